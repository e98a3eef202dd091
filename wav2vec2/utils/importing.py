"""Shared by the importers: the config they write, strict accounting of weights, comparison, and output."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..audio import SAMPLE_RATE
from ..components import published_name, published_state
from ..files import checkpoint
from ..files.errors import UserError, listed, short_repr, single_line
from ..model import Wav2Vec2Model, normalize_waveforms
from .converter_flags import Dropouts

# The extractor's output scale, which no source has: it keeps the last conv's soft mask after pruning.
DUMMY_WEIGHT = "feature_extractor.dummy_weight"
FIRST_CONV = "feature_extractor.conv_layers.0.conv.weight"

_LARGEST_DIFFERENCE = 1e-4

# Tensors under a backbone's own prefix that the model does not use, in any source: names, or prefixes up to a dot.
_LEFT_OUT = {
    "mask_emb": "replaces masked frames in pre-training",
    "masked_spec_embed": "replaces masked frames in training",
    "final_proj": "pre-training target projection",
    "label_embs_concat": "HuBERT's cluster embeddings, pre-training targets",
    "quantizer": "wav2vec 2.0's codebooks, pre-training targets",
    "project_q": "wav2vec 2.0's projection of the quantised targets",
    "project_hid": "wav2vec 2.0's projection onto the pre-training targets",
    "target_glu": "gate on pre-training targets",
    "lm_head": "CTC head",
    "projector": "classification head",
    "classifier": "classification head",
}

# What torch (compile, checkpointing, FSDP) and fairscale put before the names of what they wrap, and DDP's "module.".
_WRAPPER = re.compile(r"(?<![^.])_\w+_mod(?:ule)?\.|(?<=\.)module\.")


class Architecture(NamedTuple):
    """The settings that an importer reads from its source."""

    family: str  # "HuBERT", "wav2vec 2.0" or "WavLM", for messages
    config: dict[str, Any]  # arguments of wav2vec2_model, which checks them; without dropouts and normalisation
    stated_normalization: bool | None  # what the source says of waveform normalisation, if anything


def normalizes_waveform(extractor_mode: str) -> bool:
    """Return whether a model was trained on normalised waveforms: those with a layer_norm extractor were, others not.

    fairseq, the original program and torchaudio follow this rule; settings elsewhere often contradict it
    (https://github.com/facebookresearch/fairseq/issues/4687).
    """
    return extractor_mode == "layer_norm"


def stated_normalization(settings: Mapping[str, Any], rate_key: str, flag_key: str, place: str) -> bool | None:
    """Return what a source's settings say of waveform normalisation; refuses a sample rate other than 16 kHz."""
    rate, normalizes = settings.get(rate_key), settings.get(flag_key)
    if rate is not None and rate != SAMPLE_RATE:
        raise UserError(f"{place}: {rate_key} is {short_repr(rate)}, expected {SAMPLE_RATE}; convert a 16 kHz model")
    if normalizes is not None and not isinstance(normalizes, bool):
        raise UserError(f"{place}: {flag_key} is {short_repr(normalizes)}, expected true or false; mend it")
    return normalizes


def names_of(weight: str, names: Iterable[str]) -> list[str]:
    """Return a source's names of a weight, under whatever prefixes and in whatever wrappers."""
    return [name for name in names if f".{_WRAPPER.sub('', name)}".endswith(f".{weight}")]


def backbone_of(
    weights: Mapping[str, Tensor], anchor: str, source: str = "weights"
) -> tuple[str, dict[str, Tensor], dict[str, str]]:
    """Find a backbone among a source's tensors, whatever lies beside it or around it.

    ``anchor`` is a name that every backbone in this format has. What precedes it is the backbone's prefix
    (``module.``, ``hubert.``, ``encoder.w2v_model.``, ...), and what has another prefix is no part of it.

    Returns:
        The prefix; the tensors under it by their full names without wrappers, unknown ones included, with weight
        normalisation as in :func:`published_state`; and what was left out: source name or prefix -> reason.

    Raises:
        UserError: there are several backbones.
    """
    if len(anchors := names_of(anchor, weights)) > 1:
        raise UserError(f"{source}: {listed('models', anchors)}, expected one; make a file with the tensors of one")
    prefix = _WRAPPER.sub("", anchors[0]).removesuffix(anchor) if anchors else ""
    kept, dropped = {}, {}
    for name, tensor in weights.items():
        name = _WRAPPER.sub("", name)
        if not name.startswith(prefix):
            words, wrappers = name.split("."), prefix.split(".")
            depth = next((i for i, pair in enumerate(zip(words, wrappers, strict=False)) if pair[0] != pair[1]), 0)
            dropped[".".join(words[: depth + 1])] = f"outside of the model, {prefix}*"
        elif known := _left_out(name.removeprefix(prefix)):
            dropped[prefix + known] = _LEFT_OUT[known]
        else:
            kept[name] = tensor
    return prefix, published_state(kept), dropped


def _left_out(name: str) -> str | None:
    """Return the entry of :data:`_LEFT_OUT` that covers a tensor of the backbone."""
    return next((known for known in _LEFT_OUT if f"{name}.".startswith(f"{known}.")), None)


@dataclass(frozen=True)
class ImportedModel:
    """A converted model with strictly loaded weights, in eval mode on the CPU in float32."""

    family: str
    model: Wav2Vec2Model
    dropped: dict[str, str]  # source name or prefix that was left out -> reason
    remarks: list[str]  # lines for the user

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of ``wav2vec2_model``."""
        return self.model.config


def import_weights(
    architecture: Architecture,
    dropouts: Dropouts,
    normalize_waveform: bool | None,
    weights: Mapping[str, Tensor],
    names: Sequence[tuple[str, str]],
    source: str,
) -> ImportedModel:
    """Build the model and fill it. Every parameter must be found, and every tensor under its prefix be used or known.

    Args:
        normalize_waveform: the model expects normalised waveforms; None follows :func:`normalizes_waveform`.
        weights: the source's tensors under the source's names.
        names: (our prefix, source prefix) pairs of which the first match counts; ``{}`` stands for a layer index.

    Raises:
        UserError: a tensor is missing, left over, of another shape, not a plain float tensor or not finite.
    """
    mode = architecture.config["extractor_mode"]
    normalizes = normalizes_waveform(mode) if normalize_waveform is None else normalize_waveform
    config = architecture.config | {f"encoder_{name}": value for name, value in asdict(dropouts).items()}
    config["normalize_waveform"] = normalizes
    remarks = []
    if architecture.stated_normalization not in (None, normalizes) and normalize_waveform is None:
        remarks.append(
            f"waveforms are {'' if normalizes else 'not '}normalised, as models with a {mode} extractor "
            f"were trained, though {source} says the opposite; --normalize_waveform "
            f"{str(not normalizes).lower()} follows it"
        )
    expected = checkpoint.expected_state(config, source)
    prefix, weights, dropped = backbone_of(weights, source_name(FIRST_CONV, names), source)
    sources = {name: prefix + source_name(name, names) for name in expected if name != DUMMY_WEIGHT}
    # Before any memory is taken for the model, whose size the source claims.
    wanted = {found: expected[name] for name, found in sources.items()}
    checkpoint.check_weights(wanted, weights, f"{source}: {architecture.family}")
    model = checkpoint.build_model(config, source)
    state_dict = {name: weights[found].detach().float() for name, found in sources.items()}
    state_dict[DUMMY_WEIGHT] = torch.ones(expected[DUMMY_WEIGHT].shape)
    model.load_state_dict(state_dict)
    return ImportedModel(architecture.family, model.eval(), dropped, remarks)


def compare_outputs(
    imported: ImportedModel, run_source: Callable[[Tensor], tuple[Sequence[Tensor], Tensor]], source: str
) -> float:
    """Run the source's model and the converted one on one seeded second of sound and compare them.

    ``run_source`` turns (1, T) into the output of every layer, each (1, frames, D), and the final one. Its waveform is
    normalised here if the model wants that, because programs normalise with different epsilons.

    Returns:
        The largest absolute difference of the final output, or of any layer's output relative to that layer's
        largest value if that is above 1 (inner layers of pre-norm models reach values at which float32 itself
        resolves no better).

    Raises:
        UserError: the difference is beyond 1e-4.
    """
    generator = torch.Generator().manual_seed(0)
    waveform = 0.1 * torch.randn(1, SAMPLE_RATE, generator=generator) + 0.02  # an offset shows a lost normalisation
    with torch.inference_mode():
        is_normalized = imported.model.normalize_waveform
        source_layers, source_final = run_source(normalize_waveforms(waveform) if is_normalized else waveform)
        layers = imported.model.extract_features(waveform)[0][1:]
        differences = [(imported.model(waveform)[0] - source_final).abs().max()]
    for ours, theirs in zip(layers, source_layers, strict=True):
        differences.append((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))
    largest = torch.stack(differences).max().item()
    if not largest <= _LARGEST_DIFFERENCE:  # also true for NaN
        raise UserError(
            f"{source}: the converted model's outputs differ from the source model's by {largest:.1e}, expected at "
            f"most {_LARGEST_DIFFERENCE:.0e}; nothing was written; please report the model's name"
        )
    return largest


def load_source_state(model: torch.nn.Module, weights: Mapping[str, Tensor], anchor: str) -> None:
    """Fill the source program's own model with a source's tensors, except those that :func:`backbone_of` leaves out.

    Raises:
        RuntimeError: a tensor is missing, left over, or of another shape.
    """
    prefix, weights, _ = backbone_of(weights, anchor)
    wanted = {published_name(name): name for name in model.state_dict()}
    found = {name.removeprefix(prefix): tensor.float() for name, tensor in weights.items()}
    found = {wanted.get(name, name): tensor for name, tensor in found.items()}
    untouched = {name: tensor for name, tensor in model.state_dict().items() if _left_out(name)}
    model.load_state_dict(untouched | found)


def source_name(name: str, names: Iterable[tuple[str, str]]) -> str:
    """Return the source's name of our parameter ``name``, by the first matching prefix in ``names``."""
    for ours, theirs in names:
        match = re.match(re.escape(ours).replace(r"\{\}", r"(\d+)") + r"(?=\.|$)", name)
        if match:
            return theirs.format(*match.groups()) + name[match.end() :]
    raise KeyError(f"the importer's table has no entry for {name}")


def write_model(imported: ImportedModel, out: Path) -> None:
    """Write ``{"state_dict", "config"}`` whole or not at all, and print what was converted."""
    config = imported.config
    num_heads = config.get("encoder_num_heads") or config["encoder_total_num_heads"]
    num_params = sum(parameter.numel() for parameter in imported.model.parameters())
    checkpoint.save(out, {"state_dict": imported.model.state_dict(), "config": config})
    print(
        f"{imported.family}: {config['encoder_num_layers']} layers, {config['encoder_embed_dim']} dimensions, "
        f"{num_heads[0]} heads, feed-forward {config['encoder_ff_interm_features'][0]}, "
        f"{'pre' if config['encoder_layer_norm_first'] else 'post'}-norm"
    )
    print(
        f"extractor: {config['extractor_mode']}, bias {config['extractor_conv_bias']}, [channels, kernel, stride] "
        f"{config['extractor_conv_layer_config']}; waveform normalised: {config['normalize_waveform']}"
    )
    left_out = []
    for reason in dict.fromkeys(imported.dropped.values()):
        names = ", ".join(name for name, why in imported.dropped.items() if why == reason)
        left_out.append(f"left out: {single_line(names, 400)} ({single_line(reason)})")
    print(*imported.remarks, *left_out, f"{num_params:,} parameters, written to {out}", sep="\n")
