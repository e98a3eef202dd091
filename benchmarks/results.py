"""Shared by the benchmarks of speed: their flags, what takes turns, and their CSV file."""

import argparse
import csv
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import cli
from wav2vec2.files.storage import atomic_path


class Result(NamedTuple):
    """One measurement, with its speed in units of the baseline's (None without one)."""

    section: str
    variant: str
    value: float
    unit: str
    ratio_to_baseline: float | None
    repetitions: int


def make_parser(description: str | None, repetitions: int) -> argparse.ArgumentParser:
    parser = cli.make_parser(description)
    parser.add_argument("--out", required=True, type=Path, help="CSV file to write")
    parser.add_argument("--repetitions", type=int, default=repetitions)
    return parser


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(
    section: str,
    label: str,
    work: Mapping[str, Callable[[], float]],
    repetitions: int,
    unit: str = "s",
    value: Callable[[float], float] = float,
) -> list[Result]:
    """Let functions that return the seconds that they took take turns; the first is the baseline.

    Each is called by ``label`` with its name in place of ``{}``; ``value`` turns the median of seconds into ``unit``.
    """
    from evaluation.cost import take_turns

    return [
        Result(section, label.format(name), value(median), unit, ratio, repetitions)
        for name, (median, ratio) in take_turns(dict(work), repetitions).items()
    ]


def write_results(path: Path, results: list[Result], device: str = "cpu") -> None:
    """Print the results, and write them as CSV with the command, versions, device and threads that made them."""
    import torch

    from evaluation.cost import made_by

    about = made_by(torch.device(device))
    about["versions"] = " ".join(f"{name}={version}" for name, version in about["versions"].items())
    width = max(len(result.variant) for result in results)
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*Result._fields, *about])
        for section, variant, value, unit, ratio, repetitions in results:
            number, ratio_text = f"{value:.4g}", "" if ratio is None else f"{ratio:.3f}"
            writer.writerow([section, variant, number, unit, ratio_text, repetitions, *about.values()])
            print(f"{section:9} {variant:{width}} {number:>10} {unit:10} {ratio_text}")
    print(f"written to {path}")
