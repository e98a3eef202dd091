"""What a config may hold: one rule per key, checked before anything is built from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import short_repr

# Far beyond any model that there is, and small enough that lists of this length do no harm.
MAX_LAYERS = 256
_MAX_CONV_LAYERS = 64
_MAX_SIZE = 2**20


@dataclass(frozen=True)
class _Rule:
    """What one key may hold.

    Attributes:
        expected: in words, for errors.
        accepts: whether a value is that.
        per_layer: the value may be a list with one entry per encoder layer.
        default: whether the key may be absent.
    """

    expected: str
    accepts: Callable[[Any], bool]
    per_layer: bool = False
    default: bool = False


def _is_whole(value: Any, lowest: int, highest: int) -> bool:
    return type(value) is int and lowest <= value <= highest


def _whole(lowest: int, highest: int = _MAX_SIZE, **options: bool) -> _Rule:
    expected = f"a whole number from {lowest} to {highest}"
    return _Rule(expected, lambda value: _is_whole(value, lowest, highest), **options)


def _flag(**options: bool) -> _Rule:
    return _Rule("True or False", lambda value: type(value) is bool, **options)


def _are_conv_layers(value: Any) -> bool:
    return value is None or (
        isinstance(value, (list, tuple))
        and 0 < len(value) <= _MAX_CONV_LAYERS
        and all(
            isinstance(layer, (list, tuple)) and len(layer) == 3 and all(_is_whole(n, 1, _MAX_SIZE) for n in layer)
            for layer in value
        )
    )


def _are_heads(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and all(_is_whole(head, 0, _MAX_SIZE) for head in value)
        and all(first < second for first, second in zip(value, value[1:], strict=False))
    )


_PROBABILITY = _Rule("a number from 0 to 1", lambda value: type(value) in (int, float) and 0 <= value <= 1)

_SHARED_RULES = {
    "extractor_mode": _Rule(
        "'group_norm' or 'layer_norm'", lambda value: isinstance(value, str) and value in ("group_norm", "layer_norm")
    ),
    "extractor_conv_layer_config": _Rule(
        f"a list of 1 to {_MAX_CONV_LAYERS} layers [channels, kernel, stride], each a whole number from 1 to "
        f"{_MAX_SIZE}, or None",
        _are_conv_layers,
    ),
    "extractor_conv_bias": _flag(),
    "encoder_embed_dim": _whole(1),
    "encoder_projection_dropout": _PROBABILITY,
    "encoder_pos_conv_kernel": _whole(1),
    "encoder_pos_conv_groups": _whole(1),
    "encoder_num_layers": _whole(1, MAX_LAYERS),
    "encoder_use_attention": _flag(per_layer=True, default=True),
    "encoder_use_feed_forward": _flag(per_layer=True, default=True),
    "encoder_attention_dropout": _PROBABILITY,
    "encoder_ff_interm_features": _whole(0, per_layer=True),
    "encoder_ff_interm_dropout": _PROBABILITY,
    "encoder_dropout": _PROBABILITY,
    "encoder_layer_norm_first": _flag(),
    "encoder_layer_drop": _PROBABILITY,
    "aux_num_out": _Rule(
        f"a whole number from 1 to {_MAX_SIZE}, or None",
        lambda value: value is None or _is_whole(value, 1, _MAX_SIZE),
        default=True,
    ),
    "normalize_waveform": _flag(default=True),
    "extractor_prune_conv_channels": _flag(default=True),
    "encoder_prune_attention_heads": _flag(default=True),
    "encoder_prune_attention_layer": _flag(default=True),
    "encoder_prune_feed_forward_intermediate": _flag(default=True),
    "encoder_prune_feed_forward_layer": _flag(default=True),
}
_HUBERT_RULES = _SHARED_RULES | {
    "encoder_num_heads": _whole(0, per_layer=True),
    "encoder_head_dim": _Rule(
        f"a whole number from 1 to {_MAX_SIZE} (or None, where encoder_num_heads is one number)",
        lambda value: value is None or _is_whole(value, 1, _MAX_SIZE),
        default=True,
    ),
}
_WAVLM_RULES = _SHARED_RULES | {
    "encoder_total_num_heads": _whole(1, per_layer=True),
    "encoder_remaining_heads": _Rule("ascending indices of heads", _are_heads, per_layer=True),
    "encoder_num_buckets": _whole(4),
    "encoder_max_distance": _whole(1),
}


def is_wavlm(config: Mapping[str, Any]) -> bool:
    """Whether a config is WavLM's; it is HuBERT's or wav2vec 2.0's otherwise."""
    return "encoder_remaining_heads" in config


def check_config(config: Mapping[str, Any]) -> None:
    """Check every key of a config of ``wav2vec2_model``, and the keys that must fit each other.

    Raises:
        TypeError: a key is missing or unknown (the message names it).
        ValueError: a value cannot be (the message names its key, what was found and what is expected).
    """
    family, rules = ("WavLM", _WAVLM_RULES) if is_wavlm(config) else ("HuBERT / wav2vec 2.0", _HUBERT_RULES)
    missing = [key for key, rule in rules.items() if key not in config and not rule.default]
    unknown = [key for key in config if not isinstance(key, str) or key not in rules]
    if missing or unknown:
        problem, key = ("missing", missing[0]) if missing else ("unknown", unknown[0])
        name = key if isinstance(key, str) and key.isidentifier() else short_repr(key)
        others = len(missing) + len(unknown) - 1
        more = f" and {others} more missing or unknown" if others else ""
        raise TypeError(f"{problem} key {name}{more}, expected the keys of a {family} config")
    # The number of layers first: the lists are measured by it.
    for key in sorted(config, key=lambda key: key != "encoder_num_layers"):
        _check_value(key, config[key], rules[key], config["encoder_num_layers"])
    _check_fit(config)


def _check_value(key: str, value: Any, rule: _Rule, num_layers: int) -> None:
    if rule.per_layer and isinstance(value, (list, tuple)):
        if len(value) != num_layers:
            raise ValueError(
                f"{key}: expected {num_layers} entries, one per layer (encoder_num_layers), found {len(value)}"
            )
        for layer, entry in enumerate(value):
            if not rule.accepts(entry):
                raise ValueError(f"{key} of layer {layer}: expected {rule.expected}, found {short_repr(entry)}")
    elif not rule.accepts(value):
        raise ValueError(f"{key}: expected {rule.expected}, found {short_repr(value)}")


def _check_fit(config: Mapping[str, Any]) -> None:
    embed_dim, groups = config["encoder_embed_dim"], config["encoder_pos_conv_groups"]
    if embed_dim % groups:
        raise ValueError(
            f"encoder_pos_conv_groups: expected a divisor of encoder_embed_dim {embed_dim}, found {groups}"
        )
    if is_wavlm(config):
        _check_wavlm_fit(config)
    elif config.get("encoder_head_dim") is None:
        heads = config["encoder_num_heads"]
        if not isinstance(heads, int) or heads < 1:
            raise ValueError(
                f"encoder_head_dim: expected a number where encoder_num_heads is {short_repr(heads)}, found nothing"
            )
        if embed_dim % heads:
            raise ValueError(f"encoder_num_heads: expected a divisor of encoder_embed_dim {embed_dim}, found {heads}")


def _check_wavlm_fit(config: Mapping[str, Any]) -> None:
    embed_dim, total, remaining = (
        config[key] for key in ("encoder_embed_dim", "encoder_total_num_heads", "encoder_remaining_heads")
    )
    totals = {total} if isinstance(total, int) else set(total)
    if len(totals) > 1:
        raise ValueError(
            f"encoder_total_num_heads: expected the same number in all layers, which share one position table, found "
            f"{short_repr(total)}"
        )
    (total,) = totals
    if embed_dim % total:
        raise ValueError(f"encoder_total_num_heads: expected a divisor of encoder_embed_dim {embed_dim}, found {total}")
    for layer, heads in enumerate(remaining):
        if heads and heads[-1] >= total:
            raise ValueError(
                f"encoder_remaining_heads of layer {layer}: expected ascending indices below {total}, found "
                f"{short_repr(heads)}"
            )
    # Half of the buckets for each sign; half of those are exact, and the others reach to the largest distance.
    buckets, distance = config["encoder_num_buckets"], config["encoder_max_distance"]
    if buckets % 2:
        raise ValueError(f"encoder_num_buckets: expected an even number, found {buckets}")
    if distance <= buckets // 4:
        raise ValueError(
            f"encoder_max_distance: expected more than a quarter of encoder_num_buckets {buckets}, found {distance}"
        )
