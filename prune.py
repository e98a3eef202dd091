"""Turn the masks of step 1 into a physically smaller model.

Which units were pruned is read from the checkpoint. Writes pruned_hubert_base.pth (state_dict, config,
distill_linear_projs, and the head where the student has one) beside the checkpoint, for final_distill.py, and prints
its config as JSON.

  python prune.py --distilled_ckpt exp/hubert-base/ckpts/last.ckpt \\
      --original_ckpt pretrained/hubert-base-ls960.hf.pth
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cli
from training.checkpoints import (
    PRUNED_MODEL,
    fingerprint,
    is_on_the_way,
    made_before,
    read_training_checkpoint,
    recorded_head,
    trained_weights,
)
from wav2vec2.components import published_state
from wav2vec2.files.checkpoint import build_model, check_weights, load_state, read_model_file, save
from wav2vec2.files.checkpoint import load_model as load_pruned_model  # noqa: F401 - the published name, which others import
from wav2vec2.files.errors import UserError, short_repr
from wav2vec2.files.heads import build_with_head, contents_of, with_outputs
from wav2vec2.model import Wav2Vec2Model, masked_units, with_masks
from wav2vec2.sparsity import (
    Size,
    check_round_to,
    expected_size,
    fit_masks,
    num_params_without_rounding,
    pruned_size,
    round_widths,
    size_of,
)


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--distilled_ckpt", required=True, type=Path, help="last.ckpt of distill.py")
    parser.add_argument("--original_ckpt", required=True, type=Path, help="distill.py's --student_ckpt")
    parser.add_argument(
        "--target_sparsity", type=float, help="size to meet (default: the target that the checkpoint was trained for)"
    )
    parser.add_argument(
        "--sparsity_tolerance",
        type=float,
        default=0.005,
        help="move the masks' threshold only if the pruned size is further than this from the target; "
        "1 never moves it, as the published program",
    )
    parser.add_argument(
        "--round_to",
        type=int,
        metavar="N",
        help="keep conv channels and feed-forward widths in multiples of N, rounded up by the best of the units about "
        "to go (default: what the checkpoint names, or 1, the published rounding; 8 suits tensor cores)",
    )
    return parser.parse_args()


def chosen_round_to(training: dict[str, Any], args: argparse.Namespace) -> int:
    """--round_to, or what the checkpoint names, or 1."""
    source, value = "--round_to", args.round_to
    if value is None:
        source, value = f"{args.distilled_ckpt}: distillation: round_to", training.get("round_to")
    if value is None:
        return 1
    check_round_to(value, source)
    return value


def student_config(training: dict[str, Any], original: dict[str, Any], path: Path) -> dict[str, Any]:
    """The config of ``original``, or the recorded one in a checkpoint of when distill.py made students itself."""
    settings, config = training.get("settings"), training.get("student_config")
    if not isinstance(settings, dict) or not settings.keys() & {"student_config", "student_extractor"}:
        return original
    if not isinstance(config, dict):
        raise UserError(f"{path}: distillation: student_config: expected a dict, found {short_repr(config)}")
    return config


def fit_to_target(
    model: Wav2Vec2Model, training: dict[str, Any], args: argparse.Namespace, original: Size, round_to: int
) -> float:
    """Meet the targets of the checkpoint, or the sparsity of the user, and say what that took: the shift."""
    targets = Size(training.get("target_sparsity"), training.get("target_macs"))
    if args.target_sparsity is not None:
        targets = Size(args.target_sparsity, None)
    if targets == (None, None):
        return 0.0
    if targets.params is not None and not 0 < targets.params < 1:
        raise UserError(f"--target_sparsity: expected a number between 0 and 1, found {targets.params}")
    model.eval()
    names = Size("sparsity", "multiply-adds gone")

    def gone(size: Size) -> list[tuple[str, float, float]]:
        """Name, target and what there is of what has a target."""
        parts = zip(names, targets, size, original, strict=True)
        return [(name, target, 1 - after / before) for name, target, after, before in parts if target is not None]

    wanted = Size(*(target and (1 - target) * before for target, before in zip(targets, original, strict=True)))
    tolerance = Size(*(args.sparsity_tolerance * before for before in original))
    sizes = expected_size(model), pruned_size(model)
    shift = fit_masks(model, wanted, tolerance)
    action = f"threshold moved by {shift:+.4f} to meet the target" if shift else "within tolerance, masks as trained"
    for (name, target, expected), (_, _, rounded) in zip(*map(gone, sizes), strict=True):
        print(
            f"{name}: target {target:.4f}, expected after training {expected:.4f}, rounded {rounded:.4f}; {action}",
            file=sys.stderr,
        )
    for name, target, fitted in gone(pruned_size(model)):
        if round_to > 1 and abs(fitted - target) > args.sparsity_tolerance:
            taken = "the nearest that is not larger" if fitted >= target else "the smallest model there is"
            print(
                f"round_to {round_to}: no threshold gives a {name} within {args.sparsity_tolerance:g} of {target:.4f}; "
                f"{taken} has {fitted:.4f}",
                file=sys.stderr,
            )
    return shift


def narrow(state: dict[str, Tensor], kept_dims: Tensor) -> None:
    """Keep, in place, what projections and objectives read of the dimensions of frames that are left (n,)."""
    for key, value in state.items():
        if key.endswith("weight"):
            state[key] = value[:, kept_dims].clone()
        elif key.endswith("hidden_frame"):
            state[key] = value[kept_dims].clone()


def warn_if_unfinished(distilled: dict[str, Any], path: Path, shift: float) -> None:
    """Say so where the run of a checkpoint has not come to its end; the published program's do not tell."""
    settings = distilled["distillation"].get("settings")
    num_updates = settings.get("max_updates") if isinstance(settings, dict) else None
    is_final = not is_on_the_way(distilled["distillation"])
    if is_final and isinstance(num_updates, int) and distilled["global_step"] < num_updates:
        print(
            f"warning: {path} is of update {distilled['global_step']} of {num_updates}, an unfinished run: its masks "
            f"were still on their way (threshold moved by {shift:+.4f}), and the model will be worse than its size "
            "suggests; finish the run with distill.py --resume_checkpoint auto",
            file=sys.stderr,
        )


def main(args: argparse.Namespace) -> None:
    distilled = read_training_checkpoint(args.distilled_ckpt)
    student_state, projections, objectives = trained_weights(distilled, args.distilled_ckpt)
    units = masked_units(student_state)
    if not units:
        raise UserError(f"{args.distilled_ckpt}: no masks in it; give the checkpoint of distill.py")
    training = distilled["distillation"]
    round_to = chosen_round_to(training, args)
    original = read_model_file(args.original_ckpt)
    out = args.distilled_ckpt.parent / PRUNED_MODEL
    made_by = {
        "script": "prune.py",
        "distilled_ckpt": fingerprint(args.distilled_ckpt),
        "original_ckpt": fingerprint(args.original_ckpt),
        "target_sparsity": args.target_sparsity,
        "sparsity_tolerance": args.sparsity_tolerance,
        "round_to": round_to,
    }
    if (before := made_before(out, made_by)) is not None:
        print(json.dumps(before["config"], indent=2))
        print(f"made already, from the same files with the same settings: {out}", file=sys.stderr)
        return

    head = recorded_head(training, args.distilled_ckpt)
    masked = with_outputs(with_masks(student_config(training, original["config"], args.distilled_ckpt), units), head)
    source = f"{args.distilled_ckpt} in the model of {args.original_ckpt}"
    with torch.device("meta"):  # before memory is taken for what the checkpoint says of its layers
        expected = build_with_head(masked, head, source).state_dict()
    check_weights(expected, published_state(student_state), source)
    model = build_with_head(masked, head, source)
    load_state(model, student_state, source)
    size = size_of(build_model(with_masks(original["config"], ()), args.original_ckpt))
    # The teacher's, which the student need not have had; published checkpoints do not record it.
    original_size = Size(*(training.get(f"original_num_{name}") or value for name, value in size._asdict().items()))
    num_original = original_size.params
    round_widths(model, round_to)
    shift = fit_to_target(model, training, args, original_size, round_to)
    warn_if_unfinished(distilled, args.distilled_ckpt, shift)
    num_unrounded = num_params_without_rounding(model) if round_to > 1 else None  # it takes a copy of the model
    kept_dims = model.eval().encoder.kept_dims()
    config = model.prune()
    if kept_dims is not None:
        narrow(projections, kept_dims)
        narrow(objectives, kept_dims)
    contents = {**contents_of(model), "distill_linear_projs": projections}
    if objectives:
        contents["objectives"] = objectives
    save(out, {**contents, "made_by": made_by})
    num_params = model.get_num_params()
    print(json.dumps(config, indent=2))
    if round_to > 1:
        print(
            f"round_to {round_to}: {num_params - num_unrounded:,} parameters ({num_params / num_unrounded - 1:.2%}) "
            f"more than without ({num_unrounded:,}), sparsity {1 - num_params / num_original:.4f}",
            file=sys.stderr,
        )
    print(
        f"pruned {', '.join(units)}: {num_original:,} -> {num_params:,} parameters, "
        f"sparsity {1 - num_params / num_original:.4f}: {out}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    cli.run(main, parse_args())
