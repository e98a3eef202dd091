"""From lengths to batches (data section of the paper): buckets, batches, random crops, and each process's share."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import Sampler

from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.files.errors import UserError


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

    A batch takes utterances until the next one would exceed its budget, and may span buckets.

    Args:
        lengths: (N,) samples of each utterance.
        num_buckets: even divisions of the range ``min_len`` to ``max_len``.
        max_tokens: budget of a batch in samples.
        batch_size: budget of a batch in utterances, if it has none in samples.
        min_len: shorter utterances are left out.
        max_len: longer utterances are left out; None keeps all.
        generator: shuffles the utterances inside each bucket; None leaves them from short to long.
        max_crop: an utterance counts at most this many samples, as :class:`BatchSampler` crops it.

    Returns:
        Indices into ``lengths``, one list per batch.

    Raises:
        UserError: no utterance is within the limits, or the longest does not fit into ``max_tokens``.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    upper = max_len if max_len is not None else int(lengths.max(initial=0))
    kept = _within_limits(lengths, min_len, upper)
    if max_tokens is not None:
        budget, costs = max_tokens, lengths if max_crop is None else np.minimum(lengths, max_crop)
        if (longest := costs[kept[-1]]) > budget:
            raise UserError(f"the longest utterance lasts {_seconds(longest)}, a batch holds {_seconds(budget)}")
    elif batch_size is not None:
        budget, costs = batch_size, np.ones_like(lengths)
    else:
        raise ValueError("give max_tokens or batch_size")

    if generator is not None:
        boundaries = torch.linspace(min_len - 1, upper + 1, num_buckets + 1)
        bucket_ids = torch.bucketize(torch.from_numpy(lengths[kept]), boundaries)
        # A stable sort by bucket of a random order: shuffled inside each bucket, buckets still in order.
        order = torch.randperm(kept.size, generator=generator)
        kept = kept[order[torch.argsort(bucket_ids[order], stable=True)].numpy()]
    return _fill(kept.tolist(), costs.tolist(), budget)


def _within_limits(lengths: np.ndarray, lower: int, upper: int) -> np.ndarray:
    """Indices of the utterances of ``lower`` to ``upper`` samples, from short to long."""
    (kept,) = np.nonzero((lengths >= lower) & (lengths <= upper))
    if kept.size == 0:
        found = f": they last {_seconds(lengths.min())} to {_seconds(lengths.max())}" if lengths.size else ""
        raise UserError(
            f"none of {lengths.size} utterances lasts {_seconds(lower)} to {_seconds(upper)}, the limits{found}"
        )
    return kept[np.argsort(lengths[kept], kind="stable")]


def _fill(indices: list[int], costs: list[int], budget: float) -> list[list[int]]:
    batches: list[list[int]] = [[]]
    total = 0
    for index in indices:
        if batches[-1] and total + costs[index] > budget:
            batches.append([])
            total = 0
        batches[-1].append(index)
        total += costs[index]
    return batches


def _seconds(num_samples: float) -> str:
    """Format a duration, rounded up: a limit of so many seconds is long enough."""
    return f"{math.ceil(num_samples / SAMPLE_RATE * 1000) / 1000:.3f} s"


@dataclass(frozen=True)
class Crop:
    """One batch to read.

    Attributes:
        indices: the utterances' places in the manifest.
        offsets: the first sample of each.
        num_samples: the samples to read of each, the same for all.
        seed: 32 bits for the noise (masks, dropout) of this batch; like the offsets it depends on the sampler's
            seed, the epoch and the batch's position alone.
        tops_up: the batch is a repeat that only gives every process the same number.
    """

    indices: tuple[int, ...]
    offsets: tuple[int, ...]
    num_samples: int
    seed: int
    tops_up: bool


@dataclass(eq=False, repr=False)
class BatchSampler(Sampler[Crop]):
    """Deals batches to processes, the same number to each, and crops each batch to its shortest utterance.

    Shuffling permutes whole batches by ``seed + epoch``. An utterance is cropped at an offset drawn evenly from all
    that are possible, or at its start if ``shuffle`` is off (validation). The draw depends only on the seed, the epoch
    and the batch's position among all processes' batches.

    Rank r of R gets the batches at positions r, r + R, r + 2R, ... So one process that accumulates A batches makes
    its updates of the same batches, crops and seeds as A processes.

    Args:
        lengths: (N,) samples of each utterance at 16 kHz.
        batches: indices into ``lengths``, from :func:`make_batches`.
        num_replicas: number of processes.
        rank: this process's number.
        shuffle: permute the batches and crop at random.
        seed: not negative; the same on every rank.
        drop_last: drop the batches that do not make up a whole update, instead of topping up.
        max_crop: longest crop in samples; None for no limit.
        accum_grad: batches of one rank per update; an epoch is a whole number of updates.
        whole: do not crop; a batch has the samples of its longest utterance.
    """

    lengths: Sequence[int] | np.ndarray
    batches: list[list[int]]
    num_replicas: int
    rank: int
    shuffle: bool
    seed: int
    drop_last: bool = False
    max_crop: int | None = None
    accum_grad: int = 1
    whole: bool = False
    _ordered_epoch: int | None = field(init=False, default=None)
    _order: list[int] = field(init=False)  # of the batches in that epoch

    def __post_init__(self) -> None:
        self._order = list(range(len(self.batches)))

    def __len__(self) -> int:
        """Number of batches that a rank gets in an epoch.

        Topping up adds one update to every rank even if the batches divide evenly, with one rank too. So does the
        published program, and its step counts per epoch follow from it.
        """
        num_updates = len(self.batches) // (self.num_replicas * self.accum_grad) + (0 if self.drop_last else 1)
        return self.accum_grad * num_updates

    def __iter__(self) -> Iterator[Crop]:
        """Yield the first epoch; :class:`TrainingSampler` goes on to the others."""
        for index in range(len(self)):
            yield self.crop(0, index)

    def crop(self, epoch: int, index: int) -> Crop:
        """This rank's batch number ``index`` of an epoch, both from 0, cropped to its shortest utterance."""
        if self.shuffle and epoch != self._ordered_epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._order = torch.randperm(len(self.batches), generator=generator).tolist()
            self._ordered_epoch = epoch
        position = index * self.num_replicas + self.rank
        # Past the end the order starts again: these are the batches that top up.
        batch = self.batches[self._order[position % len(self.batches)]]
        lengths = np.array([self.lengths[utterance] for utterance in batch], dtype=np.int64)
        num_samples = int(lengths.max() if self.whole else min(lengths.min(), self.max_crop or math.inf))
        offsets = np.zeros_like(lengths)
        if self.shuffle and not self.whole:
            draws = np.random.default_rng([self.seed, epoch, position])
            offsets = draws.integers(0, lengths - num_samples, endpoint=True)
        # The 1 makes another stream than that of the offsets. (A 0 would not: numpy pads with zeros.)
        (seed,) = np.random.SeedSequence([self.seed, epoch, position, 1]).generate_state(1).tolist()
        return Crop(tuple(batch), tuple(offsets.tolist()), num_samples, seed, position >= len(self.batches))


@dataclass(eq=False, repr=False)
class TrainingSampler(Sampler[Crop]):
    """Strings one rank's epochs together, so that a resumed run continues in the middle of one.

    Args:
        batches: the rank's sampler.
        end: batches of the whole run, over all epochs.
        start: batches that an earlier run has used.
    """

    batches: BatchSampler
    end: int
    start: int = 0

    def __len__(self) -> int:
        """``end``, even if fewer are left to yield: Lightning counts the batches before ``start`` as fetched."""
        return self.end

    def __iter__(self) -> Iterator[Crop]:
        for number in range(self.start, self.end):
            epoch, index = divmod(number, len(self.batches))
            yield self.batches.crop(epoch, index)
