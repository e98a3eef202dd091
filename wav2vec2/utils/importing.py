"""What the importers share: the config they write, strict accounting of weights, the converters' flags and output."""

import argparse
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from ..components import WEIGHT_NORM_NAMES
from ..config import MAX_LAYERS
from ..errors import UserError, short_repr, single_line
from ..model import Wav2Vec2Model

# Created here: no source has the extractor's output scale (it keeps the last conv's soft mask after pruning).
_DUMMY_WEIGHT = "feature_extractor.dummy_weight"

# torch names weight normalisation's two parts in two ways; published files use either.
WEIGHT_NORM_ALIASES = {f".{published}": f".{name}" for name, published in WEIGHT_NORM_NAMES.items()}


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
    normalize_waveform: bool
    relative_positions: RelativePositions | None  # WavLM only

    def to_config(self, dropouts: Dropouts, source: str) -> dict[str, Any]:
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
        return {
            "extractor_mode": self.extractor_mode,
            "extractor_conv_layer_config": [list(layer) for layer in self.conv_layers],
            "extractor_conv_bias": self.conv_bias,
            "encoder_embed_dim": self.embed_dim,
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
            "normalize_waveform": self.normalize_waveform,
            "extractor_prune_conv_channels": False,
            "encoder_prune_attention_heads": False,
            "encoder_prune_attention_layer": False,
            "encoder_prune_feed_forward_intermediate": False,
            "encoder_prune_feed_forward_layer": False,
        }


@dataclass(frozen=True)
class Backbone:
    """Where the model lies in its source, and what lies beside it that the model has no use for.

    Dropped names are full names, or prefixes up to a dot, each with the reason.
    """

    dropped_names: Mapping[str, str]  # relative to ``prefix``
    prefix: str = ""
    dropped_head_names: Mapping[str, str] = field(default_factory=dict)  # outside of ``prefix``

    def reason_to_drop(self, name: str) -> tuple[str, str] | None:
        """The dropped name that the source tensor ``name`` falls under, and the reason; None if it is not known."""
        known_names = {self.prefix + known: reason for known, reason in self.dropped_names.items()}
        for known, reason in (known_names | dict(self.dropped_head_names)).items():
            if name == known or name.startswith(known + "."):
                return known, reason
        return None


@dataclass(frozen=True)
class ImportedModel:
    """A converted model, its weights loaded strictly, in eval mode on the CPU in float32."""

    family: str
    config: dict[str, Any]
    model: Wav2Vec2Model
    dropped: dict[str, str]  # source name or prefix that was left out -> reason


def import_weights(
    architecture: Architecture,
    dropouts: Dropouts,
    weights: Mapping[str, Tensor],
    names: Iterable[tuple[str, str]],
    backbone: Backbone,
    source: str,
) -> ImportedModel:
    """Build the model and fill it; every parameter must be found and every source tensor used or known to be dropped.

    Args:
        architecture: what the source's config says.
        dropouts: written into the config.
        weights: the source's tensors under the source's names.
        names: (our prefix, source prefix) pairs, the first match wins; ``{}`` stands for a layer index.
        backbone: the prefix of all source names in ``names``, and what may be left out.
        source: the file or directory, named in errors.

    Raises:
        UserError: a tensor is missing, left over, of another shape, not a plain float tensor or not finite.
    """
    config = architecture.to_config(dropouts, source)
    expected = checkpoint.expected_state(config, source)
    remaining = dict(weights)
    sources, missing = {}, []  # our name -> the source's
    for name in expected:
        if name == _DUMMY_WEIGHT:
            continue
        wanted = backbone.prefix + source_name(name, names)
        found = next((key for key in _spellings(wanted) if key in remaining), None)
        if found is None:
            missing.append(wanted)
        else:
            sources[name] = found
            del remaining[found]

    dropped, left_over = {}, []
    for name in remaining:
        known = backbone.reason_to_drop(name)
        if known is None:
            left_over.append(name)
        else:
            dropped[known[0]] = known[1]
    if missing or left_over:
        raise UserError(
            f"{source}: the weights are not those of a {architecture.family} model with the config beside them: "
            f"{_listed('missing', missing)}; {_listed('left over', left_over)}; "
            "nothing was converted, because the result would not be the same model"
        )
    # Before there is memory for the model: its size is what the source claims.
    checkpoint.check_weights(
        {found: expected[name] for name, found in sources.items()},
        {found: weights[found] for found in sources.values()},
        source,
    )
    model = checkpoint.build_model(config, source)
    state_dict = {name: weights[found].detach().float() for name, found in sources.items()}
    state_dict[_DUMMY_WEIGHT] = torch.ones(expected[_DUMMY_WEIGHT].shape)
    checkpoint.load_state(model, state_dict, source)
    return ImportedModel(architecture.family, config, model.eval(), dropped)


def source_name(name: str, names: Iterable[tuple[str, str]]) -> str:
    """The source's name of our parameter ``name``, by the first prefix in ``names`` that fits."""
    for ours, theirs in names:
        match = re.match(re.escape(ours).replace(r"\{\}", r"(\d+)") + r"(?=\.|$)", name)
        if match:
            return theirs.format(*match.groups()) + name[match.end() :]
    raise KeyError(f"the importer's table has no entry for {name}")


def _spellings(name: str) -> list[str]:
    """``name`` and, for a weight-normalised weight, its other published name."""
    return [name] + [name.removesuffix(old) + new for old, new in WEIGHT_NORM_ALIASES.items() if name.endswith(old)]


def _listed(label: str, names: list[str], most: int = 8) -> str:
    listed = ", ".join(single_line(name, 80) for name in names[:most])
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {label}" + (f" ({listed}{more})" if names else "")


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
        help="whether the model wants zero-mean, unit-variance waveforms; needed only where the source does not say",
    )


def dropouts_from(args: argparse.Namespace) -> Dropouts:
    """The dropouts given on the command line."""
    return Dropouts(**{name: getattr(args, name) for name in asdict(Dropouts())})


def normalize_waveform_from(args: argparse.Namespace) -> bool | None:
    """The value of ``--normalize_waveform``; None leaves the decision to the source."""
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
    for name, reason in imported.dropped.items():
        print(f"left out: {name} ({reason})")
    print(f"{num_params:,} parameters, written to {out}")
