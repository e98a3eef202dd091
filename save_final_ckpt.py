"""Write the compressed model that users load, from the checkpoint of the final distillation.

Writes pruned_hubert_base.pth (state_dict, config, distill_linear_projs) beside the checkpoint.

  python save_final_ckpt.py --config_path exp/hubert-base/ckpts/pruned_hubert_base.pth \\
      --ckpt_after_final_distill exp/hubert-base/final/ckpts/last.ckpt
"""

import argparse
from pathlib import Path

import cli
from training.checkpoints import PRUNED_MODEL, fingerprint, made_before, read_training_checkpoint, trained_weights
from wav2vec2.checkpoint import build_model, load_state, read_model_file, save


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--config_path", required=True, type=Path, help="the pruned model that prune.py wrote")
    parser.add_argument("--ckpt_after_final_distill", required=True, type=Path, help="last.ckpt of final_distill.py")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    config = read_model_file(args.config_path)["config"]
    trained = read_training_checkpoint(args.ckpt_after_final_distill)
    out = args.ckpt_after_final_distill.parent / PRUNED_MODEL
    made_by = {
        "script": "save_final_ckpt.py",
        "config_path": fingerprint(args.config_path),
        "ckpt_after_final_distill": fingerprint(args.ckpt_after_final_distill),
    }
    if made_before(out, made_by) is not None:
        print(f"made already, from the same files: {out}")
        return

    student_state, projections = trained_weights(trained, args.ckpt_after_final_distill)
    model = build_model(config, args.config_path)
    load_state(model, student_state, f"{args.ckpt_after_final_distill} in the model of {args.config_path}")
    contents = {"state_dict": model.state_dict(), "config": config, "distill_linear_projs": projections}
    save(out, {**contents, "made_by": made_by})
    print(f"{model.get_num_params():,} parameters: {out}")


if __name__ == "__main__":
    cli.run(main, parse_args())
