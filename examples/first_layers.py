"""A student of the teacher's first layers, to compare with: distilled without pruning, as DistilHuBERT is.

  python -m examples.first_layers --teacher_ckpt pretrained/hubert-base-ls960.hf.pth --num_layers 2 \\
      --distill_layers 4,8,12 --out exp/distilhubert/student.pth
  python final_distill.py --distill_mode predlayer --distill_layers 4,8,12 --exp_dir exp/distilhubert \\
      --teacher_ckpt pretrained/hubert-base-ls960.hf.pth --student_ckpt exp/distilhubert/student.pth ...
  python save_final_ckpt.py --config_path exp/distilhubert/student.pth \\
      --ckpt_after_final_distill exp/distilhubert/ckpts/last.ckpt

The student has the teacher's extractor, positional convolution and first layers (DistilHuBERT, arXiv 2110.01900,
section 3.1) and fresh prediction heads, one for each of --distill_layers.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

import cli
from lightning import make_projections, parse_distill_layers
from wav2vec2 import checkpoint
from wav2vec2.errors import UserError
from wav2vec2.model import Wav2Vec2Model


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--teacher_ckpt", type=Path, required=True)
    parser.add_argument("--num_layers", type=int, required=True, help="layers of the student")
    parser.add_argument("--distill_layers", default="4,8,12", help="the teacher's layers to predict")
    parser.add_argument("--seed", type=int, default=2022, help="of the prediction heads")
    parser.add_argument("--out", type=Path, required=True, help="the student, for final_distill.py --student_ckpt")
    return parser.parse_args()


def first_layers(teacher: Wav2Vec2Model, num_layers: int) -> Wav2Vec2Model:
    """The teacher's extractor, positional convolution and first ``num_layers`` layers, with its weights."""
    config: dict[str, Any] = {
        key: value[:num_layers] if key.startswith("encoder_") and isinstance(value, list) else value
        for key, value in teacher.config.items()
    }
    student = checkpoint.build_model({**config, "encoder_num_layers": num_layers})
    weights = teacher.state_dict()
    student.load_state_dict({name: weights[name] for name in student.state_dict()})
    return student


def main(args: argparse.Namespace) -> None:
    teacher = checkpoint.load_model(args.teacher_ckpt)
    num_teacher_layers = teacher.config["encoder_num_layers"]
    if not 0 < args.num_layers <= num_teacher_layers:
        raise UserError(
            f"--num_layers: expected 1 to {num_teacher_layers}, the teacher's layers, found {args.num_layers}"
        )
    student = first_layers(teacher, args.num_layers)
    torch.manual_seed(args.seed)
    dim = teacher.config["encoder_embed_dim"]
    projections = make_projections("predlayer", parse_distill_layers(args.distill_layers), dim, dim)
    contents = {
        "state_dict": student.state_dict(),
        "config": student.config,
        "distill_linear_projs": projections.state_dict(),
    }
    checkpoint.save(args.out, contents)
    before, after = teacher.get_num_params(), student.get_num_params()
    print(f"{before:,} -> {after:,} parameters ({1 - after / before:.2%} fewer), written to {args.out}")


if __name__ == "__main__":
    cli.run(main, parse_args())
