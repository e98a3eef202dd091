"""From a list of labelled audio to waveforms with their labels, one clip at a time or in padded batches."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from cli import progress
from dataset.batches import Crop
from dataset.speech import first_readable, with_replacements
from labels.lists import SEGMENTS, TEXT, Clip, Probe, num_samples
from wav2vec2.audio import SAMPLE_RATE, AudioError, read_audio
from wav2vec2.files.errors import UserError, short_repr
from wav2vec2.model import Wav2Vec2Model


@dataclass(frozen=True)
class FrameTimes:
    """The frames that a model makes: ``window`` samples every ``hop`` samples."""

    hop: int
    window: int

    @classmethod
    def of(cls, model: Wav2Vec2Model) -> "FrameTimes":
        return cls(model.feature_extractor.stride, model.feature_extractor.receptive_field)

    def count(self, num_samples: int) -> int:
        """Count the frames of this many samples."""
        return max(0, (num_samples - self.window) // self.hop + 1)

    def middles(self, num_frames: int) -> Tensor:
        """The middle of each frame in seconds, (frames,)."""
        return (torch.arange(num_frames) * self.hop + self.window / 2) / SAMPLE_RATE


def target_of(kind: str, clip: Clip, times: Tensor) -> Tensor:
    """The labels to find in a clip, (N,) int64: the one label, the units of the text, or the label of each frame.

    ``times`` (frames,) are the middles of the clip's frames in seconds, which tell the segment; outside it is -1.
    """
    if kind == SEGMENTS:
        starts, ends, labels = (torch.tensor(column) for column in zip(*clip.target, strict=True))
        place = torch.searchsorted(starts.double(), times.double(), right=True) - 1  # segments do not overlap
        inside = (place >= 0) & (times.double() < ends.double()[place.clamp(min=0)])
        return torch.where(inside, labels[place.clamp(min=0)], -1)
    return torch.tensor(clip.target if kind == TEXT else [clip.target])


def read_clips(probe: Probe, clips: Sequence[Clip], window: int, reader: str) -> Iterator[tuple[Clip, Tensor]]:
    """Read clips one after the other, each (T,) at 16 kHz; a progress bar names the ``reader``.

    Raises:
        UserError: one cannot be read, is shorter than the ``window`` samples of a frame, or holds values that are not
            finite. The message names the line of the list.
    """
    for clip in progress(clips, f"{reader}: {probe.name}", unit="clip", leave=False):
        place = probe.place(clip)
        try:
            waveform = read_audio(clip.path)
        except UserError as error:
            raise UserError(f"{place}: {error}; mend the file or take its line out") from error
        if not waveform.isfinite().all():
            raise UserError(f"{place}: {clip.path} holds samples that are NaN or infinite; take its line out")
        _check_frames(probe, clip, len(waveform), window)
        yield clip, waveform


def _check_frames(probe: Probe, clip: Clip, length: int, window: int) -> None:
    if length < window:
        raise UserError(
            f"{probe.place(clip)}: {clip.path} has {length} samples at 16 kHz, expected {window} or more, which make "
            "one frame; take it out"
        )


def checked_lengths(probe: Probe, clips: Sequence[Clip], frames: FrameTimes, max_samples: float) -> np.ndarray:
    """Count the samples of each clip at 16 kHz, (N,) int64, and check that training can use it.

    Raises:
        UserError: a clip cannot be read, makes no frame, is longer than ``max_samples``, has a unit that no training
            clip has, or more units than its frames can tell apart. The message names the line of the list.
    """
    lengths = []
    for clip in clips:
        try:
            length = num_samples(clip.path)
        except AudioError as error:
            raise UserError(f"{probe.place(clip)}: {error}") from error
        _check_frames(probe, clip, length, frames.window)
        if length > max_samples:
            raise UserError(
                f"{probe.place(clip)}: {clip.path} lasts {length / SAMPLE_RATE:.2f} s, a batch holds "
                f"{max_samples / SAMPLE_RATE:g} s; raise --seconds_per_batch, or take it out"
            )
        if probe.kind == TEXT:
            _check_text(probe, clip, frames.count(length))
        lengths.append(length)
    return np.array(lengths, dtype=np.int64)


def _check_text(probe: Probe, clip: Clip, num_frames: int) -> None:
    if unknown := [place for place, number in enumerate(clip.target) if number >= len(probe.labels)]:
        raise UserError(
            f"{probe.place(clip)}: its unit {unknown[0] + 1}, {short_repr(clip.units[unknown[0]])}, is in no training "
            "text; correct the text, take the line out, or add such a text for training"
        )
    # CTC needs a frame for each unit, and one for the blank between two equal ones.
    repeats = sum(one == other for one, other in itertools.pairwise(clip.target))
    if (needed := len(clip.target) + repeats) > num_frames:
        raise UserError(
            f"{probe.place(clip)}: the text needs {needed} frames ({len(clip.target)} units, {repeats} blanks between "
            f"equal units), but {clip.path} makes {num_frames}; take it out, or correct the text"
        )


class LabelledBatch(NamedTuple):
    """A batch of :class:`LabelledDataset`."""

    waveforms: Tensor  # (B, T) float32, zeros after the shorter ones
    lengths: Tensor  # (B,) valid samples
    targets: Tensor  # (B, N) int64, see target_of; -1 after the shorter ones
    num_samples: list[int]  # the lengths again, which stay on the CPU
    indices: list[int]  # the clips that the sampler chose
    paths: list[str]  # the B files that were read
    # See dataset.speech.Batch.
    seed: int
    weight: int
    bad_files: dict[str, str]


@dataclass(eq=False)
class LabelledDataset(Dataset):
    """Reads whole clips; the next longer clip, with its target, replaces a file that has gone bad.

    After the longest comes the shortest. ``lengths`` (N,) are the samples of each clip at 16 kHz.
    """

    kind: str
    clips: Sequence[Clip]
    lengths: np.ndarray
    frames: FrameTimes

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, crop: Crop) -> LabelledBatch:
        """Read one batch.

        Raises:
            AudioError: neither a file nor any of the others tried in its place can be used.
        """
        rows, targets, paths = [], [], []
        bad_files: dict[str, str] = {}
        for wanted in crop.indices:
            index, waveform, bad = first_readable(with_replacements(wanted, self.lengths), self._path, self._read)
            rows.append(waveform)
            targets.append(self.target(index))
            paths.append(self._path(index))
            bad_files |= bad
        lengths = [len(row) for row in rows]
        return LabelledBatch(
            pad_sequence(rows, batch_first=True),
            torch.tensor(lengths),
            pad_sequence(targets, batch_first=True, padding_value=-1),
            lengths,
            list(crop.indices),
            paths,
            crop.seed,
            0 if crop.tops_up else len(rows),
            bad_files,
        )

    def _path(self, index: int) -> str:
        return str(self.clips[index].path)

    def _read(self, index: int) -> Tensor:
        length = int(self.lengths[index])
        return read_audio(self._path(index), 0, length, length)

    def target(self, index: int) -> Tensor:
        """(N,) labels of a clip, see :func:`target_of`."""
        times = self.frames.middles(self.frames.count(int(self.lengths[index])))
        return target_of(self.kind, self.clips[index], times)
