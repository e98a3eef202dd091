"""Imports HuBERT, wav2vec 2.0 and WavLM from Hugging Face transformers' format, with or without heads."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..audio import SAMPLE_RATE
from ..errors import UserError, one_line, short_repr
from ..files import read_json, read_safetensors
from ..model import normalize_waveforms
from .importing import Architecture, Backbone, Dropouts, ImportedModel, RelativePositions, import_weights
from .unpickling import read_torch_file

# (our prefix, transformers' prefix); below these, transformers' names are torchaudio's.
NAMES = [
    ("feature_extractor", "feature_extractor"),
    ("encoder.feature_projection", "feature_projection"),
    ("encoder.transformer", "encoder"),
]

_DROPPED_NAMES = {"masked_spec_embed": "replaces masked frames in training"}
_DROPPED_HEAD_NAMES = {
    "lm_head": "CTC head",
    "quantizer": "wav2vec 2.0's codebooks, pre-training targets",
    "project_q": "wav2vec 2.0's projection of the quantised targets",
    "project_hid": "wav2vec 2.0's projection onto the pre-training targets",
    "layer_weights": "classification head, weighted sum of layers",
    "projector": "classification head",
    "classifier": "classification head",
    "tdnn": "speaker verification head (x-vector)",
    "feature_extractor": "speaker verification head (x-vector), beside the backbone's own extractor",
    "objective": "speaker verification loss",
}


@dataclass(frozen=True)
class Family:
    name: str
    config_class: str
    model_class: str


# By model_type, which is also the prefix of the backbone's names in a model with a head.
FAMILIES = {
    "hubert": Family("HuBERT", "HubertConfig", "HubertModel"),
    "wav2vec2": Family("wav2vec 2.0", "Wav2Vec2Config", "Wav2Vec2Model"),
    "wavlm": Family("WavLM", "WavLMConfig", "WavLMModel"),
}

EXTRACTOR_MODES = {"group": "group_norm", "layer": "layer_norm"}

# Settings that would make it another model: name -> (the value that does not, what another value means).
ACCEPTED: dict[str, tuple[Any, str]] = {
    "hidden_act": ("gelu", "another activation"),
    "feat_extract_activation": ("gelu", "another activation"),
    "layer_norm_eps": (1e-5, "another LayerNorm epsilon"),
    "conv_pos_batch_norm": (False, "a batch norm in the positional convolution"),
    "feat_proj_layer_norm": (True, "no LayerNorm before the feature projection"),
    "add_adapter": (False, "an adapter on top of the encoder"),
    "adapter_attn_dim": (None, "adapters inside the encoder layers"),
    "quantization_config": (None, "quantised weights"),
}

_LARGEST_DIFFERENCE = 1e-4

_WRITTEN_BY = "a directory that transformers' save_pretrained wrote"
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks for them


def fetch_huggingface_model(model: str) -> Path:
    """The directory of ``model``: a local directory, or a hub id that is downloaded (or found in the cache).

    Raises:
        UserError: neither a directory nor a model that can be had from the hub.
    """
    directory = Path(model)
    if directory.is_dir():
        return directory
    if directory.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UserError(
            f"--model {model}: no such directory; give a directory with config.json, or a hub id (ORG/NAME)"
        )
    from huggingface_hub import snapshot_download

    try:
        directory = Path(snapshot_download(model, allow_patterns=["*.json", "model*.safetensors"]))
        if not any(directory.glob("model*.safetensors")):
            directory = Path(snapshot_download(model, allow_patterns=["*.json", "pytorch_model*.bin"]))
    except (OSError, ValueError) as error:  # no network, no such model, not public, not a valid id
        raise UserError(
            f"--model {model}: no such local directory, and the Hugging Face hub did not give it "
            f"({type(error).__name__}); check the name and the network, or download it and give its directory"
        ) from error
    return directory


def import_huggingface_model(
    directory: str | Path, dropouts: Dropouts | None = None, normalize_waveform: bool | None = None
) -> ImportedModel:
    """Import a model saved by transformers' ``save_pretrained``.

    Args:
        directory: holds config.json, preprocessor_config.json and the weights (safetensors or
            pytorch_model.bin, in one file or in shards, full or half precision).
        dropouts: written into the config; the published training's by default.
        normalize_waveform: overrides ``do_normalize`` of preprocessor_config.json.

    Raises:
        UserError: a file is missing or damaged, or the model is of another architecture.
    """
    directory = Path(directory)
    settings = read_json(directory / "config.json", _WRITTEN_BY)
    architecture = _read_architecture(settings, directory, normalize_waveform)
    weights = _read_weights(directory)
    adapters = [name for name in weights if "adapter" in name]
    if adapters or (directory / "adapter_config.json").exists():
        raise UserError(
            f"{directory}: holds an adapter ({adapters[0] if adapters else 'adapter_config.json'}), expected a model "
            "without; convert the model that the adapter was added to"
        )
    prefix = settings["model_type"] + "."
    backbone = Backbone(_DROPPED_NAMES)
    if any(name.startswith(prefix) for name in weights):
        backbone = Backbone(_DROPPED_NAMES, prefix, _DROPPED_HEAD_NAMES)
    return import_weights(architecture, dropouts or Dropouts(), weights, NAMES, backbone, str(directory))


def compare_with_source(imported: ImportedModel, directory: str | Path) -> float:
    """Run transformers' model and ours on one seeded second of sound and compare them.

    transformers normalises waveforms with another epsilon than its models were trained with, so both models
    get the waveform that ours normalises.

    Returns:
        The largest absolute difference of the final output, or of any layer's output relative to that layer's
        largest value if that is above 1 (inner layers of pre-norm models reach values at which float32 itself
        resolves no better).

    Raises:
        UserError: transformers cannot load the model, or the difference is beyond 1e-4.
    """
    generator = torch.Generator().manual_seed(0)
    waveform = 0.1 * torch.randn(1, SAMPLE_RATE, generator=generator) + 0.02  # an offset shows a lost normalisation
    source_input = normalize_waveforms(waveform) if imported.config["normalize_waveform"] else waveform
    with torch.inference_mode():
        source_outputs = _load_source_model(Path(directory))(source_input, output_hidden_states=True)
        layers = imported.model.extract_features(waveform)[0][1:]
        final = imported.model(waveform)[0]
    source_layers = source_outputs.hidden_states[1:]
    if len(layers) != len(source_layers):
        raise UserError(f"{directory}: {len(source_layers)} layers in the source model, {len(layers)} in the converted")
    differences = [(final - source_outputs.last_hidden_state).abs().max()]
    differences += [
        (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)
        for ours, theirs in zip(layers, source_layers, strict=True)
    ]
    largest = torch.stack(differences).max().item()
    if not largest <= _LARGEST_DIFFERENCE:  # NaN is not smaller either
        raise UserError(
            f"{directory}: the converted model's outputs differ from the source model's by {largest:.1e}, expected at "
            f"most {_LARGEST_DIFFERENCE:.0e}; nothing was written; please report the model's name"
        )
    return largest


def _read_architecture(settings: dict[str, Any], directory: Path, normalize_waveform: bool | None) -> Architecture:
    source = directory / "config.json"
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"{source}: model_type {short_repr(model_type)}, expected one of {list(FAMILIES)}; "
            "other architectures cannot be converted"
        )
    import transformers

    family = FAMILIES[model_type]
    try:
        with _quiet_transformers():  # it warns of settings that it no longer uses
            # transformers' class fills in the settings that older files lack.
            config = getattr(transformers, family.config_class).from_dict(settings)
    except Exception as error:  # its validation raises classes of its own that share no base
        raise UserError(f"{source}: not a {family.name} config ({one_line(error)}); download it again") from error
    for name, (accepted, meaning) in ACCEPTED.items():
        found = getattr(config, name, accepted)
        if found != accepted:
            raise UserError(
                f"{source}: {name} is {short_repr(found)}, expected {accepted!r}: {meaning} has no counterpart here, "
                "so this model cannot be converted"
            )
    if not isinstance(config.feat_extract_norm, str) or config.feat_extract_norm not in EXTRACTOR_MODES:
        raise UserError(
            f"{source}: feat_extract_norm {short_repr(config.feat_extract_norm)}, expected one of "
            f"{list(EXTRACTOR_MODES)}"
        )
    convs = [config.conv_dim, config.conv_kernel, config.conv_stride]
    if not all(isinstance(entries, (list, tuple)) and len(entries) == len(convs[0]) for entries in convs):
        raise UserError(
            f"{source}: conv_dim, conv_kernel and conv_stride are not lists, or of different lengths; download it again"
        )
    return Architecture(
        family=family.name,
        extractor_mode=EXTRACTOR_MODES[config.feat_extract_norm],
        conv_layers=[list(layer) for layer in zip(*convs, strict=True)],
        conv_bias=config.conv_bias,
        embed_dim=config.hidden_size,
        pos_conv_kernel=config.num_conv_pos_embeddings,
        pos_conv_groups=config.num_conv_pos_embedding_groups,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        ff_interm_features=config.intermediate_size,
        layer_norm_first=config.do_stable_layer_norm,
        normalize_waveform=_reads_normalized(directory) if normalize_waveform is None else normalize_waveform,
        relative_positions=RelativePositions(config.num_buckets, config.max_bucket_distance)
        if model_type == "wavlm"
        else None,
    )


def _reads_normalized(directory: Path) -> bool:
    """``do_normalize`` of the feature extractor's settings, which newer files keep inside the processor's."""
    path = directory / "preprocessor_config.json"
    settings = {}
    if path.is_file():
        settings = read_json(path, _WRITTEN_BY)
    elif (directory / "processor_config.json").is_file():
        path = directory / "processor_config.json"
        settings = read_json(path, _WRITTEN_BY).get("feature_extractor", {})
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected a JSON object under feature_extractor, found {short_repr(settings)}")
    rate = settings.get("sampling_rate", SAMPLE_RATE)
    if rate != SAMPLE_RATE:
        raise UserError(f"{path}: sampling_rate is {short_repr(rate)}, expected {SAMPLE_RATE}; convert a 16 kHz model")
    if not isinstance(settings.get("do_normalize"), bool):
        raise UserError(
            f"{path}: {'no do_normalize in it' if path.is_file() else 'no such file'}, expected do_normalize true or "
            "false, which says whether the model wants normalised waveforms; give --normalize_waveform true or false"
        )
    return settings["do_normalize"]


def _read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of the first weight file that is there, in one piece or in shards."""
    for name in _WEIGHT_FILES:
        if (directory / name).is_file():
            return _read_weight_file(directory / name)
        index = directory / f"{name}.index.json"
        if index.is_file():
            weights = {}
            for shard in _shard_paths(index):
                weights |= _read_weight_file(shard)
            return weights
    raise UserError(f"{directory}: no weights; expected {' or '.join(_WEIGHT_FILES)}, or their shards with an index")


def _shard_paths(index: Path) -> Iterator[Path]:
    weight_map = read_json(index, _WRITTEN_BY).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: no weight_map that names the shards; download it again")
    for name in sorted({str(name) for name in weight_map.values()}):
        path = index.parent / name
        if path.parent != index.parent or not path.is_file():
            raise UserError(
                f"{index}: names the shard {short_repr(name)}, which is not beside it; download the whole model"
            )
        yield path


def _read_weight_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    weights = read_torch_file(path)
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise UserError(f"{path}: expected a dict of tensors by name, found {type(weights).__name__}")
    return weights


def _load_source_model(directory: Path) -> torch.nn.Module:
    import transformers

    family = FAMILIES[read_json(directory / "config.json", _WRITTEN_BY)["model_type"]]
    try:
        with _quiet_transformers():
            model = getattr(transformers, family.model_class).from_pretrained(
                directory, local_files_only=True, attn_implementation="eager", dtype=torch.float32
            )
    except Exception as error:  # whatever transformers meets, the conversion cannot be checked
        raise UserError(f"{directory}: transformers cannot load the source model ({one_line(error)})") from error
    return model.eval()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' load reports (the heads that are left out) and progress bars."""
    from transformers.utils import logging

    verbosity, progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress_bar:
            logging.enable_progress_bar()
