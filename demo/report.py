"""Print what came out of a compression run: sizes, shapes per layer, and the feature loss on held-out speech.

python demo/report.py --exp_dir demo/out/exp --teacher_ckpt demo/out/mini-hubert.pth --tsv demo/out/data/valid.tsv
"""

import argparse
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the script runs from the checkout, not installed

from training.pairs import parse_distill_layers

import cli
from evaluation.architecture import print_architecture
from evaluation.fidelity import HeldOutSpeech, make_student, measure_fidelity, shared_min_samples
from training.checkpoints import LAST_CHECKPOINT, PRUNED_MODEL, read_training_checkpoint
from wav2vec2.audio import MAX_SECONDS
from wav2vec2.checkpoint import load_model
from wav2vec2.errors import UserError


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--exp_dir", type=Path, required=True, help="run.sh's exp_dir")
    parser.add_argument("--teacher_ckpt", type=Path, required=True)
    parser.add_argument("--tsv", type=Path, required=True, help="manifest of held-out speech")
    parser.add_argument("--distill_layers", default="0.2,4,6", help="as in training")
    parser.add_argument("--max_seconds", type=float, default=MAX_SECONDS, help="leave out longer utterances")
    return parser.parse_args()


def feature_loss(fidelity: dict[str, Any]) -> float:
    """The distillation loss (L1 minus cosine, the published weights) of what was measured layer by layer."""
    return fmean(layer["l1"] - layer["cosine"] for layer in fidelity["layers"])


def main(args: argparse.Namespace) -> None:
    teacher = load_model(args.teacher_ckpt).eval()
    paths = {
        "after pruning": args.exp_dir / "ckpts" / PRUNED_MODEL,
        "after final distillation": args.exp_dir / "final" / "ckpts" / PRUNED_MODEL,
    }
    target = read_training_checkpoint(args.exp_dir / "ckpts" / LAST_CHECKPOINT)["distillation"]["target_sparsity"]
    models = {label: load_model(path).eval() for label, path in paths.items()}
    layers = [layer for group in parse_distill_layers(args.distill_layers) for layer in group]
    students = [make_student(label, paths[label], model, teacher, layers) for label, model in models.items()]
    for student in students:
        if student.projections is None:
            raise UserError(f"{student.path}: no projections in it; give the --exp_dir of a run of run.sh")
    speech = HeldOutSpeech(args.tsv, args.max_seconds, shared_min_samples([teacher, *models.values()]))
    compared = dict(zip(models, measure_fidelity(teacher, students, layers, speech), strict=True))
    *_, final = models.values()
    num_before, num_after = teacher.get_num_params(), final.get_num_params()

    print(f"\nparameters   {num_before:,} -> {num_after:,}")
    sparsity = 1 - num_after / num_before
    verdict = "met within 0.5%" if abs(sparsity - target) <= 0.005 else "missed by more than 0.5%"
    print(f"sparsity     {sparsity:.4f} reached, {target:.4f} wanted: {verdict}")
    print_architecture(teacher.config, final.config)
    print(f"\n{'held-out speech':<24}{'feature loss':>14}" + "".join(f"{f'cosine {layer}':>11}" for layer in layers))
    for label, found in compared.items():
        cosines = "".join(f"{layer['cosine']:>11.3f}" for layer in found["layers"])
        print(f"{label:<24}{feature_loss(found):>14.4f}{cosines}")
    print(
        "\nto load it:\n"
        f'  ckpt = torch.load("{students[-1].path}", weights_only=True)\n'
        '  model = wav2vec2_model(**ckpt["config"])  # from wav2vec2.model import wav2vec2_model\n'
        '  model.load_state_dict(ckpt["state_dict"])'
    )


if __name__ == "__main__":
    cli.run(main, parse_args())
