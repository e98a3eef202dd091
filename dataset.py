"""From a manifest to a batch of waveforms (data section of the paper): buckets, batches, random crops.

A manifest is what ``prepare_data.py`` writes: the root folder on the first line, then one
``relative path<TAB>samples`` per utterance, counted at 16 kHz. The three steps from there are

    manifest = read_manifest("data/librispeech/train960.tsv")
    batches = make_batches(manifest.lengths, max_tokens=87.5 * SAMPLE_RATE, min_len=32_000, max_len=250_000)
    sampler = BatchSampler(manifest.lengths, batches, num_replicas=4, rank=0, shuffle=True, seed=0)
    loader = DataLoader(SpeechDataset(manifest), sampler=sampler, batch_size=None, num_workers=4)

The sampler already yields whole batches, hence ``batch_size=None``. It also chooses the crops, so
that what is trained on depends on the seed and the epoch alone, not on the number of workers.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from wav2vec2.errors import UserError

SAMPLE_RATE = 16_000

# The published limits for an utterance to be trained on: 32,000 to 250,000 samples.
MIN_SECONDS = 2.0
MAX_SECONDS = 15.625


class AudioError(UserError):
    """A file that cannot give the samples its manifest promises; the message is one line.

    A DataLoader worker's exception reaches the main process as the same class built from the text of
    its traceback. The traceback ends with the original message, which is all that the user needs.
    """

    def __init__(self, message: str) -> None:
        last_line = message.rstrip("\n").rpartition("\n")[2]
        super().__init__(last_line.removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: "))


@dataclass(frozen=True)
class Manifest:
    """The utterances of one split: ``paths`` relative to ``root``, ``lengths`` (N,) in samples at 16 kHz."""

    path: Path
    root: Path
    paths: list[str]
    lengths: np.ndarray


def read_manifest(path: str | os.PathLike) -> Manifest:
    """Read a ``.tsv`` manifest; blank lines and Windows line ends are tolerated.

    Raises:
        UserError: the file is missing, lists no utterance, or a line is not ``relative path<TAB>samples``.
    """
    path = Path(path)
    if not path.is_file():
        others = ", ".join(sorted(other.stem for other in path.parent.glob("*.tsv"))) or "none"
        raise UserError(
            f"{path}: no such manifest (subsets in that folder: {others}); "
            "write it with prepare_data.py or change --tsv_dir and --train_subset"
        )
    # surrogateescape: a file name on Linux is bytes, and need not be valid UTF-8.
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    root, *rows = text.split("\n")
    if not root.strip() or "\t" in root:
        raise UserError(
            f"{path}: line 1 is {root!r}, expected the folder that the paths below it start from; "
            "write the manifest with prepare_data.py"
        )
    paths, lengths = [], []
    for line_number, row in enumerate(rows, start=2):
        name, _, count = row.rpartition("\t")
        if name and count.isdecimal() and (length := int(count)) > 0:
            paths.append(name)
            lengths.append(length)
        elif row.strip():
            raise UserError(
                f"{path}: line {line_number} is {row!r}, expected a relative path, a tab and a positive number of "
                "samples; mend the line or write the manifest again with prepare_data.py"
            )
    if not paths:
        raise UserError(
            f"{path}: no utterance is listed, expected one a line below the root folder; run prepare_data.py again"
        )
    return Manifest(path, Path(root), paths, np.array(lengths, dtype=np.int64))


def make_batches(
    lengths: Sequence[int] | np.ndarray,
    num_buckets: int = 1000,
    max_tokens: float | None = None,
    batch_size: int | None = None,
    min_len: int = 0,
    max_len: int | None = None,
    generator: torch.Generator | None = None,
    max_crop: int | None = None,
) -> list[list[int]]:
    """Sort utterances into even buckets by length and fill batches bucket after bucket.

    A batch takes utterances until the next one would push it past its budget, and may span buckets.

    Args:
        lengths: (N,) samples of each utterance.
        num_buckets: even divisions of the range ``min_len`` to ``max_len``.
        max_tokens: budget of a batch in samples; give this or ``batch_size``.
        batch_size: budget of a batch in utterances.
        min_len: shorter utterances are left out.
        max_len: longer utterances are left out; None keeps all.
        generator: shuffles the utterances inside each bucket; None leaves them from short to long.
        max_crop: an utterance counts at most this many samples of the budget, as :class:`BatchSampler` crops it.

    Returns:
        Indices into ``lengths``, one list per batch.

    Raises:
        UserError: no utterance is within the limits, or the longest does not fit into ``max_tokens``.
    """
    if (max_tokens is None) == (batch_size is None):
        raise ValueError("give either max_tokens or batch_size")
    lengths = np.asarray(lengths, dtype=np.int64)
    upper = max_len if max_len is not None else int(lengths.max(initial=0))
    (kept,) = np.nonzero((lengths >= min_len) & (lengths <= upper))
    if kept.size == 0:
        raise UserError(_nothing_left(lengths, min_len, max_len))
    counted = lengths if max_crop is None else np.minimum(lengths, max_crop)
    if max_tokens is not None and (longest := int(counted[kept].max())) > max_tokens:
        needed_seconds = math.ceil(longest / SAMPLE_RATE * 1000) / 1000
        raise UserError(
            f"--seconds_per_batch {max_tokens / SAMPLE_RATE:g} is too small: the longest utterance lasts "
            f"{needed_seconds:.3f} s; give at least {needed_seconds:.3f}, or leave it out with --max_seconds"
        )

    kept = kept[np.argsort(lengths[kept], kind="stable")]
    boundaries = torch.linspace(min_len - 1, upper + 1, num_buckets + 1)
    bucket_ids = torch.bucketize(torch.from_numpy(lengths[kept]), boundaries)
    if generator is not None:
        # A stable sort by bucket of a random order: shuffled inside each bucket, buckets still in order.
        order = torch.randperm(kept.size, generator=generator)
        kept = kept[order[torch.argsort(bucket_ids[order], stable=True)].numpy()]

    costs = (counted[kept] if max_tokens is not None else np.ones_like(kept)).tolist()
    budget = max_tokens if max_tokens is not None else batch_size
    batches: list[list[int]] = [[]]
    total = 0
    for index, cost in zip(kept.tolist(), costs, strict=True):
        if batches[-1] and total + cost > budget:
            batches.append([])
            total = 0
        batches[-1].append(index)
        total += cost
    return batches


def _nothing_left(lengths: np.ndarray, min_len: int, max_len: int | None) -> str:
    """The message for limits that no utterance meets."""
    if lengths.size == 0:
        return "no utterance was given; run prepare_data.py on a folder that holds audio"
    limits = f"--min_seconds {min_len / SAMPLE_RATE:g}"
    if max_len is not None:
        limits += f" and --max_seconds {max_len / SAMPLE_RATE:g}"
    return (
        f"no utterance is left of {lengths.size}: they last {lengths.min() / SAMPLE_RATE:.2f} s to "
        f"{lengths.max() / SAMPLE_RATE:.2f} s, and {limits} keep none; widen the limits"
    )


@dataclass(frozen=True)
class Crop:
    """One batch to read: for each utterance its index and first sample, and the samples that all share."""

    indices: tuple[int, ...]
    offsets: tuple[int, ...]
    num_samples: int


class BatchSampler(Sampler[Crop]):
    """Deals batches to ranks, the same number to each, and crops each batch to its shortest utterance.

    Shuffling permutes whole batches by ``seed + epoch``. An utterance is cropped at an offset drawn
    evenly from all that are possible, or at its start when ``shuffle`` is off (validation). The draw
    depends on the seed, the epoch and the batch's position among all ranks' batches, and on nothing else.

    Args:
        lengths: (N,) samples of each utterance at 16 kHz.
        batches: indices into ``lengths``, from :func:`make_batches`.
        num_replicas: number of ranks.
        rank: which of them this is.
        shuffle: permute the batches and crop at random.
        seed: not negative; the same on every rank.
        drop_last: drop the batches that do not divide among the ranks, instead of topping up.
        max_crop: longest crop in samples; None for no limit.

    Raises:
        UserError: a negative seed, or ``drop_last`` leaves no batch for a rank.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batches: list[list[int]],
        num_replicas: int,
        rank: int,
        shuffle: bool,
        seed: int,
        drop_last: bool = False,
        max_crop: int | None = None,
    ) -> None:
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank {rank} is not one of {num_replicas} ranks")
        if seed < 0:
            raise UserError(f"--seed {seed}: expected 0 or a positive number")
        if len(batches) < (num_replicas if drop_last else 1):
            raise UserError(
                f"{len(batches)} batches do not give each of {num_replicas} processes one; "
                "lower --seconds_per_batch or use fewer GPUs"
            )
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batches = batches
        self.num_replicas = num_replicas
        self.rank = rank
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.max_crop = max_crop
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the crops of the next pass; Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches a rank gets in an epoch.

        Topping up adds one to every rank even where the batches already divide evenly, one rank
        included: so does the published program, and its step counts per epoch follow from it.
        """
        return len(self.batches) // self.num_replicas + (0 if self.drop_last else 1)

    def __iter__(self) -> Iterator[Crop]:
        order = list(range(len(self.batches)))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(len(self.batches), generator=generator).tolist()
        for position in range(self.rank, len(self) * self.num_replicas, self.num_replicas):
            # Past the end the order starts again: these are the batches that top up.
            yield self._crop(self.batches[order[position % len(order)]], position)

    def _crop(self, batch: list[int], position: int) -> Crop:
        """Crop ``batch`` to its shortest utterance; ``position`` counts the batches of all ranks."""
        lengths = self.lengths[batch]
        num_samples = int(lengths.min())
        if self.max_crop is not None:
            num_samples = min(num_samples, self.max_crop)
        offsets = np.zeros_like(lengths)
        if self.shuffle:
            draws = np.random.default_rng([self.seed, self.epoch, position])
            offsets = draws.integers(0, lengths - num_samples, endpoint=True)
        return Crop(tuple(batch), tuple(offsets.tolist()), num_samples)


def num_samples_at_16k(num_frames: int, sample_rate: int) -> int:
    """Samples that ``num_frames`` at ``sample_rate`` become at 16 kHz, rounded up as resampling does."""
    return -(-num_frames * SAMPLE_RATE // sample_rate)


def load_audio(path: str | os.PathLike, offset: int = 0, num_samples: int | None = None) -> Tensor:
    """Read an audio file as 16 kHz mono, or ``num_samples`` of it from sample ``offset`` on.

    Other sample rates are resampled, several channels averaged. Offset and count are samples at 16 kHz.

    Returns:
        (T,) float32; all that follows ``offset`` if ``num_samples`` is None.

    Raises:
        AudioError: the file is missing, unreadable, or ends before ``offset + num_samples``.
    """
    if not os.path.isfile(path):
        raise AudioError(f"{path}: no such file, though the manifest lists it; run prepare_data.py again")
    try:
        with open_audio(path) as file:
            waveform = _decode(file, offset, num_samples)
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{path}: expected audio, but it cannot be decoded ({error.error_string}); run prepare_data.py again"
        ) from error
    if num_samples is not None and waveform.numel() < num_samples:
        raise AudioError(
            f"{path}: ends at sample {offset + waveform.numel()} (at 16 kHz), expected {offset + num_samples} or more: "
            "it has changed since the manifest was written; run prepare_data.py again"
        )
    return waveform


def open_audio(path: str | os.PathLike) -> soundfile.SoundFile:
    """Open a file to read audio from; errors are soundfile's."""
    # As bytes: soundfile insists on UTF-8 in a str, which a file name on Linux need not be.
    return soundfile.SoundFile(os.fsencode(path))


def _decode(file: soundfile.SoundFile, offset: int, num_samples: int | None) -> Tensor:
    """What an open file holds of the wanted range, (T,) at 16 kHz; shorter than asked if the file is."""
    if file.samplerate == SAMPLE_RATE and seeks_exactly(file):
        file.seek(min(offset, file.frames))
        return _read_mono(file, -1 if num_samples is None else num_samples)
    waveform = resample_to_16k(_read_mono(file, -1), file.samplerate)
    return waveform[offset : None if num_samples is None else offset + num_samples]


def seeks_exactly(file: soundfile.SoundFile) -> bool:
    """Whether reading from the middle gives the samples that reading from the start gives.

    An MP3 frame leans on the frames before it, and the count in an MP3's header is a claim only.
    """
    return file.format != "MP3"


def _read_mono(file: soundfile.SoundFile, num_frames: int) -> Tensor:
    """The next ``num_frames`` of a file (-1: all), channels averaged: (T,) float32."""
    return torch.from_numpy(file.read(num_frames, dtype="float32", always_2d=True).mean(axis=1))


def resample_to_16k(waveform: Tensor, sample_rate: int) -> Tensor:
    """(T,) at ``sample_rate`` to (``num_samples_at_16k(T, sample_rate)``,) at 16 kHz."""
    if sample_rate == SAMPLE_RATE:
        return waveform
    from torchaudio.functional import resample  # imported late: a corpus at 16 kHz does without torchaudio

    # torchaudio rounds the length in float32, which can lose the last sample; a few zeros more prevent it.
    padded = torch.nn.functional.pad(waveform, (0, sample_rate // 100))
    return resample(padded, sample_rate, SAMPLE_RATE)[: num_samples_at_16k(waveform.numel(), sample_rate)]


class SpeechDataset(Dataset):
    """Reads the crops that :class:`BatchSampler` chooses.

    Args:
        manifest: from :func:`read_manifest`.

    Raises:
        UserError: the manifest's root folder does not exist.
    """

    def __init__(self, manifest: Manifest) -> None:
        if not manifest.root.is_dir():
            raise UserError(
                f"{manifest.path}: its root folder {manifest.root} does not exist; run prepare_data.py on the "
                "corpus where it is now, or put its folder on the first line"
            )
        self.manifest = manifest

    def __len__(self) -> int:
        return len(self.manifest.paths)

    def __getitem__(self, crop: Crop) -> tuple[Tensor, Tensor]:
        """Read one batch: waveforms (B, T) float32 and lengths (B,) int64, all equal to T.

        Raises:
            AudioError: a file is missing, unreadable or shorter than the manifest says.
        """
        waveforms = torch.empty(len(crop.indices), crop.num_samples)
        for row, index, offset in zip(waveforms, crop.indices, crop.offsets, strict=True):
            row.copy_(load_audio(self.manifest.root / self.manifest.paths[index], offset, crop.num_samples))
        return waveforms, torch.full((len(crop.indices),), crop.num_samples, dtype=torch.int64)
