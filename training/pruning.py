"""Pruning a student as its masks say: its checkpoint, the size that they shall meet, and the smaller model."""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cli import print_line
from lightning import BUDGETS
from training.checkpoints import INTERMEDIATE, recorded_head, split_state_dict
from wav2vec2.components import published_state
from wav2vec2.files.checkpoint import Source, build_model, check_weights, load_state
from wav2vec2.files.errors import UserError, short_repr
from wav2vec2.files.heads import Head, build_with_head, contents_of, with_outputs
from wav2vec2.files.profiles import parse_profile
from wav2vec2.model import Wav2Vec2Model, masked_units, with_masks
from wav2vec2.profiles import Profile
from wav2vec2.sparsity import (
    Size,
    expected_size,
    fit_masks,
    num_params_without_rounding,
    pruned_size,
    round_widths,
    size_of,
)

# Names that checkpoints give the teacher's sizes.
_ORIGINALS = ("original_num_params", "original_num_macs", "original_latency")
# The threshold of masks of a Lagrangian stays where it is if the size is so near, as a share of the wanted one.
DEFAULT_TOLERANCE = 0.005


def prune(
    distilled: dict[str, Any], original_config: dict[str, Any], profile: Profile | None, args: argparse.Namespace
) -> tuple[dict[str, Any], str]:
    """Prune the student of a checkpoint of distill.py, as the flags of prune.py say.

    ``profile`` is that of :func:`recorded_profile`.

    Returns:
        The contents of the pruned model's file, with ``distill_linear_projs``; what came of it, in words.

    Raises:
        UserError: the checkpoint has no masks, or does not fit the model.
    """
    state, projections = split_state_dict(distilled)
    units = masked_units(state)
    if not units:
        raise UserError(f"{args.distilled_ckpt}: no masks in it; give the checkpoint of distill.py")
    training = distilled["distillation"]
    model = _masked_model(training, state, original_config, args)
    before = size_of(build_model(with_masks(original_config, ()), args.original_ckpt), profile)
    # Sparsity counts from the teacher, which may be larger; checkpoints of the published program do not say its size.
    original = Size(*(training.get(name) or size for name, size in zip(_ORIGINALS, before, strict=True)))
    round_widths(model, args.round_to)
    shift = _meet_targets(model, training, original, profile, args)
    _warn_if_unfinished(distilled, shift, args)

    num_unrounded = num_params_without_rounding(model) if args.round_to > 1 else 0  # it takes a copy of the model
    kept_dims, embed_dim = model.eval().encoder.kept_dims(), model.encoder.embed_dim
    model.prune()
    if kept_dims is not None:  # the dimensions of frames that are left
        for key, value in projections.items():
            if key.endswith("weight"):
                if value.ndim != 2 or value.size(1) != embed_dim:
                    found = f"{key} has shape {list(value.shape)}, expected {embed_dim} columns"
                    raise UserError(f"{args.distilled_ckpt}: distill_linear_projs: {found}; it is damaged")
                projections[key] = value[:, kept_dims].clone()
    num_params = int(model.get_num_params())
    sparsity = f"sparsity {1 - num_params / original.params:.4f}"
    if num_unrounded:
        print_line(
            f"round_to {args.round_to}: {num_params - num_unrounded:,} parameters "
            f"({num_params / num_unrounded - 1:.2%}) more than without ({num_unrounded:,}), {sparsity}"
        )
    summary = f"pruned {', '.join(units)}: {int(original.params):,} -> {num_params:,} parameters, {sparsity}"
    return {**contents_of(model), "distill_linear_projs": projections}, summary


def _masked_model(
    training: dict[str, Any], state: dict[str, Tensor], original_config: dict[str, Any], args: argparse.Namespace
) -> Wav2Vec2Model:
    """Build the student with its masks, as it was trained; checkpoints of the published program say nothing of it."""
    recorded = training.get("student_config", {})
    if not isinstance(recorded, dict):
        found = f"distillation: student_config: expected a dict, found {short_repr(recorded)}"
        raise UserError(f"{args.distilled_ckpt}: {found}")
    head = recorded_head(training, args.distilled_ckpt)
    config = with_outputs(with_masks(recorded or original_config, masked_units(state)), head)
    return load_student(config, head, state, f"{args.distilled_ckpt} in the model of {args.original_ckpt}")


def load_student(config: dict[str, Any], head: Head | None, state: dict[str, Tensor], source: Source) -> Wav2Vec2Model:
    """Build the student of a training checkpoint, and load its weights strictly."""
    with torch.device("meta"):  # before memory is taken for what the config says of its layers
        expected = build_with_head(config, head, source).state_dict()
    check_weights(expected, published_state(state), source)
    model = build_with_head(config, head, source)
    load_state(model, state, source)
    return model


def recorded_profile(training: dict[str, Any], path: Path) -> Profile | None:
    """Return the profile of a machine that a run had a target for.

    Args:
        training: what a checkpoint says of its run.
        path: its file, for the error.

    Raises:
        UserError: the record is damaged.
    """
    settings = training.get("settings")
    if training.get("target_latency") is None or not isinstance(settings, dict):
        return None
    return Profile(parse_profile(str(settings.get("latency_profile")), f"{path}: latency_profile"))


def _meet_targets(
    model: Wav2Vec2Model, training: dict[str, Any], original: Size, profile: Profile | None, args: argparse.Namespace
) -> float:
    """Meet the targets of the checkpoint, or the sparsity of the user, and say what that took: the shift."""
    targets = Size(*(training.get(f"target_{name}") for name in BUDGETS))
    if args.target_sparsity is not None:
        targets = Size(args.target_sparsity, None)
    if set(targets) == {None}:
        return 0.0
    model.eval()
    settings = training.get("settings")
    is_exact = isinstance(settings, dict) and settings.get("sparsity_control") == "exact"
    tolerance = (0.0 if is_exact else DEFAULT_TOLERANCE) if args.sparsity_tolerance is None else args.sparsity_tolerance
    if tolerance >= 1:
        tolerance = math.inf

    def gone(size: Size) -> dict[str, tuple[float, float]]:
        """The target and the value of what has a target, by name."""
        parts = zip(("sparsity", "multiply-adds gone", "time gone"), targets, size, original, strict=True)
        return {name: (target, 1 - after / before) for name, target, after, before in parts if target is not None}

    wanted = Size(*(target and (1 - target) * before for target, before in zip(targets, original, strict=True)))
    expected, rounded = gone(expected_size(model, profile)), gone(pruned_size(model, profile))
    shift = fit_masks(model, wanted, tolerance, profile)
    action = f"threshold moved by {shift:+.4f} to meet the target" if shift else "within tolerance, masks as trained"
    for name, (target, value) in expected.items():
        values = f"expected after training {value:.4f}, rounded {rounded[name][1]:.4f}"
        print_line(f"{name}: target {target:.4f}, {values}; {action}")
    for name, (target, value) in gone(pruned_size(model, profile)).items():
        if args.round_to > 1 and abs(value - target) > max(tolerance, DEFAULT_TOLERANCE) * (1 - target):
            taken = "the nearest that is not larger" if value >= target else "the smallest model there is"
            print_line(
                f"round_to {args.round_to}: no threshold gives a {name} nearer to {target:.4f}; {taken} has {value:.4f}"
            )
    return shift


def _warn_if_unfinished(distilled: dict[str, Any], shift: float, args: argparse.Namespace) -> None:
    """Warn where the run of a checkpoint has not come to its end; the published program's do not tell."""
    settings = distilled["distillation"].get("settings")
    wanted, done = settings.get("max_updates") if isinstance(settings, dict) else None, distilled["global_step"]
    if INTERMEDIATE not in distilled["distillation"] and isinstance(wanted, int) and done < wanted:
        print_line(
            f"warning: {args.distilled_ckpt} is of update {done} of {wanted}, an unfinished run: its masks were still "
            f"on their way (threshold moved by {shift:+.4f}), and the model will be worse than its size suggests; "
            "finish the run with distill.py --resume_checkpoint auto"
        )
