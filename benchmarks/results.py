"""The results of the benchmarks of speed, and their CSV file."""

import csv
from pathlib import Path
from typing import NamedTuple

from wav2vec2.files.storage import atomic_path


class Result(NamedTuple):
    """One measurement; ``ratio`` is its speed in units of the baseline's, None without one."""

    section: str
    variant: str
    value: float
    unit: str
    ratio: float | None
    repetitions: int


def write_results(path: Path, results: list[Result], device: str = "cpu") -> None:
    """Print the results, and write them as CSV with the command, versions, device and threads that made them."""
    import torch

    from evaluation.cost import made_by

    about = made_by(torch.device(device))
    about["versions"] = " ".join(f"{name}={version}" for name, version in about["versions"].items())
    width = max(len(result.variant) for result in results)
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*(n if n != "ratio" else "ratio_to_baseline" for n in Result._fields), *about])
        for section, variant, value, unit, ratio, repetitions in results:
            number, ratio_text = f"{value:.4g}", "" if ratio is None else f"{ratio:.3f}"
            writer.writerow([section, variant, number, unit, ratio_text, repetitions, *about.values()])
            print(f"{section:9} {variant:{width}} {number:>10} {unit:10} {ratio_text}")
    print(f"written to {path}")
