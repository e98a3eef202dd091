"""List a speech corpus in manifests: NAME.tsv for each split, for ``--tsv_dir`` and ``--train_subset``.

LibriSpeech is known by its folders and gives train100, train960 and valid, whichever are there:

    python prepare_data.py --data /corpora/LibriSpeech --out data/librispeech

Any other corpus, of files that libsndfile reads, is split by folder name, or by holding out a fraction:

    python prepare_data.py --data /corpora/mine --out data/mine --splits train=tr,extra-* valid=cv
    python prepare_data.py --data /corpora/mine --out data/mine --valid_fraction 0.05

Only folders below --data decide about splits. Links to folders are followed. Files that cannot be
read are left out and listed with the reason in rejected.tsv. Audio and video that libsndfile does not
read, such as .m4a, are passed over and counted.
"""

import argparse
import contextlib
import hashlib
import multiprocessing
import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path

import numpy as np

import cli
from wav2vec2.audio import (
    AUDIO_SUFFIXES,
    CONVERT,
    MAX_SECONDS,
    MIN_SECONDS,
    SAMPLE_RATE,
    AudioError,
    checked_audio,
    mono_blocks,
    num_samples_at_16k,
    read_mono,
    stated_length,
)
from wav2vec2.files.errors import UserError
from wav2vec2.files.storage import atomic_path

# Of audio and video that libsndfile does not read, or not without being told the rate.
OTHER_NAMES = """
m4a m4b mp4 m4v mov 3gp aac ac3 eac3 amr awb wma wmv asf webm weba mkv mka avi flv mpg mpeg ogv spx ape wv tta tak dsf
dff dts ra rm shn gsm vox raw pcm
"""
OTHER_SUFFIXES = tuple(f".{name}" for name in OTHER_NAMES.split())
LIBRISPEECH_SPLITS = {
    "train100": ["train-clean-100"],
    "train960": ["train-clean-100", "train-clean-360", "train-other-500"],
    "valid": ["dev-clean", "dev-other"],
}
DEFAULT_VALID_FRACTION = 0.05
REJECTED = "rejected"
LINE_BREAK = re.compile(r"[\r\n]")  # either would end a manifest's row

FolderPatterns = dict[str, list[str]]  # split name to its folders
Splits = dict[str, list[str]]  # split name to its files


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of this script, from ``arguments`` or the command line."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("--data", required=True, help="folder of the corpus")
    parser.add_argument("--out", default="data/librispeech", help="folder to write the manifests to")
    parser.add_argument(
        "--splits",
        nargs="+",
        metavar="NAME=FOLDER[,FOLDER...]",
        help="splits by folder: a name or path below --data, * and ? allowed; not needed for LibriSpeech",
    )
    parser.add_argument(
        "--valid_fraction",
        type=float,
        help="fraction of the files for valid.tsv, the rest for train.tsv; "
        f"{DEFAULT_VALID_FRACTION} if --splits is not given and the corpus is not LibriSpeech",
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses the files that --valid_fraction holds out")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes that read files")
    return parser.parse_args(arguments)


def find_audio(folder: str, prefix: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> list[str]:
    """Every audio file below ``folder`` by its suffix in either case, as sorted paths from there with ``/``.

    Those that libsndfile does not read are among them.

    Args:
        folder: where to look.
        prefix: of the paths.
        above: device and inode of the folders around ``folder``, so that no link leads in a circle.
    """
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    found: list[str] = []
    if identity in above:
        return found
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                found += find_audio(entry.path, f"{prefix}{entry.name}/", above | {identity})
            elif entry.name.lower().endswith(AUDIO_SUFFIXES + OTHER_SUFFIXES):
                found.append(prefix + entry.name)
    return sorted(found)


def parse_splits(options: list[str]) -> FolderPatterns:
    """``["train=a,b", "valid=c"]`` to ``{"train": ["a", "b"], "valid": ["c"]}``.

    Raises:
        UserError: an option of another form, a name that cannot name a manifest or is given twice.
    """
    splits: FolderPatterns = {}
    for option in options:
        name, _, folders = option.partition("=")
        patterns = [folder.strip("/") for folder in folders.split(",") if folder.strip("/")]
        if not re.fullmatch(r"\w[\w.-]*", name) or name == REJECTED or name in splits or not patterns:
            raise UserError(
                f"--splits: found {option!r}, expected NAME=FOLDER[,FOLDER...] with each NAME once, of letters, "
                f"digits and _.-, and not {REJECTED!r}; for example train=tr,extra-* valid=cv"
            )
        splits[name] = patterns
    return splits


def split_by_folder(paths: Iterable[str], splits: FolderPatterns) -> Splits:
    """Sort relative paths into splits: the outermost folder that any pattern matches decides.

    A folder may belong to several splits, as train-clean-100 does to train100 and train960.
    """

    @cache
    def names_of(folder: str) -> list[str]:
        if folder == "":
            return []
        parent, _, last = folder.rpartition("/")
        return names_of(parent) or [
            name
            for name, patterns in splits.items()
            if any(fnmatchcase(last, pattern) or fnmatchcase(folder, pattern) for pattern in patterns)
        ]

    found: Splits = {name: [] for name in splits}
    for path in paths:
        for name in names_of(path.rpartition("/")[0]):
            found[name].append(path)
    return found


def hold_out(paths: list[str], fraction: float, seed: int) -> Splits:
    """Hold out ``fraction`` of the files, at least one, as valid; the rest is train.

    Files are ranked by a hash of seed and path, so that most keep their place when the corpus grows.
    """
    ranked = sorted(paths, key=lambda path: hashlib.sha256(f"{seed} {path}".encode(errors="surrogateescape")).digest())
    num_valid = max(1, round(fraction * len(paths)))
    return {"train": sorted(ranked[num_valid:]), "valid": sorted(ranked[:num_valid])}


def choose_rule(
    paths: list[str], split_options: list[str] | None, valid_fraction: float | None, seed: int
) -> Callable[[list[str]], Splits]:
    """Choose from the options and the corpus how to split, and say so.

    Raises:
        UserError: both options, or one that cannot be followed.
    """
    if split_options and valid_fraction is not None:
        raise UserError("--splits and --valid_fraction are two ways to split; give one of them")
    rule = "by folder"
    splits = parse_splits(split_options) if split_options else {}
    if not split_options and valid_fraction is None:
        members = split_by_folder(paths, LIBRISPEECH_SPLITS)
        absent = ", ".join(name for name in members if not members[name])
        rule = "LibriSpeech's" + (f" (not there: {absent})" if absent else "")
        splits = {name: patterns for name, patterns in LIBRISPEECH_SPLITS.items() if members[name]}
    if splits:
        in_words = "; ".join(f"{name} = {', '.join(patterns)}" for name, patterns in splits.items())
        print(f"splits: {rule}, {in_words}")
        return partial(split_by_folder, splits=splits)
    fraction = DEFAULT_VALID_FRACTION if valid_fraction is None else valid_fraction
    if not 0 < fraction < 1:
        raise UserError(f"--valid_fraction {fraction:g}: expected a number between 0 and 1, such as 0.05")
    print(f"splits: {fraction:g} of the files, chosen by --seed {seed}, held out as valid")
    return partial(hold_out, fraction=fraction, seed=seed)


def count_samples(path: str) -> tuple[int, str]:
    """Samples that a file gives at 16 kHz and ``""``, or 0 and the reason why it cannot be used.

    The last sample is read too: a file that was cut short still has the whole count in its header. Where the header
    is not to be trusted, the file is decoded.
    """
    if LINE_BREAK.search(path):
        return 0, "a line break in its path"
    if not os.path.isfile(path):
        return 0, "not a file, or a link to nothing"
    try:
        with checked_audio(path) as file:
            num_frames, is_finite = file.frames, True
            if stated_length(file) is None:
                num_frames = 0
                for block in mono_blocks(file):
                    num_frames += len(block)
                    is_finite = is_finite and bool(np.isfinite(block).all())
            else:
                last = np.empty(0)
                with contextlib.suppress(RuntimeError):  # soundfile's
                    file.seek(max(num_frames - 1, 0))
                    last = read_mono(file, 1)
                if len(last) < min(num_frames, 1):
                    return 0, f"cut short: its header promises {num_frames} samples, the last cannot be read"
                is_finite = bool(np.isfinite(last).all())
            if num_frames == 0:
                return 0, "no samples"
            if not is_finite:
                return 0, "NaN or infinite samples"
            return num_samples_at_16k(num_frames, file.samplerate), ""
    except AudioError as error:
        return 0, str(error).removeprefix(f"{path}: ")


def count_all(root: str, paths: list[str], num_workers: int) -> dict[str, tuple[int, str]]:
    """:func:`count_samples` of every file, in order, with a progress bar.

    In processes: in threads the short calls wait for Python's lock and are slower than one alone.
    """
    full_paths = [os.path.join(root, path) for path in paths]
    # Many files at a time, as the main process would otherwise slow down the others; enough parts to share out.
    size = max(1, min(256, len(paths) // (8 * num_workers)))
    # Ctrl-C is left to the main process, which ends the workers.
    with multiprocessing.Pool(num_workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        counts = pool.imap(count_samples, full_paths, chunksize=size)
        shown = cli.progress(counts, "reading headers", total=len(paths), unit=" files")
        return dict(zip(paths, shown, strict=True))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file whole or not at all; names that are not UTF-8 keep their bytes."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="surrogateescape")


def write_rejected(path: Path, rejected: dict[str, str]) -> None:
    """List the files that were left out with the reason; with none, remove an earlier run's list."""
    if not rejected:
        path.unlink(missing_ok=True)
        return
    write_lines(path, (f"{LINE_BREAK.sub('?', name)}\t{reason}" for name, reason in rejected.items()))
    print(f"{len(rejected)} files left out, listed with the reason in {path}")


def describe(name: str, lengths: list[int]) -> str:
    """One line on a split: utterances, hours, and how much of it training with the default limits uses."""
    kept = [length for length in lengths if MIN_SECONDS * SAMPLE_RATE <= length <= MAX_SECONDS * SAMPLE_RATE]
    hours, kept_hours = (sum(samples) / SAMPLE_RATE / 3600 for samples in (lengths, kept))
    return (
        f"{name}: {len(lengths)} utterances, {hours:.2f} h; "
        f"{len(kept)} ({kept_hours:.2f} h) last {MIN_SECONDS:g} s to {MAX_SECONDS:g} s, the limits of training"
    )


def main(args: argparse.Namespace) -> None:
    """Find, split, count, write.

    Raises:
        UserError: no such folder, no audio in it, or a split without a file that can be read.
    """
    root = os.path.abspath(args.data)
    out = Path(args.out)
    if not os.path.isdir(root):
        raise UserError(f"--data {args.data}: no such folder; give the folder of the corpus")
    if "\t" in root or LINE_BREAK.search(root):
        raise UserError(f"--data {args.data!r}: a tab or line break in the path breaks the manifest; rename the folder")
    if args.num_workers < 1:
        raise UserError(f"--num_workers {args.num_workers}: expected 1 or more")
    files = find_audio(root)
    found = [path for path in files if path.lower().endswith(AUDIO_SUFFIXES)]
    others = Counter(os.path.splitext(path)[1].lower() for path in set(files).difference(found))
    passed_over = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common())
    if not found:
        instead = f"but {passed_over}; convert them: {CONVERT}" if others else "give the corpus folder"
        raise UserError(
            f"--data {root}: no {', '.join(AUDIO_SUFFIXES[:6])} or other file that libsndfile reads in it or below"
            f"{', ' if others else '; '}{instead}"
        )
    if others:
        print(f"passed over: {passed_over}, which libsndfile does not read; convert them: {CONVERT}")

    split = choose_rule(found, args.splits, args.valid_fraction, args.seed)
    candidates = split(found)
    chosen = sorted(set().union(*candidates.values()))
    if len(chosen) < len(found):
        print(f"{len(found) - len(chosen)} of {len(found)} files are in no split")

    counts = count_all(root, chosen, args.num_workers)
    write_rejected(out / f"{REJECTED}.tsv", {path: reason for path, (_, reason) in counts.items() if reason})
    splits = split([path for path, (_, reason) in counts.items() if not reason])
    for name, paths in splits.items():
        if not paths:
            num_files = len(candidates[name])
            unusable = f"none of its {num_files} files can be used" if num_files else "no file falls into it"
            folders = ", ".join(sorted(entry.name for entry in os.scandir(root) if entry.is_dir())[:10]) or "none"
            raise UserError(
                f"{name}.tsv would be empty: {unusable}; folders in {root}: {folders}; "
                "change --splits or --valid_fraction"
            )
    for name, paths in splits.items():
        lengths = [counts[path][0] for path in paths]
        write_lines(out / f"{name}.tsv", [root, *map("{}\t{}".format, paths, lengths)])
        print(describe(name, lengths))
    print(f"written to {out}: {', '.join(f'{name}.tsv' for name in splits)}")


if __name__ == "__main__":
    cli.run(main, parse_args())
