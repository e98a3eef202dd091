"""The keys of a config: the fields of :class:`HubertConfig` and :class:`WavLMConfig`.

Each field states its meaning and its possible values once. The arguments of ``wav2vec2_model``, their checks,
``Wav2Vec2Model.config`` and the table of pruning units follow from these fields.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from operator import mul
from typing import Any, NamedTuple

from .files.errors import short_repr

# Far beyond any known model, and small enough for lists of this length to do no harm.
MAX_LAYERS = 256
MAX_CONV_LAYERS = 64
_MAX_HEADS = 1024  # of a layer in a list
_MAX_SIZE = 2**20

# (channels, kernel, stride) of every published model's extractor: 320 samples (20 ms) per frame.
CONV_LAYERS = [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2


class _Rule(NamedTuple):
    """The values that a key accepts; ``expected`` describes them in errors."""

    expected: str
    accepts: Callable[[Any], bool]

    def check(self, key: str, value: Any) -> None:
        if not self.accepts(value):
            raise ValueError(f"{key}: expected {self.expected}, found {short_repr(value)}")

    def or_none(self) -> "_Rule":
        return _Rule(f"{self.expected}, or None", lambda value: value is None or self.accepts(value))


def _whole(lowest: int, highest: int = _MAX_SIZE) -> _Rule:
    expected = f"a whole number from {lowest} to {highest}"
    return _Rule(expected, lambda value: type(value) is int and lowest <= value <= highest)


_SIZE = _whole(1)
_FLAG = _Rule("True or False", lambda value: type(value) is bool)
_PROBABILITY = _Rule("a number from 0 to 1", lambda value: type(value) in (int, float) and 0 <= value <= 1)
_MODE = _Rule(
    "'group_norm' or 'layer_norm'", lambda value: type(value) is str and value in ("group_norm", "layer_norm")
)
_HEADS = _Rule(
    f"ascending indices of at most {_MAX_HEADS} heads",
    lambda value: (
        isinstance(value, (list, tuple))
        and len(value) <= _MAX_HEADS
        and all(map(_whole(0).accepts, value))
        and all(first < second for first, second in zip(value, value[1:], strict=False))
    ),
)
_CONV_LAYERS = _Rule(
    f"a list of 1 to {MAX_CONV_LAYERS} layers [channels, kernel, stride], each {_SIZE.expected}",
    lambda value: (
        isinstance(value, (list, tuple))
        and 0 < len(value) <= MAX_CONV_LAYERS
        and all(isinstance(x, (list, tuple)) and len(x) == 3 and all(map(_SIZE.accepts, x)) for x in value)
    ),
)


def _key(rule: _Rule, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"rule": rule})


def _per_layer(rule: _Rule, default: Any = MISSING) -> Any:
    """Declare a list with an entry for each encoder layer; a single number or bool stands for all of them."""
    return field(default=default, metadata={"rule": rule, "per_layer": True})


def _masks(unit: str, mask_name: str, drop_rate: float, is_published: bool = True) -> Any:
    """Declare the switch that puts masks on a kind of unit, and its row of :data:`PRUNING_UNITS`."""
    return field(default=False, metadata={"rule": _FLAG, "unit": (unit, mask_name, drop_rate, is_published)})


@dataclass(kw_only=True)
class SharedConfig:
    """The keys that all families share.

    Raises:
        ValueError: a value is impossible, or two do not fit each other; the message names the key.
    """

    # "group_norm": a norm after the first conv layer only; "layer_norm": after every one
    extractor_mode: str = _key(_MODE)
    # [channels, kernel, stride] of each conv layer; None means the published ones
    extractor_conv_layer_config: list[list[int]] = _key(_CONV_LAYERS.or_none())
    extractor_conv_bias: bool = _key(_FLAG)  # give the conv layers a bias
    encoder_embed_dim: int = _key(_SIZE)  # D, the size of a frame in the transformer
    # A LayerNorm before the feature projection; DistilHuBERT has none. Not a published key: omitted if True
    encoder_feature_projection_layer_norm: bool = _key(_FLAG, default=True)
    encoder_projection_dropout: float = _key(_PROBABILITY)  # after the feature projection
    encoder_pos_conv_kernel: int = _key(_SIZE)  # frames that the positional convolution covers
    # groups of the positional convolution; a divisor of ``encoder_embed_dim``
    encoder_pos_conv_groups: int = _key(_SIZE)
    encoder_num_layers: int = _key(_whole(1, MAX_LAYERS))  # layers of the transformer
    encoder_use_attention: list[bool] = _per_layer(_FLAG, default=True)  # true for each layer that has attention
    # true for each layer that has a feed-forward
    encoder_use_feed_forward: list[bool] = _per_layer(_FLAG, default=True)
    encoder_attention_dropout: float = _key(_PROBABILITY)  # on the attention weights
    # F of each layer, the feed-forward's intermediate dimensions
    encoder_ff_interm_features: list[int] = _per_layer(_whole(0))
    encoder_ff_interm_dropout: float = _key(_PROBABILITY)  # after the feed-forward's GELU
    # after the positional convolution, each attention and each feed-forward
    encoder_dropout: float = _key(_PROBABILITY)
    encoder_layer_norm_first: bool = _key(_FLAG)  # pre-norm (Large) or post-norm (Base)
    encoder_layer_drop: float = _key(_PROBABILITY)  # probability that ``forward`` skips a layer in training
    # outputs of an extra linear layer after the last; None means no such layer
    aux_num_out: int | None = _key(_SIZE.or_none(), default=None)
    # normalise each waveform to zero mean and unit variance first
    normalize_waveform: bool = _key(_FLAG, default=False)
    # Frames of a chunk of a streaming model: a frame attends to its chunk and to encoder_left_frames before that, and
    # nothing else looks ahead. Not a published key: omitted if None, which lets each frame attend to all
    encoder_chunk_frames: int | None = _key(_SIZE.or_none(), default=None)
    encoder_left_frames: int = _key(_whole(0), default=0)
    extractor_prune_conv_channels: bool = _masks("conv", "conv_layers.{}.hard_concrete", drop_rate=0.01)
    encoder_prune_attention_heads: bool = _masks("head", "attention.hard_concrete_for_heads", drop_rate=0.01)
    encoder_prune_feed_forward_intermediate: bool = _masks(
        "interm", "feed_forward.hard_concrete_for_intermediate", drop_rate=0.5
    )
    encoder_prune_attention_layer: bool = _masks("attlayer", "attention.hard_concrete_for_layer", drop_rate=0.01)
    encoder_prune_feed_forward_layer: bool = _masks("ffnlayer", "feed_forward.hard_concrete_for_layer", drop_rate=0.01)
    # masks on the taps of the positional convolution, from the outside in
    encoder_prune_pos_conv: bool = _masks("posconv", "pos_conv_embed.hard_concrete", drop_rate=0.01, is_published=False)
    # one mask on the dimensions of frames, the same in all layers
    encoder_prune_embed_dim: bool = _masks("embed", "encoder.hard_concrete", drop_rate=0.01, is_published=False)

    def __post_init__(self) -> None:
        # Lists last: they have encoder_num_layers entries.
        for entry in sorted(fields(self), key=lambda entry: "per_layer" in entry.metadata):
            value, rule = getattr(self, entry.name), entry.metadata["rule"]
            if "per_layer" in entry.metadata:
                setattr(self, entry.name, self._entries(entry.name, value, rule))
            else:
                rule.check(entry.name, value)
        layers = CONV_LAYERS if self.extractor_conv_layer_config is None else self.extractor_conv_layer_config
        self.extractor_conv_layer_config = [list(layer) for layer in layers]
        self._check_divides("encoder_pos_conv_groups", self.encoder_pos_conv_groups)
        if self.encoder_chunk_frames is None and self.encoder_left_frames:
            found = f"found {self.encoder_left_frames} without encoder_chunk_frames"
            raise ValueError(f"encoder_left_frames: expected 0, {found}")
        if self.encoder_chunk_frames and self.normalize_waveform and self.extractor_mode == "group_norm":
            raise ValueError("normalize_waveform: expected False in a streaming model with a GroupNorm, found True")

    def _entries(self, key: str, value: Any, rule: _Rule) -> list[Any]:
        """Return one entry per layer, checked."""
        if not isinstance(value, (list, tuple)):
            rule.check(key, value)
            return [value] * self.encoder_num_layers
        if len(value) != self.encoder_num_layers:
            wanted = f"{self.encoder_num_layers} entries, one per layer (encoder_num_layers)"
            raise ValueError(f"{key}: expected {wanted}, found {len(value)}")
        for layer, entry in enumerate(value):
            rule.check(f"{key} of layer {layer}", entry)
        return [list(entry) if isinstance(entry, (list, tuple)) else entry for entry in value]

    def to_dict(self) -> dict[str, Any]:
        """Return the keys and values that a file holds."""
        config = _published(asdict(self))
        if self.encoder_feature_projection_layer_norm:
            del config["encoder_feature_projection_layer_norm"]
        if self.encoder_chunk_frames is None:
            del config["encoder_chunk_frames"], config["encoder_left_frames"]
        return config

    def of_layer(self, layer: int) -> dict[str, Any]:
        """Return one layer's entries of the keys that have one for each layer."""
        return {entry.name: getattr(self, entry.name)[layer] for entry in fields(self) if "per_layer" in entry.metadata}

    @property
    def num_embed_units(self) -> int:
        """Number of units of the mask over dimensions of frames: one for each place in a group."""
        return self.encoder_embed_dim // self.encoder_pos_conv_groups

    def _check_divides(self, key: str, value: int) -> None:
        if self.encoder_embed_dim % value:
            raise ValueError(f"{key}: expected a divisor of encoder_embed_dim {self.encoder_embed_dim}, found {value}")


@dataclass(kw_only=True)
class HubertConfig(SharedConfig):
    """The keys of HuBERT and wav2vec 2.0."""

    encoder_num_heads: list[int] = _per_layer(_whole(0))  # heads of each layer
    # K, the size of a head; None means D / heads, where the number of heads is given as one number
    encoder_head_dim: int = _key(_SIZE.or_none(), default=None)

    def __post_init__(self) -> None:
        num_heads = self.encoder_num_heads  # before it becomes a list
        super().__post_init__()
        if self.encoder_head_dim is None:
            if not isinstance(num_heads, int) or num_heads < 1:
                found = short_repr(num_heads)
                raise ValueError(f"encoder_head_dim: expected a number where encoder_num_heads is {found}, found None")
            self._check_divides("encoder_num_heads", num_heads)
            self.encoder_head_dim = self.encoder_embed_dim // num_heads


@dataclass(kw_only=True)
class WavLMConfig(SharedConfig):
    """The keys of WavLM."""

    # heads of each layer before pruning, the same in all layers; D / heads is the size of a head
    encoder_total_num_heads: list[int] = _per_layer(_SIZE)
    encoder_remaining_heads: list[list[int]] = _per_layer(_HEADS)  # indices of the heads that each layer still has
    # buckets of the table of relative positions: half for each sign, half of those for a single distance each
    encoder_num_buckets: int = _key(_whole(4))
    encoder_max_distance: int = _key(_SIZE)  # distance in frames from which on all fall into the last bucket
    # K, the size of a head; None means D / heads before pruning. Not a published key: omitted if it is that
    encoder_head_dim: int = _key(_SIZE.or_none(), default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        total = self.encoder_total_num_heads[0]
        if set(self.encoder_total_num_heads) != {total}:
            found = short_repr(self.encoder_total_num_heads)
            raise ValueError(f"encoder_total_num_heads: expected the same number in all layers, found {found}")
        self._check_divides("encoder_total_num_heads", total)
        if self.encoder_head_dim is None:
            self.encoder_head_dim = self.encoder_embed_dim // total
        for layer, heads in enumerate(self.encoder_remaining_heads):
            if heads and heads[-1] >= total:
                key = f"encoder_remaining_heads of layer {layer}"
                raise ValueError(f"{key}: expected ascending indices below {total}, found {short_repr(heads)}")
        if self.encoder_num_buckets % 2:
            raise ValueError(f"encoder_num_buckets: expected an even number, found {self.encoder_num_buckets}")
        if self.encoder_max_distance <= self.encoder_num_buckets // 4:
            wanted = f"more than a quarter of encoder_num_buckets {self.encoder_num_buckets}"
            raise ValueError(f"encoder_max_distance: expected {wanted}, found {self.encoder_max_distance}")

    def to_dict(self) -> dict[str, Any]:
        config = super().to_dict()
        if self.encoder_head_dim == self.encoder_embed_dim // self.encoder_total_num_heads[0]:
            del config["encoder_head_dim"]
        return config

    @property
    def num_embed_units(self) -> int:
        """One for each place in both a group and a head, because the gates of attention read each head alone."""
        return math.gcd(super().num_embed_units, self.encoder_embed_dim // self.encoder_total_num_heads[0])


ModelConfig = HubertConfig | WavLMConfig


def is_wavlm(config: Mapping[str, Any]) -> bool:
    """Return whether a config is WavLM's; all others are HuBERT's or wav2vec 2.0's."""
    return "encoder_remaining_heads" in config


def unit_counts(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Count the units of each layer by kind in a complete config; 0 where the whole block is gone."""
    heads = map(len, config["encoder_remaining_heads"]) if is_wavlm(config) else config["encoder_num_heads"]
    return {
        "conv channels": [channels for channels, *_ in config["extractor_conv_layer_config"]],
        "heads": list(map(mul, heads, config["encoder_use_attention"])),
        "FFN dimensions": list(map(mul, config["encoder_ff_interm_features"], config["encoder_use_feed_forward"])),
    }


def wavlm_attention(num_layers: Any, num_heads: Any, num_buckets: Any, max_distance: Any) -> dict[str, Any]:
    """Return the keys of WavLM's unpruned attention; numbers may be impossible, which :func:`check_config` refuses."""
    # No list may be made of impossible numbers.
    is_possible = all(type(number) is int and 0 < number <= MAX_LAYERS for number in (num_layers, num_heads))
    return {
        "encoder_total_num_heads": num_heads,
        "encoder_remaining_heads": [list(range(num_heads))] * num_layers if is_possible else [],
        "encoder_num_buckets": num_buckets,
        "encoder_max_distance": max_distance,
    }


def check_config(config: Mapping[str, Any]) -> ModelConfig:
    """Return the checked config of its family, with one entry per layer in every list.

    Raises:
        TypeError: a key is missing or unknown (the message names it).
        ValueError: a value is impossible (the message names its key).
    """
    family, cls = ("WavLM", WavLMConfig) if is_wavlm(config) else ("HuBERT / wav2vec 2.0", HubertConfig)
    config = dict(config)
    # DiariZen's switch: pruned layer by layer, to sizes of another kind.
    if (switch := config.pop("use_layerwise_prune", False)) is not False:
        raise ValueError(f"use_layerwise_prune: expected False, or no such key, found {short_repr(switch)}")
    defaults = {entry.name: entry.default for entry in fields(cls)}
    missing = [key for key, default in defaults.items() if key not in config and default is MISSING]
    unknown = [key for key in config if key not in defaults]
    if missing or unknown:
        problem, key = ("missing", missing[0]) if missing else ("unknown", unknown[0])
        name = key if isinstance(key, str) and key.isidentifier() else short_repr(key)
        others = len(missing) + len(unknown) - 1
        more = f" and {others} more missing or unknown" if others else ""
        raise TypeError(f"{problem} key {name}{more}, expected the keys of a {family} config")
    return cls(**config)


class PruningUnit(NamedTuple):
    """A kind of unit that can be pruned (paper, section 2.2)."""

    switch: str  # the config key that turns its masks on
    mask_name: str  # the masks' place in a model, {} standing for the layer
    drop_rate: float  # initial probability that a unit is off (released settings)
    is_published: bool  # the published program knows it


# By their names in --pruning_units.
PRUNING_UNITS: dict[str, PruningUnit] = {}
for _entry in fields(SharedConfig):
    if "unit" in _entry.metadata:
        _name, *_row = _entry.metadata["unit"]
        PRUNING_UNITS[_name] = PruningUnit(_entry.name, *_row)


def with_masks(config: Mapping[str, Any], units: Iterable[str]) -> dict[str, Any]:
    """Return the config with masks on exactly these units, keys of :data:`PRUNING_UNITS`."""
    units = set(units)
    return _published({**config, **{unit.switch: name in units for name, unit in PRUNING_UNITS.items()}})


def _published(config: dict[str, Any]) -> dict[str, Any]:
    """Omit switches that are off and that the published program does not know: it would refuse them."""
    unknown = {unit.switch for unit in PRUNING_UNITS.values() if not unit.is_published}
    return {key: value for key, value in config.items() if value or key not in unknown}
