"""Collect what the runs of ``benchmarks.rows`` reached: a table in Markdown, and two pictures.

    python -m benchmarks.table results/small

Reads OUT/ROW.json, the results of evaluate.py, and OUT/*/finetuned/finetuned.json, those of
finetune.py. Writes OUT/table.md, methods-parameters.svg and methods-time.svg (quality against either).
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import cli
from evaluation.tables import read_results
from wav2vec2.files.errors import UserError
from wav2vec2.files.storage import atomic_path

if TYPE_CHECKING:
    from report.pictures import Point

NOTES = """
Means over the seeds of training; in brackets the lowest and the highest. RTF: real-time factor, seconds of work per
second of audio. Cosine and CKA: with the teacher's last distilled layer. Quality: where the scores lie between log-mel
(0) and the teacher (100), a mean over the probes. Scores are test scores in per cent.
"""


class Run(NamedTuple):
    """The measurements of one model, by name; None or no entry stands for what was not measured.

    Attributes:
        row, size: the method, and the share of the teacher that was to go; None for teacher and controls.
        scores: of probes or lists, in per cent.
        quality: from log-mel (0) to the teacher (100).
    """

    row: str
    size: str | None
    scores: Mapping[str, float]
    quality: float | None = None
    num_params: int | None = None
    macs_per_second: float | None = None
    real_time_factor: float | None = None
    cosine: float | None = None
    cka: float | None = None


def probed_runs(path: Path) -> list[Run]:
    """Read the runs of a row, the teacher and the controls, from a results file of evaluate.py."""
    results, runs = read_results(path), []
    for model in results["models"]:
        row, size = ("teacher", None) if model["is_teacher"] else model["name"].rsplit("-", 2)[:2]
        scores = {name: found["mean"] for name, found in model["probes"].items()}
        quality, cost = model["quality"]["mean"] if model["quality"] else None, model["cost"]
        costs = cost["num_params"], cost["macs_per_second"]["total"], cost["speed"][0]["real_time_factor"]
        layer = model["fidelity"]["layers"][-1] if model["fidelity"] else {}
        runs.append(Run(row, size, scores, quality, *costs, layer.get("cosine"), layer.get("cka")))
    for name, probes in results["controls"].items():
        runs.append(Run(name, None, {probe: found["mean"] for probe, found in probes.items()}))
    return runs


def finetuned_run(path: Path) -> Run:
    """Read the run ``ROW-LIST-SIZE-SEED`` of a finetuned.json."""
    row, rest = path.parent.parent.name.split("-", 1)
    labels, size, _ = rest.rsplit("-", 2)
    test = json.loads(path.read_text(encoding="utf-8"))["test"]
    return Run(row, size, {f"{labels}: {test['metric']}": test["value"]})


def read_runs(out: Path) -> list[Run]:
    """Read all runs; teacher and controls, which every row has, once.

    Raises:
        UserError: there are none, or a file is not that of such a run.
    """
    runs: list[Run] = []
    try:
        for path in sorted(out.glob("*.json")):
            runs += [run for run in probed_runs(path) if run.size or run.row not in {each.row for each in runs}]
        runs += map(finetuned_run, sorted(out.glob("*/finetuned/finetuned.json")))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{out}: not the results of benchmarks.rows ({type(error).__name__}: {error})") from error
    if not runs:
        raise UserError(f"{out}: has neither ROW.json nor finetuned.json; run benchmarks.rows")
    return runs


def grouped(runs: Iterable[Run]) -> list[list[Run]]:
    """Group runs that differ in their seed alone: the teacher, then by size with the best first, then the controls."""
    groups: dict[tuple[str, str | None], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.row, run.size), []).append(run)

    def place(group: Sequence[Run]) -> tuple[float, ...]:
        first = group[0]
        if first.size is None:
            return (0,) if first.num_params else (2,)
        return 1, float(first.size), -fmean(run.quality or 0 for run in group)

    return sorted(groups.values(), key=place)


def averaged(values: Iterable[float | None], form: str, with_range: bool = False) -> str:
    """Write a mean, with the lowest and highest of several values; nothing without a value."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    text = format(fmean(known), form)
    return f"{text} [{min(known):{form}}, {max(known):{form}}]" if with_range and len(known) > 1 else text


def cells(group: Sequence[Run], scores: Sequence[str]) -> list[str]:
    """Make a line of the table, of the runs of a group."""
    row, size, *_ = group[0]
    found = [[run.scores[name] for run in group if name in run.scores] for name in scores]
    return [
        row,
        size or "",
        averaged((run.num_params for run in group), ",.0f"),
        averaged((run.macs_per_second and run.macs_per_second / 1e6 for run in group), ".0f"),
        averaged((run.real_time_factor for run in group), ".4f"),
        averaged((run.cosine for run in group), ".3f"),
        averaged((run.cka for run in group), ".3f"),
        *(averaged(values, ".1f", with_range=True) for values in found),
        averaged((run.quality for run in group), ".1f", with_range=True),
        str(max(map(len, found))) if size else "",
    ]


def table(groups: Sequence[Sequence[Run]]) -> str:
    """Make the table in Markdown: a line for each group."""
    scores = list(dict.fromkeys(name for group in groups for run in group for name in run.scores))
    header = ["", "off", "parameters", "M MACs a second", "RTF", "cosine", "CKA", *scores, "quality", "seeds"]
    lines = [header, ["---"] * len(header), *(cells(group, scores) for group in groups)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + NOTES


def points(groups: Iterable[Sequence[Run]], cost: Callable[[Run], float | None]) -> "dict[str, list[Point]]":
    """Return the line of each row in a picture: the cost of its sizes, and the quality that they reach."""
    from report.pictures import Point

    lines: dict[str, list[Point]] = {}
    for group in groups:
        costs = [value for run in group if (value := cost(run)) is not None]
        qualities = [run.quality for run in group if run.quality is not None]
        if group[0].size is not None and len(costs) == len(qualities) == len(group):
            point = Point(fmean(costs), fmean(qualities), min(qualities), max(qualities))
            lines.setdefault(group[0].row, []).append(point)
    return dict(sorted(lines.items()))  # a row looks the same in both pictures


def main(args: argparse.Namespace) -> None:
    from report.pictures import methods

    groups = grouped(read_runs(args.out))
    text = table(groups)
    print(text)
    with atomic_path(args.out / "table.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    for name, title, lines in (
        ("parameters", "parameters", points(groups, lambda run: run.num_params)),
        ("time", "real-time factor", points(groups, lambda run: run.real_time_factor)),
    ):
        if lines:
            methods(lines, title).write(args.out / f"methods-{name}.svg")
    print(f"written to {args.out / 'table.md'} and, where the quality was measured, methods-*.svg")


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of benchmarks.rows")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args())
