"""The data of a run: what is in its two subsets, their batches, and which process gets which."""

import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from dataset.batches import BatchSampler, TrainingSampler, make_batches
from dataset.manifest import Manifest, read_manifest
from dataset.speech import SpeechDataset, check_files
from labels.batches import FrameTimes, LabelledDataset, checked_lengths
from labels.lists import SEGMENTS, TEXT, Clip, Probe
from training.settings import BatchSettings, DataSettings
from training.signals import ignore_stop_signals
from training.updates import too_many_bad_files
from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.files.errors import UserError

# Of labelled lists; manifests have names of their own for the first.
TRAIN_SUBSET, VALID_SUBSET, TEST_SUBSET = "train", "valid", "test"
# Of the training clips of a list without others to validate on.
VALID_SHARE = 0.1
# Length buckets that batches are filled from (paper's program).
NUM_BUCKETS = 1000
# Seconds without a batch after which the loader processes count as hanging: a disk may, and a process that is forked
# while another thread calls into Python may never start (seen with Python 3.11.7 and gloo).
WORKER_TIMEOUT = 600


@contextmanager
def advice(text: str) -> Iterator[None]:
    """Add to an error of ``dataset/``, which states facts, what users can do about it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; {text}") from error


class BatchDataModule(pl.LightningDataModule):
    """The batches of two subsets, for training and validation, and which process gets which.

    Args:
        settings: of the batches.
        train_subset: the name of the one that is trained on.
        max_crop: the longest crop in samples; None for no limit.
        whole: do not crop.

    Attributes:
        batches: of each subset; filled by what is derived from this.
        max_bad_files: audio files that may be bad.
    """

    max_bad_files: int

    def __init__(
        self, settings: BatchSettings, train_subset: str, *, max_crop: int | None = None, whole: bool = False
    ) -> None:
        super().__init__()
        self.settings = settings
        self.train_subset = train_subset
        self.batches: dict[str, list[list[int]]] = {}
        self._max_crop = max_crop
        self._whole = whole

    def lengths(self, subset: str) -> np.ndarray:
        """The samples of each utterance (N,)."""
        raise NotImplementedError

    def dataset(self, subset: str) -> Dataset:
        """What reads the batches of the sampler."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A digest of what is trained on, wherever it lies."""
        raise NotImplementedError

    def check_crops(self, num_samples: int) -> None:
        """Check that nothing is shorter than this many samples, of which the models make one frame.

        Raises:
            UserError: something is; names the option that lets it in.
        """

    def _make_batches(self, subset: str, **limits: int | None) -> list[list[int]]:
        settings = self.settings
        is_training = subset == self.train_subset
        return make_batches(
            self.lengths(subset),
            num_buckets=NUM_BUCKETS,
            max_tokens=settings.seconds_per_batch * SAMPLE_RATE,
            generator=torch.Generator().manual_seed(settings.seed) if is_training else None,
            **limits,
        )

    def sampler(self, subset: str, num_replicas: int, rank: int, accum_grad: int = 1) -> BatchSampler:
        """The batches of one process; those of the training subset are shuffled and cropped at random."""
        is_training = subset == self.train_subset
        with advice("lower --seconds_per_batch or --accum_grad, or use fewer GPUs"):
            return BatchSampler(
                self.lengths(subset),
                self.batches[subset],
                num_replicas=num_replicas,
                rank=rank,
                shuffle=is_training,
                seed=self.settings.seed,
                # Validation on one process needs no batch twice to make the processes even.
                drop_last=not is_training and num_replicas == 1,
                max_crop=self._max_crop,
                accum_grad=accum_grad,
                whole=self._whole,
            )

    def _loader(self, subset: str, sampler: BatchSampler | TrainingSampler) -> DataLoader:
        num_workers = self.settings.num_workers
        # batch_size=None: the sampler's entries are whole batches already.
        return DataLoader(
            self.dataset(subset),
            sampler=sampler,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            # Lightning copies what is pinned to the GPU without waiting for the end of it.
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            timeout=WORKER_TIMEOUT if num_workers else 0,
            worker_init_fn=ignore_stop_signals,
            # Its own, so that the global one, which makes masks and dropout, does not depend on the loader.
            generator=torch.Generator().manual_seed(self.settings.seed),
        )

    def train_dataloader(self) -> DataLoader:
        """All batches of the run that are left, one epoch after the other."""
        trainer, subset = self.trainer, self.train_subset
        accum_grad = trainer.accumulate_grad_batches
        batches = self.sampler(subset, trainer.world_size, trainer.global_rank, accum_grad)
        return self._loader(
            subset, TrainingSampler(batches, end=trainer.max_steps * accum_grad, start=trainer.global_step * accum_grad)
        )

    def val_dataloader(self) -> DataLoader:
        return self._loader(VALID_SUBSET, self.sampler(VALID_SUBSET, self.trainer.world_size, self.trainer.global_rank))


class SpeechDataModule(BatchDataModule):
    """Batches of ``TSV_DIR/TRAIN_SUBSET.tsv`` and ``TSV_DIR/valid.tsv``, bucketed and cropped.

    Manifests are read and batches are made here and now, so that bad input ends the run before any model is built.

    Args:
        settings: of the data.

    Attributes:
        manifests: of each of the two subsets.

    Raises:
        UserError: a manifest is wrong, its utterances do not make batches, or too many of its files are bad.
    """

    settings: DataSettings

    def __init__(self, settings: DataSettings) -> None:
        max_crop = None if settings.max_crop_seconds is None else round(settings.max_crop_seconds * SAMPLE_RATE)
        super().__init__(settings, settings.train_subset, max_crop=max_crop)
        self.manifests: dict[str, Manifest] = {}
        limits = {
            "min_len": round(settings.min_seconds * SAMPLE_RATE),
            "max_len": round(settings.max_seconds * SAMPLE_RATE),
            "max_crop": max_crop,
        }
        for subset in (settings.train_subset, VALID_SUBSET):
            path = settings.manifest_dir / f"{subset}.tsv"
            with advice("write it with prepare_data.py, or change --tsv_dir and --train_subset"):
                self.manifests[subset] = read_manifest(path)
            with advice("see --seconds_per_batch, --min_seconds and --max_seconds"):
                try:
                    self.batches[subset] = self._make_batches(subset, **limits)
                except UserError as error:
                    raise UserError(f"{path}: {error}") from None
        self.max_bad_files = settings.max_bad_files_of(len(self.manifests[settings.train_subset].paths))
        bad_files: dict[str, str] = {}
        for manifest in self.manifests.values():
            with advice("run prepare_data.py again, or see --max_bad_files"):
                bad_files |= check_files(manifest, self.max_bad_files)
        if len(bad_files) > self.max_bad_files:
            raise UserError(too_many_bad_files(bad_files, self.max_bad_files))

    def lengths(self, subset: str) -> np.ndarray:
        return self.manifests[subset].lengths

    def dataset(self, subset: str) -> SpeechDataset:
        return SpeechDataset(self.manifests[subset])

    def fingerprint(self) -> str:
        manifest = self.manifests[self.train_subset]
        utterances = hashlib.sha256(manifest.lengths.tobytes())
        utterances.update("\0".join(manifest.paths).encode(errors="surrogateescape"))
        return utterances.hexdigest()[:16]

    def check_crops(self, num_samples: int) -> None:
        settings, seconds = self.settings, math.ceil(1000 * num_samples / SAMPLE_RATE) / 1000
        needed = f"the models make a frame of {num_samples}; give {seconds:.3f} or more"
        if self._max_crop is not None and self._max_crop < num_samples:
            raise UserError(
                f"--max_crop_seconds {settings.max_crop_seconds:g}: {self._max_crop} samples at 16 kHz, {needed}"
            )
        for subset, batches in self.batches.items():
            manifest = self.manifests[subset]
            shortest = min((index for batch in batches for index in batch), key=manifest.lengths.__getitem__)
            if manifest.lengths[shortest] < num_samples:
                raise UserError(
                    f"--min_seconds {settings.min_seconds:g} lets in {manifest.full_path(shortest)}, which has "
                    f"{manifest.lengths[shortest]} samples at 16 kHz; {needed}"
                )


class LabelledDataModule(BatchDataModule):
    """Batches of whole utterances of a labelled list, bucketed and padded.

    Where the list has no clips for validation, a tenth of those for training is held out for it, drawn by the seed: of
    clips with labels a tenth of each label.

    Args:
        settings: of the data.
        probe: the list.
        frames: of the model.

    Attributes:
        probe, frames: the same.
        clips: of each split.

    Raises:
        UserError: a clip cannot be used (see :func:`labels.batches.checked_lengths`), or there are too few.
    """

    def __init__(self, settings: BatchSettings, probe: Probe, frames: FrameTimes) -> None:
        super().__init__(settings, TRAIN_SUBSET, whole=True)
        self.probe = probe
        self.frames = frames
        train, valid = (probe.train, probe.valid) if probe.valid else held_out(probe, settings.seed)
        self.clips = {TRAIN_SUBSET: train, VALID_SUBSET: valid, TEST_SUBSET: probe.test}
        max_samples = settings.seconds_per_batch * SAMPLE_RATE
        self._lengths = {
            split: checked_lengths(probe, clips, frames, max_samples) for split, clips in self.clips.items()
        }
        if probe.kind == SEGMENTS:
            for split in self.clips:
                dataset = self.dataset(split)
                if not any((dataset.target(index) >= 0).any() for index in range(len(dataset))):
                    raise UserError(
                        f"{probe.path}: no segment of the {split} clips holds the middle of a frame of the model, "
                        f"expected segments of {frames.hop / SAMPLE_RATE:g} s or more"
                    )
        for subset in (TRAIN_SUBSET, VALID_SUBSET):
            self.batches[subset] = self._make_batches(subset)
        self.max_bad_files = settings.max_bad_files_of(len(train))

    def lengths(self, subset: str) -> np.ndarray:
        return self._lengths[subset]

    def fingerprint(self) -> str:
        folder = self.probe.path.parent
        digest = hashlib.sha256(repr(self.probe.labels).encode())
        for split, clips in self.clips.items():
            rows = [(split, os.path.relpath(clip.path, folder), clip.target) for clip in clips]
            digest.update(repr(rows).encode(errors="surrogateescape"))
            digest.update(self._lengths[split].tobytes())
        return digest.hexdigest()[:16]

    def dataset(self, subset: str) -> LabelledDataset:
        return LabelledDataset(self.probe.kind, self.clips[subset], self._lengths[subset], self.frames)


def held_out(probe: Probe, seed: int) -> tuple[tuple[Clip, ...], tuple[Clip, ...]]:
    """The training clips of a list in two: nine tenths and a tenth, one clip of each label or more.

    Raises:
        UserError: there is one clip alone.
    """
    groups: dict[Any, list[int]] = {}
    for index, clip in enumerate(probe.train):
        groups.setdefault(None if probe.kind in (TEXT, SEGMENTS) else clip.target, []).append(index)
    if min(map(len, groups.values())) < 2:
        raise UserError(
            f"{probe.path}: one file is there to train on, expected two or more, or some with the split valid"
        )
    generator, chosen = torch.Generator().manual_seed(seed), set()
    for _, group in sorted(groups.items(), key=lambda item: item[1]):
        count = max(1, round(VALID_SHARE * len(group)))
        chosen |= {group[i] for i in torch.randperm(len(group), generator=generator)[:count].tolist()}
    parts = ([clip for i, clip in enumerate(probe.train) if (i in chosen) == is_valid] for is_valid in (False, True))
    train, valid = map(tuple, parts)
    return train, valid
