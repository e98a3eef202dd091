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
from typing import TYPE_CHECKING, Any

import cli
from wav2vec2.files.errors import UserError, short_repr

if TYPE_CHECKING:  # at run time torch is imported where it is needed: wrong flags and --help need not wait for it
    from torch import Tensor

    from wav2vec2.model import Wav2Vec2Model
    from wav2vec2.sparsity import Size

# Far above any width; a number without bounds could not be read back from the file that it is recorded in.
MAX_ROUND_TO = 1_000_000


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
        default=1,
        help="keep conv channels and feed-forward widths in multiples of N, rounded up by the best of the units about "
        "to go (1 is the published rounding; 8 suits tensor cores)",
    )
    return parser.parse_args()


def load_pruned_model(path: Path) -> "Wav2Vec2Model":
    """Load a model file; the published name of ``wav2vec2.files.checkpoint.load_model``."""
    from wav2vec2.files.checkpoint import load_model

    return load_model(path)


def check_flags(args: argparse.Namespace) -> None:
    """Check what can be checked without a file.

    Raises:
        UserError: names the option, what was found and what is expected.
    """
    if not 1 <= args.round_to <= MAX_ROUND_TO:
        found = short_repr(args.round_to)
        raise UserError(f"--round_to: expected a whole number from 1 to {MAX_ROUND_TO}, found {found}")
    if args.target_sparsity is not None and not 0 < args.target_sparsity < 1:
        raise UserError(f"--target_sparsity: expected a number between 0 and 1, found {args.target_sparsity}")


def masked_model(
    training: dict[str, Any], student_state: dict[str, "Tensor"], original: dict[str, Any], args: argparse.Namespace
) -> "Wav2Vec2Model":
    """Build the student with its masks, as it was trained.

    Args:
        training: what the checkpoint says of its run; nothing if it is of the published program.
        student_state: weights and masks.
        original: config of --original_ckpt, which the student has if the checkpoint does not say its config.
        args: name the files in errors.

    Raises:
        UserError: the weights do not fit the model.
    """
    import torch

    from training.checkpoints import recorded_head
    from wav2vec2.components import published_state
    from wav2vec2.files.checkpoint import check_weights, load_state
    from wav2vec2.files.heads import build_with_head, with_outputs
    from wav2vec2.model import masked_units, with_masks

    recorded = training.get("student_config", {})
    if not isinstance(recorded, dict):
        found = f"distillation: student_config: expected a dict, found {short_repr(recorded)}"
        raise UserError(f"{args.distilled_ckpt}: {found}")
    head = recorded_head(training, args.distilled_ckpt)
    config = with_outputs(with_masks(recorded or original, masked_units(student_state)), head)
    source = f"{args.distilled_ckpt} in the model of {args.original_ckpt}"
    with torch.device("meta"):  # before memory is taken for what the checkpoint says of its layers
        expected = build_with_head(config, head, source).state_dict()
    check_weights(expected, published_state(student_state), source)
    model = build_with_head(config, head, source)
    load_state(model, student_state, source)
    return model


def fit_to_target(
    model: "Wav2Vec2Model", training: dict[str, Any], args: argparse.Namespace, original: "Size"
) -> float:
    """Meet the targets of the checkpoint, or the sparsity of the user, and say what that took: the shift."""
    from wav2vec2.sparsity import Size, expected_size, fit_masks, pruned_size

    original = Size(*(training.get(f"original_num_{name}") or size for name, size in original._asdict().items()))
    targets = Size(training.get("target_sparsity"), training.get("target_macs"))
    if args.target_sparsity is not None:
        targets = Size(args.target_sparsity, None)
    if targets == (None, None):
        return 0.0
    model.eval()
    names = Size("sparsity", "multiply-adds gone")

    def gone(size: "Size") -> list[tuple[str, float, float]]:
        """Name, target and value of what has a target."""
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
        if args.round_to > 1 and abs(fitted - target) > args.sparsity_tolerance:
            taken = "the nearest that is not larger" if fitted >= target else "the smallest model there is"
            print(
                f"round_to {args.round_to}: no threshold gives a {name} within {args.sparsity_tolerance:g} of "
                f"{target:.4f}; {taken} has {fitted:.4f}",
                file=sys.stderr,
            )
    return shift


def warn_if_unfinished(distilled: dict[str, Any], path: Path, shift: float) -> None:
    """Warn where the run of a checkpoint has not come to its end; the published program's do not tell."""
    from training.checkpoints import INTERMEDIATE

    training = distilled["distillation"]
    settings = training.get("settings")
    num_updates = settings.get("max_updates") if isinstance(settings, dict) else None
    if INTERMEDIATE not in training and isinstance(num_updates, int) and distilled["global_step"] < num_updates:
        print(
            f"warning: {path} is of update {distilled['global_step']} of {num_updates}, an unfinished run: its masks "
            f"were still on their way (threshold moved by {shift:+.4f}), and the model will be worse than its size "
            "suggests; finish the run with distill.py --resume_checkpoint auto",
            file=sys.stderr,
        )


def write_pruned(
    model: "Wav2Vec2Model",
    projections: dict[str, "Tensor"],
    args: argparse.Namespace,
    num_original: int,
    out: Path,
    made_by: dict[str, Any],
) -> None:
    """Prune a model in place, write it, and say what that took."""
    from wav2vec2.files.checkpoint import save
    from wav2vec2.files.heads import contents_of
    from wav2vec2.model import masked_units
    from wav2vec2.sparsity import num_params_without_rounding

    num_unrounded = num_params_without_rounding(model) if args.round_to > 1 else 0  # it takes a copy of the model
    units = masked_units(model.state_dict())
    kept_dims = model.eval().encoder.kept_dims()
    config = model.prune()
    if kept_dims is not None:  # the dimensions of frames that are left
        for key, value in projections.items():
            if key.endswith("weight"):
                projections[key] = value[:, kept_dims].clone()
    save(out, {**contents_of(model), "distill_linear_projs": projections, "made_by": made_by})
    print(json.dumps(config, indent=2))
    num_params = int(model.get_num_params())
    sparsity = f"sparsity {1 - num_params / num_original:.4f}"
    if num_unrounded:
        print(
            f"round_to {args.round_to}: {num_params - num_unrounded:,} parameters "
            f"({num_params / num_unrounded - 1:.2%}) more than without ({num_unrounded:,}), {sparsity}",
            file=sys.stderr,
        )
    print(
        f"pruned {', '.join(units)}: {num_original:,} -> {num_params:,} parameters, {sparsity}: {out}", file=sys.stderr
    )


def main(args: argparse.Namespace) -> None:
    check_flags(args)
    from training.checkpoints import (
        PRUNED_MODEL,
        fingerprint,
        made_before,
        read_training_checkpoint,
        split_state_dict,
    )
    from wav2vec2.files.checkpoint import build_model, read_model_file
    from wav2vec2.model import masked_units, with_masks
    from wav2vec2.sparsity import round_widths, size_of

    distilled = read_training_checkpoint(args.distilled_ckpt)
    student_state, projections = split_state_dict(distilled)
    if not masked_units(student_state):
        raise UserError(f"{args.distilled_ckpt}: no masks in it; give the checkpoint of distill.py")
    original = read_model_file(args.original_ckpt)
    out = args.distilled_ckpt.parent / PRUNED_MODEL
    made_by = {
        "script": "prune.py",
        "distilled_ckpt": fingerprint(args.distilled_ckpt),
        "original_ckpt": fingerprint(args.original_ckpt),
        "target_sparsity": args.target_sparsity,
        "sparsity_tolerance": args.sparsity_tolerance,
        "round_to": args.round_to,
    }
    if (before := made_before(out, made_by)) is not None:
        print(json.dumps(before["config"], indent=2))
        print(f"made already, from the same files with the same settings: {out}", file=sys.stderr)
        return

    training = distilled["distillation"]
    model = masked_model(training, student_state, original["config"], args)
    original_size = size_of(build_model(with_masks(original["config"], ()), args.original_ckpt))
    round_widths(model, args.round_to)
    shift = fit_to_target(model, training, args, original_size)
    warn_if_unfinished(distilled, args.distilled_ckpt, shift)
    write_pruned(model, projections, args, int(original_size.params), out, made_by)


if __name__ == "__main__":
    cli.run(main, parse_args())
