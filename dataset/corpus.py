"""Finds the audio files of a corpus, splits them and counts their samples, without torch."""

import contextlib
import hashlib
import multiprocessing
import os
import re
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from functools import cache

import numpy as np

from wav2vec2.audio import (
    AUDIO_SUFFIXES,
    AudioError,
    checked_audio,
    mono_blocks,
    num_samples_at_16k,
    read_mono,
    stated_length,
)

# Suffixes of audio and video that libsndfile does not read, or not without being told the rate.
_OTHER_NAMES = """
m4a m4b mp4 m4v mov 3gp aac ac3 eac3 amr awb wma wmv asf webm weba mkv mka avi flv mpg mpeg ogv spx ape wv tta tak dsf
dff dts ra rm shn gsm vox raw pcm
"""
_OTHER_SUFFIXES = tuple(f".{name}" for name in _OTHER_NAMES.split())
LINE_BREAK = re.compile(r"[\r\n]")  # either would end a manifest's row

FolderPatterns = dict[str, list[str]]  # split name to its folders
Splits = dict[str, list[str]]  # split name to its files


def find_audio(root: str) -> tuple[list[str], Counter[str]]:
    """Return the audio files below a folder, as sorted paths from it with ``/``, and the number of others by suffix.

    The others are audio and video that libsndfile does not read. Suffixes count, in either case. Links are followed.
    """
    found: list[str] = []
    others: list[str] = []
    # Folders to look into, each with device and inode of those around it, so that no link leads in a circle.
    folders: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while folders:
        prefix, above = folders.pop()
        status = os.stat(os.path.join(root, prefix))
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            continue
        with os.scandir(os.path.join(root, prefix)) as entries:
            for entry in entries:
                if _is_folder(entry):
                    folders.append((f"{prefix}{entry.name}/", above | {identity}))
                elif entry.name.lower().endswith(AUDIO_SUFFIXES):
                    found.append(prefix + entry.name)
                elif entry.name.lower().endswith(_OTHER_SUFFIXES):
                    others.append(os.path.splitext(entry.name)[1].lower())
    return sorted(found), Counter(sorted(others))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


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


def count_samples(path: str) -> tuple[int, str]:
    """Return a file's samples at 16 kHz and ``""``, or 0 and the reason why it cannot be used.

    The last sample is read too: the header of a file that was cut short still has the whole count. Where the header
    cannot be trusted, the file is decoded.
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
            elif num_frames:
                last = np.empty(0)
                with contextlib.suppress(RuntimeError):  # soundfile's
                    file.seek(num_frames - 1)
                    last = read_mono(file, 1)
                if not len(last):
                    return 0, f"cut short: its header promises {num_frames} samples, the last cannot be read"
                is_finite = bool(np.isfinite(last).all())
            if num_frames == 0:
                return 0, "no samples"
            if not is_finite:
                return 0, "NaN or infinite samples"
            return num_samples_at_16k(num_frames, file.samplerate), ""
    except AudioError as error:
        return 0, str(error).removeprefix(f"{path}: ")


def count_all(root: str, paths: list[str], num_workers: int) -> Iterator[tuple[int, str]]:
    """Call :func:`count_samples` for every file below ``root``, in order.

    In processes: threads would wait for Python's lock in the short calls, and be slower than one thread alone.
    """
    # Many files at a time, or the main process would slow down the others; enough parts to share out.
    size = max(1, min(256, len(paths) // (8 * num_workers)))
    # Ctrl-C is left to the main process, which ends the workers.
    with multiprocessing.Pool(num_workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        yield from pool.imap(count_samples, (os.path.join(root, path) for path in paths), chunksize=size)
