"""A student of another shape: what its JSON changes of a model's config, and which of that model's weights it keeps.

Such a student is a pruned model whose masks are chosen: the first units of each kind stay. So it is sliced by pruning.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import MISSING, asdict, fields
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from hardconcrete import HardConcrete
from training.settings import RANDOM, StudentSettings
from wav2vec2.config import MAX_LAYERS, PRUNING_UNITS, HubertConfig, ModelConfig, WavLMConfig, check_config, is_wavlm
from wav2vec2.files.checkpoint import build_model, load_state
from wav2vec2.files.errors import UserError, short_repr
from wav2vec2.model import with_masks

# What starts from the source, or fresh, as a whole: name -> the prefix of its parameters.
_PARTS = {
    "extractor": "feature_extractor.",
    "projection": "encoder.feature_projection.",
    "positional convolution": "encoder.transformer.pos_conv_embed.",
    "encoder norm": "encoder.transformer.layer_norm.",
    "layers": "encoder.transformer.layers.",
    "output layer": "aux.",
}
# Those that make or take frames of the transformer's size.
_FRAMED = set(_PARTS) - {"extractor"}
_TABLE = "attention.rel_attn_embed.weight"  # WavLM's positions, which the first layer with attention holds for all


def student_of(contents: dict[str, Any], settings: StudentSettings, source: str | os.PathLike) -> dict[str, Any]:
    """The ``config`` and ``state_dict`` of the student that ``--student_config`` makes of a model file.

    A line says which parts start from the model; the others are fresh.

    Args:
        contents: of the model file.
        settings: that name the student's config and the layers that it starts from.
        source: the file, named in errors.

    Raises:
        UserError: no model can have this config, or its layers cannot start from those of the file.
    """
    own = _checked(with_masks(contents["config"], ()), source)
    config, starts = _student_config(own, settings, source)
    obstacles = _obstacles(own, config, starts)
    if settings.init_layers == RANDOM:
        obstacles["layers"] = f"--init_layers {RANDOM}"
    elif "layers" in obstacles:
        raise UserError(
            f"{settings.student_config}: its layers cannot start from those of {source}: {obstacles['layers']}; "
            f"change it, or let all layers start fresh with --init_layers {RANDOM}"
        )
    student = build_model(config.to_dict(), settings.student_config)
    state_dict = student.state_dict()
    sliced = _sliced(contents["state_dict"], own, config, starts, obstacles.keys())
    prefixes = tuple(prefix for part, prefix in _PARTS.items() if part not in obstacles)
    state_dict |= {key: sliced[key] for key in state_dict if key in sliced and key.startswith(prefixes)}
    load_state(student, state_dict, settings.student_config)  # a slice of another shape would be a fault of this module
    rank_zero_only(print)(f"student of {settings.student_config}: {_origins(config, starts, obstacles)}", flush=True)
    return {"config": student.config, "state_dict": state_dict}


def _checked(config: Mapping[str, Any], source: str | os.PathLike) -> ModelConfig:
    try:
        return check_config(config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: no model can have this config: {error}") from None


def _per_layer_keys(config: ModelConfig) -> list[str]:
    return [entry.name for entry in fields(config) if "per_layer" in entry.metadata]


def _student_config(
    own: ModelConfig, settings: StudentSettings, source: str | os.PathLike
) -> tuple[ModelConfig, list[int]]:
    """The student's config, and the layer of the source, from 1, that each of its layers takes after.

    Where the JSON does not say otherwise, a layer has the shape of the layer that it takes after.
    """
    changes, num_own = settings.changes, own.encoder_num_layers
    family = WavLMConfig if is_wavlm(changes) else HubertConfig
    is_complete = all(entry.name in changes for entry in fields(family) if entry.default is MISSING)
    config = {} if is_complete else asdict(own)
    num_layers = changes.get("encoder_num_layers", num_own)
    starts = settings.layers
    if type(num_layers) is not int or not 0 < num_layers <= MAX_LAYERS:
        starts = []  # refused below, by its key
    elif starts is None:  # spread evenly, the last one after the last
        starts = [-(-number * num_own // num_layers) for number in range(1, num_layers + 1)]
    elif len(starts) != num_layers:
        raise UserError(
            f"--init_layers {settings.init_layers}: expected {num_layers} layers, one for each of "
            f"{settings.student_config}'s, found {len(starts)}"
        )
    elif max(starts) > num_own:
        raise UserError(
            f"--init_layers {settings.init_layers}: layer {max(starts)} does not exist; {source} has layers 1 to "
            f"{num_own}"
        )
    if not is_complete:
        config |= {key: [config[key][start - 1] for start in starts] for key in _per_layer_keys(own)}
    config |= changes
    masked = [unit.switch for unit in PRUNING_UNITS.values() if config.get(unit.switch)]
    if masked:
        raise UserError(
            f"{settings.student_config}: {masked[0]}: expected False, found {short_repr(config[masked[0]])}; "
            "--pruning_units says where masks are"
        )
    return _checked(config, settings.student_config), starts


def _obstacles(own: ModelConfig, student: ModelConfig, starts: list[int]) -> dict[str, str]:
    """Why parts of the student cannot be a slice of the source's, by part, the first reason of each."""
    obstacles: dict[str, str] = {}
    for part, key, found, expected, is_met in _needs(own, student, starts):
        if not is_met:
            obstacles.setdefault(part, f"{key}: expected {expected}, found {short_repr(found)}")
    # Channels of a fresh extractor are not those that the projection knows, but may be taught to be.
    last = [config.extractor_conv_layer_config[-1][0] for config in (own, student)]
    if "extractor" in obstacles and last[0] != last[1]:
        obstacles.setdefault("projection", obstacles["extractor"])
    return obstacles


# Part, key, what the student has, what it may have, and whether that is so.
_Need = tuple[str, str, Any, str, bool]


def _needs(own: ModelConfig, student: ModelConfig, starts: list[int]) -> Iterator[_Need]:
    """What parts of the student need to be a slice of the source's."""

    def same(part: str, *keys: str) -> Iterator[_Need]:
        for key in keys:
            ours, theirs = getattr(own, key), getattr(student, key)
            yield part, key, theirs, f"{short_repr(ours)}, as there", ours == theirs

    yield from same("extractor", "extractor_mode", "extractor_conv_bias")
    ours, theirs = own.extractor_conv_layer_config, student.extractor_conv_layer_config
    fits = [layer[1:] for layer in ours] == [layer[1:] for layer in theirs]
    fits = fits and all(few[0] <= many[0] for few, many in zip(theirs, ours, strict=True))
    yield "extractor", "extractor_conv_layer_config", theirs, "the layers there, with at most their channels", fits

    yield from same("projection", "encoder_feature_projection_layer_norm")
    dim, unit = student.encoder_embed_dim, own.encoder_embed_dim // own.num_embed_units
    for part in _FRAMED:
        fits = dim <= own.encoder_embed_dim and dim % unit == 0
        yield part, "encoder_embed_dim", dim, f"a multiple of {unit}, at most {own.encoder_embed_dim}", fits
        yield from same(part, "encoder_pos_conv_groups")
    kernel, most = student.encoder_pos_conv_kernel, own.encoder_pos_conv_kernel
    expected = f"at most {most}, and {'odd' if most % 2 else 'even'} as that"  # rings of taps go from the outside in
    fits = kernel <= most and (most - kernel) % 2 == 0
    yield "positional convolution", "encoder_pos_conv_kernel", kernel, expected, fits
    yield from same("output layer", "aux_num_out")
    for part in ("encoder norm", "layers"):
        yield from same(part, "encoder_layer_norm_first")

    families = [type(config).__name__.removesuffix("Config") for config in (own, student)]
    yield "layers", "kind of model", families[1], families[0], families[0] == families[1]
    if families[0] != families[1]:
        return
    yield from same("layers", "encoder_head_dim")
    if isinstance(own, WavLMConfig):
        yield from same("layers", "encoder_num_buckets", "encoder_max_distance")
    for number, start in enumerate(starts, start=1):
        layer, source = student.of_layer(number - 1), own.of_layer(start - 1)
        for key, found in layer.items():
            block = "encoder_use_feed_forward" if key.startswith("encoder_ff") else "encoder_use_attention"
            if layer[block] or key.startswith("encoder_use"):
                expected, fits = _at_most(key, found, source[key])
                yield "layers", f"{key} of layer {number}, from layer {start} there", found, expected, fits


def _at_most(key: str, found: Any, most: Any) -> tuple[str, bool]:
    """What an entry of a layer may be where the layer that it starts from has ``most``, and whether it is."""
    if key == "encoder_total_num_heads":
        return f"{most}, as there", found == most
    if isinstance(most, list):
        return f"some of {short_repr(most)}", set(found) <= set(most)
    return "False, as there" if most is False else f"at most {most}", found <= most


@torch.no_grad()
def _sliced(
    state_dict: dict[str, Tensor], own: ModelConfig, student: ModelConfig, starts: list[int], whole: Set[str]
) -> dict[str, Tensor]:
    """The source's weights, its layers put in the student's order, pruned to the student's shape.

    Parts named in ``whole`` lose nothing.
    """
    per_layer = {key: [getattr(own, key)[start - 1] for start in starts] for key in _per_layer_keys(own)}
    config = own.to_dict() | per_layer | {"encoder_num_layers": len(starts)}
    dim = own.encoder_embed_dim if whole >= _FRAMED else student.encoder_embed_dim
    # Narrower frames scale the positional convolution's weight: without need that would only round it.
    units = PRUNING_UNITS.keys() - ({"embed"} if dim == own.encoder_embed_dim else set())
    model = build_model(with_masks(config, units))
    encoder = model.encoder

    def keep(mask: HardConcrete, kept: Iterable[bool]) -> None:
        mask.log_alpha.copy_(torch.tensor([math.inf if unit else -math.inf for unit in kept]))

    def keep_first(mask: HardConcrete, number: int) -> None:
        keep(mask, [unit < number for unit in range(mask.n_in)])

    masks = {key: value for key, value in model.state_dict().items() if key.endswith("log_alpha")}
    load_state(model, masks | _reordered(state_dict, starts, per_layer["encoder_use_attention"]), "student")
    for module in model.modules():
        if isinstance(module, HardConcrete):
            keep_first(module, module.n_in)
    if "extractor" not in whole:
        for block, layer in zip(model.feature_extractor.conv_layers, student.extractor_conv_layer_config, strict=True):
            keep_first(block.hard_concrete, layer[0])
    if "embed" in units:
        keep_first(encoder.hard_concrete, dim * own.num_embed_units // own.encoder_embed_dim)
    if "positional convolution" not in whole:
        keep_first(encoder.transformer.pos_conv_embed.hard_concrete, (student.encoder_pos_conv_kernel + 1) // 2)
    for number, block in enumerate(encoder.transformer.layers if "layers" not in whole else ()):
        layer, attention, feed_forward = student.of_layer(number), block.attention, block.feed_forward
        if attention is not None:
            keep(attention.hard_concrete_for_layer, [layer["encoder_use_attention"]])
            if isinstance(own, WavLMConfig):
                heads = set(layer["encoder_remaining_heads"])
                keep(attention.hard_concrete_for_heads, [head in heads for head in attention.remaining_heads])
            else:
                keep_first(attention.hard_concrete_for_heads, layer["encoder_num_heads"])
        if feed_forward is not None:
            keep(feed_forward.hard_concrete_for_layer, [layer["encoder_use_feed_forward"]])
            keep_first(feed_forward.hard_concrete_for_intermediate, layer["encoder_ff_interm_features"])
    model.prune()
    return model.state_dict()


def _reordered(state_dict: dict[str, Tensor], starts: list[int], use_attention: list[bool]) -> dict[str, Tensor]:
    """A state dict with these layers, from 1, in this order; WavLM's table goes to the first that attends."""
    prefix = _PARTS["layers"]
    reordered = {key: value for key, value in state_dict.items() if not key.startswith(prefix)}
    for number, start in enumerate(starts):
        for key, value in state_dict.items():
            if key.startswith(f"{prefix}{start - 1}.") and not key.endswith(_TABLE):
                reordered[f"{prefix}{number}.{key.removeprefix(f'{prefix}{start - 1}.')}"] = value
    for key, table in state_dict.items():
        if key.endswith(_TABLE) and True in use_attention:
            reordered[f"{prefix}{use_attention.index(True)}.{_TABLE}"] = table
    return reordered


def _origins(student: ModelConfig, starts: list[int], obstacles: Mapping[str, str]) -> str:
    """What starts from --student_ckpt and what is fresh, with the key that is in the way."""
    names = {part: part for part in _PARTS} | {"layers": f"layers {', '.join(map(str, starts))}"}
    if student.aux_num_out is None:
        del names["output layer"]
    kept = [name for part, name in names.items() if part not in obstacles]
    fresh = [f"{part} ({obstacles[part].partition(':')[0]})" for part in names if part in obstacles]
    return f"from --student_ckpt {', '.join(kept) or 'nothing'}; fresh {', '.join(fresh) or 'nothing'}"
