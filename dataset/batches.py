"""From lengths to batches (data section of the paper): buckets, batches, random crops, and who gets which."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
        found = f": they last {_seconds(lengths.min())} to {_seconds(lengths.max())}" if lengths.size else ""
        raise UserError(
            f"none of {lengths.size} utterances lasts {_seconds(min_len)} to {_seconds(upper)}, the limits{found}"
        )
    counted = lengths if max_crop is None else np.minimum(lengths, max_crop)
    if max_tokens is not None and (longest := int(counted[kept].max())) > max_tokens:
        raise UserError(f"the longest utterance lasts {_seconds(longest)}, a batch holds {_seconds(max_tokens)}")

    kept = kept[np.argsort(lengths[kept], kind="stable")]
    if generator is not None:
        boundaries = torch.linspace(min_len - 1, upper + 1, num_buckets + 1)
        bucket_ids = torch.bucketize(torch.from_numpy(lengths[kept]), boundaries)
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


def _seconds(num_samples: float) -> str:
    """In words, rounded up: a limit of so many seconds is long enough."""
    return f"{math.ceil(num_samples / SAMPLE_RATE * 1000) / 1000:.3f} s"


@dataclass(frozen=True)
class Crop:
    """One batch to read.

    Attributes:
        indices: of its utterances in the manifest.
        offsets: the first sample of each.
        num_samples: the samples read of each, the same for all.
        seed: 32 bits for the noise (masks, dropout) of this batch; like the offsets it depends on the sampler's
            seed, the epoch and the batch's position alone.
        tops_up: the batch is a repeat that only makes the ranks even.
    """

    indices: tuple[int, ...]
    offsets: tuple[int, ...]
    num_samples: int
    seed: int
    tops_up: bool


class BatchSampler(Sampler[Crop]):
    """Deals batches to ranks, the same number to each, and crops each batch to its shortest utterance, if it crops.

    Shuffling permutes whole batches by ``seed + epoch``. An utterance is cropped at an offset drawn
    evenly from all that are possible, or at its start when ``shuffle`` is off (validation). The draw
    depends on the seed, the epoch and the batch's position among all ranks' batches, and on nothing else.

    Rank r of R gets the batches at positions r, r + R, r + 2R, ... So the updates of one process that
    accumulates A batches are made of the very batches, crops and seeds that A processes share among them.

    Args:
        lengths: (N,) samples of each utterance at 16 kHz.
        batches: indices into ``lengths``, from :func:`make_batches`.
        num_replicas: number of ranks.
        rank: which of them this is.
        shuffle: permute the batches and crop at random.
        seed: not negative; the same on every rank.
        drop_last: drop the batches that do not make up a whole update, instead of topping up.
        max_crop: longest crop in samples; None for no limit.
        accum_grad: batches of one rank per update; an epoch is a whole number of updates.
        whole: do not crop; a batch has the samples of its longest utterance.

    Raises:
        UserError: a negative seed, or ``drop_last`` leaves no update.
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
        accum_grad: int = 1,
        whole: bool = False,
    ) -> None:
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank {rank} is not one of {num_replicas} ranks")
        if seed < 0:
            raise UserError(f"seed {seed}: expected 0 or a positive number")
        if len(batches) < (num_replicas * accum_grad if drop_last else 1):
            raise UserError(f"{len(batches)} batches do not give each of {num_replicas} processes {accum_grad}")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batches = batches
        self.num_replicas = num_replicas
        self.rank = rank
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.max_crop = max_crop
        self.accum_grad = accum_grad
        self.whole = whole
        self._ordered_epoch = None
        self._order = list(range(len(batches)))

    def __len__(self) -> int:
        """Batches a rank gets in an epoch.

        Topping up adds one update to every rank even where the batches already divide evenly, one rank
        included: so does the published program, and its step counts per epoch follow from it.
        """
        num_updates = len(self.batches) // (self.num_replicas * self.accum_grad) + (0 if self.drop_last else 1)
        return self.accum_grad * num_updates

    def __iter__(self) -> Iterator[Crop]:
        """The first epoch's; :class:`TrainingSampler` goes on to the others."""
        for index in range(len(self)):
            yield self.crop(0, index)

    def crop(self, epoch: int, index: int) -> Crop:
        """This rank's batch number ``index`` of an epoch, both from 0, cropped to its shortest utterance."""
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} is not one of the epoch's {len(self)}")
        if self.shuffle and epoch != self._ordered_epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._order = torch.randperm(len(self.batches), generator=generator).tolist()
            self._ordered_epoch = epoch
        position = index * self.num_replicas + self.rank
        # Past the end the order starts again: these are the batches that top up.
        batch = self.batches[self._order[position % len(self.batches)]]
        lengths = self.lengths[batch]
        num_samples = int(lengths.max() if self.whole else min(lengths.min(), self.max_crop or math.inf))
        offsets = np.zeros_like(lengths)
        if self.shuffle and not self.whole:
            draws = np.random.default_rng([self.seed, epoch, position])
            offsets = draws.integers(0, lengths - num_samples, endpoint=True)
        # The 1 makes another stream than that of the offsets. (A 0 would not: numpy pads with zeros.)
        (seed,) = np.random.SeedSequence([self.seed, epoch, position, 1]).generate_state(1).tolist()
        return Crop(tuple(batch), tuple(offsets.tolist()), num_samples, seed, position >= len(self.batches))


class TrainingSampler(Sampler[Crop]):
    """Strings one rank's epochs together, so that a resumed run goes on in the middle of one.

    Args:
        batches: the rank's sampler.
        end: batches of the whole run, over all epochs.
        start: batches of them that an earlier run has used.
    """

    def __init__(self, batches: BatchSampler, end: int, start: int = 0) -> None:
        self.batches = batches
        self.end = end
        self.start = start

    def __len__(self) -> int:
        """``end``, also where less is left to yield: Lightning counts the batches before ``start`` as fetched."""
        return self.end

    def __iter__(self) -> Iterator[Crop]:
        for number in range(self.start, self.end):
            epoch, index = divmod(number, len(self.batches))
            yield self.batches.crop(epoch, index)
