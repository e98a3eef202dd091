"""From a manifest to a batch of waveforms (data section of the paper): buckets, batches, random crops.

A manifest is what ``prepare_data.py`` writes: the root folder on the first line, then one
``relative path<TAB>samples`` per utterance, counted at 16 kHz. The steps from there are

    manifest = read_manifest("data/librispeech/train960.tsv")
    check_files(manifest, max_bad=0)
    batches = make_batches(manifest.lengths, max_tokens=87.5 * SAMPLE_RATE, min_len=32_000, max_len=250_000)
    sampler = BatchSampler(manifest.lengths, batches, num_replicas=4, rank=0, shuffle=True, seed=0)
    loader = DataLoader(SpeechDataset(manifest), sampler=sampler, batch_size=None, num_workers=4)

The sampler already yields whole batches, hence ``batch_size=None``. It also chooses the crops, so
that what is trained on depends on the seed and the epoch alone, not on the number of workers.
:class:`TrainingSampler` strings epochs together and can start in the middle of one. A file that
has gone bad is replaced by one of about its length, and the batch says so.

``packed.attach(manifest)`` after the first line makes everything below it read from the packed copy of
the corpus, if ``prepare_data.py --pack`` wrote one beside the manifest.
"""

import bisect
import itertools
import math
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import soundfile
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from wav2vec2.errors import UserError, shown
from wav2vec2.utils.audio import (
    SAMPLE_RATE,
    decode,
    num_samples_at_16k,
    open_audio,
    seeks_exactly,
)

if TYPE_CHECKING:
    from packed import Pack

# Crop lengths are sought in steps of 8 of the published extractors' frames (320 samples each, and 80 more for the first
# one's window): tensor cores and fused attention like that.
CROP_STEP, CROP_START = 8 * 320, 80
# Audio that a few crop lengths may lose, and how many there may be for that.
MAX_LOST = 0.02
MAX_CROP_LENGTHS = 32

# Files tried in place of a bad one before giving up: as many in a row point to a lost disk, not to bad files.
MAX_REPLACEMENTS = 20


class AudioError(UserError):
    """A file that cannot give the samples its manifest promises; the message is one line.

    A DataLoader worker's exception reaches the main process as the same class built from the text of
    its traceback. The traceback ends with the original message, which is all that the user needs.
    """

    def __init__(self, message: str) -> None:
        last_line = message.rstrip("\n").rpartition("\n")[2]
        super().__init__(last_line.removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: "))


class Names(Sequence[str]):
    """A list of file names that loader processes share.

    Each str of a list counts its users inside itself, so that a forked process copies every one that it looks at.
    Here all names are one text, which is only read. It is a tensor because torch passes tensors to processes
    that are not forked through shared memory, and numpy's arrays as copies.

    Args:
        names: file names; bytes that are not UTF-8 as ``surrogateescape`` decodes them.
    """

    def __init__(self, names: Iterable[str]) -> None:
        text, bounds = bytearray(), array("q", [0])
        for name in names:
            text += name.encode(errors="surrogateescape")
            bounds.append(len(text))
        # A byte more, for there is no tensor from an empty buffer.
        self._text = torch.frombuffer(text + b"\0", dtype=torch.uint8)
        self._bounds = torch.frombuffer(bounds, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(f"name {index} is not one of {len(self)}")
        first = index % len(self)
        start, end = self._bounds.numpy()[first : first + 2]
        return self._text.numpy()[start:end].tobytes().decode(errors="surrogateescape")

    def __iter__(self) -> Iterator[str]:
        text = memoryview(self._text.numpy())
        for start, end in itertools.pairwise(memoryview(self._bounds.numpy())):
            yield str(text[start:end], "utf-8", "surrogateescape")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None


@dataclass(frozen=True)
class Manifest:
    """The utterances of one split.

    Attributes:
        path: the manifest's own.
        root: the folder that ``paths`` start from.
        paths: (N,) of the audio files.
        lengths: (N,) int64 in samples at 16 kHz.
        pack: where to read the samples instead, see :func:`packed.attach`.
    """

    path: Path
    root: Path
    paths: Sequence[str]
    lengths: np.ndarray
    pack: "Pack | None" = None

    def full_path(self, index: int) -> str:
        return str(self.root / self.paths[index])


def read_manifest(path: str | os.PathLike) -> Manifest:
    """Read a ``.tsv`` manifest; blank lines, Windows line ends and a byte order mark are tolerated.

    Raises:
        UserError: the file is missing, lists no utterance or one twice, or a line is not
            ``relative path<TAB>samples``.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected a manifest; give the .tsv file that prepare_data.py wrote")
    if not path.is_file():
        others = ", ".join(sorted(other.stem for other in path.parent.glob("*.tsv"))) or "none"
        raise UserError(
            f"{path}: no such manifest (subsets in that folder: {others}); "
            "write it with prepare_data.py or change --tsv_dir and --train_subset"
        )
    lines = _lines(path)
    _, root = next(lines, (1, ""))
    if not root.strip() or "\t" in root or "\0" in root:
        raise UserError(
            f"{path}: line 1 is {shown(root)}, expected the folder that the paths below it start from; "
            "write the manifest with prepare_data.py"
        )
    lengths, hashes = array("q"), array("q")
    paths = Names(_rows(path, lines, lengths, hashes))
    if not paths:
        raise UserError(
            f"{path}: no utterance is listed, expected one a line below the root folder; run prepare_data.py again"
        )
    # Two names may share a hash, though hardly ever do: only then are the names themselves compared.
    if len(np.unique(np.asarray(hashes))) < len(paths):
        _refuse_repeats(path)
    return Manifest(path, Path(root), paths, np.array(lengths, dtype=np.int64))


def _rows(path: Path, lines: Iterator[tuple[int, str]], lengths: array, hashes: array) -> Iterator[str]:
    """The names in a manifest's lines below the first; the length and the hash of each are appended."""
    for line_number, line in lines:
        name, _, count = line.rpartition("\t")
        # 18 digits fit into 64 bits.
        if name and count.isdecimal() and len(count) <= 18 and (length := int(count)) > 0:
            lengths.append(length)
            hashes.append(hash(name))
            yield name
        elif line.strip():
            raise UserError(
                f"{path}: line {line_number} is {shown(line)}, expected a relative path, a tab and a positive number "
                "of samples; mend the line or write the manifest again with prepare_data.py"
            )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers from 1, one at a time: manifests can be long."""
    # surrogateescape: a file name on Linux is bytes, and need not be valid UTF-8.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            yield number, line.removesuffix("\n")


def _refuse_repeats(path: Path) -> None:
    """Look for an utterance that a manifest lists twice.

    It reads the file again, so that a good manifest costs no memory for line numbers.

    Raises:
        UserError: there is one.
    """
    first: dict[str, int] = {}
    for line_number, line in itertools.islice(_lines(path), 1, None):
        name = line.rpartition("\t")[0]
        if name in first:
            raise UserError(
                f"{path}: line {line_number} lists {shown(name)}, which line {first[name]} does already, expected "
                "each path once; take one of the lines out or write the manifest again with prepare_data.py"
            )
        if name:
            first[name] = line_number


def check_files(manifest: Manifest, max_bad: int, sample: int = 256) -> dict[str, str]:
    """Read the headers of some utterances before training starts, evenly from the whole manifest.

    With a pack there is nothing to do: opening it has compared it with the manifest, and the files are not needed.

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
    if manifest.pack is not None:
        return {}
    if not manifest.root.is_dir():
        raise UserError(
            f"{manifest.path}: its root folder {manifest.root} does not exist; run prepare_data.py on the "
            "corpus where it is now, or put its folder on the first line"
        )
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
    if len(bad_files) <= min(max_bad, len(chosen) // 2):
        return bad_files
    found = f"{len(bad_files)} of {len(chosen)} files looked at cannot be used ({_some(list(bad_files))})"
    reason = next(iter(bad_files.values()))
    if len(bad_files) > len(chosen) // 2:
        raise UserError(f"{manifest.path}: the corpus has moved or changed: {found}; the first: {reason}")
    raise UserError(f"{manifest.path}: {found}, expected at most {max_bad} (--max_bad_files); the first: {reason}")


def _some(names: list[str]) -> str:
    """The first three of some names, in words."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def parse_max_bad_files(text: str, num_files: int) -> int:
    """``"5"`` to 5, ``"1%"`` to that share of ``num_files``, rounded down.

    Raises:
        UserError: neither a whole number nor a share of 0% to 100%.
    """
    match = re.fullmatch(r"([0-9]{1,18})|([0-9]{1,3}(?:\.[0-9]{1,9})?)%", text)
    if match and match[1]:
        return int(match[1])
    # A fraction, not a float: 0.7% of 1000 files are 7.
    if match and (share := Fraction(match[2]) / 100) <= 1:
        return int(share * num_files)
    raise UserError(
        f"--max_bad_files {text}: expected a number of files such as 5, or a share of them from 0% to 100% such as 1%"
    )


def make_batches(
    lengths: Sequence[int] | np.ndarray,
    num_buckets: int = 1000,
    max_tokens: float | None = None,
    batch_size: int | None = None,
    min_len: int = 0,
    max_len: int | None = None,
    generator: torch.Generator | None = None,
    max_crop: int | None = None,
    crop_lengths: Sequence[int] | None = None,
) -> list[list[int]]:
    """Sort utterances into even buckets by length and fill batches bucket after bucket.

    A batch takes utterances until the next one would push it past its budget, and may span buckets. With
    ``crop_lengths`` there is a bucket for each, and all batches of a bucket have the same number of utterances, so
    that batches have ``len(crop_lengths)`` shapes, and one more for the last, which takes what is left.

    Args:
        lengths: (N,) samples of each utterance.
        num_buckets: even divisions of the range ``min_len`` to ``max_len``.
        max_tokens: budget of a batch in samples; give this or ``batch_size``.
        batch_size: budget of a batch in utterances.
        min_len: shorter utterances are left out.
        max_len: longer utterances are left out; None keeps all.
        generator: shuffles the utterances inside each bucket; None leaves them from short to long.
        max_crop: an utterance counts at most this many samples of the budget, as :class:`BatchSampler` crops it.
        crop_lengths: from :func:`choose_crop_lengths`; needs ``max_tokens``.

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

    if crop_lengths is not None:
        return _even_batches(kept, counted[kept], crop_lengths, max_tokens, generator)
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


def _even_batches(
    utterances: np.ndarray,
    lengths: np.ndarray,
    crop_lengths: Sequence[int],
    max_tokens: float,
    generator: torch.Generator | None,
) -> list[list[int]]:
    """Batches of as many utterances as fit at their crop length, see :func:`make_batches`.

    From long to short: what does not fill a batch of one crop length begins the first of the next shorter.

    Args:
        utterances: (N,) indices.
        lengths: (N,) samples of each, none shorter than ``crop_lengths[0]``.
        crop_lengths: ascending.
        max_tokens: budget of a batch in samples, not less than the longest crop.
        generator: shuffles the utterances of each crop length.
    """
    chosen = np.searchsorted(crop_lengths, lengths, side="right") - 1
    batches: list[list[int]] = []
    left: list[int] = []
    for number in reversed(range(len(crop_lengths))):
        members = utterances[chosen == number]
        if generator is not None:
            members = members[torch.randperm(len(members), generator=generator).numpy()]
        left += members.tolist()
        size = int(max_tokens // crop_lengths[number])
        num_full = len(left) // size
        batches += [left[start * size : (start + 1) * size] for start in range(num_full)]
        left = left[num_full * size :]
    return batches + ([left] if left else [])


def choose_crop_lengths(lengths: np.ndarray, number: int | None = None) -> list[int]:
    """The crop lengths that lose the least audio when each utterance is cropped to the longest that it has.

    Args:
        lengths: (N,) samples of the utterances, N > 0.
        number: how many crop lengths at most; None for the fewest that lose no more than :data:`MAX_LOST` of the
            samples, at most :data:`MAX_CROP_LENGTHS`.

    Returns:
        Samples, ascending; the first is the shortest utterance's length.
    """
    shortest, longest = int(lengths.min()), int(lengths.max())
    candidates = np.unique([shortest, longest, *range(CROP_START, longest, CROP_STEP)])
    candidates = candidates[candidates >= shortest]
    num_as_long = len(lengths) - np.searchsorted(np.sort(lengths), candidates)
    # What going on from candidate h to the longer candidate i adds to the samples that are kept.
    steps = candidates - candidates[:, None]
    gains = np.where(steps > 0, steps * num_as_long, -np.inf)
    # The most samples kept by 1, 2, ... crop lengths that end with candidate i, and the candidate before it.
    kept = np.where(candidates == shortest, float(shortest * len(lengths)), -np.inf)
    best, paths = kept.max(), [np.zeros(len(candidates), dtype=int)]
    limit = number if number is not None else MAX_CROP_LENGTHS
    while len(paths) < min(limit, len(candidates)) and not (
        number is None and best >= (1 - MAX_LOST) * lengths.sum(dtype=np.int64)
    ):
        totals = kept[:, None] + gains
        paths.append(totals.argmax(axis=0))
        kept = totals.max(axis=0)
        best = kept.max()
    last = int(kept.argmax())
    chosen = []
    for before in reversed(paths):
        chosen.append(int(candidates[last]))
        last = int(before[last])
    return chosen[::-1]


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
    """Deals batches to ranks, the same number to each, and crops each batch to its shortest utterance.

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
        crop_lengths: the only lengths to crop to, ascending, the first not above the shortest utterance's; None
            for the batch's shortest utterance's.

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
        crop_lengths: Sequence[int] | None = None,
    ) -> None:
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank {rank} is not one of {num_replicas} ranks")
        if seed < 0:
            raise UserError(f"--seed {seed}: expected 0 or a positive number")
        if len(batches) < (num_replicas * accum_grad if drop_last else 1):
            raise UserError(
                f"{len(batches)} batches do not give each of {num_replicas} processes {accum_grad}; "
                "lower --seconds_per_batch or --accum_grad, or use fewer GPUs"
            )
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batches = batches
        self.num_replicas = num_replicas
        self.rank = rank
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.max_crop = max_crop
        self.accum_grad = accum_grad
        self.crop_lengths = crop_lengths
        self.epoch = 0
        self._ordered_epoch = None
        self._order = list(range(len(batches)))

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the crops of the next pass; Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches a rank gets in an epoch.

        Topping up adds one update to every rank even where the batches already divide evenly, one rank
        included: so does the published program, and its step counts per epoch follow from it.
        """
        num_updates = len(self.batches) // (self.num_replicas * self.accum_grad) + (0 if self.drop_last else 1)
        return self.accum_grad * num_updates

    def num_samples(self, batch: Sequence[int]) -> int:
        """The samples that each utterance of a batch is cropped to."""
        num_samples = int(self.lengths[batch].min())
        if self.max_crop is not None:
            num_samples = min(num_samples, self.max_crop)
        if self.crop_lengths is not None:
            num_samples = self.crop_lengths[bisect.bisect_right(self.crop_lengths, num_samples) - 1]
        return num_samples

    def __iter__(self) -> Iterator[Crop]:
        epoch = self.epoch
        for index in range(len(self)):
            yield self.crop(epoch, index)

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
        num_samples = self.num_samples(batch)
        offsets = np.zeros_like(lengths)
        if self.shuffle:
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
            "it has changed since the manifest was written; run prepare_data.py again"
        )
    return waveform


@contextmanager
def _opened(path: str | os.PathLike, length: int | None) -> Iterator[soundfile.SoundFile]:
    """Open a file to read audio from; what goes wrong, inside the ``with`` too, is an :class:`AudioError`.

    ``length`` is the number of samples at 16 kHz that its header must state; None accepts any.
    """
    if not os.path.isfile(path):
        raise AudioError(f"{path}: no such file, though the manifest lists it; run prepare_data.py again")
    try:
        if os.path.getsize(path) == 0:
            raise AudioError(f"{path}: is empty (0 bytes), expected audio; run prepare_data.py again")
        with open_audio(path) as file:
            # An MP3's count is a claim only, see seeks_exactly.
            found = num_samples_at_16k(file.frames, file.samplerate) if seeks_exactly(file) else length
            if length is not None and found != length:
                raise AudioError(
                    f"{path}: is {found} samples long (at 16 kHz), expected the manifest's {length}: "
                    "it has changed since the manifest was written; run prepare_data.py again"
                )
            yield file
    except soundfile.LibsndfileError as error:
        reason = error.error_string.rstrip(".")
        raise AudioError(
            f"{path}: expected audio, but it cannot be decoded ({reason}); run prepare_data.py again"
        ) from error
    except OSError as error:  # a disk that fails, a network folder that went away
        raise AudioError(
            f"{path}: expected audio, but reading it fails ({error.strerror}); check the disk, "
            "then run prepare_data.py again"
        ) from error


class Batch(NamedTuple):
    """What :class:`SpeechDataset` makes of a crop.

    Attributes:
        waveforms: (B, T) float32.
        lengths: (B,) int64, all equal to T.
        paths: the B files that were read.
        seed: the crop's.
        weight: utterances that count, B, or 0 in a batch that only tops up.
        bad_files: path to reason, one line, of the files that others had to replace.
    """

    waveforms: Tensor
    lengths: Tensor
    paths: list[str]
    seed: int
    weight: int
    bad_files: dict[str, str]


class SpeechDataset(Dataset):
    """Reads the crops that :class:`BatchSampler` chooses, and replaces files that cannot give theirs.

    A bad file gives its place to the next longer one of the manifest, after the longest to the shortest that is
    long enough; if that is bad too, to the one after. So the batch keeps its shape and every run reads the same.

    Args:
        manifest: from :func:`read_manifest`, and with a pack if :func:`packed.attach` has added one.
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
        lengths = torch.full((len(crop.indices),), crop.num_samples, dtype=torch.int64)
        return Batch(waveforms, lengths, paths, crop.seed, 0 if crop.tops_up else len(crop.indices), bad_files)

    def _read_or_replace(self, index: int, offset: int, num_samples: int) -> tuple[str, Tensor, dict[str, str]]:
        """The path that was read in the end, (T,) of it, and path to reason of those that were bad."""
        bad: dict[str, str] = {}
        for candidate, start in itertools.chain([(index, offset)], self._replacements(index, offset, num_samples)):
            path = self.manifest.full_path(candidate)
            try:
                return path, self._read(candidate, start, num_samples), bad
            except AudioError as error:
                bad[path] = str(error)
        raise AudioError(f"{next(iter(bad.values()))} (the {len(bad) - 1} files tried in its place fail too)")

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
            AudioError: see :func:`load_audio` and :meth:`packed.Pack.read`; or what was read cannot be trained on.
        """
        if self.manifest.pack is not None:  # what cannot be trained on is not packed
            return self.manifest.pack.read(index, offset, num_samples)
        path = self.manifest.full_path(index)
        waveform = load_audio(path, offset, num_samples, int(self.manifest.lengths[index]))
        where = f"of samples {offset} to {offset + num_samples} (at 16 kHz)"
        remedy = f"mend the file or take its line out of {self.manifest.path}"
        low, high = (float(value) for value in waveform.aminmax())  # NaN if any sample is
        if not (math.isfinite(low) and math.isfinite(high)):
            num_bad = int((~waveform.isfinite()).sum())
            raise AudioError(f"{path}: {num_bad} {where} are NaN or infinite, expected numbers; {remedy}")
        # A crop may fall into a pause of digital silence; only a file without any sound is bad.
        if low == high == 0 and not load_audio(path).any():
            raise AudioError(f"{path}: all of its samples are zero, expected sound; {remedy}")
        return waveform
