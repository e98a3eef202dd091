"""Time listing and loading data, each beside the bare library calls that it cannot do without.

    python -m benchmarks.bench_data --out results/bench_data.csv

    prepare   prepare_data.py, with its start, on FLAC files of 1 to 2 s, beside parallel calls of soundfile.info
    loader    batches of 87.5 s from FLAC files of 2 to 15 s, and from a tar archive of them, beside soundfile reading
              the same crops

The files are made first. Variants take turns; values are medians, and those of the loader leave out its start.
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

import cli
from benchmarks.results import Result, compare, make_parser, seconds, write_results
from wav2vec2.audio import SAMPLE_RATE

if TYPE_CHECKING:
    from dataset.batches import Crop
    from dataset.manifest import Manifest

# Torch is imported once the flags are known to be right: it takes seconds.


def make_corpus(folder: Path, num_files: int, shortest: float, longest: float) -> list[Path]:
    """Write FLAC files of that many seconds: swelling tones and noise, which FLAC halves, as it does speech."""
    generator = np.random.default_rng(0)
    times = np.arange(round(longest * SAMPLE_RATE)) / SAMPLE_RATE
    paths = [folder / "train" / f"{number:05}.flac" for number in range(num_files)]
    (folder / "train").mkdir(parents=True)
    for path in paths:
        length = int(generator.integers(round(shortest * SAMPLE_RATE), len(times)))
        tone = np.sin(2 * np.pi * generator.uniform(100, 300) * times[:length]) * np.sin(6 * np.pi * times[:length])
        soundfile.write(path, 0.2 * tone + 0.004 * generator.standard_normal(length), SAMPLE_RATE)
    return paths


def prepare(corpus: Path, num_processes: int) -> None:
    """Run prepare_data.py on a folder or an archive, which writes ``tsv/train.tsv`` in it or beside it."""
    out = (corpus if corpus.is_dir() else corpus.parent) / "tsv"
    flags = ["--data", corpus, "--out", out, "--splits", "train=train", "--num_workers", num_processes]
    script = Path(__file__).parents[1] / "prepare_data.py"
    subprocess.run([sys.executable, script, *map(str, flags)], check=True, stdout=subprocess.DEVNULL)


def bench_prepare(args: argparse.Namespace, folder: Path) -> list[Result]:
    paths = make_corpus(folder, args.num_files, 1, 2)

    def info_of_all() -> None:
        with multiprocessing.Pool(args.num_processes) as pool:
            list(pool.imap(soundfile.info, paths, chunksize=64))

    work = {
        "soundfile.info": partial(seconds, info_of_all),
        "prepare_data.py": partial(seconds, partial(prepare, folder, args.num_processes)),
    }
    return compare("prepare", "{}", work, args.repetitions, "files/s", lambda taken: len(paths) / taken)


class BareReads:
    """Reads the same crops with soundfile and nothing else."""

    def __init__(self, manifest: "Manifest") -> None:
        self.manifest = manifest

    def __getitem__(self, crop: "Crop") -> np.ndarray:
        """(B, T) float32."""
        places = zip(map(self.manifest.full_path, crop.indices), crop.offsets, strict=True)
        return np.stack([soundfile.read(path, crop.num_samples, at, dtype="float32")[0] for path, at in places])


def load_all(dataset: Any, crops: "list[Crop]", num_workers: int) -> float:
    """Return the seconds for all batches but the first, which waits for the processes to start."""
    from torch.utils.data import DataLoader

    batches = iter(DataLoader(dataset, sampler=crops, batch_size=None, num_workers=num_workers))
    next(batches)
    return seconds(lambda: list(map(type, batches)))


def bench_loader(args: argparse.Namespace, folder: Path) -> list[Result]:
    from dataset.batches import BatchSampler, TrainingSampler, make_batches
    from dataset.manifest import read_manifest
    from dataset.speech import SpeechDataset

    make_corpus(folder, max(16, args.num_files // 33), 2, 15)
    prepare(folder, args.num_processes)
    archive = folder.with_name("archive") / "speech.tar"
    archive.parent.mkdir()
    with tarfile.open(archive, "w") as tar:
        tar.add(folder / "train", "train")
    prepare(archive, args.num_processes)
    manifest, archived = (read_manifest(place / "tsv" / "train.tsv") for place in (folder, archive.parent))
    batches = make_batches(manifest.lengths, max_tokens=87.5 * SAMPLE_RATE)
    crops = list(TrainingSampler(BatchSampler(manifest.lengths, batches, 1, 0, True, seed=0), end=2 * len(batches)))
    loaded = sum(len(crop.indices) * crop.num_samples for crop in crops[1:]) / SAMPLE_RATE
    results = []
    datasets = {
        "soundfile.read": BareReads(manifest),
        "SpeechDataset": SpeechDataset(manifest),
        "SpeechDataset, tar": SpeechDataset(archived),
    }
    for workers in args.workers:
        work = {name: partial(load_all, dataset, crops, workers) for name, dataset in datasets.items()}
        label = f"{{}}, {workers} workers"
        results += compare("loader", label, work, args.repetitions, "audio s/s", lambda taken: loaded / taken)
    return results


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        results = bench_prepare(args, Path(name) / "small") + bench_loader(args, Path(name) / "long")
    write_results(args.out, results)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, repetitions=5)
    parser.add_argument("--num_files", type=int, default=20_000, help="to list; a 33rd of them to load, at least 16")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2], help="processes of the loader")
    parser.add_argument("--num_processes", type=int, default=os.cpu_count(), help="processes that list files")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args())
