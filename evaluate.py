"""Measure what models cost and what they know, side by side: tables, and the same as JSON.

  cost       parameters, multiplications, bytes, and time on this machine
  fidelity   L1, cosine and CKA of the distilled layers with the teacher's (with --teacher and --tsv)
  probes     linear classifiers on frozen features, a SUPERB in miniature (with --probes), beside two controls:
             log-mel features, and random weights
  own heads  of fine-tuned models, on the same lists if kind and labels are theirs

  python evaluate.py --teacher pretrained/hubert-base-ls960.hf.pth \\
      --models exp/hubert-base/ckpts/pruned_hubert_base.pth exp/hubert-base/final/ckpts/pruned_hubert_base.pth \\
      --names pruned final --tsv data/librispeech/valid.tsv --distill_layers 0.4,8,12 \\
      --probes probes/keywords.tsv --out results/evaluation.json
  python -m report exp/hubert-base --evaluation results/evaluation.json     to show it with the run

A probe is a list of labelled audio files, separated by tabs, with the header "split path label" (clips, or a
verification), "split path start end label" (segments) or "split path text" (CTC on words): see docs/measuring.md. All
numbers but times are the same in every run on the same machine.
"""

import argparse
import json
from pathlib import Path

import cli
from wav2vec2.audio import MAX_SECONDS
from wav2vec2.files.errors import UserError
from wav2vec2.files.storage import atomic_path, check_writable

BACKENDS = ("torch", "onnx", "onnx-int8")
# Every published extractor makes frames of this.
MIN_SECONDS = 0.1


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--teacher", type=Path, help="the model that the others are compared with")
    parser.add_argument("--models", type=Path, nargs="+", default=[], metavar="PTH", help="model files")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="names of --models (default: their file names)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: only print the tables)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    group = parser.add_argument_group("speed")
    group.add_argument("--speed_seconds", type=float, nargs="*", default=[1, 5, 15], help="lengths; none: no timing")
    group.add_argument(
        "--backends", default="torch", metavar="LIST", help=f"{','.join(BACKENDS)}: time and probe each of them"
    )
    group = parser.add_argument_group("fidelity")
    group.add_argument("--tsv", type=Path, help="manifest of held-out speech, from prepare_data.py")
    group.add_argument("--distill_layers", default="0.4,8,12", help="as in training")
    group.add_argument(
        "--distill_mode", choices=("layer2layer", "predlayer"), help="as in training (default: read from each file)"
    )
    group.add_argument("--max_seconds", type=float, default=MAX_SECONDS, help="leave out longer utterances")
    group = parser.add_argument_group("probes")
    group.add_argument("--probes", type=Path, nargs="+", default=[], metavar="TSV", help="lists of labelled clips")
    group.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="run each probe once for each seed")
    return parser.parse_args()


def check_arguments(args: argparse.Namespace) -> None:
    """Raise a :class:`UserError` for impossible values, and for combinations that measure nothing."""
    if not args.models and not args.teacher:
        raise UserError("--models: nothing to measure; give one or more model files, or --teacher")
    if args.names and len(args.names) != len(args.models):
        raise UserError(f"--names: {len(args.names)} names for {len(args.models)} models; give one each")
    if args.tsv and not (args.teacher and args.models):
        raise UserError("--tsv: fidelity compares --models with a --teacher; give both, or leave --tsv out")
    threads = [] if args.threads is None else [args.threads]
    limits = {"speed_seconds": (args.speed_seconds, MIN_SECONDS), "threads": (threads, 1), "seeds": (args.seeds, 0)}
    for option, (values, least) in limits.items():
        if bad := [value for value in values if not least <= value < 2**31]:
            raise UserError(f"--{option} {bad[0]:g}: expected at least {least:g}")
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds: expected every seed once, found {args.seeds}")
    backends = args.backends.split(",")
    if set(backends) - set(BACKENDS) or len(set(backends)) < len(backends) or "torch" not in backends:
        raise UserError(f"--backends {args.backends}: expected torch, and each once of {', '.join(BACKENDS)}")


def main(args: argparse.Namespace) -> None:
    check_arguments(args)
    # These imports take seconds: flags are checked first.
    from evaluation.measure import evaluate
    from evaluation.tables import evaluation_tables
    from training.settings import parse_distill_layers

    layers = [layer for group in parse_distill_layers(args.distill_layers) for layer in group]
    if args.out:
        try:
            check_writable(args.out)
        except UserError as error:
            cli.print_line(f"warning: {error}; the tables are printed")
    results = evaluate(args, layers, args.backends.split(","))
    try:
        if args.out:
            with atomic_path(args.out) as temporary:
                temporary.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    finally:
        for table in evaluation_tables(results):
            print(f"\n{table}")
    if args.out:
        print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    cli.run(main, parse_args())
