"""Step 2: distil the pruned student further, without masks and without the sparsity penalty.

--student_ckpt is what prune.py wrote; its projections are taken over. The result is
EXP_DIR/ckpts/last.ckpt, from which save_final_ckpt.py makes the model file.

  python final_distill.py --tsv_dir data/librispeech --train_subset train960 --seconds_per_batch 160 \\
      --gpus 1 --accum_grad 4 --precision 16 --exp_dir exp/hubert-base/final \\
      --teacher_ckpt pretrained/hubert-base-ls960.hf.pth --student_ckpt exp/hubert-base/ckpts/pruned_hubert_base.pth

Several GPUs, nodes, SLURM, CPU: as in distill.py.

With --task_tsv the student's head learns labels beside distillation, or with --distill_weight 0 instead of it.

A student that make_student.py made has no projections yet and gets fresh ones. Methods without pruning are this stage
alone (conf/distilhubert.conf).
"""

import argparse

import cli
from training.settings import FinalSettings, add_arguments, read_arguments
from wav2vec2.files.errors import UserError


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add_arguments(parser, FinalSettings, learning_rate=1e-4, warmup_updates=5000, max_updates=25000)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    settings = read_arguments(args, FinalSettings)
    # These import torch and Lightning, for which wrong flags need not wait.
    from training.distillation import read_inputs, train
    from training.pairing import new_projections
    from wav2vec2.files.checkpoint import load_state
    from wav2vec2.files.heads import model_with_its_head

    data, teacher, pruned = read_inputs(settings)
    learnt, made_by = pruned.get("distill_linear_projs"), pruned.get("made_by")
    is_new = isinstance(made_by, dict) and made_by.get("script") == "make_student.py"
    if settings.distils and not is_new and not isinstance(learnt, dict):
        raise UserError(
            f"{args.student_ckpt}: no distill_linear_projs in it; give the file that prune.py wrote, or make a student "
            "that is not pruned with make_student.py"
        )
    student = model_with_its_head(pruned, settings.models.student_ckpt)
    projections = new_projections(settings, teacher, student)
    if len(projections) and learnt:  # none are in it where the task was all
        fit = "distill_linear_projs; --distill_layers and --distill_mode must be those of distill.py"
        load_state(projections, learnt, f"{args.student_ckpt} ({fit})")
    train(settings, data, teacher, student, projections)


if __name__ == "__main__":
    cli.run(main, parse_args())
