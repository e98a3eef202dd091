"""From an audio file to samples at 16 kHz, mono; torch, soundfile and torchaudio are imported when they are needed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    from soundfile import SoundFile
    from torch import Tensor

SAMPLE_RATE = 16_000

# The published limits for an utterance to be trained on: 32,000 to 250,000 samples.
MIN_SECONDS = 2.0
MAX_SECONDS = 15.625

# Seconds that read_audio decodes at once: what a file has beyond mono at 16 kHz never fills the memory.
_BLOCK_SECONDS = 60

# What libsndfile makes of a FLAC file whose encoder wrote to a pipe.
UNKNOWN_LENGTH = 2**63 - 1


def num_samples_at_16k(num_frames: int, sample_rate: int) -> int:
    """Samples that ``num_frames`` at ``sample_rate`` become at 16 kHz, rounded up as resampling does."""
    return -(-num_frames * SAMPLE_RATE // sample_rate)


def open_audio(path: str | os.PathLike) -> "SoundFile":
    """Open a file to read audio from; errors are soundfile's."""
    from soundfile import SoundFile

    # As bytes: soundfile insists on UTF-8 in a str, which a file name on Linux need not be.
    return SoundFile(os.fsencode(path))


@contextmanager
def checked_audio(path: str | os.PathLike, error_class: type[UserError] = UserError) -> "Iterator[SoundFile]":
    """Open a file to read audio from; what goes wrong, inside the ``with`` too, becomes an ``error_class``.

    Raises:
        UserError: the file is missing or cannot be read, or a package that reads it is not installed.
    """
    if not os.path.isfile(path):
        raise error_class(f"{path}: no such file, expected audio; check the path")
    try:
        from soundfile import LibsndfileError
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: reading audio needs soundfile, which is missing; pip install soundfile") from error
    try:
        with open_audio(path) as file:
            yield file
    except LibsndfileError as error:
        reason = f"{error.error_string.rstrip('.')}; {os.path.getsize(path)} bytes"
        raise error_class(f"{path}: expected audio, but it cannot be decoded ({reason}); get the file again") from error
    except OSError as error:  # a disk that fails, a network folder that went away
        raise error_class(f"{path}: expected audio, but reading it fails ({error.strerror}); check the disk") from error


def decode(file: "SoundFile", offset: int = 0, num_samples: int | None = None) -> "Tensor":
    """What an open file holds of the wanted range, (T,) at 16 kHz; shorter than asked if the file is."""
    if file.samplerate == SAMPLE_RATE and seeks_exactly(file):
        file.seek(min(offset, file.frames))
        return _read_mono(file, -1 if num_samples is None else num_samples)
    waveform = resample_to_16k(_read_mono(file, -1), file.samplerate)
    return waveform[offset : None if num_samples is None else offset + num_samples]


def seeks_exactly(file: "SoundFile") -> bool:
    """Whether reading from the middle gives the samples that reading from the start gives.

    An MP3 frame leans on the frames before it, and the count in an MP3's header is a claim only.
    """
    return file.format != "MP3"


def _read_mono(file: "SoundFile", num_frames: int) -> "Tensor":
    """The next ``num_frames`` of a file (-1: all), channels averaged: (T,) float32."""
    import torch

    frames = file.read(num_frames, dtype="float32")
    # The mean over one channel would change nothing, in a tenth of the time that decoding takes.
    return torch.from_numpy(frames if frames.ndim == 1 else frames.mean(axis=1))


def resample_to_16k(waveform: "Tensor", sample_rate: int) -> "Tensor":
    """(T,) at ``sample_rate`` to (``num_samples_at_16k(T, sample_rate)``,) at 16 kHz.

    Raises:
        UserError: torchaudio is missing.
    """
    if sample_rate == SAMPLE_RATE:
        return waveform
    from torch.nn.functional import pad

    try:
        from torchaudio.functional import resample  # imported late: a corpus at 16 kHz does without torchaudio
    except ModuleNotFoundError as error:
        raise UserError(f"audio at {sample_rate} Hz: resampling to 16 kHz needs torchaudio; install it") from error

    # torchaudio rounds the length in float32, which can lose the last sample; a few zeros more prevent it.
    padded = pad(waveform, (0, sample_rate // 100))
    return resample(padded, sample_rate, SAMPLE_RATE)[: num_samples_at_16k(waveform.numel(), sample_rate)]


def read_audio(path: str | os.PathLike) -> "Tensor":
    """Read a whole file, (T,) float32 at 16 kHz; several channels are averaged.

    Beside the samples themselves (0.23 GB an hour, twice for a moment) it takes a minute of audio as decoded.

    Raises:
        UserError: the file is missing, unreadable or cut short, or a package that reads it is not installed.
    """
    with checked_audio(path) as file:
        blocks = list(_blocks_at_16k(file))
        if seeks_exactly(file) and file.frames != UNKNOWN_LENGTH and file.tell() != file.frames:
            raise UserError(
                f"{path}: is cut short: {file.tell()} of {file.frames} samples can be read; get the file again"
            )
    import torch

    return torch.cat(blocks) if blocks else torch.empty(0)


def _blocks_at_16k(file: "SoundFile") -> "Iterator[Tensor]":
    """An open file's samples at 16 kHz, a block at a time.

    A block is resampled together with a second before and after it, which is more than the filter reaches. Whole
    seconds fall on samples at every rate, so that the blocks are those of the file resampled as a whole.
    """
    import torch

    rate = file.samplerate
    held, num_done = torch.empty(0), 0  # samples held, and how many of their seconds have been yielded
    is_last = False
    while not is_last:
        block = _read_mono(file, _BLOCK_SECONDS * rate)
        is_last = block.numel() < _BLOCK_SECONDS * rate
        if rate == SAMPLE_RATE:
            yield block
            continue
        held = torch.cat([held, block])
        num_ready = None if is_last else held.numel() // rate - 1
        resampled = resample_to_16k(held, rate)
        yield resampled[num_done * SAMPLE_RATE : None if num_ready is None else num_ready * SAMPLE_RATE].clone()
        if num_ready is not None:
            held, num_done = held[(num_ready - 1) * rate :], 1
