"""Print what came out of a compression run: sizes, kept units per layer, and the loss on held-out speech.

python -m demo.report --exp_dir demo/out/exp --teacher_ckpt demo/out/mini-hubert.pth --tsv demo/out/data/valid.tsv
"""

import argparse
from pathlib import Path
from statistics import fmean

import cli
from evaluation.fidelity import HeldOutSpeech, make_student, measure_fidelity, shared_min_samples
from evaluation.tables import architecture_tables, fidelity_table
from report.experiment import read_experiment
from training.settings import parse_distill_layers
from wav2vec2.audio import MAX_SECONDS
from wav2vec2.files.checkpoint import load_model
from wav2vec2.files.errors import UserError


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--exp_dir", type=Path, required=True, help="the exp_dir of run.sh")
    parser.add_argument("--teacher_ckpt", type=Path, required=True)
    parser.add_argument("--tsv", type=Path, required=True, help="manifest of held-out speech")
    parser.add_argument("--distill_layers", default="0.2,4,6", help="as in training")
    parser.add_argument("--max_seconds", type=float, default=MAX_SECONDS, help="leave out longer utterances")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    run = read_experiment(args.exp_dir)
    if run.notes or run.target_sparsity is None or len(run.models) < 2:
        problem = run.notes[0] if run.notes else "the run is not complete"
        raise UserError(f"{args.exp_dir}: {problem}; give the exp_dir of a finished run of run.sh")
    teacher = load_model(args.teacher_ckpt).eval()
    models = {model.name: load_model(model.path).eval() for model in run.models}
    layers = [layer for group in parse_distill_layers(args.distill_layers) for layer in group]
    students = [make_student(m.name, m.path, models[m.name], teacher, layers) for m in run.models]
    speech = HeldOutSpeech(args.tsv, args.max_seconds, shared_min_samples([teacher, *models.values()]))
    fidelity = dict(zip(models, measure_fidelity(teacher, students, layers, speech), strict=True))

    final = models[run.models[-1].name]
    num_before, num_after = teacher.get_num_params(), final.get_num_params()
    sparsity = 1 - num_after / num_before
    verdict = "met within 0.5%" if abs(sparsity - run.target_sparsity) <= 0.005 else "missed by more than 0.5%"
    print(f"\nparameters   {num_before:,} -> {num_after:,}")
    print(f"sparsity     {sparsity:.4f} reached, {run.target_sparsity:.4f} wanted: {verdict}")
    for table in (*architecture_tables(teacher.config, final.config), fidelity_table(fidelity)):
        print(f"\n{table}")
    for name, found in fidelity.items():
        if found["projections"]:  # the distillation loss with the published weights
            print(f"feature loss {name}: {fmean(layer['l1'] - layer['cosine'] for layer in found['layers']):.4f}")
    print(
        "\nto load it:\n"
        f'  ckpt = torch.load("{run.models[-1].path}", weights_only=True)\n'
        '  model = wav2vec2_model(**ckpt["config"])  # from wav2vec2.model import wav2vec2_model\n'
        '  model.load_state_dict(ckpt["state_dict"])'
    )


if __name__ == "__main__":
    cli.run(main, parse_args())
