"""From a crop to a batch of waveforms; a file that has gone bad is replaced by one of about its length."""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from soundfile import SoundFile
from torch import Tensor
from torch.utils.data import Dataset

from dataset.batches import Crop
from dataset.manifest import Manifest
from wav2vec2.audio import AudioError, checked_audio, decode, stated_length
from wav2vec2.files.errors import UserError

# Files tried in place of a bad one before giving up: as many in a row point to a lost disk, not to bad files.
MAX_REPLACEMENTS = 20


@contextmanager
def _opened(path: str | os.PathLike, length: int | None) -> Iterator[SoundFile]:
    """Open a file to read audio from; what goes wrong, inside the ``with`` too, is an :class:`AudioError`.

    ``length`` is the number of samples at 16 kHz that its header must state, if it states any; None accepts all.
    """
    with checked_audio(path) as file:
        found = stated_length(file)
        if length is not None and found not in (None, length):
            raise AudioError(
                f"{path}: is {found} samples long (at 16 kHz), expected the manifest's {length}: "
                "it has changed since the manifest was written"
            )
        yield file


def load_audio(
    path: str | os.PathLike, offset: int = 0, num_samples: int | None = None, length: int | None = None
) -> Tensor:
    """Read an audio file as 16 kHz mono, or ``num_samples`` of it from sample ``offset`` on.

    Other sample rates are resampled, several channels averaged. Offset and counts are samples at 16 kHz.
    ``length`` is what the manifest says of the whole file; None leaves that unchecked.

    Returns:
        (T,) float32; all that follows ``offset`` if ``num_samples`` is None.

    Raises:
        AudioError: the file is missing, unreadable, not ``length`` long, or ends before ``offset + num_samples``.
    """
    with _opened(path, length) as file:
        waveform = decode(file, offset, num_samples)
    if num_samples is not None and waveform.numel() < num_samples:
        raise AudioError(
            f"{path}: ends at sample {offset + waveform.numel()} (at 16 kHz), expected {offset + num_samples} or more: "
            "it is cut short, or has changed since the manifest was written"
        )
    return waveform


def check_files(manifest: Manifest, max_bad: int, sample: int = 256) -> dict[str, str]:
    """Read the headers of some utterances before training starts, evenly from the whole manifest.

    Args:
        manifest: from :func:`read_manifest`.
        max_bad: bad files that are tolerated.
        sample: utterances to look at; all if the manifest has fewer.

    Returns:
        Path to reason, one line, of each that is missing, no audio, or not as long as the manifest says.

    Raises:
        UserError: the root folder does not exist, more than half of the files looked at are bad, or more than
            ``max_bad`` are.
    """
    if not manifest.root.is_dir():
        raise UserError(f"{manifest.path}: its root folder {manifest.root} (line 1) does not exist")
    num_files = len(manifest.paths)
    chosen = np.linspace(0, num_files - 1, min(sample, num_files)).round().astype(int).tolist()
    bad_files: dict[str, str] = {}
    for index in chosen:
        path = manifest.full_path(index)
        try:
            with _opened(path, int(manifest.lengths[index])):
                pass
        except AudioError as error:
            bad_files[path] = str(error)
    num_bad, has_moved = len(bad_files), len(bad_files) > len(chosen) // 2
    if num_bad > max_bad or has_moved:
        expected = "the corpus has moved or changed" if has_moved else f"expected at most {max_bad}"
        raise UserError(
            f"{manifest.path}: {num_bad} of {len(chosen)} files looked at cannot be used, {expected}; the first: "
            f"{next(iter(bad_files.values()))}"
        )
    return bad_files


class Batch(NamedTuple):
    """What :class:`SpeechDataset` makes of a crop.

    Attributes:
        waveforms: (B, T) float32.
        lengths: None: crops have no padding, and a model on a GPU would have to wait to see that.
        paths: the B files that were read.
        seed: the crop's.
        weight: utterances that count, B, or 0 in a batch that only tops up.
        bad_files: path to reason, one line, of the files that others had to replace.
    """

    waveforms: Tensor
    lengths: None
    paths: list[str]
    seed: int
    weight: int
    bad_files: dict[str, str]


class SpeechDataset(Dataset):
    """Reads the crops that :class:`BatchSampler` chooses, and replaces files that cannot give theirs.

    A bad file gives its place to the next longer one of the manifest, after the longest to the shortest that is
    long enough; if that is bad too, to the one after. So the batch keeps its shape and every run reads the same.

    Args:
        manifest: from :func:`read_manifest`.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    @cached_property
    def _by_length(self) -> np.ndarray:
        """The utterances from short to long; not before a file is bad, so that no process holds it in vain."""
        return np.argsort(self.manifest.lengths, kind="stable")

    def __len__(self) -> int:
        return len(self.manifest.paths)

    def __getitem__(self, crop: Crop) -> Batch:
        """Read one batch.

        Raises:
            AudioError: neither a file nor any of :data:`MAX_REPLACEMENTS` others can be used.
        """
        waveforms = torch.empty(len(crop.indices), crop.num_samples)
        paths: list[str] = []
        bad_files: dict[str, str] = {}
        for row, index, offset in zip(waveforms, crop.indices, crop.offsets, strict=True):
            path, waveform, bad = self._read_or_replace(index, offset, crop.num_samples)
            row.copy_(waveform)
            paths.append(path)
            bad_files.update(bad)
        return Batch(waveforms, None, paths, crop.seed, 0 if crop.tops_up else len(crop.indices), bad_files)

    def _read_or_replace(self, index: int, offset: int, num_samples: int) -> tuple[str, Tensor, dict[str, str]]:
        """The path that was read in the end, (T,) of it, and path to reason of those that were bad."""
        candidates = itertools.chain([(index, offset)], self._replacements(index, offset, num_samples))
        (index, _), waveform, bad = first_readable(
            candidates,
            lambda candidate: self.manifest.full_path(candidate[0]),
            lambda candidate: self._read(*candidate, num_samples),
        )
        return self.manifest.full_path(index), waveform, bad

    def _replacements(self, index: int, offset: int, num_samples: int) -> Iterator[tuple[int, int]]:
        """Index and first sample of each utterance to try in place of a bad one."""
        lengths = self.manifest.lengths
        candidates = self._by_length[np.searchsorted(lengths, num_samples, sorter=self._by_length) :]
        place = np.flatnonzero(candidates == index)[0]
        for candidate in np.roll(candidates, -place)[1 : 1 + MAX_REPLACEMENTS].tolist():
            yield candidate, min(offset, int(lengths[candidate]) - num_samples)

    def _read(self, index: int, offset: int, num_samples: int) -> Tensor:
        """(T,) of one utterance.

        Raises:
            AudioError: see :func:`load_finite`; or there is no sound in the file.
        """
        path = self.manifest.full_path(index)
        waveform = load_finite(path, offset, num_samples, int(self.manifest.lengths[index]))
        # A crop may fall into a pause of digital silence; only a file without any sound is bad.
        if not waveform.any() and not load_audio(path).any():
            raise AudioError(f"{path}: all of its samples are zero, expected sound")
        return waveform


def load_finite(path: str | os.PathLike, offset: int, num_samples: int, length: int) -> Tensor:
    """As :func:`load_audio`.

    Raises:
        AudioError: as there; or a sample is no number.
    """
    waveform = load_audio(path, offset, num_samples, length)
    low, high = (float(value) for value in waveform.aminmax())  # NaN if any sample is
    if not (math.isfinite(low) and math.isfinite(high)):
        num_bad = int((~waveform.isfinite()).sum())
        raise AudioError(
            f"{path}: {num_bad} of samples {offset} to {offset + num_samples} (at 16 kHz) are NaN or infinite, "
            "expected numbers"
        )
    return waveform


def first_readable(
    candidates: Iterable[Any], path_of: Callable[[Any], str], read: Callable[[Any], Tensor]
) -> tuple[Any, Tensor, dict[str, str]]:
    """The first of several files that can be read, what was read of it, and path to reason of those before it.

    Raises:
        AudioError: none can.
    """
    bad: dict[str, str] = {}
    for candidate in candidates:
        try:
            return candidate, read(candidate), bad
        except AudioError as error:
            bad[path_of(candidate)] = str(error)
    raise AudioError(f"{next(iter(bad.values()))} (the {len(bad) - 1} files tried in its place fail too)")
