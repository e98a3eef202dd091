"""Write the compressed model that users load, from the checkpoint of the final distillation.

Writes pruned_hubert_base.pth (state_dict, config, distill_linear_projs) beside the checkpoint.

  python save_final_ckpt.py --config_path exp/hubert-base/ckpts/pruned_hubert_base.pth \\
      --ckpt_after_final_distill exp/hubert-base/final/ckpts/last.ckpt
"""

import argparse
from pathlib import Path

import cli
from lightning import PRUNED_MODEL, read_training_checkpoint, split_state_dict
from wav2vec2.checkpoint import build_model, load_state, read_model_file, save


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--config_path", required=True, type=Path, help="the pruned model that prune.py wrote")
    parser.add_argument("--ckpt_after_final_distill", required=True, type=Path, help="last.ckpt of final_distill.py")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    config = read_model_file(args.config_path)["config"]
    trained = read_training_checkpoint(args.ckpt_after_final_distill)
    student_state, projections = split_state_dict(trained["state_dict"])
    model = build_model(config, args.config_path)
    load_state(model, student_state, f"{args.ckpt_after_final_distill} in the model of {args.config_path}")
    out = args.ckpt_after_final_distill.parent / PRUNED_MODEL
    save(out, {"state_dict": model.state_dict(), "config": config, "distill_linear_projs": projections})
    print(f"{model.get_num_params():,} parameters: {out}")


if __name__ == "__main__":
    cli.run(main, parse_args())
