"""How fast data is listed and loaded, each beside the bare library calls that it cannot do without.

    python benchmarks/bench_data.py --out results/bench_data.csv
    python benchmarks/bench_data.py --out results/bench_data.csv --sections loader --workers 0 4 16

Sections:

    prepare   prepare_data.py on 20,000 files of 1 to 2 s, beside parallel calls of soundfile.info
    loader    an epoch and more of batches of 87.5 s from files of 2 to 15 s, beside soundfile reading the same crops
              in the same number of processes
    manifest  reading a manifest of 300,000 lines

Files are made for the purpose, and have been read once before anything is timed. What is compared takes turns, so
that other work on the machine meets all of it. Values are medians, and those of the loader leave out its start; a
ratio is the median of the turns' ratios.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import cli  # noqa: E402
import prepare_data  # noqa: E402
from benchmarks.results import Result, take_turns, write_results  # noqa: E402
from dataset.batches import BatchSampler, Crop, TrainingSampler, make_batches  # noqa: E402
from dataset.manifest import Manifest, read_manifest  # noqa: E402
from dataset.speech import SpeechDataset  # noqa: E402
from wav2vec2.audio import SAMPLE_RATE, open_audio  # noqa: E402

SECONDS_PER_BATCH = 87.5


class Size(NamedTuple):
    """How much there is to do."""

    num_small_files: int
    num_utterances: int
    num_batches: int
    num_lines: int


FULL = Size(num_small_files=20_000, num_utterances=600, num_batches=120, num_lines=300_000)
QUICK = Size(num_small_files=40, num_utterances=24, num_batches=4, num_lines=1000)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of this script, from ``arguments`` or the command line."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("--out", required=True, type=Path, help="CSV file to write")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2], help="processes of the loader")
    parser.add_argument("--num_processes", type=int, default=os.cpu_count(), help="processes that list files")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--folder", help="where to make the files (default: the system's temporary folder)")
    parser.add_argument("--quick", action="store_true", help="a few files only: whether it runs, not how fast")
    return parser.parse_args(arguments)


def seconds(work: Callable[[], object]) -> float:
    """How long ``work`` takes; what it prints is not shown."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        work()
    return time.perf_counter() - start


def make_corpus(folder: Path, num_files: int, shortest: float, longest: float) -> None:
    """FLAC files of that many seconds at 16 kHz in ``folder/train`` and ``folder/valid``: tones that swell, and noise.

    They take about half the room of the samples, as LibriSpeech's do.
    """
    generator = np.random.default_rng(0)
    times = np.arange(round(longest * SAMPLE_RATE)) / SAMPLE_RATE
    for number in range(num_files):
        length = int(generator.integers(round(shortest * SAMPLE_RATE), len(times)))
        tone = np.sin(2 * np.pi * generator.uniform(100, 300) * times[:length])
        samples = 0.2 * tone * np.sin(2 * np.pi * 3 * times[:length]) + 0.004 * generator.standard_normal(length)
        path = folder / ("valid" if number % 20 == 0 else "train") / str(number % 100) / f"{number:05}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, samples, SAMPLE_RATE)


# ---------------------------------------------------------------------------------------------- prepare


def _frames_by_info(path: str) -> int:
    return soundfile.info(path).frames


def _frames_by_opening(path: str) -> int:
    with open_audio(path) as file:
        return file.frames


def bench_prepare(args: argparse.Namespace, size: Size, folder: Path) -> list[Result]:
    """Files per second of prepare_data.py and of its parts."""
    corpus, out = folder / "small", folder / "small_manifests"
    make_corpus(corpus, size.num_small_files, 1, 2)
    names = prepare_data.find_audio(str(corpus))
    paths = [str(corpus / name) for name in names]
    arguments = ["--data", str(corpus), "--out", str(out), "--splits", "train=train", "valid=valid"]
    arguments += ["--num_workers", str(args.num_processes)]

    def in_pool(function: Callable[[str], int]) -> None:
        with multiprocessing.Pool(args.num_processes) as pool:
            chunk = max(1, min(256, len(paths) // (8 * args.num_processes)))
            list(pool.imap(function, paths, chunksize=chunk))

    def run_command() -> None:
        command = [sys.executable, str(REPOSITORY / "prepare_data.py"), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    work: dict[str, Callable[[], object]] = {
        "soundfile.info (baseline)": lambda: in_pool(_frames_by_info),
        "opening each file": lambda: in_pool(_frames_by_opening),
        "opening and looking at the last sample": lambda: prepare_data.count_all(
            str(corpus), names, args.num_processes
        ),
        "prepare_data.main": lambda: prepare_data.main(prepare_data.parse_args(arguments)),
        "python prepare_data.py, with its start": run_command,
    }
    work["soundfile.info (baseline)"]()  # the files are in the page cache from here on
    taken = take_turns({name: lambda job=job: seconds(job) for name, job in work.items()}, args.repetitions)
    return [
        Result("prepare", name, len(paths) / duration, "files/s", ratio, args.repetitions)
        for name, (duration, ratio) in taken.items()
    ]


# ---------------------------------------------------------------------------------------------- loader


class BareReads(Dataset):
    """The same crops with soundfile and nothing else."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def __getitem__(self, crop: Crop) -> Tensor:
        """(B, T) float32."""
        rows = [
            soundfile.read(self.manifest.full_path(index), crop.num_samples, offset, dtype="float32")[0]
            for index, offset in zip(crop.indices, crop.offsets, strict=True)
        ]
        return torch.from_numpy(np.stack(rows))


def bench_loader(args: argparse.Namespace, size: Size, folder: Path) -> list[Result]:
    """Seconds of audio and batches per second, of one loader process after the other."""
    corpus, out = folder / "long", folder / "long_manifests"
    make_corpus(corpus, size.num_utterances, 2, 15)
    arguments = ["--data", str(corpus), "--out", str(out), "--splits", "train=train,valid"]
    seconds(lambda: prepare_data.main(prepare_data.parse_args([*arguments, "--num_workers", str(args.num_processes)])))
    manifest = read_manifest(out / "train.tsv")
    results: list[Result] = []
    batches = make_batches(manifest.lengths, max_tokens=SECONDS_PER_BATCH * SAMPLE_RATE)
    crops = list(TrainingSampler(BatchSampler(manifest.lengths, batches, 1, 0, True, seed=0), end=size.num_batches))
    # The first batch waits for the processes to start.
    loaded = sum(len(crop.indices) * crop.num_samples for crop in crops[1:]) / SAMPLE_RATE
    datasets = {
        "soundfile.read (baseline)": BareReads(manifest),
        "files": SpeechDataset(manifest),
    }

    def measure(dataset: Dataset, num_workers: int) -> float:
        loader = iter(DataLoader(dataset, sampler=crops, batch_size=None, num_workers=num_workers))
        next(loader)
        return seconds(lambda: take_all(loader))

    for num_workers in args.workers:
        taken = take_turns(
            {name: lambda d=dataset, n=num_workers: measure(d, n) for name, dataset in datasets.items()},
            args.repetitions,
        )
        for name, (duration, ratio) in taken.items():
            variant = f"{name}, {num_workers} workers"
            for value, unit in ((loaded, "audio s/s"), (len(crops) - 1, "batches/s")):
                results.append(Result("loader", variant, value / duration, unit, ratio, args.repetitions))
    return results


def take_all(batches: object) -> None:
    """Take all batches and keep none."""
    for _ in batches:
        pass


# ---------------------------------------------------------------------------------------------- manifest


def bench_manifest(args: argparse.Namespace, size: Size, folder: Path) -> list[Result]:
    """Time and memory that reading a long manifest takes; the memory is Python's and numpy's at its highest."""
    path = folder / "long.tsv"
    names = (f"train-clean-360/{n % 2000}/{n % 300}/{n % 2000}-{n % 300}-{n:06}.flac" for n in range(size.num_lines))
    path.write_text("/root\n" + "".join(f"{name}\t{200_000}\n" for name in names))
    variant = f"read_manifest of {size.num_lines:,} lines"
    taken = take_turns({variant: lambda: seconds(lambda: read_manifest(path))}, args.repetitions)
    tracemalloc.start()
    read_manifest(path)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return [
        Result("manifest", variant, taken[variant][0], "s", None, args.repetitions),
        Result("manifest", variant, peak, "MB", None, 1),
    ]


SECTIONS = {"prepare": bench_prepare, "loader": bench_loader, "manifest": bench_manifest}


def main(args: argparse.Namespace) -> None:
    """Measure, write and show.

    Raises:
        UserError: see :mod:`prepare_data`.
    """
    size = QUICK if args.quick else FULL
    results: list[Result] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name in args.sections:
            results += SECTIONS[name](args, size, Path(folder))
    write_results(args.out, results)


if __name__ == "__main__":
    cli.run(main, parse_args())
