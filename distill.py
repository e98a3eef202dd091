"""Step 1: joint distillation and pruning.

The student starts as a copy of --student_ckpt with masks on the units of --pruning_units. Weights,
masks and the multipliers of the sparsity penalty are trained together; the result is
EXP_DIR/ckpts/last.ckpt, which prune.py turns into a smaller model.

One GPU, keeping the published total batch of 4 x 160 s:
  python distill.py --tsv_dir data/librispeech --train_subset train960 --seconds_per_batch 160 \\
      --gpus 1 --accum_grad 4 --precision 16 --pruning_units conv,head,interm --exp_dir exp/hubert-base \\
      --teacher_ckpt pretrained/hubert-base-ls960.hf.pth --student_ckpt pretrained/hubert-base-ls960.hf.pth

Four GPUs of one node: the same with --gpus 4 and without --accum_grad.
Several nodes, or SLURM: srun (one task per GPU) or torchrun in front, with --num_nodes; run.sh does it.
No GPU: --accelerator cpu.
"""

import argparse

import cli
from lightning import add_arguments, prepare, train_student
from wav2vec2.checkpoint import load_masked_model
from wav2vec2.errors import UserError
from wav2vec2.model import PRUNING_UNITS, Wav2Vec2Model
from wav2vec2.sparsity import check_round_to, smallest_num_params


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add_arguments(parser, learning_rate=2e-4, warmup_updates=15000, max_updates=50000)
    group = parser.add_argument_group("pruning")
    group.add_argument("--pruning_units", default=",".join(PRUNING_UNITS), help="units to put masks on")
    group.add_argument("--reg_learning_rate", type=float, default=0.02, help="of masks and multipliers")
    group.add_argument("--target_sparsity", type=float, default=0.75, help="share of the parameters to remove")
    group.add_argument("--sparsity_warmup_updates", type=int, default=5000, help="the target rises over these updates")
    group.add_argument(
        "--round_to", type=int, help="recorded for prune.py: keep conv and feed-forward widths in multiples of this"
    )
    return parser.parse_args()


def parse_pruning_units(text: str) -> list[str]:
    units = text.split(",")
    unknown = [unit for unit in units if unit not in PRUNING_UNITS]
    if unknown:
        raise UserError(
            f"--pruning_units: {', '.join(map(repr, unknown))} unknown; choose from {', '.join(PRUNING_UNITS)}"
        )
    return units


def check_target(args: argparse.Namespace, teacher: Wav2Vec2Model, student: Wav2Vec2Model) -> None:
    """Check that the masks can reach the target at all."""
    highest = 1 - smallest_num_params(student) / teacher.get_num_params()
    if args.target_sparsity > highest:
        raise UserError(
            f"--target_sparsity {args.target_sparsity}: pruning {args.pruning_units} removes at most {highest:.4f} "
            "of the teacher's parameters; lower the target or add --pruning_units"
        )


def main(args: argparse.Namespace) -> None:
    units = parse_pruning_units(args.pruning_units)
    if not 0 < args.target_sparsity < 1:
        raise UserError(f"--target_sparsity: expected a number between 0 and 1, found {args.target_sparsity}")
    for name in ("sparsity_warmup_updates", "reg_learning_rate"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name}: expected 0 or more, found {getattr(args, name)}")
    if args.round_to is not None:
        check_round_to(args.round_to, "--round_to")
    setup = prepare(args)
    student = load_masked_model(args.student_ckpt, units)
    projections = setup.make_projections(student, args.distill_mode)
    check_target(args, setup.teacher, student)
    train_student(
        args,
        "distill and prune",
        setup,
        student,
        projections,
        use_reg=True,
        reg_learning_rate=args.reg_learning_rate,
        target_sparsity=args.target_sparsity,
        sparsity_warmup_updates=args.sparsity_warmup_updates,
    )


if __name__ == "__main__":
    cli.run(main, parse_args())
