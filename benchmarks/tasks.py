"""Collect what ``benchmarks/tasks.sh`` reached: a table in Markdown.

    python -m benchmarks.tasks results/8m-tasks

Reads ``finetuned.json`` of each run ``RECIPE-LIST-SEED``, and that of the teacher that a run has fine-tuned; what
is not there is left out. Writes ``tasks.md``.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch

import cli
from benchmarks.methods import averaged
from wav2vec2.files.checkpoint import read_model_file
from wav2vec2.files.errors import UserError
from wav2vec2.files.storage import atomic_path
from wav2vec2.model import wav2vec2_model

NOTES = """
Test scores in per cent, means over the seeds of training; in brackets the lowest and the highest, and behind ± half of
what 95% of bootstrap samples of the test clips span. Less is better of an error rate.
"""


class Run(NamedTuple):
    """What one run reached.

    Attributes:
        recipe, task: its name, and that of its list.
        metric: of the score.
        score: on the test clips, in per cent.
        spread: half of the width of its interval.
        num_params: of the model.
    """

    recipe: str
    task: str
    metric: str
    score: float
    spread: float
    num_params: int


def read_run(folder: Path, recipe: str, task: str) -> Run:
    """What is in the folder of a fine-tuning.

    Raises:
        UserError: its files are not those of finetune.py.
    """
    path = folder / "finetuned.json"
    try:
        test = json.loads(path.read_text(encoding="utf-8"))["test"]
        metric, score, (low, high) = test["metric"], float(test["value"]), map(float, test["interval"])
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: not the result of finetune.py ({type(error).__name__}: {error})") from error
    config = read_model_file(folder / "finetuned.pth")["config"]
    with torch.device("meta"):
        num_params = wav2vec2_model(**config).get_num_params()
    return Run(recipe, task, metric, score, (high - low) / 2, num_params)


def read_runs(out: Path) -> Iterator[Run]:
    """All that is there, in the folder of benchmarks/tasks.sh."""
    for path in sorted(out.glob("*/*/finetuned.json")):
        recipe, _, rest = path.parent.parent.name.partition("-")
        task = rest.rpartition("-")[0]
        yield read_run(path.parent, "teacher" if path.parent.name == "teacher" else recipe, task)


def table(runs: Sequence[Run]) -> str:
    """The table in Markdown: a line for each recipe, a column for each list."""
    tasks = {run.task: run.metric for run in runs}
    lines = [["", "parameters", *(f"{task}: {metric}" for task, metric in tasks.items()), "seeds"]]
    lines.append(["---"] * len(lines[0]))
    for recipe in sorted({run.recipe for run in runs}, key=lambda recipe: (recipe != "teacher", recipe)):
        own = {task: [run for run in runs if (run.recipe, run.task) == (recipe, task)] for task in tasks}
        num_params = averaged([run.num_params for found in own.values() for run in found], ",.0f")
        scores = [
            f"{averaged([run.score for run in found], '.1f', True)} ±{fmean(run.spread for run in found):.1f}"
            if found
            else ""
            for found in own.values()
        ]
        seeds = sorted({len(found) for found in own.values() if found})
        lines.append([recipe, num_params, *scores, " to ".join(map(str, seeds))])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + NOTES


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of benchmarks/tasks.sh")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    runs = list(read_runs(args.out))
    if not runs:
        raise UserError(f"{args.out}: has no RECIPE-LIST-SEED/finetuned/finetuned.json; run benchmarks/tasks.sh")
    text = table(runs)
    print(text)
    with atomic_path(args.out / "tasks.md") as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    cli.run(main, parse_args())
