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
        num_buckets: even divisions of the range ``min_len`` to ``max_len``; utterances outside of it are left out.
        max_tokens: budget of a batch in samples; otherwise ``batch_size`` is one in utterances.
        generator: shuffles the utterances inside each bucket; None leaves them from short to long.
        max_crop: an utterance counts at most this many samples, as :class:`BatchSampler` crops it.

    Returns:
        Indices into ``lengths``, one list per batch.

    Raises:
        UserError: no utterance is within the limits, or the longest does not fit into ``max_tokens``.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    upper = max_len if max_len is not None else int(lengths.max(initial=0))
    (kept,) = np.nonzero((lengths >= min_len) & (lengths <= upper))
    if kept.size == 0:
        found = f": they last {_seconds(lengths.min())} to {_seconds(lengths.max())}" if lengths.size else ""
        limits = f"{_seconds(min_len)} to {_seconds(upper)}"
        raise UserError(f"none of {lengths.size} utterances lasts {limits}, the limits{found}")
    kept = kept[np.argsort(lengths[kept], kind="stable")]
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
    batches: list[list[int]] = [[]]
    total = 0
    for index, cost in zip(kept.tolist(), costs[kept].tolist(), strict=True):
        if batches[-1] and total + cost > budget:
            batches.append([])
            total = 0
        batches[-1].append(index)
        total += cost
    return batches


def _seconds(num_samples: float) -> str:
    """Format a duration, rounded up: a limit of so many seconds is long enough."""
    return f"{math.ceil(num_samples / SAMPLE_RATE * 1000) / 1000:.3f} s"


@dataclass(frozen=True)
class Crop:
    """One batch to read; seed and offsets depend on the sampler's seed, the epoch and the batch's position alone."""

    indices: tuple[int, ...]  # the utterances' places in the manifest
    offsets: tuple[int, ...]  # the first sample of each
    num_samples: int  # to read of each
    seed: int  # 32 bits for the noise (masks, dropout) of this batch
    tops_up: bool  # the batch is a repeat that only gives every process the same number


@dataclass(eq=False, repr=False)
class BatchSampler(Sampler[Crop]):
    """Deals batches to processes, the same number to each, and crops each batch to its shortest utterance.

    Shuffling permutes whole batches by ``seed + epoch``. An utterance is cropped at an offset drawn evenly from all
    that are possible, or at its start if ``shuffle`` is off (validation). The draw depends only on the seed, the epoch
    and the batch's position among all processes' batches.

    Rank r of R gets the batches at positions r, r + R, r + 2R, ... So one process that accumulates A batches makes
    its updates of the same batches, crops and seeds as A processes.
    """

    lengths: Sequence[int] | np.ndarray  # (N,) samples of each utterance at 16 kHz
    batches: list[list[int]]  # indices into lengths, from make_batches
    num_replicas: int  # number of processes
    rank: int  # this process's number
    shuffle: bool  # permute the batches and crop at random
    seed: int  # not negative; the same on every rank
    drop_last: bool = False  # drop the batches that do not make up a whole update, instead of topping up
    max_crop: int | None = None  # longest crop in samples; None for no limit
    accum_grad: int = 1  # batches of one rank per update; an epoch is a whole number of updates
    whole: bool = False  # do not crop; a batch has the samples of its longest utterance
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
    """Strings one rank's epochs together, so that a resumed run continues in the middle of one."""

    batches: BatchSampler  # the rank's
    end: int  # batches of the whole run, over all epochs
    start: int = 0  # batches that an earlier run has used

    def __len__(self) -> int:
        """``end``, even if fewer are left to yield: Lightning counts the batches before ``start`` as fetched."""
        return self.end

    def __iter__(self) -> Iterator[Crop]:
        for number in range(self.start, self.end):
            epoch, index = divmod(number, len(self.batches))
            yield self.batches.crop(epoch, index)
