"""What the importers share: the config they write, strict accounting of weights, the converters' flags and output."""

import argparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..audio import SAMPLE_RATE
from ..components import published_name, published_state
from ..config import MAX_LAYERS
from ..files import checkpoint
from ..files.errors import UserError, listed, short_repr
from ..model import Wav2Vec2Model, normalize_waveforms

# Created here: no source has the extractor's output scale (it keeps the last conv's soft mask after pruning).
_DUMMY_WEIGHT = "feature_extractor.dummy_weight"
_FIRST_CONV = "feature_extractor.conv_layers.0.conv.weight"

_LARGEST_DIFFERENCE = 1e-4

# What the model has no use for, beside a backbone or around it, in any source: names, or prefixes up to a dot.
_LEFT_OUT = {
    "mask_emb": "replaces masked frames in pre-training",
    "masked_spec_embed": "replaces masked frames in training",
    "mask_generator": "replaces masked frames in pre-training",
    "final_proj": "pre-training target projection",
    "label_embs_concat": "HuBERT's cluster embeddings, pre-training targets",
    "logit_generator": "HuBERT's cluster embeddings and projection, pre-training targets",
    "quantizer": "wav2vec 2.0's codebooks, pre-training targets",
    "project_q": "wav2vec 2.0's projection of the quantised targets",
    "project_hid": "wav2vec 2.0's projection onto the pre-training targets",
    "target_glu": "gate on pre-training targets",
    "proj": "CTC head",
    "lm_head": "CTC head",
    "layer_weights": "classification head, weighted sum of layers",
    "projector": "classification head",
    "classifier": "classification head",
    "tdnn": "speaker verification head (x-vector)",
    "objective": "speaker verification loss",
}
# The backbone has one of its own, so only around it.
_LEFT_OUT_AROUND = {"feature_extractor": "speaker verification head (x-vector), beside the backbone's own extractor"}


@dataclass(frozen=True)
class Dropouts:
    """Dropouts of the written config. They act on the student; the defaults are the published training's.

    Raises:
        UserError: a value is not in [0, 1).
    """

    projection_dropout: float = 0.1
    attention_dropout: float = 0.1
    ff_interm_dropout: float = 0.0
    dropout: float = 0.1
    layer_drop: float = 0.05

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value < 1:
                raise UserError(f"--{name} {value}: expected a probability, 0 or more and less than 1")


@dataclass(frozen=True)
class RelativePositions:
    """WavLM's bucketed relative positions."""

    num_buckets: int
    max_distance: int


@dataclass(frozen=True)
class Architecture:
    """Shapes and switches that an importer reads from its source's config."""

    family: str  # for people: "HuBERT", "wav2vec 2.0" or "WavLM"
    extractor_mode: str  # "group_norm" or "layer_norm"
    conv_layers: list[list[int]]  # [channels, kernel, stride] of each layer
    conv_bias: bool
    embed_dim: int
    pos_conv_kernel: int
    pos_conv_groups: int
    num_layers: int
    num_heads: int
    ff_interm_features: int
    layer_norm_first: bool
    stated_normalization: bool | None  # whether the source says that waveforms are normalised; None: it says nothing
    relative_positions: RelativePositions | None  # WavLM only
    feature_projection_norm: bool = True  # DistilHuBERT has none

    def to_config(self, dropouts: Dropouts, normalize_waveform: bool, source: str) -> dict[str, Any]:
        """The arguments of ``wav2vec2_model``, with every mask switched off; ``source`` is named in errors.

        Raises:
            UserError: the embedding cannot be split into the heads.
        """
        # The others are checked with the config; these come first, because they make lists.
        for name, value in (("encoder layers", self.num_layers), ("attention heads", self.num_heads)):
            if type(value) is not int or not 0 < value <= MAX_LAYERS:
                raise UserError(f"{source}: expected 1 to {MAX_LAYERS} {name}, found {short_repr(value)}")
        if type(self.embed_dim) is not int or self.embed_dim % self.num_heads:
            raise UserError(
                f"{source}: {short_repr(self.embed_dim)} dimensions cannot be split into {self.num_heads} "
                "attention heads; "
                "the config does not describe a model of this kind"
            )
        if self.relative_positions is None:
            attention = {
                "encoder_num_heads": [self.num_heads] * self.num_layers,
                "encoder_head_dim": self.embed_dim // self.num_heads,
            }
        else:
            attention = {
                "encoder_total_num_heads": [self.num_heads] * self.num_layers,
                "encoder_remaining_heads": [list(range(self.num_heads)) for _ in range(self.num_layers)],
                "encoder_num_buckets": self.relative_positions.num_buckets,
                "encoder_max_distance": self.relative_positions.max_distance,
            }
        # Not published: left out where it is True.
        has_norm = self.feature_projection_norm
        norm = {} if has_norm is True else {"encoder_feature_projection_layer_norm": has_norm}
        return {
            "extractor_mode": self.extractor_mode,
            "extractor_conv_layer_config": [list(layer) for layer in self.conv_layers],
            "extractor_conv_bias": self.conv_bias,
            "encoder_embed_dim": self.embed_dim,
            **norm,
            "encoder_projection_dropout": dropouts.projection_dropout,
            "encoder_pos_conv_kernel": self.pos_conv_kernel,
            "encoder_pos_conv_groups": self.pos_conv_groups,
            "encoder_num_layers": self.num_layers,
            "encoder_use_attention": [True] * self.num_layers,
            "encoder_use_feed_forward": [True] * self.num_layers,
            **attention,
            "encoder_attention_dropout": dropouts.attention_dropout,
            "encoder_ff_interm_features": [self.ff_interm_features] * self.num_layers,
            "encoder_ff_interm_dropout": dropouts.ff_interm_dropout,
            "encoder_dropout": dropouts.dropout,
            "encoder_layer_norm_first": self.layer_norm_first,
            "encoder_layer_drop": dropouts.layer_drop,
            "aux_num_out": None,
            "normalize_waveform": normalize_waveform,
            "extractor_prune_conv_channels": False,
            "encoder_prune_attention_heads": False,
            "encoder_prune_attention_layer": False,
            "encoder_prune_feed_forward_intermediate": False,
            "encoder_prune_feed_forward_layer": False,
        }


def normalizes_waveform(extractor_mode: str) -> bool:
    """Whether a model was trained on normalised waveforms: those with a layer_norm extractor were, the others not.

    fairseq, the original program and torchaudio hold to it; what is said of a model elsewhere often does not
    (https://github.com/facebookresearch/fairseq/issues/4687).
    """
    return extractor_mode == "layer_norm"


def check_sample_rate(found: Any, place: str) -> None:
    """Check the sample rate that a source states; None is not stated. ``place`` is named in errors.

    Raises:
        UserError: it is another than 16 kHz.
    """
    if found is not None and found != SAMPLE_RATE:
        raise UserError(f"{place} is {short_repr(found)}, expected {SAMPLE_RATE}; convert a 16 kHz model")


def backbone_of(weights: Mapping[str, Tensor], anchor: str) -> tuple[str, dict[str, Tensor], dict[str, str]]:
    """A backbone among a source's tensors, whatever lies beside it or around it.

    Args:
        weights: a source's tensors. Heads, pre-training targets, and names that wrap the backbone's (``module.``,
            ``model.``, ``hubert.``, ``w2v_encoder.w2v_model.``, ...) may be there.
        anchor: a name that every backbone in this format has; what stands before it is the wrapper's.

    Returns:
        The wrapper's prefix; the tensors by their full names, weight normalisation as in :func:`published_state`,
        those that are not known among them; and what was left out: source name or prefix -> reason.
    """
    prefix = min(
        (name.removesuffix(anchor) for name in weights if f".{name}".endswith(f".{anchor}")), key=len, default=""
    )
    kept, left_out = {}, {}
    for name, tensor in weights.items():
        known = _left_out(name, prefix)
        if known is None:
            kept[name] = tensor
        else:
            left_out[known[0]] = known[1]
    return prefix, published_state(kept), left_out


def _left_out(name: str, prefix: str) -> tuple[str, str] | None:
    """What in :data:`_LEFT_OUT` a tensor falls under, with the wrappers' names, and the reason; None if it does not."""
    wrappers = prefix.split(".")[:-1]
    for depth in range(len(wrappers), -1, -1):  # a wrapper may hold a head beside the backbone, or around it
        around = "".join(f"{part}." for part in wrappers[:depth])
        if not name.startswith(around):
            continue
        known_names = _LEFT_OUT if depth == len(wrappers) else _LEFT_OUT | _LEFT_OUT_AROUND
        for known, reason in known_names.items():
            if f"{name}.".startswith(f"{around}{known}."):
                return around + known, reason
    return None


@dataclass(frozen=True)
class ImportedModel:
    """A converted model, its weights loaded strictly, in eval mode on the CPU in float32."""

    family: str
    config: dict[str, Any]
    model: Wav2Vec2Model
    dropped: dict[str, str]  # source name or prefix that was left out -> reason
    remarks: list[str]  # for the user, each a line


def import_weights(
    architecture: Architecture,
    dropouts: Dropouts,
    normalize_waveform: bool | None,
    weights: Mapping[str, Tensor],
    names: Sequence[tuple[str, str]],
    source: str,
) -> ImportedModel:
    """Build the model and fill it; every parameter must be found and every source tensor used or known to be dropped.

    Args:
        architecture: what the source's config says.
        dropouts: written into the config.
        normalize_waveform: whether the model wants normalised waveforms; None: as :func:`normalizes_waveform` says.
        weights: the source's tensors under the source's names.
        names: (our prefix, source prefix) pairs, the first match wins; ``{}`` stands for a layer index.
        source: the file or directory, named in errors.

    Raises:
        UserError: a tensor is missing, left over, of another shape, not a plain float tensor or not finite.
    """
    normalizes = normalizes_waveform(architecture.extractor_mode) if normalize_waveform is None else normalize_waveform
    config = architecture.to_config(dropouts, normalizes, source)
    remarks = []
    if architecture.stated_normalization not in (None, normalizes) and normalize_waveform is None:
        remarks.append(
            f"waveforms are {'' if normalizes else 'not '}normalised, as models with a {architecture.extractor_mode} "
            f"extractor were trained, though {source} says the opposite; --normalize_waveform "
            f"{str(not normalizes).lower()} follows it"
        )
    expected = checkpoint.expected_state(config, source)
    prefix, weights, dropped = backbone_of(weights, source_name(_FIRST_CONV, names))
    sources = {name: prefix + source_name(name, names) for name in expected if name != _DUMMY_WEIGHT}
    missing = [found for found in sources.values() if found not in weights]
    left_over = weights.keys() - sources.values()
    if missing or left_over:
        raise UserError(
            f"{source}: the weights are not those of a {architecture.family} model with the config beside them: "
            f"{listed('missing', missing)}; {listed('left over', [name for name in weights if name in left_over])}; "
            "nothing was converted, because the result would not be the same model"
        )
    # Before there is memory for the model: its size is what the source claims.
    checkpoint.check_weights({found: expected[name] for name, found in sources.items()}, weights, source)
    model = checkpoint.build_model(config, source)
    state_dict = {name: weights[found].detach().float() for name, found in sources.items()}
    state_dict[_DUMMY_WEIGHT] = torch.ones(expected[_DUMMY_WEIGHT].shape)
    checkpoint.load_state(model, state_dict, source)
    return ImportedModel(architecture.family, config, model.eval(), dropped, remarks)


def compare_outputs(
    imported: ImportedModel, run_source: Callable[[Tensor], tuple[Sequence[Tensor], Tensor]], source: str
) -> float:
    """Run the source's model and the converted one on one seeded second of sound and compare them.

    Args:
        imported: the converted model.
        run_source: (1, T) -> the output of every layer, each (1, frames, D), and the final one. It gets the waveform
            that the converted model normalises, because programs normalise with different epsilons.
        source: the file or directory, named in errors.

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
        source_layers, source_final = run_source(
            normalize_waveforms(waveform) if imported.config["normalize_waveform"] else waveform
        )
        layers = imported.model.extract_features(waveform)[0][1:]
        final = imported.model(waveform)[0]
    if len(layers) != len(source_layers):
        raise UserError(f"{source}: {len(source_layers)} layers in the source model, {len(layers)} in the converted")
    differences = [(final - source_final).abs().max()]
    differences += [
        (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)
        for ours, theirs in zip(layers, source_layers, strict=True)
    ]
    largest = torch.stack(differences).max().item()
    if not largest <= _LARGEST_DIFFERENCE:  # NaN is not smaller either
        raise UserError(
            f"{source}: the converted model's outputs differ from the source model's by {largest:.1e}, expected at "
            f"most {_LARGEST_DIFFERENCE:.0e}; nothing was written; please report the model's name"
        )
    return largest


def load_source_state(model: torch.nn.Module, weights: Mapping[str, Tensor], anchor: str) -> None:
    """Fill the source program's own model with a source's tensors; what is left out (see :func:`backbone_of`) stays.

    Raises:
        RuntimeError: a tensor is missing, left over, or of another shape.
    """
    prefix, weights, _ = backbone_of(weights, anchor)
    wanted = {published_name(name): name for name in model.state_dict()}
    found = {name.removeprefix(prefix): tensor.float() for name, tensor in weights.items()}
    found = {wanted.get(name, name): tensor for name, tensor in found.items()}
    untouched = {name: tensor for name, tensor in model.state_dict().items() if _left_out(name, "")}
    model.load_state_dict(untouched | found)


def source_name(name: str, names: Iterable[tuple[str, str]]) -> str:
    """The source's name of our parameter ``name``, by the first prefix in ``names`` that fits."""
    for ours, theirs in names:
        match = re.match(re.escape(ours).replace(r"\{\}", r"(\d+)") + r"(?=\.|$)", name)
        if match:
            return theirs.format(*match.groups()) + name[match.end() :]
    raise KeyError(f"the importer's table has no entry for {name}")


def add_converter_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that both converters have: the dropouts and the waveform normalisation."""
    help_texts = {
        "projection_dropout": "dropout after the feature projection",
        "attention_dropout": "dropout on the attention weights",
        "ff_interm_dropout": "dropout inside the feed-forward blocks",
        "dropout": "dropout on hidden states",
        "layer_drop": "probability of skipping a layer in training",
    }
    group = parser.add_argument_group("dropouts written into the config (they act on the student)")
    for name, default in asdict(Dropouts()).items():
        group.add_argument(f"--{name}", type=float, default=default, help=help_texts[name])
    parser.add_argument(
        "--normalize_waveform",
        choices=("true", "false"),
        help="whether the model wants zero-mean, unit-variance waveforms; if not given, those with a layer_norm "
        "extractor do and those with a group_norm extractor do not, as they were trained",
    )


def dropouts_from(args: argparse.Namespace) -> Dropouts:
    """The dropouts given on the command line."""
    return Dropouts(**{name: getattr(args, name) for name in asdict(Dropouts())})


def normalize_waveform_from(args: argparse.Namespace) -> bool | None:
    """The value of ``--normalize_waveform``; None leaves the decision to the extractor's mode."""
    return None if args.normalize_waveform is None else args.normalize_waveform == "true"


def write_model(imported: ImportedModel, out: Path) -> None:
    """Write ``{"state_dict", "config"}`` whole or not at all, and print what was converted.

    Raises:
        OSError: the place cannot be written to.
    """
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
    for remark in imported.remarks:
        print(remark)
    for name, reason in imported.dropped.items():
        print(f"left out: {name} ({reason})")
    print(f"{num_params:,} parameters, written to {out}")
