"""Report on a run: sizes, kept units, training curves, settings, and what evaluate.py has measured.

  python -m report exp/hubert-base
  python -m report exp/hubert-base --evaluation results/evaluation.json

Prints the tables and writes EXP_DIR/report.html, which needs no other file and no network, from the files of the run,
which may still be going on. It is the last stage of run.sh.
"""

import argparse
from pathlib import Path

import cli


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.prog = "python -m report"
    parser.add_argument("exp_dir", type=Path, metavar="EXP_DIR", help="folder of distill.py, finetune.py or run.sh")
    parser.add_argument("--evaluation", type=Path, metavar="JSON", help="results of evaluate.py to show too")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    # These imports take seconds: flags are checked first.
    from report.page import write_report

    path, tables = write_report(args.exp_dir, args.evaluation)
    for table in tables:
        print(f"\n{table}")
    print(f"\nreport: {path}")


if __name__ == "__main__":
    cli.run(main, parse_args())
