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

import pytorch_lightning as pl
import torch

import cli
from training.arguments import DEFAULT_MODEL, PruningSettings, add_arguments, read_arguments
from training.data import SpeechDataModule
from training.objectives import with_layer_groups
from training.task import with_task
from training.trainer import new_projections, train
from wav2vec2.files.checkpoint import build_model, load_model, read_model_file
from wav2vec2.files.errors import UserError
from wav2vec2.files.heads import masked_model_with_its_head
from wav2vec2.model import Wav2Vec2Model, with_masks
from wav2vec2.sparsity import Size, size_of, smallest_size


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add_arguments(
        parser, prunes=True, student_ckpt=DEFAULT_MODEL, learning_rate=2e-4, warmup_updates=15000, max_updates=50000
    )
    return parser.parse_args()


def check_budgets(pruning: PruningSettings, teacher: Wav2Vec2Model, student: Wav2Vec2Model) -> None:
    """Check that the units that masks are on can be pruned so far, and that the student is not smaller already.

    Raises:
        UserError: names the target, and the most that can go, or what is gone.
    """
    original, smallest = size_of(teacher), smallest_size(student)
    with torch.device("meta"):
        largest = size_of(build_model(with_masks(student.config, ())))
    targets = Size(pruning.target_sparsity, pruning.target_macs)
    options = Size("--target_sparsity", "--target_macs")
    things = Size("parameters", "multiply-adds")
    rows = zip(options, targets, original, smallest, largest, things, strict=True)
    for option, target, before, after, start, thing in rows:
        if target is not None and target < (lowest := 1 - start / before):
            raise UserError(
                f"{option} {target}: the student starts without {lowest:.4f} of the teacher's {thing}; raise the target"
            )
        if target is not None and target > (highest := 1 - after / before):
            raise UserError(
                f"{option} {target}: pruning {pruning.pruning_units} removes at most {highest:.4f} of the teacher's "
                f"{thing}; lower the target or add --pruning_units"
            )


def main(args: argparse.Namespace) -> None:
    settings = read_arguments(args, "distill and prune", prunes=True)
    data = None if settings.task.is_on else SpeechDataModule(settings.data)
    pl.seed_everything(settings.data.seed, verbose=False)
    teacher = load_model(settings.models.teacher_ckpt)
    contents = read_model_file(settings.models.student_ckpt)
    if settings.task.is_on:
        contents, data = with_task(contents, settings)
    settings = with_layer_groups(settings, data, teacher)
    student = masked_model_with_its_head(contents, settings.pruning.units, settings.models.student_ckpt)
    projections = new_projections(settings, teacher, student)
    check_budgets(settings.pruning, teacher, student)
    train(settings, data, teacher, student, projections)


if __name__ == "__main__":
    cli.run(main, parse_args())
