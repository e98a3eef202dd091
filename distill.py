"""Step 1: joint distillation and pruning.

The student starts as a copy of --student_ckpt with masks on the units of --pruning_units. Weights,
masks and the multipliers of the sparsity penalty are trained together; the result is
EXP_DIR/ckpts/last.ckpt, which prune.py turns into a smaller model.

With --task_tsv a head of the student learns labels beside distillation, or with --distill_weight 0 instead of it:
  python distill.py --task_tsv data/commands.tsv --task_weight 1 --distill_weight 1 --gpus 1 --exp_dir exp/commands \\
      --teacher_ckpt exp/teacher/finetuned.pth --student_ckpt exp/teacher/finetuned.pth

A student of another shape than the teacher is a file of make_student.py, given as --student_ckpt.

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
from training.settings import DEFAULT_MODEL, DistillSettings, add_arguments, read_arguments


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    defaults = {"student_ckpt": DEFAULT_MODEL, "learning_rate": 2e-4, "warmup_updates": 15000, "max_updates": 50000}
    add_arguments(parser, DistillSettings, **defaults)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    settings = read_arguments(args, DistillSettings)
    # These import torch and Lightning, for which wrong flags need not wait.
    from training.distillation import read_inputs, train
    from training.pairing import check_budgets, new_projections
    from wav2vec2.files.heads import masked_model_with_its_head

    data, teacher, contents = read_inputs(settings)
    student = masked_model_with_its_head(contents, settings.pruning.units, settings.models.student_ckpt)
    projections = new_projections(settings, teacher, student)
    check_budgets(settings.pruning, teacher, student)
    train(settings, data, teacher, student, projections)


if __name__ == "__main__":
    cli.run(main, parse_args())
