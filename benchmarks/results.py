"""What the benchmarks share: fair turns, one kind of result, one kind of file."""

import csv
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable
from operator import truediv
from pathlib import Path
from typing import NamedTuple

import soundfile
import torch

from wav2vec2.files import atomic_path


class Result(NamedTuple):
    """One measurement; ``ratio`` is its speed in units of the baseline's, None without one."""

    section: str
    variant: str
    value: float
    unit: str
    ratio: float | None
    repetitions: int


def take_turns(work: dict[str, Callable[[], float]], repetitions: int) -> dict[str, tuple[float, float]]:
    """Measure seconds of each kind of work, in turns and every other time in the opposite order.

    Returns:
        For each its median, and how fast it is in units of the first: the median over the turns, so that a slow
        minute of the machine, which meets both, does not count.
    """
    taken: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repetitions):
        for name in list(work)[:: -1 if turn % 2 else 1]:
            taken[name].append(work[name]())
    baseline = next(iter(taken.values()))
    return {
        name: (statistics.median(found), statistics.median(map(truediv, baseline, found)))
        for name, found in taken.items()
    }


def cpu_name() -> str:
    """The processor's name and the number of its cores that this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def write_results(path: Path, results: list[Result], device: str | None = None) -> None:
    """Write one row a result, with what is needed to get it again, and print them.

    ``device`` is what was measured; None means the CPU.
    """
    versions = {"torch": torch.__version__, "soundfile": soundfile.__version__, "python": platform.python_version()}
    surroundings = {
        "command": shlex.join(["python", *sys.argv]),
        "versions": " ".join(f"{name}={version}" for name, version in versions.items()),
        "device": device or cpu_name(),
        "num_threads": torch.get_num_threads(),
    }
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        columns = ("command", "section", "variant", "value", "unit", "ratio_to_baseline", "repetitions")
        writer = csv.DictWriter(file, [*columns, "versions", "device", "num_threads"])
        writer.writeheader()
        for result in results:
            row = {**result._asdict(), **surroundings, "value": f"{result.value:.4g}"}
            ratio = row.pop("ratio")
            writer.writerow({**row, "ratio_to_baseline": "" if ratio is None else f"{ratio:.3f}"})
    width = max(len(result.variant) for result in results)
    for result in results:
        ratio = "" if result.ratio is None else f"{result.ratio:.2f} x baseline"
        print(f"{result.section:9} {result.variant:{width}} {result.value:10.4g} {result.unit:10} {ratio}")
    print(f"written to {path}")
