"""Reads audio files as 16 kHz mono. torch, soundfile and torchaudio are imported when they are needed."""

import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from io import BytesIO
from itertools import chain
from typing import TYPE_CHECKING

from .files.errors import UserError, one_line

if TYPE_CHECKING:
    import numpy as np
    from soundfile import SoundFile
    from torch import Tensor

SAMPLE_RATE = 16_000

# The sample rates that are read, in Hz. A rate far below is in kHz by mistake, or the header is damaged.
LOWEST_RATE, HIGHEST_RATE = 1_000, 384_000

# The published limits for training utterances: 32,000 to 250,000 samples.
MIN_SECONDS = 2.0
MAX_SECONDS = 15.625

# Suffixes of what libsndfile reads, except for files without a header.
_AUDIO_NAMES = """
flac wav ogg mp3 opus oga aiff aif aifc aiffc au snd sph nist wv1 wv2 w64 caf rf64 wave wavex bwf mp1 mp2 mpga sf ircam
voc iff svx 8svx 16svx avr htk paf fap pvf sd2 sds mpc wve xi mat
"""
AUDIO_SUFFIXES = tuple(f".{name}" for name in _AUDIO_NAMES.split())
CONVERT = "ffmpeg -i IN OUT.flac"

# A file inside of an archive.
_ARCHIVED = re.compile(r"(.+\.(?:tar|zip)):(\d{1,18}):(\d{1,18})", re.IGNORECASE | re.DOTALL)

# The first bytes of files that libsndfile cannot decode, and what such a file is.
_FOREIGN = {
    rb"OggS.{24}\x7fFLAC": "FLAC in Ogg",
    rb"OggS.{24}Speex": "Speex in Ogg",
    rb".{4}ftyp": "MPEG-4 (AAC, ALAC or video)",
    rb"\x1aE\xdf\xa3": "Matroska or WebM",
    rb"0&\xb2u\x8ef\xcf\x11": "Windows Media",
    rb"#!AMR": "AMR",
}

# Formats and encodings in which each sample has its own place, and FLAC, whose decoder finds the exact sample. Others
# decode a sample from those before it, or seek to the nearest block.
_EXACT_FORMATS = {"WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "NIST", "FLAC"}
_EXACT_ENCODINGS = {"PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"}

# Ogg's longest page, and how much of a file is searched for streams: all of an utterance.
_OGG_PAGE, _OGG_HEAD = 2**16, 2**20
# In an MP3's first frame: how many bytes it speaks for. And nine frames, as no tag or picture behind them looks.
_XING = rb"\xff[\xe0-\xff].{11,36}(?:Xing|Info)\0\0\0[\x03\x07\x0b\x0f](?!\0{4}).{4}(?!\0{4})(.{4})"
_MP3_FRAMES = rb"(\xff[\xe2-\xff])(?:.{22,1730}?\1){8}"

# Limits on what is decoded at once and on one read: high rates and many channels must not fill the memory.
_BLOCK_SECONDS = 60
_READ_VALUES = 2**22

# The number of frames that libsndfile states for a FLAC file whose encoder wrote to a pipe.
_UNKNOWN_LENGTH = 2**63 - 1

# The filter of torchaudio's resample: zero crossings on each side, and the share of the band that is kept.
_CROSSINGS, _ROLLOFF = 6, 0.99
# torchaudio tabulates the filter for each phase. The table grows with the product of the terms of the rates' ratio:
# 282,240 at 11,025 Hz, the most of any ordinary rate, and 705,616,000 at 44,101 Hz.
_MAX_TABLE = 2_000_000


class AudioError(UserError):
    """A file that cannot give the audio that is wanted; the message is one line.

    A DataLoader worker's exception reaches the main process as the same class, built from the text of its traceback.
    That text ends with the original message, which is all that the user needs.
    """

    def __init__(self, message: str) -> None:
        last_line = message.rstrip("\n").rpartition("\n")[2]
        super().__init__(last_line.removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: "))


def num_samples_at_16k(num_frames: int, sample_rate: int) -> int:
    """Samples that ``num_frames`` at ``sample_rate`` become at 16 kHz, rounded up as resampling does."""
    return -(-num_frames * SAMPLE_RATE // sample_rate)


def _archived(path: str | os.PathLike) -> bytes:
    """Read ``ARCHIVE:OFFSET:BYTES``, as fairseq's manifests name a file inside of an archive that is not compressed."""
    named = _ARCHIVED.fullmatch(os.fsdecode(path))
    if named is None or not os.path.isfile(named[1]):
        raise AudioError(f"{path}: no such file, expected audio; check the path")
    start, num_bytes = int(named[2]), int(named[3])
    try:
        with open(named[1], "rb") as archive:
            if archive.seek(0, os.SEEK_END) < start + num_bytes:
                raise AudioError(f"{path}: the archive ends before that; it has changed, run prepare_data.py again")
            archive.seek(start)
            return archive.read(num_bytes)
    except OSError as error:
        raise AudioError(f"{path}: reading it fails ({one_line(error)}), expected audio; check the disk") from error


@contextmanager
def checked_audio(
    path: str | os.PathLike, length: int | None = None, contents: bytes | None = None
) -> "Iterator[SoundFile]":
    """Open an audio file; any error, inside the ``with`` block too, is reported as the file's.

    The file's ``seekable()`` is true only if a seek gives the samples that reading from the start gives. ``length`` is
    the number of samples at 16 kHz that its header must state, if it states any. A file in memory has its ``contents``
    and a ``path`` that only names it in errors; a path may also be ``ARCHIVE:OFFSET:BYTES``.

    Raises:
        AudioError: the file is missing, cannot be read or decoded, has another length, or states a rate that no
            recording has.
        UserError: a package that reads it is not installed.
    """
    if contents is None and not os.path.isfile(path):
        contents = _archived(path)
    try:
        from soundfile import SoundFile
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: reading audio needs soundfile, which is missing; pip install soundfile") from error
    try:
        # As bytes: soundfile insists on UTF-8 in a str, which a file name on Linux need not be.
        with SoundFile(os.fsencode(path) if contents is None else BytesIO(contents)) as file:
            if not LOWEST_RATE <= file.samplerate <= HIGHEST_RATE:
                problem = (
                    f"states a sample rate of {file.samplerate} Hz, expected {LOWEST_RATE} Hz to {HIGHEST_RATE} Hz"
                )
                raise AudioError(f"{path}: {problem}; its header is damaged, get the file again")
            if file.format in ("OGG", "MP3") and _is_joined(path, contents, file.format):
                problem = "holds several recordings, of which libsndfile reads the first"
                raise AudioError(f"{path}: {problem}; split it, or convert it: {CONVERT}")
            is_exact = file.format in _EXACT_FORMATS and file.subtype in _EXACT_ENCODINGS
            if not is_exact or file.frames == _UNKNOWN_LENGTH:
                file.seekable = lambda: False  # or soundfile itself would seek, after every read
            at_16k = num_samples_at_16k(file.frames, file.samplerate)
            if length == file.frames != at_16k:
                problem = (
                    f"{length} samples, counted at its own rate of {file.samplerate} Hz, expected {at_16k} at 16 kHz"
                )
                raise AudioError(f"{path}: is listed with {problem}; write the manifest with prepare_data.py")
            if length is not None and (stated := stated_length(file)) not in (None, length):
                problem = f"{stated} samples long (at 16 kHz), expected {length} as it was listed"
                raise AudioError(f"{path}: is {problem}: the file has changed since")
            yield file
    except (UserError, ImportError):
        raise
    except Exception as error:  # soundfile's, numpy's or torch's: the file decides
        raise AudioError(f"{path}: {_reason(path, contents, error)}") from error


def _is_joined(path: str | os.PathLike, contents: bytes | None, format: str) -> bool:
    """Look for a second stream behind the first, in Ogg (``cat a.ogg b.ogg``) and in MP3 whose header has a length."""
    with open(path, "rb") if contents is None else BytesIO(contents) as file:
        head = file.read(_OGG_HEAD if format == "OGG" else 10)
        if format == "OGG":
            file.seek(max(len(head), file.seek(0, os.SEEK_END) - _OGG_PAGE))
            pages = re.findall(rb"OggS\0(.).{8}(.{4})", head + file.read(), re.DOTALL)  # kind, stream
            begins = [kind[0] & 2 for kind, _ in pages]
            first = [stream for kind, stream in pages if kind[0] & 2]
            # Streams side by side, as of a video, begin before any goes on.
            return begins != sorted(begins, reverse=True) or pages[-1][1] not in first
        tag = 10 + int("".join(f"{byte:07b}" for byte in head[6:]), 2) if head[:3] == b"ID3" else 0
        file.seek(tag)
        if header := re.match(_XING, file.read(64), re.DOTALL):
            file.seek(tag + int.from_bytes(header[1]))
        return bool(header and re.search(_MP3_FRAMES, file.read(), re.DOTALL))


def _reason(path: str | os.PathLike, contents: bytes | None, error: Exception) -> str:
    """Say what is wrong with a file that could not be read, and what to do."""
    try:
        if isinstance(error, OSError):
            raise error
        with open(path, "rb") if contents is None else BytesIO(contents) as file:
            head, num_bytes = file.read(64), file.seek(0, os.SEEK_END)
    except OSError as failure:  # no permission, a failing disk, a network folder that went away
        return f"reading it fails ({failure.strerror or one_line(failure)}), expected audio; check the disk"
    for pattern, kind in _FOREIGN.items():
        if re.match(pattern, head, re.DOTALL):
            return f"cannot be decoded: it is {kind}, which libsndfile does not read; convert it: {CONVERT}"
    what = getattr(error, "error_string", "").rstrip(".") or one_line(error)
    return f"cannot be decoded ({what}; {num_bytes} bytes), expected audio; get the file again"


def stated_length(file: "SoundFile") -> int | None:
    """Samples at 16 kHz that an open file's header states; None if the header cannot be trusted.

    Ogg's last page has the true count, even in a file that was cut short; an MP3's header is only a claim.
    """
    is_true = file.seekable() or (file.format == "OGG" and file.frames != _UNKNOWN_LENGTH)
    return num_samples_at_16k(file.frames, file.samplerate) if is_true else None


def read_mono(file: "SoundFile", num_frames: int) -> "np.ndarray":
    """Read the next ``num_frames`` of an open file, or what is left of it, and average the channels: (T,) float32."""
    import numpy as np

    pieces = [np.empty(0, np.float32)]
    size = max(1, _READ_VALUES // file.channels)
    while num_frames > 0:
        wanted = min(num_frames, size)
        frames = file.read(wanted, dtype="float32")
        # The mean over one channel would change nothing, and take a tenth of the time that decoding takes.
        pieces.append(frames if frames.ndim == 1 else frames.mean(axis=1))
        num_frames = num_frames - wanted if len(frames) == wanted else 0
    return pieces[1] if len(pieces) == 2 else np.concatenate(pieces)


def mono_blocks(file: "SoundFile") -> "Iterator[np.ndarray]":
    """Read the rest of an open file a minute at a time; the last block is shorter, or empty."""
    size = _BLOCK_SECONDS * file.samplerate
    while True:
        block = read_mono(file, size)
        yield block
        if len(block) < size:
            return


def read_audio(
    path: str | os.PathLike,
    offset: int = 0,
    num_samples: int | None = None,
    length: int | None = None,
    contents: bytes | None = None,
) -> "Tensor":
    """Read an audio file as 16 kHz mono, or ``num_samples`` of it from sample ``offset`` on.

    Other rates are resampled and channels averaged. A whole file takes the memory of its samples (0.23 GB an hour,
    briefly twice) and of a minute as decoded. All numbers are samples at 16 kHz; ``length`` and ``contents`` are those
    of :func:`checked_audio`.

    Returns:
        (T,) float32.

    Raises:
        AudioError: the file is missing, unreadable, shorter or longer than stated, or holds NaN or infinite samples.
        UserError: a package that reads it is not installed.
    """
    import torch

    with checked_audio(path, length, contents) as file:
        wanted = sys.maxsize if num_samples is None else num_samples
        if file.seekable() and file.samplerate == SAMPLE_RATE:
            file.seek(min(offset, file.frames))
            waveform = torch.from_numpy(read_mono(file, wanted))
        else:
            waveform = _read_from_start(file, offset, wanted)
        stated_end = stated_length(file) if num_samples is None else offset + num_samples
    end = offset + len(waveform)
    if stated_end not in (None, end):
        raise AudioError(f"{path}: is cut short at sample {end} (at 16 kHz), expected {stated_end}; get the file again")
    # The sum is not finite if any sample is not, and is much faster than a look at each sample.
    if not waveform.sum().isfinite() and not (is_finite := waveform.isfinite()).all():
        problem = f"{int((~is_finite).sum())} of samples {offset} to {end} (at 16 kHz) are NaN or infinite"
        raise AudioError(f"{path}: {problem}, expected numbers")
    return waveform


def _read_from_start(file: "SoundFile", offset: int, num_samples: int) -> "Tensor":
    """Decode and resample an open file up to the samples that are wanted: a crop is a slice of the whole."""
    import torch

    blocks = map(torch.from_numpy, mono_blocks(file))
    kept, position = [], 0
    for block in blocks if file.samplerate == SAMPLE_RATE else _resampled(blocks, file.samplerate):
        kept.append(block[max(offset - position, 0) :])
        position += len(block)
        if position >= offset + num_samples:
            break
    return torch.cat(kept)[:num_samples]


# --- Resampling


def resample_to_16k(waveform: "Tensor", sample_rate: int) -> "Tensor":
    """Resample (T,) at ``sample_rate`` to (``num_samples_at_16k(T, sample_rate)``,) at 16 kHz, with torchaudio."""
    import torch

    if sample_rate == SAMPLE_RATE:
        return waveform
    # In the blocks in which a file is read. The empty block is the last if a whole number of blocks comes before it.
    blocks = chain(waveform.split(_BLOCK_SECONDS * sample_rate), [waveform[:0]])
    return torch.cat(list(_resampled(blocks, sample_rate)))


def _resampled(blocks: "Iterable[Tensor]", sample_rate: int) -> "Iterator[Tensor]":
    """Resample blocks of a minute to 16 kHz; the first shorter block is the last.

    A block is resampled together with a second before and after it, which is more than the filter reaches. Whole
    seconds fall on samples at every rate, so the result is that of the whole waveform.
    """
    import torch

    held, num_done = torch.empty(0), 0  # samples held, and how many of their seconds have been yielded
    for block in blocks:
        held = torch.cat([held, block])
        resampled = _resample(held, sample_rate)[num_done * SAMPLE_RATE :]
        if len(block) < _BLOCK_SECONDS * sample_rate:
            yield resampled
            return
        num_ready = len(held) // sample_rate - 1
        yield resampled[: (num_ready - num_done) * SAMPLE_RATE].clone()  # a view would keep all of it in memory
        held, num_done = held[(num_ready - 1) * sample_rate :], 1


def _resample(waveform: "Tensor", sample_rate: int) -> "Tensor":
    """Resample one block, with torchaudio where its table is small."""
    from torch.nn.functional import pad

    ratio = Fraction(SAMPLE_RATE, sample_rate)
    if ratio.numerator * ratio.denominator > _MAX_TABLE:
        return _interpolate(waveform, sample_rate)
    try:
        from torchaudio.functional import resample  # imported late: a corpus at 16 kHz does without torchaudio
    except ModuleNotFoundError as error:
        raise UserError(f"audio at {sample_rate} Hz: resampling to 16 kHz needs torchaudio; install it") from error

    # torchaudio rounds the length in float32, which can lose the last sample; a few more zeros prevent it.
    padded = pad(waveform, (0, sample_rate // 100))
    return resample(padded, sample_rate, SAMPLE_RATE)[: num_samples_at_16k(waveform.numel(), sample_rate)]


def _interpolate(waveform: "Tensor", sample_rate: int) -> "Tensor":
    """Resample as torchaudio does, in time and memory that depend on the waveform alone, not on the rate.

    The filter, a sinc under a Hann window, is computed for each sample instead of once for each phase.
    """
    import torch
    from torch.nn.functional import pad

    scale = _ROLLOFF * min(SAMPLE_RATE / sample_rate, 1.0)
    width = math.ceil(_CROSSINGS / scale)
    taps = torch.arange(-width, width + 1)
    surroundings = pad(waveform, (width, width + 1)).unfold(0, len(taps), 1)  # (T + 1, taps)
    indices = torch.arange(num_samples_at_16k(waveform.numel(), sample_rate))
    rows = []
    for chosen in indices.split(2**20 // len(taps)):
        before, phase = chosen * sample_rate // SAMPLE_RATE, (chosen * sample_rate % SAMPLE_RATE).double() / SAMPLE_RATE
        t = ((taps - phase[:, None]) * scale).clamp(-_CROSSINGS, _CROSSINGS)  # (samples, taps)
        kernel = torch.sinc(t) * torch.cos(t * (math.pi / 2 / _CROSSINGS)) ** 2 * scale
        rows.append((surroundings[before] * kernel).sum(1).float())
    return torch.cat(rows)
