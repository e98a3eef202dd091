"""Imports the state dicts that ``torchaudio.pipelines`` downloads: bare tensors by name, without a config.

Names and shapes tell which of nine published networks they belong to. The names are ours, except for WavLM's packed
attention and the extractor's output scale, which only pruning needs.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..files.checkpoint import check_weights, expected_state
from ..files.errors import UserError
from ..model import (
    Wav2Vec2Model,
    hubert_base,
    hubert_large,
    hubert_xlarge,
    wav2vec2_large,
    wav2vec2_large_lv60k,
    wavlm_base,
    wavlm_large,
)
from .importing import DUMMY_WEIGHT, FIRST_CONV, backbone_of, names_of, normalizes_waveform

_ENCODER_NORM = "encoder.transformer.layer_norm.weight"
_LAYER = re.compile(r"encoder\.transformer\.layers\.(\d+)\.")

# torchaudio's WavLM uses PyTorch's own attention, with three projections in one matrix, in this order.
_PACKED = re.compile(r"(encoder\.transformer\.layers\.\d+\.attention)\.attention\.(in_proj_|out_proj\.)(weight|bias)")
_IN_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class _Traits(NamedTuple):
    """The properties that tell the published networks apart."""

    is_wavlm: bool
    embed_dim: int
    extractor_mode: str
    conv_bias: bool

    def __str__(self) -> str:
        family = "WavLM" if self.is_wavlm else "HuBERT / wav2vec 2.0"
        bias = "with" if self.conv_bias else "without"
        return f"{family} of {self.embed_dim} dimensions, {self.extractor_mode} extractor {bias} bias"


_LV60K = "wav2vec 2.0 Large LV-60k / XLSR-53 / XLS-R 300M / MMS"
_BIAS = {"extractor_conv_bias": True}
_XLSR_2B = _BIAS | {"encoder_embed_dim": 1920, "encoder_ff_interm_features": 7680}

# Name, factory, and what overrides its config.
_NETWORKS: dict[_Traits, tuple[str, Callable[..., Wav2Vec2Model], dict[str, Any]]] = {
    _Traits(False, 768, "group_norm", False): ("HuBERT Base / wav2vec 2.0 Base", hubert_base, {}),
    _Traits(False, 1024, "group_norm", False): ("wav2vec 2.0 Large", wav2vec2_large, {}),
    _Traits(False, 1024, "layer_norm", True): (_LV60K, wav2vec2_large_lv60k, {}),
    _Traits(False, 1024, "layer_norm", False): ("HuBERT Large", hubert_large, {}),
    _Traits(False, 1280, "layer_norm", False): ("HuBERT XLarge", hubert_xlarge, {}),
    _Traits(False, 1280, "layer_norm", True): ("XLS-R 1B", hubert_xlarge, _BIAS),
    _Traits(False, 1920, "layer_norm", True): ("XLS-R 2B", hubert_xlarge, _XLSR_2B),
    _Traits(True, 768, "group_norm", False): ("WavLM Base / Base+", wavlm_base, {}),
    _Traits(True, 1024, "layer_norm", False): ("WavLM Large", wavlm_large, {}),
}


def is_torchaudio_state(state_dict: Any) -> bool:
    """Return whether ``state_dict`` is a bare dict of tensors under torchaudio's names, of any shapes."""
    return (
        isinstance(state_dict, Mapping)
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state_dict.items())
        and all(names_of(key, state_dict) for key in (FIRST_CONV, _ENCODER_NORM))
    )


def import_torchaudio(
    state_dict: Mapping[str, Tensor], normalize_waveform: bool | None = None, source: str = "torchaudio weights"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and the state dict, in our names, of a published network or of its first layers.

    The weights are as ``torchaudio.pipelines`` downloads them, in full or half precision; an output layer (``aux``) is
    kept. Waveforms are normalised by default as in torchaudio's bundle: for models with a layer_norm extractor.
    Networks that differ only in dropouts and training (HuBERT and wav2vec 2.0 Base) share a config.

    Raises:
        UserError: the names or shapes are not those of a published network; it says what was found.
    """
    if not is_torchaudio_state(state_dict):
        raise UserError(f"{source}: expected tensors under torchaudio's names ({FIRST_CONV}, ...), found others")
    weights = our_names(state_dict, source)
    if _ENCODER_NORM not in weights:
        raise UserError(f"{source}: the weights of more than one model, expected those of one")
    name, config = recognize(weights, source)
    by_mode = normalizes_waveform(config["extractor_mode"])
    config["normalize_waveform"] = by_mode if normalize_waveform is None else normalize_waveform
    expected = expected_state(config, source)
    scale = torch.ones(expected[DUMMY_WEIGHT].shape, dtype=weights[FIRST_CONV].dtype)
    weights = {DUMMY_WEIGHT: scale, **weights}
    check_weights(expected, weights, f"{source} (by its names and sizes {name})")
    return config, {name: weights[name] for name in expected}


def recognize(weights: Mapping[str, Tensor], source: str) -> tuple[str, dict[str, Any]]:
    """Return the name of the published network with the traits of these weights, under our names, and its config.

    The config has their number of layers and their size of the output layer; the other weights are not checked.
    """
    norm = weights[_ENCODER_NORM]
    if norm.ndim != 1:
        raise UserError(f"{source}: {_ENCODER_NORM} has shape {list(norm.shape)}, expected one dimension")
    traits = _Traits(
        is_wavlm=any(".gru_rel_pos_" in name for name in weights),
        embed_dim=len(norm),
        extractor_mode="layer_norm" if "feature_extractor.conv_layers.1.layer_norm.weight" in weights else "group_norm",
        conv_bias="feature_extractor.conv_layers.0.conv.bias" in weights,
    )
    if traits not in _NETWORKS:
        raise UserError(
            f"{source}: {traits}: none of the published networks: {'; '.join(map(str, _NETWORKS))}; a model of another "
            "size needs its config, in a model file (.pth)"
        )
    network, factory, options = _NETWORKS[traits]
    with torch.device("meta"):
        config = factory(**options).config
    num_layers = len({match[1] for name in weights if (match := _LAYER.match(name))})
    most = config["encoder_num_layers"]
    if not 0 < num_layers <= most:
        raise UserError(f"{source}: found {num_layers} layers, expected the {most} of {network}, or the first of them")
    per_layer = [key for key in config if isinstance(config[key], list) and key != "extractor_conv_layer_config"]
    config |= {key: config[key][:num_layers] for key in per_layer} | {"encoder_num_layers": num_layers}
    if "aux.weight" in weights:
        shape = list(weights["aux.weight"].shape)
        if len(shape) != 2 or not shape[0]:
            raise UserError(f"{source}: aux.weight has shape {shape}, expected (outputs, dimensions)")
        config["aux_num_out"] = shape[0]
    return network, config


def our_names(state_dict: Mapping[str, Tensor], source: str = "torchaudio weights") -> dict[str, Tensor]:
    """Rename tensors from torchaudio's names to ours; heads, targets and wrappers of the names are left out."""
    weights: dict[str, Tensor] = {}
    prefix, kept, _ = backbone_of(state_dict, FIRST_CONV, source)
    for name, tensor in kept.items():
        name = name.removeprefix(prefix)
        packed = _PACKED.fullmatch(name)
        if packed is None:
            weights[name] = tensor
        elif packed[2] == "out_proj.":
            weights[f"{packed[1]}.out_proj.{packed[3]}"] = tensor
        else:
            parts = tensor.chunk(3) if tensor.ndim else ()  # fewer than 3 parts: the others will be missed
            for projection, part in zip(_IN_PROJECTIONS, parts, strict=False):
                weights[f"{packed[1]}.{projection}.{packed[3]}"] = part
    return weights
