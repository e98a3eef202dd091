"""Write the compressed model that users load, from the checkpoint of the final distillation.

Writes pruned_hubert_base.pth (state_dict, config, distill_linear_projs, and the head where the student has one) beside
the checkpoint.

  python save_final_ckpt.py --config_path exp/hubert-base/ckpts/pruned_hubert_base.pth \\
      --ckpt_after_final_distill exp/hubert-base/final/ckpts/last.ckpt

Without --config_path the model has the config that the checkpoint records.
"""

import argparse
from pathlib import Path

import cli
from wav2vec2.files.errors import UserError, short_repr
from wav2vec2.files.storage import check_writable


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--config_path", type=Path, help="the pruned model that prune.py wrote (default: what the checkpoint records)"
    )
    parser.add_argument("--ckpt_after_final_distill", required=True, type=Path, help="last.ckpt of final_distill.py")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    # These import torch, for which wrong flags and --help need not wait.
    from training import checkpoints
    from training.pruning import load_student
    from wav2vec2.files.checkpoint import read_model_file, save
    from wav2vec2.files.heads import contents_of, with_outputs
    from wav2vec2.model import with_masks

    path = args.ckpt_after_final_distill
    config = read_model_file(args.config_path)["config"] if args.config_path else None
    trained = checkpoints.read_training_checkpoint(path)
    if config is None:
        config = trained["distillation"].get("student_config")
        if not isinstance(config, dict):  # the published program's checkpoints do not say it
            raise UserError(
                f"{path}: does not say its student's config (distillation: student_config: expected a dict, found "
                f"{short_repr(config)}); give the model that prune.py wrote with --config_path"
            )
        config = with_masks(config, ())
    out = path.parent / checkpoints.PRUNED_MODEL
    made_by = {
        "script": "save_final_ckpt.py",
        "config_path": checkpoints.fingerprint(args.config_path) if args.config_path else None,
        "ckpt_after_final_distill": checkpoints.fingerprint(path),
    }
    if checkpoints.made_before(out, made_by) is not None:
        print(f"made already, from the same files: {out}")
        return

    check_writable(out)
    student_state, projections = checkpoints.split_state_dict(trained)
    head, source = checkpoints.recorded_head(trained["distillation"], path), args.config_path or path
    config = with_outputs(config, head)
    model = load_student(config, head, student_state, f"{path} in the model of {source}")
    save(out, {**contents_of(model), "config": config, "distill_linear_projs": projections, "made_by": made_by})
    print(f"{model.get_num_params():,} parameters: {out}")


if __name__ == "__main__":
    cli.run(main, parse_args())
