"""Finds the audio files of a corpus, splits them and counts their samples, without torch."""

import contextlib
import hashlib
import heapq
import multiprocessing
import os
import re
import signal
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from fnmatch import fnmatchcase
from functools import cache
from itertools import chain
from typing import NamedTuple

import numpy as np

from dataset import archives
from wav2vec2.audio import (
    AUDIO_SUFFIXES,
    AudioError,
    checked_audio,
    mono_blocks,
    num_samples_at_16k,
    read_mono,
    stated_length,
)
from wav2vec2.files.errors import one_line

# Suffixes of audio and video that libsndfile does not read, or not without being told the rate.
_OTHER_NAMES = """
m4a m4b mp4 m4v mov 3gp aac ac3 eac3 amr awb wma wmv asf webm weba mkv mka avi flv mpg mpeg ogv spx ape wv tta tak dsf
dff dts ra rm shn gsm vox raw pcm
"""
_OTHER_SUFFIXES = tuple(f".{name}" for name in _OTHER_NAMES.split())
# Files that speech lies in without being audio files: what they are, and how to get such files.
_STORES = {
    (".scp", ".ark"): "Kaldi (wav.scp): give the folder of the audio that it names, or write that with kaldiio",
    (".jsonl", ".jsonl.gz"): "lhotse (manifests): give the folder of the audio, or write it with CutSet.save_audios",
    (".parquet", ".arrow"): "datasets (tables): write the bytes of each row's audio to a file",
    (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"): "compressed tar: unpack, or store it as plain .tar",
    (".7z", ".rar", ".gz", ".bz2", ".xz", ".zst"): "compressed data: unpack, 7z x FILE",
    (".npy", ".npz", ".h5", ".hdf5", ".pt", ".mdb", ".tfrecord"): "arrays or records: write with soundfile.write",
}
# Folders of macOS, Windows, file systems and network storage, in lower case.
_SYSTEM = {"__macosx", "$recycle.bin", "system volume information", "lost+found", "@eadir", "#recycle", "#snapshot"}
LINE_BREAK = re.compile(r"[\r\n]")  # either would end a manifest's row

FolderPatterns = dict[str, list[str]]  # split name to its folders
Splits = dict[str, list[str]]  # split name to its files


class Found(NamedTuple):
    """The contents of a folder, as paths from it with ``/``."""

    audio: list[str]  # sorted; of a file in an archive, ARCHIVE/NAME
    places: dict[str, str]  # of those in archives, where they are read: ARCHIVE:OFFSET:BYTES
    others: Counter[str]  # audio and video that libsndfile does not read, by suffix
    stores: Counter[str]  # what else speech may lie in, by :func:`store_of`
    repeated: list[str]  # folders that are read under another name
    unreadable: dict[str, str]  # folders that may not be read, and links that lead nowhere: the reason


def find_audio(root: str) -> Found:
    """Find the audio files below a folder and in its archives, or in one archive. Suffixes count, in either case.

    Links are followed. A folder with several names is read once, under the first of those with the fewest links; a
    file counts under each of its names. What is hidden, and what systems keep for themselves, is passed over.
    """
    found = Found([], {}, Counter(), Counter(), [], {})
    if os.path.isfile(root):
        _look_into(os.path.dirname(root), os.path.basename(root), found)
    # A heap: number of links on the way, path.
    folders, seen = [(0, "")] if os.path.isdir(root) else [], set()
    while folders:
        num_links, prefix = heapq.heappop(folders)
        try:
            status = os.stat(os.path.join(root, prefix))
            if (identity := (status.st_dev, status.st_ino)) in seen:
                found.repeated.append(prefix)
                continue
            seen.add(identity)
            with os.scandir(os.path.join(root, prefix)) as entries:
                for entry in entries:
                    if _is_passed_over(entry.name):
                        continue
                    # A link to itself is none; is_dir would raise an error.
                    if os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():
                        heapq.heappush(folders, (num_links + entry.is_symlink(), f"{prefix}{entry.name}/"))
                    elif entry.name.lower().endswith(archives.SUFFIXES) and entry.is_file():  # no pipe, which waits
                        _look_into(root, prefix + entry.name, found)
                    else:
                        _sort_in(prefix + entry.name, entry, found)
        except OSError as error:
            found.unreadable[prefix or "."] = error.strerror or type(error).__name__
    found.audio.sort()
    return found


def find_audio_of(data: list[str]) -> tuple[str, dict[str, Found]]:
    """Return the folder that folders and archives share, and what :func:`find_audio` finds of each, from there."""
    paths = [os.path.abspath(path) for path in data]
    homes = [path if os.path.isdir(path) else os.path.dirname(path) for path in paths]
    root = os.path.commonpath(homes)
    found = {}
    for path, home, name in zip(paths, homes, data, strict=True):
        prefix = "" if home == root else f"{os.path.relpath(home, root)}/"
        audio, places, others, stores, repeated, unreadable = find_audio(path)
        found[name] = Found(
            [prefix + name for name in audio],
            {prefix + name: prefix + place for name, place in places.items()},
            others,
            stores,
            [prefix + name for name in repeated],
            {prefix + name: reason for name, reason in unreadable.items()},
        )
    return root, found


def _is_passed_over(name: str) -> bool:
    """Return whether a file or folder is hidden, or one that systems keep for themselves."""
    return name.startswith(".") or name.lower() in _SYSTEM


def _look_into(root: str, archive: str, found: Found) -> None:
    members: dict[str, str] = {}
    try:
        for name, start, num_bytes in archives.members(os.path.join(root, archive)):
            parts = [part for part in name.split("/") if part not in ("", ".")]
            if name.lower().endswith(AUDIO_SUFFIXES) and not any(map(_is_passed_over, parts)):
                members["/".join([archive, *parts])] = f"{archive}:{start}:{num_bytes}"
    except OSError as error:
        found.unreadable[archive] = one_line(error)
        return
    found.audio.extend(members)
    found.places.update(members)


def _sort_in(path: str, entry: os.DirEntry, found: Found) -> None:
    name = entry.name.lower()
    if name.endswith(AUDIO_SUFFIXES):
        found.audio.append(path)
    elif name.endswith(_OTHER_SUFFIXES):
        found.others[os.path.splitext(name)[1]] += 1
    elif store := store_of(name):
        found.stores[store] += 1
    elif entry.is_symlink() and not os.path.exists(entry):
        found.unreadable[path] = "a link that leads nowhere"


def store_of(name: str) -> str:
    """Return what kind of store a file is, and how to get audio files out; ``""`` if it is none."""
    return next((advice for suffixes, advice in _STORES.items() if name.lower().endswith(suffixes)), "")


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


def count_all(root: str, paths: list[str], num_workers: int) -> Iterator[tuple[str, tuple[int, str]]]:
    """Yield every path below ``root`` with what :func:`count_samples` says of it, in the order in which they are done.

    A decoder that crashes, or the system when memory runs out, ends a process. The files in hand are done again, one
    after the other while nothing else runs; one that ends its process then is at fault.
    """
    # Many files at a time, or the main process would slow down the others; enough parts to share out.
    size = max(1, min(256, len(paths) // (8 * num_workers)))
    suspects = yield from _in_processes(root, [paths[i : i + size] for i in range(0, len(paths), size)], num_workers)
    for path in (yield from _in_processes(root, [[path] for path in suspects], 1)):
        yield path, (0, "reading it ends the process: its decoder crashes, or memory runs out")


def _in_processes(
    root: str, parts: list[list[str]], num_workers: int
) -> Generator[tuple[str, tuple[int, str]], None, list[str]]:
    """Count the files of all parts; returns those that were in hand when a process died.

    In processes: threads would wait for Python's lock in the short calls, and be slower than one thread alone.
    """
    parts = parts[::-1]
    lost: list[str] = []
    while parts:
        busy: dict[Future, list[str]] = {}
        # Ctrl-C is left to the main process, which ends the workers.
        with ProcessPoolExecutor(
            num_workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
        ) as pool:
            try:
                while parts or busy:
                    while parts and len(busy) < num_workers:
                        busy[pool.submit(_count_part, root, parts[-1])] = parts[-1]
                        parts.pop()
                    for future in wait(busy, return_when=FIRST_COMPLETED).done:
                        yield from zip(busy[future], future.result(), strict=True)
                        del busy[future]
            except BrokenProcessPool:
                lost += chain(*busy.values())
            except BaseException:
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
    return lost


def _count_part(root: str, part: list[str]) -> list[tuple[int, str]]:
    return [count_samples(os.path.join(root, path)) for path in part]
