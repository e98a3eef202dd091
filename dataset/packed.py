"""The packed copy of a corpus: all samples in a few large files, which training reads without decoding.

``prepare_data.py --pack`` writes it beside the manifests, once for all splits::

    data/librispeech/packed/index.bin           what lies where, and the checksums
    data/librispeech/packed/5f0c21aa-00000.pcm  utterances one after the other: 16 kHz, mono, 16 bits, little-endian
    data/librispeech/packed/5f0c21aa-00001.pcm

:func:`attach` finds it from the manifest. The sources are not needed then, and the folder may be moved or linked to
a faster disk along with the manifests.

A sample is stored as the nearest multiple of 1/32768 in [-1, 1). That is exact for sources of 16 bits and one channel
at 16 kHz; of others (floats, 24 bits, resampled, several channels averaged) it is off by 1/65536 at most. What is
louder is clipped; the packing counts both.

There is a checksum for each second or so, and every read compares those of the seconds that it touches. An
utterance that fails is treated like a bad audio file: replaced, named and counted (``--max_bad_files``).

The index is what makes a pack: it is written last, whole or not at all, and names files that no other pack names. So
a run that breaks off leaves the pack before it as it was. Packing again while a run trains from the pack ends that run.
"""

import fcntl
import io
import multiprocessing
import os
import secrets
import shutil
import signal
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.manifest import Manifest, Names
from dataset.speech import AudioError, load_audio
from wav2vec2.errors import UserError, short_repr
from wav2vec2.files import atomic_path

FOLDER = "packed"
INDEX = "index.bin"
PCM_FILES = "[0-9a-f]" * 8 + "-*.pcm"
FORMAT = 1
FULL_SCALE = 32_768
BYTES_PER_SAMPLE = 2
BLOCK_SAMPLES = 16_384  # that one checksum covers
FILE_SAMPLES = 2**29  # a file of 1 GiB; only a longer utterance makes a larger one

REMEDY = "write the pack again with prepare_data.py --pack, remove its folder, or train without it (--no_pack)"


@dataclass(frozen=True)
class Index:
    """What a pack holds: N utterances in F files.

    Attributes:
        pack_id: what the names of its files start with.
        file_bytes: (F,) int64, their sizes.
        names: (N,) relative paths as in the manifests.
        lengths: (N,) int64, samples.
        files: (N,) int64, the file of each.
        offsets: (N,) int64, its first sample in the file.
        checksums: (blocks,) uint32, CRC-32 of each block of each utterance. An utterance's last block may be shorter.
    """

    pack_id: str
    file_bytes: np.ndarray
    names: Names
    lengths: np.ndarray
    files: np.ndarray
    offsets: np.ndarray
    checksums: np.ndarray

    def file_names(self) -> list[str]:
        return [f"{self.pack_id}-{number:05}.pcm" for number in range(len(self.file_bytes))]


def _num_blocks(lengths: np.ndarray) -> np.ndarray:
    """Blocks of utterances of these lengths (N,)."""
    return -(-lengths // BLOCK_SAMPLES)


# ---------------------------------------------------------------------------------------------- reading


class Pack:
    """The utterances of one manifest in a pack.

    The arrays are tensors, so that loader processes of any kind share them (see :class:`dataset.manifest.Names`).

    Args:
        folder: of the pack.
        index: what it holds.
        rows: (N,) for each utterance of the manifest, its place in the index.
    """

    def __init__(self, folder: Path, index: Index, rows: np.ndarray) -> None:
        self.folder = folder
        self._file_names = index.file_names()
        ends = np.cumsum(_num_blocks(index.lengths))
        first_blocks = ends - _num_blocks(index.lengths)
        # (N, 4): file, first sample, samples, first block
        columns = (index.files, index.offsets, index.lengths, first_blocks)
        self._places = torch.from_numpy(np.stack([column[rows] for column in columns], axis=1))
        self._checksums = torch.from_numpy(index.checksums.view(np.int32))

    def read(self, index: int, offset: int, num_samples: int) -> Tensor:
        """``num_samples`` of an utterance from sample ``offset`` on, which must lie inside: (T,) float32.

        Raises:
            AudioError: they cannot be read, or are not those that were packed.
        """
        file, start, length, first_block = self._places[index].tolist()
        # Whole blocks, for these are what has checksums.
        block = offset // BLOCK_SAMPLES
        begin, end = block * BLOCK_SAMPLES, min(-(-(offset + num_samples) // BLOCK_SAMPLES) * BLOCK_SAMPLES, length)
        path = self.folder / self._file_names[file]
        try:
            with path.open("rb", buffering=0) as samples_file:
                samples_file.seek((start + begin) * BYTES_PER_SAMPLE)
                data = samples_file.read((end - begin) * BYTES_PER_SAMPLE)
        except OSError as error:
            raise AudioError(f"{path}: reading it fails ({error.strerror}); check the disk, or {REMEDY}") from error
        found = _checksums(data)
        expected = self._checksums[first_block + block :][: len(found)].numpy().view(np.uint32)
        if len(data) != (end - begin) * BYTES_PER_SAMPLE or not np.array_equal(found, expected):
            raise AudioError(
                f"{path}: damaged between bytes {(start + begin) * BYTES_PER_SAMPLE} and "
                f"{(start + end) * BYTES_PER_SAMPLE}: expected the samples that were packed; {REMEDY}"
            )
        samples = np.frombuffer(data, "<i2")[offset - begin :][:num_samples]
        return torch.from_numpy(np.multiply(samples, np.float32(1 / FULL_SCALE), dtype=np.float32))


def _checksums(data: bytes) -> np.ndarray:
    """CRC-32 of each block, (blocks,) uint32."""
    size, view = BLOCK_SAMPLES * BYTES_PER_SAMPLE, memoryview(data)
    return np.array([zlib.crc32(view[at : at + size]) for at in range(0, len(data), size)], dtype=np.uint32)


def attach(manifest: Manifest) -> Manifest:
    """The manifest with the pack that lies beside it; without one, the manifest as it is.

    Raises:
        UserError: the pack is damaged or incomplete, or it lacks an utterance of the manifest.
    """
    folder = manifest.path.parent / FOLDER
    if not is_there(folder):
        return manifest
    index = read_index(folder)
    for name, size in zip(index.file_names(), index.file_bytes.tolist(), strict=True):
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: no such file, though the pack's index lists it; {REMEDY}")
        if (found := path.stat().st_size) != size:
            raise UserError(f"{path}: is {found} bytes long, expected {size}; {REMEDY}")
    rows_by_name = {name: row for row, name in enumerate(index.names)}
    rows = np.array([rows_by_name.get(name, -1) for name in manifest.paths])
    for wrong, problem in (
        (rows < 0, "are not in it"),
        (index.lengths[rows] != manifest.lengths, "have another length in it"),
    ):
        if wrong.any():
            first = manifest.paths[int(wrong.argmax())]
            raise UserError(
                f"{folder}: not the pack of {manifest.path}: {wrong.sum()} of {len(rows)} utterances {problem} "
                f"(the first: {short_repr(first)}); {REMEDY}"
            )
    return replace(manifest, pack=Pack(folder, index, rows))


def is_there(folder: Path) -> bool:
    """Whether the folder holds a pack, or what is left of one."""
    return (folder / INDEX).exists() or any(folder.glob(PCM_FILES))


def read_index(folder: Path) -> Index:
    """Read what a pack holds.

    Raises:
        UserError: the index is missing or damaged.
    """
    path = folder / INDEX
    if not path.is_file():
        raise UserError(f"{folder}: holds samples but no {INDEX}: packing did not finish; {REMEDY}")
    contents = path.read_bytes()
    if int.from_bytes(contents[:4], "little") != zlib.crc32(contents[4:]) or len(contents) <= 4:
        raise UserError(f"{path}: damaged, expected the index of a pack; {REMEDY}")
    with np.load(io.BytesIO(contents[4:]), allow_pickle=False) as arrays:
        if (found := int(arrays["format"])) != FORMAT:
            raise UserError(f"{path}: is of format {found}, expected {FORMAT}; {REMEDY}")
        names = bytes(arrays["names"]).decode(errors="surrogateescape").split("\n")
        return Index(
            str(arrays["pack_id"]),
            names=Names(names),
            **{name: arrays[name] for name in ("file_bytes", "lengths", "files", "offsets", "checksums")},
        )


# ---------------------------------------------------------------------------------------------- writing


class _Job(NamedTuple):
    """One utterance to pack: ``num_samples`` of ``source`` go to sample ``offset`` of ``target``."""

    source: str
    num_samples: int
    target: Path
    offset: int


class _Outcome(NamedTuple):
    """What became of a job: the reason why it was left out, or "" and the rest.

    Attributes:
        reason: one line.
        checksums: (blocks,) uint32.
        is_rounded: some sample was no multiple of 1/32768.
        num_clipped: samples outside [-1, 1).
    """

    reason: str
    checksums: np.ndarray = np.empty(0, np.uint32)
    is_rounded: bool = False
    num_clipped: int = 0


def _pack_one(job: _Job) -> _Outcome:
    """Decode, round and write one utterance; runs in a worker process."""
    try:
        waveform = load_audio(job.source, 0, job.num_samples, job.num_samples).numpy()
    except AudioError as error:
        return _Outcome(str(error).removeprefix(f"{job.source}: ").removesuffix("; run prepare_data.py again"))
    if not np.isfinite(waveform).all():
        return _Outcome("NaN or infinite samples")
    with np.errstate(over="ignore"):  # an absurdly loud sample becomes infinite here, and is clipped below
        scaled = waveform * np.float32(FULL_SCALE)  # exact, as a power of 2
    rounded = np.rint(scaled)
    samples = rounded.clip(-FULL_SCALE, FULL_SCALE - 1).astype("<i2")
    if not samples.any():
        return _Outcome("all of its samples are zero in 16 bits, expected sound")
    data = samples.tobytes()
    with job.target.open("r+b") as file:
        file.seek(job.offset * BYTES_PER_SAMPLE)
        file.write(data)
    is_rounded, num_clipped = (scaled != rounded).any(), np.count_nonzero(samples != rounded)
    return _Outcome("", _checksums(data), bool(is_rounded), num_clipped)


class Writer:
    """Writes a pack; before :meth:`commit`, the one that was there stays in use. See :func:`writing`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index: Index | None = None
        self._remove_others(*self._files_in_use())

    def _files_in_use(self) -> list[str]:
        """Files of the pack that is there, if it can be read."""
        try:
            return read_index(self.folder).file_names()
        except UserError:
            return []

    def _remove_others(self, *kept: str) -> None:
        """Remove every file with samples but these: earlier packs, and packs that were not finished."""
        for path in self.folder.glob(PCM_FILES):
            if path.name not in kept:
                path.unlink()

    def add(self, root: str, lengths: dict[str, int], num_workers: int) -> dict[str, str]:
        """Decode utterances and write their samples, with a progress bar.

        Args:
            root: the folder that paths start from.
            lengths: relative path to samples at 16 kHz; at least one.
            num_workers: processes.

        Returns:
            Path to reason, one line, of what could not be used and is not in the pack.

        Raises:
            UserError: the disk is too small.
        """
        names, counts = list(lengths), np.array(list(lengths.values()), dtype=np.int64)
        self._check_space(int(counts.sum()) * BYTES_PER_SAMPLE)
        files, offsets = lay_out(counts, FILE_SAMPLES)
        file_bytes = np.zeros(files[-1] + 1, dtype=np.int64)
        np.maximum.at(file_bytes, files, (offsets + counts) * BYTES_PER_SAMPLE)
        index = Index(secrets.token_hex(4), file_bytes, Names(()), counts, files, offsets, np.empty(0, np.uint32))
        targets = [self.folder / name for name in index.file_names()]
        for target, size in zip(targets, file_bytes.tolist(), strict=True):
            with target.open("wb") as file:
                file.truncate(size)
        jobs = [
            _Job(os.path.join(root, name), count, targets[file], offset)
            for name, count, file, offset in zip(names, counts.tolist(), files, offsets.tolist(), strict=True)
        ]
        # Ctrl-C is left to the main process, which ends the workers.
        with multiprocessing.Pool(num_workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            results = pool.imap(_pack_one, jobs, chunksize=8)
            outcomes = list(tqdm(results, "packing", len(jobs), unit=" files", disable=None))
        used = np.array([not outcome.reason for outcome in outcomes])
        self._index = replace(
            index,
            names=Names(name for name, is_used in zip(names, used, strict=True) if is_used),
            lengths=counts[used],
            files=files[used],
            offsets=offsets[used],
            checksums=np.concatenate([outcome.checksums for outcome in outcomes]),
        )
        self._report(outcomes)
        return {name: outcome.reason for name, outcome in zip(names, outcomes, strict=True) if outcome.reason}

    def _check_space(self, num_bytes: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if num_bytes > free:
            kept = " (the pack that is there stays until the new one is complete)" if self._files_in_use() else ""
            raise UserError(
                f"{self.folder}: packing needs {num_bytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left{kept}; "
                "make room there, or give another --out"
            )

    def _report(self, outcomes: list[_Outcome]) -> None:
        num_rounded = sum(outcome.is_rounded for outcome in outcomes)
        if num_rounded:
            print(f"{num_rounded} of {len(outcomes)} files are not 16-bit mono at 16 kHz: rounded to 16 bits")
        clipped = [outcome.num_clipped for outcome in outcomes if outcome.num_clipped]
        if clipped:
            print(f"{sum(clipped)} samples in {len(clipped)} files are louder than 16 bits can hold: clipped")

    def commit(self) -> None:
        """Make what was added the pack of this folder, and remove the one before it."""
        for name in self._index.file_names():
            with (self.folder / name).open("rb") as file:
                os.fsync(file.fileno())
        arrays = {**vars(self._index), "format": FORMAT}
        arrays["names"] = np.frombuffer("\n".join(self._index.names).encode(errors="surrogateescape"), np.uint8)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        contents = buffer.getvalue()
        with atomic_path(self.folder / INDEX) as temporary:
            temporary.write_bytes(zlib.crc32(contents).to_bytes(4, "little") + contents)
        self._remove_others(*self._index.file_names())

    def discard(self) -> None:
        """Remove what was added since the last commit."""
        self._remove_others(*self._files_in_use())


def lay_out(lengths: np.ndarray, file_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Lay utterances one after the other into files of at most ``file_samples``; a longer one has its own.

    Returns:
        The file of each, and its first sample in it: (N,) int64.
    """
    files, offsets = np.zeros_like(lengths), np.zeros_like(lengths)
    file = end = 0
    for number, length in enumerate(lengths.tolist()):
        if end and end + length > file_samples:
            file, end = file + 1, 0
        files[number], offsets[number] = file, end
        end += length
    return files, offsets


@contextmanager
def writing(folder: Path) -> Iterator[Writer]:
    """A writer of the pack in ``folder``; what it has not committed in the end is removed.

    Raises:
        UserError: another process is packing there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"{folder}: another prepare_data.py is packing there; wait for its end") from None
        except OSError:
            pass  # a file system without locks
        writer = Writer(folder)
        try:
            yield writer
        finally:
            writer.discard()
            if not is_there(folder):
                (folder / ".lock").unlink()
                with suppress(OSError):  # something else is in it
                    folder.rmdir()
