"""From a list of labelled audio to batches of whole utterances, padded, with what is said or heard in each."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from dataset.batches import Crop
from dataset.speech import first_readable, with_replacements
from labels.lists import SEGMENTS, TEXT, UNITS, Clip, Probe, read_table, text_units
from wav2vec2.audio import SAMPLE_RATE, AudioError, checked_audio, read_audio, stated_length
from wav2vec2.files.errors import UserError, short_repr


@dataclass(frozen=True)
class FrameTimes:
    """The frames that a model makes: ``window`` samples every ``hop`` samples."""

    hop: int
    window: int

    def count(self, num_samples: int) -> int:
        """Frames of so many samples."""
        return max(0, (num_samples - self.window) // self.hop + 1)

    def middles(self, num_samples: int) -> Tensor:
        """The middle of each frame in seconds, (frames,)."""
        return (torch.arange(self.count(num_samples)) * self.hop + self.window / 2) / SAMPLE_RATE


def frame_labels(clip: Clip, times: Tensor) -> Tensor:
    """The label of each frame by its middle, (N,); -1 in no segment."""
    starts, ends, labels = (torch.tensor(column) for column in zip(*clip.target, strict=True))
    place = torch.searchsorted(starts.double(), times.double(), right=True) - 1  # segments do not overlap
    inside = (place >= 0) & (times.double() < ends.double()[place.clamp(min=0)])
    return torch.where(inside, labels[place.clamp(min=0)], -1)


def checked_lengths(probe: Probe, clips: Sequence[Clip], frames: FrameTimes, max_samples: float) -> np.ndarray:
    """The samples of each clip at 16 kHz, (N,) int64, by the headers of the files.

    Raises:
        UserError: a clip cannot be read, makes no frame, is longer than ``max_samples``, has a unit that no training
            clip has, or more units than its frames can tell apart. The line of the list is named.
    """
    lengths = []
    for clip in clips:
        place = probe.place(clip)
        try:
            with checked_audio(clip.path) as file:
                length = stated_length(file)
            lengths.append(len(read_audio(clip.path)) if length is None else length)
        except AudioError as error:
            raise UserError(f"{place}: {error}") from error
        num_frames = frames.count(lengths[-1])
        if not num_frames:
            raise UserError(
                f"{place}: {clip.path} has {lengths[-1]} samples at 16 kHz, expected {frames.window} or more, of which "
                "the model makes one frame; take it out"
            )
        if lengths[-1] > max_samples:
            raise UserError(
                f"{place}: {clip.path} lasts {lengths[-1] / SAMPLE_RATE:.2f} s, a batch holds "
                f"{max_samples / SAMPLE_RATE:g} s; raise --seconds_per_batch, or take it out"
            )
        if probe.kind == TEXT:
            _check_text(probe, clip, num_frames)
    return np.array(lengths, dtype=np.int64)


def _check_text(probe: Probe, clip: Clip, num_frames: int) -> None:
    place = probe.place(clip)
    if -1 in clip.target:
        number = clip.target.index(-1)
        (text,) = [fields["text"] or "" for line, fields in read_table(probe.path)[1] if line == clip.line]
        parts = (text_units(text, units) for units in UNITS)
        unit = next(units[number] for units in parts if len(units) == len(clip.target))
        raise UserError(
            f"{place}: its unit {number + 1}, {short_repr(unit)}, is in no training text; correct the text, take the "
            "line out, or add such a text for training"
        )
    # CTC needs a frame for each unit, and one for the blank between two that are alike.
    repeats = sum(one == other for one, other in itertools.pairwise(clip.target))
    if (needed := len(clip.target) + repeats) > num_frames:
        raise UserError(
            f"{place}: the text needs {needed} frames ({len(clip.target)} units, {repeats} blanks between units that "
            f"are alike), but {clip.path} makes {num_frames}; take it out, or correct the text"
        )


class LabelledBatch(NamedTuple):
    """What :class:`LabelledDataset` makes of a batch.

    Attributes:
        waveforms: (B, T) float32, zeros behind the shorter ones.
        lengths: (B,) samples that are valid.
        targets: (B, N) int64, -1 behind the shorter ones: the label (N = 1), the units of the text, or the label of
            each frame, -1 in no segment.
        num_samples: the lengths again, which stay on the CPU.
        indices: the clips that were wanted.
        paths: the B files that were read.
        seed, weight, bad_files: as of :class:`dataset.speech.Batch`.
    """

    waveforms: Tensor
    lengths: Tensor
    targets: Tensor
    num_samples: list[int]
    indices: list[int]
    paths: list[str]
    seed: int
    weight: int
    bad_files: dict[str, str]


class LabelledDataset(Dataset):
    """Reads whole clips; a file that has gone bad is replaced, with its target, by the next longer one.

    After the longest comes the shortest.

    Args:
        kind: of the task, as of :class:`~labels.lists.Probe`.
        clips: of one split.
        lengths: (N,) their samples at 16 kHz.
        frames: of the model, which segments are labels for.
    """

    def __init__(self, kind: str, clips: Sequence[Clip], lengths: np.ndarray, frames: FrameTimes) -> None:
        self.kind = kind
        self.clips = clips
        self.lengths = lengths
        self.frames = frames

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, crop: Crop) -> LabelledBatch:
        """Read one batch.

        Raises:
            AudioError: neither a file nor any of the others tried in its place can be used.
        """
        rows, targets, paths, bad_files = [], [], [], {}
        for wanted in crop.indices:
            index, waveform, bad = first_readable(with_replacements(wanted, self.lengths), self._path, self._read)
            rows.append(waveform)
            targets.append(self.target(index))
            paths.append(self._path(index))
            bad_files |= bad
        num_samples = [len(row) for row in rows]
        return LabelledBatch(
            pad_sequence(rows, batch_first=True),
            torch.tensor(num_samples),
            pad_sequence(targets, batch_first=True, padding_value=-1),
            num_samples,
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
        """(N,) of a clip: as of :class:`LabelledBatch`, without what is behind it."""
        clip = self.clips[index]
        if self.kind == SEGMENTS:
            return frame_labels(clip, self.frames.middles(int(self.lengths[index])))
        return torch.tensor(clip.target if self.kind == TEXT else [clip.target])
