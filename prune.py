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
from typing import TYPE_CHECKING

import cli
from wav2vec2.files.errors import UserError, short_repr
from wav2vec2.files.storage import check_writable

if TYPE_CHECKING:  # at run time torch is imported where it is needed: wrong flags and --help need not wait for it
    from wav2vec2.model import Wav2Vec2Model

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
        help="move the masks' threshold only if the pruned size is further than this share of it from the target "
        "(default: 0.005, or with the exact control 0, which gives the nearest size there is); 1 never moves it, as "
        "the published program",
    )
    parser.add_argument(
        "--round_to",
        type=int,
        metavar="N",
        help="keep conv channels and feed-forward widths in multiples of N, rounded up by the best of the units about "
        "to go (default: 1, the published rounding, or what suits the machine of --latency_profile; 8 suits tensor "
        "cores)",
    )
    return parser.parse_args()


def load_pruned_model(path: Path) -> "Wav2Vec2Model":
    """Load a model file; the published name of ``wav2vec2.files.checkpoint.load_model``."""
    from wav2vec2.files.checkpoint import load_model

    return load_model(path)


def main(args: argparse.Namespace) -> None:
    if args.round_to is not None and not 1 <= args.round_to <= MAX_ROUND_TO:
        found = short_repr(args.round_to)
        raise UserError(f"--round_to: expected a whole number from 1 to {MAX_ROUND_TO}, found {found}")
    if args.target_sparsity is not None and not 0 < args.target_sparsity < 1:
        raise UserError(f"--target_sparsity: expected a number between 0 and 1, found {args.target_sparsity}")
    # These import torch, for which wrong flags and --help need not wait.
    from training.checkpoints import PRUNED_MODEL, fingerprint, made_before, read_training_checkpoint
    from training.pruning import prune, recorded_profile
    from wav2vec2.files.checkpoint import read_model_file, save

    distilled, original = read_training_checkpoint(args.distilled_ckpt), read_model_file(args.original_ckpt)
    profile = recorded_profile(distilled["distillation"], args.distilled_ckpt)
    if args.round_to is None:
        args.round_to = 1 if profile is None else profile.multiple
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
    check_writable(out)
    contents, summary = prune(distilled, original["config"], profile, args)
    if profile is not None:
        from evaluation.latency import times_of

        configs = contents["config"], original["config"]
        contents["time"], warnings = times_of(profile, *configs, distilled["distillation"].get("original_latency"))
        print(contents["time"], *warnings, sep="\n", file=sys.stderr)
    save(out, {**contents, "made_by": made_by})
    print(json.dumps(contents["config"], indent=2))
    print(f"{summary}: {out}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, parse_args())
