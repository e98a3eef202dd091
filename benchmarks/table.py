"""Collect what the runs of ``benchmarks.rows`` reached: a table in Markdown, and two pictures.

    python -m benchmarks.table results/small

Reads OUT/ROW.json, the results of evaluate.py, and OUT/*/finetuned/finetuned.json, those of finetune.py. Writes
OUT/table.md and, where the quality was measured, methods-parameters.svg and methods-time.svg (quality against either).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import cli
from evaluation.tables import results_of
from wav2vec2.files.errors import UserError, markdown
from wav2vec2.files.storage import atomic_path, read_json

NOTES = """
Means over the seeds of training; in brackets the lowest and the highest. RTF: real-time factor, seconds of work per
second of audio. Cosine and CKA: with the teacher's last distilled layer. Quality: where the scores lie between log-mel
(0) and the teacher (100), a mean over the probes. Scores are test scores in per cent.
"""
# The columns that are not scores: how their means are written.
COSTS = {"parameters": ",.0f", "M MACs a second": ".0f", "RTF": ".4f", "cosine": ".3f", "CKA": ".3f"}


class Run(NamedTuple):
    """The measurements of one model."""

    row: str
    size: str | None  # the share of the teacher to remove; None for teacher and controls
    values: dict[str, float]  # by column, without those that were not measured


def probed_runs(path: Path) -> list[Run]:
    """Read the runs of a row, the teacher and the controls, from a results file of evaluate.py."""
    with results_of(path) as results:
        runs = [
            Run(name, None, {probe: found["mean"] for probe, found in probes.items()})
            for name, probes in results["controls"].items()
        ]
        for model in results["models"]:
            row, size, _ = ("teacher", None, None) if model["is_teacher"] else model["name"].rsplit("-", 2)
            cost, fidelity = model["cost"], model["fidelity"] or {"layers": [{}]}
            found = {
                "parameters": cost["num_params"],
                "M MACs a second": cost["macs_per_second"]["total"] / 1e6,
                "RTF": cost["speed"][0]["real_time_factor"],
                "cosine": fidelity["layers"][-1].get("cosine"),
                "CKA": fidelity["layers"][-1].get("cka"),
                "quality": model["quality"] and model["quality"]["mean"],
                **{probe: probed["mean"] for probe, probed in model["probes"].items()},
            }
            runs.append(Run(row, size, {name: value for name, value in found.items() if value is not None}))
    return runs


def grouped(out: Path) -> list[list[Run]]:
    """Group runs that differ in their seed alone: the teacher, then by size with the best first, then the controls."""
    groups: dict[tuple[str, str | None], list[Run]] = {}
    for path in sorted(out.glob("*.json")):
        for run in probed_runs(path):
            group = groups.setdefault((run.row, run.size), [])
            if run.size or not group:  # every row has teacher and controls
                group.append(run)
    for path in sorted(out.glob("*/finetuned/finetuned.json")):
        row, rest = path.parent.parent.name.split("-", 1)  # ROW-LIST-SIZE-SEED
        labels, size, _ = rest.rsplit("-", 2)
        test = read_json(path, "the score that finetune.py writes", "run benchmarks.rows again")["test"]
        groups.setdefault((row, size), []).append(Run(row, size, {f"{labels}: {test['metric']}": test["value"]}))
    if not groups:
        raise UserError(f"{out}: has neither ROW.json nor finetuned.json; run benchmarks.rows")

    def place(group: Sequence[Run]) -> tuple[float, ...]:
        first = group[0]
        if first.size is None:
            return (0,) if first.row == "teacher" else (2,)
        return 1, float(first.size), -fmean(run.values.get("quality", 0) for run in group)

    return sorted(groups.values(), key=place)


def cell(values: Sequence[float], form: str | None) -> str:
    """Write a cost's mean, or a score's with the lowest and highest of several."""
    if not values:
        return ""
    mean = format(fmean(values), form or ".1f")
    return f"{mean} [{min(values):.1f}, {max(values):.1f}]" if form is None and len(values) > 1 else mean


def table(groups: Sequence[Sequence[Run]]) -> str:
    """Make the table in Markdown: a line for each group."""
    scores = dict.fromkeys(name for group in groups for run in group for name in run.values)
    columns = [*COSTS, *(name for name in scores if name not in (*COSTS, "quality")), "quality"]
    names = [markdown(name).replace("|", r"\|") for name in columns]
    lines = [["", "off", *names, "seeds"], ["---"] * (len(columns) + 3)]
    for group in groups:
        row, size, _ = group[0]
        found = {name: [run.values[name] for run in group if name in run.values] for name in columns}
        seeds = str(max(map(len, found.values()))) if size else ""
        lines.append([row, size or "", *(cell(values, COSTS.get(name)) for name, values in found.items()), seeds])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + NOTES


def main(args: argparse.Namespace) -> None:
    from report.pictures import Point, methods

    groups = grouped(args.out)
    text = table(groups)
    print(text)
    with atomic_path(args.out / "table.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    for name, column, title in (("parameters", "parameters", "parameters"), ("time", "RTF", "real-time factor")):
        lines: dict[str, list[Point]] = {}
        for group in sorted(groups, key=lambda group: group[0].row):  # a row looks the same in both pictures
            if group[0].size and all("quality" in run.values for run in group):
                quality = [run.values["quality"] for run in group]
                point = Point(fmean(run.values[column] for run in group), fmean(quality), min(quality), max(quality))
                lines.setdefault(group[0].row, []).append(point)
        if lines:
            methods(lines, title).write(args.out / f"methods-{name}.svg")
    print(f"written to {args.out}")


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of benchmarks.rows")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args())
