"""Slice a student out of a model: fewer or repeated layers, narrower frames, fewer units.

A slice is a pruned model whose masks are chosen instead of learnt: the first units of each kind stay. What cannot be
sliced, such as an extractor of other layers, starts fresh.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from training.data import SpeechDataModule
from training.settings import RANDOM
from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.components import Heard, RunningMoments
from wav2vec2.config import MAX_LAYERS, PRUNING_UNITS, ModelConfig, check_config
from wav2vec2.files.checkpoint import build_model
from wav2vec2.files.errors import UserError, short_repr
from wav2vec2.model import Wav2Vec2Model, with_masks

_FRAMES = ["encoder_embed_dim", "encoder_pos_conv_groups"]
# The parts of a model that start from the source, or fresh, as a whole: the prefix of their parameters, and the
# config's keys in which slice and student must agree.
_PARTS = {
    "extractor": ("feature_extractor.", ["extractor_mode", "extractor_conv_bias", "extractor_conv_layer_config"]),
    "projection": ("encoder.feature_projection.", [*_FRAMES, "encoder_feature_projection_layer_norm"]),
    "positional convolution": ("encoder.transformer.pos_conv_embed.", [*_FRAMES, "encoder_pos_conv_kernel"]),
    "encoder norm": ("encoder.transformer.layer_norm.", [*_FRAMES, "encoder_layer_norm_first"]),
    "layers": (
        "encoder.transformer.layers.",
        [
            *_FRAMES,
            *("encoder_layer_norm_first", "encoder_head_dim", "encoder_num_buckets", "encoder_max_distance"),
            *("encoder_use_attention", "encoder_num_heads", "encoder_total_num_heads", "encoder_remaining_heads"),
            *("encoder_use_feed_forward", "encoder_ff_interm_features"),
        ],
    ),
    "output layer": ("aux.", [*_FRAMES, "aux_num_out"]),
}
_LAYERS = _PARTS["layers"][0]
_POSITIONAL = _PARTS["positional convolution"][0]
_TABLE = "attention.rel_attn_embed.weight"  # WavLM's positions, which the first layer with attention holds for all
# Speech whose statistics a streaming model starts with.
_PRIOR_SECONDS = 600


def slice_model(
    contents: Mapping[str, Any], changes: Mapping[str, Any], init_layers: Sequence[int] | str | None, source: str
) -> tuple[dict[str, Any], str]:
    """Slice a student of another shape out of a model.

    Args:
        contents: contents of the model file; its head is left out.
        changes: the config's keys in which the student differs. Where they do not say otherwise, a layer has the shape
            of the layer that it starts from.
        init_layers: the model's layers, from 1, that the student's layers start from; ``RANDOM`` for fresh layers; None
            spreads them evenly over the model's depth, the last one after its last.
        source: the model file, named in errors.

    Returns:
        ``{"config", "state_dict"}`` of the student, and a line that says what starts from the model and what is fresh.

    Raises:
        UserError: no model can have this config, or its layers cannot start from the model's.
    """
    own = check_config(with_masks(contents["config"], ()))
    starts = _starting_layers(own.encoder_num_layers, changes, init_layers)
    student = build_model({**_with_layers(own, starts), **changes}, "--student_config")
    wanted = check_config(student.config)
    if any(getattr(wanted, unit.switch) for unit in PRUNING_UNITS.values()):
        raise UserError("--student_config: has masks, expected none; distill.py --pruning_units puts them on a student")
    sliced = _sliced(contents["state_dict"], own, wanted, starts, whole_layers=init_layers == RANDOM)
    obstacles = _obstacles(check_config(sliced.config), wanted)
    if own.encoder_chunk_frames and ("extractor" in obstacles or own.normalize_waveform != wanted.normalize_waveform):
        cause = obstacles.get("extractor", "normalize_waveform")
        raise UserError(
            f"--student_config: {cause}: {source} streams, by statistics of what its extractor hears: expected no "
            "change but fewer channels; slice the model that it was made from, with --streaming in the same call"
        )
    if init_layers == RANDOM:
        obstacles["layers"] = f"--init_layers {RANDOM}"
    elif key := obstacles.get("layers"):
        found, nearest = (short_repr(getattr(config, key)) for config in (wanted, check_config(sliced.config)))
        raise UserError(
            f"--student_config: its layers cannot start from those of {source}: {key}: found {found}, the nearest "
            f"slice has {nearest}; change it, or let all layers start fresh with --init_layers {RANDOM}"
        )
    kept = tuple(prefix for name, (prefix, _) in _PARTS.items() if name not in obstacles)
    weights = {key: value for key, value in sliced.state_dict().items() if key.startswith(kept)}
    student.load_state_dict(student.state_dict() | weights)
    origins = {name: name for name in _PARTS if name != "output layer" or wanted.aux_num_out is not None}
    origins["layers"] = f"layers {', '.join(map(str, starts))}"
    same = ", ".join(words for part, words in origins.items() if part not in obstacles)
    fresh = ", ".join(f"{part} ({obstacles[part]})" for part in origins if part in obstacles)
    line = f"from the model {same or 'nothing'}; fresh {fresh or 'nothing'}"
    return {"config": student.config, "state_dict": student.state_dict()}, line


def streaming_model(
    contents: Mapping[str, Any], chunk_frames: int, left_frames: int, data: SpeechDataModule | None
) -> dict[str, Any]:
    """Make a model stream; one that does already gets other chunks, and is the same otherwise.

    The positional convolution keeps the taps up to the frame itself. An extractor with a GroupNorm gets the waveform as
    it is: the norm makes up for it.

    Args:
        contents: contents of the model file; its head is left out.
        chunk_frames: frames of a chunk.
        left_frames: frames before its chunk that a frame attends to.
        data: training data, whose statistics stand for what a stream has not heard yet; only norms that need them do.

    Raises:
        UserError: no model can have these chunks, or data are needed and missing.
    """
    config = check_config(with_masks(contents["config"], ())).to_dict()
    state_dict, had_chunks = dict(contents["state_dict"]), "encoder_chunk_frames" in config
    config |= {"encoder_chunk_frames": chunk_frames, "encoder_left_frames": left_frames}
    if not had_chunks:
        # Tap i of the kernel K is for the frame i - K // 2 later.
        config["encoder_pos_conv_kernel"] = taps = config["encoder_pos_conv_kernel"] // 2 + 1
        for name in ("conv.weight_g", "conv.weight_v"):
            state_dict[_POSITIONAL + name] = state_dict[_POSITIONAL + name][..., :taps].clone()
        config["normalize_waveform"] &= config["extractor_mode"] != "group_norm"
    model = build_model(config, "--streaming")
    heard = model.feature_extractor.heard
    if heard is not None and not had_chunks:
        if data is None:
            raise UserError(
                "--tsv_dir: is not given; the model's norm, where it has heard little, needs statistics of speech: "
                "give a directory of prepare_data.py's manifests"
            )
        mean, products = _moments(heard, data)
        state_dict |= {"feature_extractor.heard.prior_mean": mean, "feature_extractor.heard.prior_products": products}
    model.load_state_dict(state_dict)
    return {"config": model.config, "state_dict": model.state_dict()}


def _moments(heard: RunningMoments, data: SpeechDataModule) -> tuple[Tensor, Tensor]:
    """Return mean (kernel,) and mean products (kernel, kernel) of windows of samples, from the first training batches.

    They are the same in every run with the same seed.
    """
    crops, dataset = data.sampler(data.train_subset, num_replicas=1, rank=0), data.datasets[data.train_subset]
    total, num_samples = heard.nothing(1), 0
    for crop in crops:
        waveforms = dataset[crop].waveforms
        lengths = torch.full((len(waveforms),), waveforms.size(1))
        total += Heard(*(part.sum(0, keepdim=True) for part in heard.sums(waveforms, lengths)))
        num_samples += waveforms.numel()
        if num_samples >= _PRIOR_SECONDS * SAMPLE_RATE:
            break
    return (total.sum / total.number)[0], (total.products / total.number)[0]


def _starting_layers(
    num_own: int, changes: Mapping[str, Any], init_layers: Sequence[int] | str | None
) -> Sequence[int]:
    """Choose the layer of the source, from 1, that each of the student's layers starts from."""
    named = () if init_layers is None or isinstance(init_layers, str) else init_layers
    num_layers = changes.get("encoder_num_layers", len(named) or num_own)
    if type(num_layers) is not int or not 0 < num_layers <= MAX_LAYERS:
        found = short_repr(num_layers)
        raise UserError(f"--student_config: encoder_num_layers: expected 1 to {MAX_LAYERS}, found {found}")
    if not named:
        return [-(-number * num_own // num_layers) for number in range(1, num_layers + 1)]
    if len(named) != num_layers or max(named) > num_own:
        raise UserError(
            f"--init_layers: expected {num_layers} layers, one for each of the student's, from 1 to {num_own}; found "
            f"{', '.join(map(str, named))}"
        )
    return named


def _with_layers(own: ModelConfig, starts: Sequence[int]) -> dict[str, Any]:
    """Put the layers of the source's config in the student's order."""
    layers = [own.of_layer(start - 1) for start in starts]
    per_layer = {key: [layer[key] for layer in layers] for key in own.of_layer(0)}
    return asdict(own) | per_layer | {"encoder_num_layers": len(starts)}


def _sliced(
    state_dict: Mapping[str, Tensor], own: ModelConfig, student: ModelConfig, starts: Sequence[int], whole_layers: bool
) -> Wav2Vec2Model:
    """Put the source's layers in the student's order, and prune towards the student's shape as far as that goes."""
    units = set(PRUNING_UNITS)
    if student.encoder_embed_dim >= own.encoder_embed_dim:
        units.remove("embed")  # its mask scales the positional convolution's weight, which would round it
    reordered = check_config(_with_layers(own, starts))
    model = build_model(with_masks(reordered.to_dict(), units))
    kept = _kept_units(reordered, student, whole_layers)
    masks = {}
    for name, log_alpha in model.state_dict().items():
        if name.endswith(".log_alpha"):
            stays = kept.get(name.removesuffix(".log_alpha"), range(len(log_alpha)))
            masks[name] = torch.tensor([math.inf if unit in stays else -math.inf for unit in range(len(log_alpha))])
    model.load_state_dict(masks | _reordered(state_dict, starts, reordered.encoder_use_attention))
    model.prune()
    return model


def _kept_units(own: ModelConfig, student: ModelConfig, whole_layers: bool) -> dict[str, Sequence[int]]:
    """List the units that stay, by the name of their mask; all units of other masks stay."""
    kept: dict[str, Sequence[int]] = {}
    windows, wanted_windows = ([conv[1:] for conv in config.extractor_conv_layer_config] for config in (own, student))
    if windows == wanted_windows:
        for number, conv in enumerate(student.extractor_conv_layer_config):
            kept[f"feature_extractor.conv_layers.{number}.hard_concrete"] = range(conv[0])
    num_dims = student.encoder_embed_dim * own.num_embed_units // own.encoder_embed_dim
    kept["encoder.hard_concrete"] = range(max(1, num_dims))
    # Taps go in rings, from the outside in; those of a streaming model one by one, from the past on.
    taps, streams = student.encoder_pos_conv_kernel, own.encoder_chunk_frames is not None
    kept["encoder.transformer.pos_conv_embed.hard_concrete"] = range(taps if streams else (taps + 1) // 2)
    for number in range(0 if whole_layers else own.encoder_num_layers):
        source, layer = own.of_layer(number), student.of_layer(number)
        attention = f"{_LAYERS}{number}.attention.hard_concrete"
        feed_forward = f"{_LAYERS}{number}.feed_forward.hard_concrete"
        if "encoder_remaining_heads" in layer:  # WavLM's mask is on the heads that are left
            wanted = layer["encoder_remaining_heads"]
            heads = [unit for unit, head in enumerate(source["encoder_remaining_heads"]) if head in wanted]
        else:
            heads = list(range(layer["encoder_num_heads"]))
        kept[f"{attention}_for_heads"] = heads
        kept[f"{attention}_for_layer"] = range(int(layer["encoder_use_attention"]))
        kept[f"{feed_forward}_for_intermediate"] = range(layer["encoder_ff_interm_features"])
        kept[f"{feed_forward}_for_layer"] = range(int(layer["encoder_use_feed_forward"]))
    return kept


def _reordered(
    state_dict: Mapping[str, Tensor], starts: Sequence[int], use_attention: Sequence[bool]
) -> dict[str, Tensor]:
    """Put these layers, from 1, of a state dict in this order; WavLM's table goes to the first that attends."""
    reordered = {key: value for key, value in state_dict.items() if not key.startswith(_LAYERS)}
    for key, value in state_dict.items():
        if key.endswith(_TABLE) and True in use_attention:
            reordered[f"{_LAYERS}{use_attention.index(True)}.{_TABLE}"] = value
        elif key.startswith(_LAYERS) and not key.endswith(_TABLE):
            layer, _, name = key.removeprefix(_LAYERS).partition(".")
            for number, start in enumerate(starts):
                if start - 1 == int(layer):
                    reordered[f"{_LAYERS}{number}.{name}"] = value
    return reordered


def _obstacles(sliced: ModelConfig, student: ModelConfig) -> dict[str, str]:
    """Find the parts that cannot start from the slice, each with the first key in which slice and student differ."""
    ours, theirs = _shapes(sliced), _shapes(student)
    obstacles = {}
    for name, (_, keys) in _PARTS.items():
        if differing := [key for key in keys if ours.get(key) != theirs.get(key)]:
            obstacles[name] = differing[0]
    # A projection may teach a fresh extractor the channels that it knows, but needs as many of them.
    if sliced.extractor_conv_layer_config[-1][0] != student.extractor_conv_layer_config[-1][0]:
        obstacles.setdefault("projection", "extractor_conv_layer_config")
    return obstacles


def _shapes(config: ModelConfig) -> dict[str, Any]:
    """Return the config's keys without the sizes of blocks that are switched off."""
    shapes = asdict(config)
    for key in config.of_layer(0):
        is_on = config.encoder_use_feed_forward if key.startswith("encoder_ff") else config.encoder_use_attention
        if not key.startswith("encoder_use"):
            shapes[key] = [size if block else None for size, block in zip(shapes[key], is_on, strict=True)]
    return shapes
