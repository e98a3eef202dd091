"""Collect what ``benchmarks/methods.sh`` measured: a table in Markdown, and two pictures.

    python -m benchmarks.methods results/mini

Reads ``teacher.json``, ``speed.json`` and, of each run ``ROW-SIZE-SEED``, ``evaluation.json`` and ``fidelity.json``:
results of ``evaluate.py``. What is not there is left out. Writes ``methods.md``, ``methods-1.svg`` (quality
against parameters) and ``methods-2.svg`` (against the real-time factor).
"""

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import cli
from evaluation.scores import LOG_MEL, placed
from evaluation.tables import read_results
from report.pictures import Point, methods
from wav2vec2.files.errors import UserError
from wav2vec2.files.storage import atomic_path

NOTES = """
Means over the seeds of training; in brackets the lowest and the highest. RTF: real-time factor, seconds of work per
second of audio. Cosine and CKA: with the teacher's last distilled layer. Quality: where the scores lie between log-mel
(0) and the teacher (100), a mean over the probes.
"""


class Run(NamedTuple):
    """What was measured of one model, by name; a value is None where it was not.

    Attributes:
        row, size: the method, and the share of the teacher that was to go.
        num_params, macs_per_second, real_time_factor: what it costs.
        cosine, cka: with the teacher's last distilled layer.
        probes: scores in per cent.
        quality: from log-mel (0) to the teacher (100).
    """

    row: str
    size: float | None
    num_params: int | None
    macs_per_second: float | None
    real_time_factor: float | None
    cosine: float | None
    cka: float | None
    probes: Mapping[str, float]
    quality: float | None


def scores_of(probes: Mapping[str, Any]) -> dict[str, float]:
    """The score of each probe, from an entry of a results file."""
    return {name: found["mean"] for name, found in probes.items()}


def quality_of(teacher: Mapping[str, Any]) -> Callable[[Mapping[str, float]], float | None]:
    """The figure of merit of scores, see :func:`evaluation.scores.figure_of_merit`, which chose its probes.

    Args:
        teacher: the results of the teacher and the controls.
    """
    counted = teacher["models"][0]["quality"]["probes"] if teacher["models"][0]["quality"] else ()
    top, bottom = scores_of(teacher["models"][0]["probes"]), scores_of(teacher["controls"][LOG_MEL])

    def quality(scores: Mapping[str, float]) -> float | None:
        return fmean(placed(scores[name], bottom[name], top[name]) for name in counted) if counted else None

    return quality


def run_folders(out: Path) -> Iterator[tuple[Path, str, float]]:
    """The folders ``ROW-SIZE-SEED``, with row and size."""
    for folder in sorted(out.iterdir()):
        row, *rest = folder.name.rsplit("-", 2)
        if folder.is_dir() and len(rest) == 2 and re.fullmatch(r"0\.\d+", rest[0]):
            yield folder, row, float(rest[0])


def read_runs(out: Path, teacher: Mapping[str, Any]) -> tuple[list[Run], list[str]]:
    """What was measured: the teacher, the compressed models and the controls; and the folders without results.

    Args:
        out: of benchmarks/methods.sh.
        teacher: the results of the teacher and the controls.

    Raises:
        UserError: a file is not the results of evaluate.py, or has other probes than the teacher's.
    """
    quality = quality_of(teacher)
    speeds: dict[str, float] = {}
    if (path := out / "speed.json").is_file():
        speeds = {
            model["name"]: model["cost"]["speed"][0]["real_time_factor"] for model in read_results(path)["models"]
        }

    def run(row: str, size: float | None, name: str, model: Mapping[str, Any], layer: Mapping[str, Any]) -> Run:
        scores, cost = scores_of(model["probes"]), model["cost"]
        if scores.keys() != teacher["probes"].keys():
            raise UserError(
                f"{out / name}/evaluation.json: its probes are {', '.join(scores)}, the teacher's "
                f"{', '.join(teacher['probes'])}; delete it, and run benchmarks/methods.sh again"
            )
        macs = cost["macs_per_second"]["total"]
        similarity = layer.get("cosine"), layer.get("cka")
        return Run(row, size, cost["num_params"], macs, speeds.get(name), *similarity, scores, quality(scores))

    runs, missing = [run("teacher", None, "teacher", teacher["models"][0], {})], []
    for folder, row, size in run_folders(out):
        if not (folder / "evaluation.json").is_file():
            missing.append(folder.name)
            continue
        (model,), layer = read_results(folder / "evaluation.json")["models"], {}
        if (path := folder / "fidelity.json").is_file():
            layer = read_results(path)["models"][-1]["fidelity"]["layers"][-1]
        runs.append(run(row, size, folder.name, model, layer))
    for name, found in teacher["controls"].items():
        scores = scores_of(found)
        runs.append(Run(name, None, *5 * [None], scores, quality(scores)))
    return runs, missing


def grouped(runs: Iterable[Run]) -> list[list[Run]]:
    """The runs that differ in their seed alone: the teacher's, then by size with the best first, then the controls'."""
    groups: dict[tuple[str, float | None], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.row, run.size), []).append(run)

    def place(group: Sequence[Run]) -> tuple[float, ...]:
        first = group[0]
        if first.size is None:
            return (0,) if first.num_params else (2,)
        return 1, first.size, -(fmean(run.quality for run in group) if first.quality is not None else 0)

    return sorted(groups.values(), key=place)


def averaged(values: Iterable[float | None], form: str, with_range: bool = False) -> str:
    """The mean as text, with the lowest and highest of several behind it; nothing without a value."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    text = format(fmean(known), form)
    return f"{text} [{min(known):{form}}, {max(known):{form}}]" if with_range and len(known) > 1 else text


def cells(group: Sequence[Run]) -> list[str]:
    """A line of the table: of the runs that differ in their seed alone."""
    first = group[0]
    return [
        first.row,
        "" if first.size is None else f"{first.size:g}",
        averaged([run.num_params for run in group], ",.0f"),
        averaged([run.macs_per_second and run.macs_per_second / 1e6 for run in group], ".0f"),
        averaged([run.real_time_factor for run in group], ".4f"),
        averaged([run.cosine for run in group], ".3f"),
        averaged([run.cka for run in group], ".3f"),
        *(averaged([run.probes[probe] for run in group], ".1f", True) for probe in first.probes),
        averaged([run.quality for run in group], ".1f", True),
        "" if first.size is None else str(len(group)),
    ]


def table(groups: Sequence[Sequence[Run]], teacher: Mapping[str, Any]) -> str:
    """The table in Markdown, with what its numbers are."""
    probes = [f"{name}: {probe['metric']}" for name, probe in teacher["probes"].items()]
    header = ["", "off", "parameters", "M MACs a second", "RTF", "cosine", "CKA", *probes, "quality", "seeds"]
    lines = [header, ["---"] * len(header), *map(cells, groups)]
    left_out = [f"{name} is left out of the quality: {reason}.\n" for name, reason in teacher["left_out"].items()]
    return "".join([*(f"| {' | '.join(line)} |\n" for line in lines), NOTES, *left_out])


def points(groups: Iterable[Sequence[Run]], cost: Callable[[Run], float | None]) -> dict[str, list[Point]]:
    """The line of each row in a picture: what its sizes cost, and the quality that they reach."""
    lines: dict[str, list[Point]] = {}
    for group in groups:
        known = [(cost(run), run.quality) for run in group]
        if group[0].size is not None and all(None not in pair for pair in known):
            costs, qualities = zip(*known, strict=True)
            lines.setdefault(group[0].row, []).append(
                Point(fmean(costs), fmean(qualities), min(qualities), max(qualities))
            )
    return dict(sorted(lines.items()))  # a row looks the same in both


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of benchmarks/methods.sh")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    teacher = read_results(args.out / "teacher.json")
    try:
        runs, missing = read_runs(args.out, teacher)
        groups = grouped(runs)
        text = table(groups, teacher)
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{args.out}: its files are not the results of benchmarks/methods.sh ({type(error).__name__}: {error})"
        ) from error
    print(text)
    with atomic_path(args.out / "methods.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    costs = {"parameters": lambda run: run.num_params, "real-time factor": lambda run: run.real_time_factor}
    for number, (title, cost) in enumerate(costs.items(), start=1):
        if lines := points(groups, cost):
            methods(lines, title).write(args.out / f"methods-{number}.svg")
    if missing:
        print(
            f"left out: {len(missing)} of {len(missing) + sum(run.size is not None for run in runs)} runs have no "
            f"evaluation.json yet: {', '.join(missing)}"
        )
    print(f"written to {args.out / 'methods.md'} and methods-1.svg, methods-2.svg")


if __name__ == "__main__":
    cli.run(main, parse_args())
