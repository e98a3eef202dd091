"""Reads crops as batches of waveforms. A file that cannot be read is replaced by one of about its length."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.batches import Crop
from dataset.manifest import Manifest
from wav2vec2.audio import AudioError, checked_audio, read_audio
from wav2vec2.files.errors import UserError

# Files tried in place of a bad one before giving up: so many in a row point to a lost disk, not to bad files.
MAX_REPLACEMENTS = 20


def check_files(manifest: Manifest, sample: int = 256) -> dict[str, str]:
    """Read the headers of some utterances, evenly spread over the manifest; returns path to reason of each bad file.

    Raises:
        UserError: the root folder does not exist, or more than half of the files looked at are bad.
    """
    if not manifest.root.is_dir():
        problem = f"its root folder {manifest.root} (line 1) does not exist"
        raise UserError(f"{manifest.path}: {problem}; run prepare_data.py again")
    num_files = len(manifest.paths)
    chosen = np.linspace(0, num_files - 1, min(sample, num_files)).round().astype(int).tolist()
    bad_files: dict[str, str] = {}
    for index in chosen:
        path = manifest.full_path(index)
        try:
            with checked_audio(path, int(manifest.lengths[index])):
                pass
        except AudioError as error:
            bad_files[path] = str(error)
    if len(bad_files) > len(chosen) // 2:
        first = next(iter(bad_files.values()))
        advice = "" if "prepare_data.py" in first else "; the corpus has moved or changed, run prepare_data.py again"
        num_bad = f"{len(bad_files)} of {len(chosen)} files looked at"
        raise UserError(f"{manifest.path}: {num_bad} cannot be used, the first: {first}{advice}")
    return bad_files


class Batch(NamedTuple):
    """A batch of crops, read."""

    waveforms: Tensor  # (B, T) float32
    lengths: None  # crops have no padding; a model on a GPU would have to wait to see that
    paths: list[str]  # the B files that were read
    seed: int  # the crop's
    weight: int  # number of utterances that count: B, or 0 in a batch that only tops up
    bad_files: dict[str, str]  # path to reason, one line, of the files that others replaced


class SpeechDataset(Dataset):
    """Reads the crops that :class:`BatchSampler` chooses, and replaces files that cannot be used.

    Replacements keep the shape of the batch, and are the same in every run.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.lengths = manifest.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, crop: Crop) -> Batch:
        """Read one batch.

        Raises:
            AudioError: neither a file nor any of :data:`MAX_REPLACEMENTS` others can be used.
        """
        waveforms = torch.empty(len(crop.indices), crop.num_samples)
        paths: list[str] = []
        bad_files: dict[str, str] = {}
        for row, wanted, offset in zip(waveforms, crop.indices, crop.offsets, strict=True):
            candidates = with_replacements(wanted, self.lengths, crop.num_samples)
            read = partial(self._read, offset=offset, num_samples=crop.num_samples)
            index, waveform, bad = first_readable(candidates, self.manifest.full_path, read)
            row.copy_(waveform)
            paths.append(self.manifest.full_path(index))
            bad_files |= bad
        return Batch(waveforms, None, paths, crop.seed, 0 if crop.tops_up else len(paths), bad_files)

    def _read(self, index: int, offset: int, num_samples: int) -> Tensor:
        path, length = self.manifest.full_path(index), int(self.lengths[index])
        waveform = read_audio(path, min(offset, length - num_samples), num_samples, length)
        # A crop may fall into a pause of digital silence; only a file without any sound is bad.
        if not waveform.any() and not read_audio(path).any():
            raise AudioError(f"{path}: all of its samples are zero, expected sound")
        return waveform


def with_replacements(index: int, lengths: np.ndarray, num_samples: int = 0) -> Iterator[int]:
    """Yield an utterance and those of at least ``num_samples`` to try in its place.

    These are the next longer ones, and after the longest the shortest.
    """
    yield index
    by_length = np.argsort(lengths, kind="stable")
    long_enough = by_length[lengths[by_length] >= num_samples]
    place = int(np.flatnonzero(long_enough == index)[0])
    yield from np.roll(long_enough, -place)[1 : 1 + MAX_REPLACEMENTS].tolist()


def first_readable(
    candidates: Iterable[int], path_of: Callable[[int], str], read: Callable[[int], Tensor]
) -> tuple[int, Tensor, dict[str, str]]:
    """Return the first utterance that can be read, its waveform, and path to reason of those before it.

    Raises:
        AudioError: none can be read.
    """
    bad: dict[str, str] = {}
    for candidate in candidates:
        try:
            return candidate, read(candidate), bad
        except AudioError as error:
            bad[path_of(candidate)] = str(error)
    raise AudioError(f"{next(iter(bad.values()))} (the {len(bad) - 1} files tried in its place fail too)")
