"""The data of a run: its training and validation subsets, their batches, and each process's share."""

import hashlib
import itertools
import math
import os
import shutil
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from dataset.batches import BatchSampler, TrainingSampler, make_batches
from dataset.manifest import read_manifest
from dataset.speech import SpeechDataset, check_files
from labels.batches import FrameTimes, LabelledDataset, checked_lengths
from labels.lists import SEGMENTS, TEXT, Clip, Probe
from training.settings import BatchSettings, DataSettings
from training.signals import ignore_stop_signals
from training.updates import too_many_bad_files
from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.files.errors import UserError

# Names of the subsets of labelled lists. Of manifests, the user names the one for training.
TRAIN_SUBSET, VALID_SUBSET, TEST_SUBSET = "train", "valid", "test"
# Share of the training clips held out for validation if a list has none.
VALID_SHARE = 0.1
# Seconds without a batch after which the loader processes count as hanging: a disk may hang, and a process that is
# forked while another thread calls into Python may never start (seen with Python 3.11.7 and gloo).
WORKER_TIMEOUT = 600
# Loader processes hand batches over in it; Docker gives a container 64 MB. Each keeps so many batches ready.
SHARED_MEMORY, PREFETCHED = "/dev/shm", 2
MORE_SHARED_MEMORY = (
    f"give the container more {SHARED_MEMORY} (docker run --shm-size=8g, or --ipc=host), or lower --num_workers "
    "(0 needs none) or --seconds_per_batch"
)


class BatchDataModule(pl.LightningDataModule):
    """Makes the batches of a training and a validation subset, and deals them to processes.

    ``datasets`` are the subsets by name. Crops have at most ``max_crop`` samples; there are none if ``whole``.
    ``limits`` are ``min_len`` and ``max_len`` of :func:`make_batches`.

    Raises:
        UserError: the utterances of a subset do not make batches.
    """

    trainer: pl.Trainer  # Lightning sets it before it asks for loaders

    def __init__(
        self,
        settings: BatchSettings,
        train_subset: str,
        datasets: dict[str, SpeechDataset] | dict[str, LabelledDataset],
        *,
        max_crop: int | None = None,
        whole: bool = False,
        **limits: int,
    ) -> None:
        super().__init__()
        self.settings, self.train_subset, self.datasets = settings, train_subset, datasets
        self.max_bad_files = settings.max_bad_files_of(len(datasets[train_subset]))
        self._max_crop, self._whole = max_crop, whole
        self.batches: dict[str, list[list[int]]] = {}  # by subset: indices into its dataset, one list per batch
        max_tokens = settings.seconds_per_batch * SAMPLE_RATE
        for subset in (train_subset, VALID_SUBSET):
            generator = torch.Generator().manual_seed(settings.seed) if subset == train_subset else None
            try:
                self.batches[subset] = make_batches(
                    datasets[subset].lengths, max_tokens=max_tokens, generator=generator, max_crop=max_crop, **limits
                )
            except UserError as error:
                options = "--seconds_per_batch, --min_seconds and --max_seconds"
                raise UserError(f"{subset}.tsv: {error}; see {options}") from error

    def fingerprint(self) -> str:
        """A digest of the training data, wherever they lie."""
        raise NotImplementedError

    def largest_batch(self) -> tuple[int, int]:
        """Return the waveforms and the samples of each in the largest batch of the training subset."""
        lengths = np.asarray(self.datasets[self.train_subset].lengths)
        ends = [lengths[batch] for batch in self.batches[self.train_subset]]
        samples = (int(end.max() if self._whole else min(end.min(), self._max_crop or end.min())) for end in ends)
        return max(zip(map(len, ends), samples, strict=True), key=math.prod)

    def check_crops(self, num_samples: int) -> None:
        """Raise a UserError if a crop is shorter than ``num_samples``, which the models need for one frame."""

    def check_shared_memory(self, num_processes: int) -> None:
        """Raise a UserError if the first batches of this machine's processes surely do not fit into shared memory."""
        num_workers = self.settings.num_workers
        if not num_workers or not os.path.isdir(SHARED_MEMORY):
            return
        ready = itertools.islice(self.sampler(self.train_subset, num_processes, 0), PREFETCHED * num_workers)
        needed = 4 * num_processes * sum(len(crop.indices) * crop.num_samples for crop in ready)
        if (free := shutil.disk_usage(SHARED_MEMORY).free) < needed:
            raise UserError(
                f"--num_workers {num_workers}: {SHARED_MEMORY} has {free / 1e6:.1f} MB free, loader processes keep "
                f"batches of {needed / 1e6:.1f} MB ready in it; {MORE_SHARED_MEMORY}"
            )

    def sampler(self, subset: str, num_replicas: int, rank: int, accum_grad: int = 1) -> BatchSampler:
        """The batches of one process; those of the training subset are shuffled and cropped at random."""
        is_training = subset == self.train_subset
        return BatchSampler(
            self.datasets[subset].lengths,
            self.batches[subset],
            num_replicas=num_replicas,
            rank=rank,
            shuffle=is_training,
            seed=self.settings.seed,
            # Validation on one process needs no repeated batch to make the processes even.
            drop_last=not is_training and num_replicas == 1,
            max_crop=self._max_crop,
            accum_grad=accum_grad,
            whole=self._whole,
        )

    def train_dataloader(self) -> DataLoader:
        """All batches of the run that are left, one epoch after the other."""
        trainer, accum_grad = self.trainer, self.trainer.accumulate_grad_batches
        batches = self.sampler(self.train_subset, trainer.world_size, trainer.global_rank, accum_grad)
        end, start = trainer.max_steps * accum_grad, trainer.global_step * accum_grad
        return self._loader(self.train_subset, TrainingSampler(batches, end, start))

    def val_dataloader(self) -> DataLoader:
        return self._loader(VALID_SUBSET, self.sampler(VALID_SUBSET, self.trainer.world_size, self.trainer.global_rank))

    def _loader(self, subset: str, sampler: BatchSampler | TrainingSampler) -> DataLoader:
        num_workers = self.settings.num_workers
        return DataLoader(
            self.datasets[subset],
            sampler=sampler,
            batch_size=None,  # the sampler yields whole batches
            collate_fn=_shared,
            num_workers=num_workers,
            prefetch_factor=PREFETCHED if num_workers else None,
            # Python 3.14 would have another process start them, and torch would not notice when one is killed.
            multiprocessing_context="fork" if num_workers else None,
            persistent_workers=num_workers > 0,
            # Lightning copies pinned memory to the GPU without waiting for the copy to end.
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            timeout=WORKER_TIMEOUT if num_workers else 0,
            worker_init_fn=ignore_stop_signals,
            # Its own, so that the global one, which makes masks and dropout, does not depend on the loader.
            generator=torch.Generator().manual_seed(self.settings.seed),
        )


def _shared(batch: Any) -> Any:
    """Move a loader process's batch into shared memory.

    The queue would do it in a thread of its own, where an error loses the batch, and the run waits for it.
    """
    if get_worker_info() is not None:
        for value in batch:
            if isinstance(value, Tensor):
                value.share_memory_()
    return batch


class SpeechDataModule(BatchDataModule):
    """Batches of ``TSV_DIR/TRAIN_SUBSET.tsv`` and ``TSV_DIR/valid.tsv``, bucketed and cropped.

    Raises:
        UserError: a manifest is wrong, its utterances do not make batches, or too many of its files are bad.
    """

    settings: DataSettings
    datasets: dict[str, SpeechDataset]

    def __init__(self, settings: DataSettings) -> None:
        paths = {subset: settings.manifest_dir / f"{subset}.tsv" for subset in (settings.train_subset, VALID_SUBSET)}
        super().__init__(
            settings,
            settings.train_subset,
            {subset: SpeechDataset(read_manifest(path)) for subset, path in paths.items()},
            max_crop=None if settings.max_crop_seconds is None else round(settings.max_crop_seconds * SAMPLE_RATE),
            min_len=round(settings.min_seconds * SAMPLE_RATE),
            max_len=round(settings.max_seconds * SAMPLE_RATE),
        )
        bad_files: dict[str, str] = {}
        for dataset in self.datasets.values():
            bad_files |= check_files(dataset.manifest)
        if len(bad_files) > self.max_bad_files:
            raise UserError(too_many_bad_files(bad_files, self.max_bad_files))

    def fingerprint(self) -> str:
        manifest = self.datasets[self.train_subset].manifest
        utterances = hashlib.sha256(manifest.lengths.tobytes())
        utterances.update("\0".join(manifest.paths).encode(errors="surrogateescape"))
        return utterances.hexdigest()[:16]

    def check_crops(self, num_samples: int) -> None:
        settings, max_crop = self.settings, self._max_crop
        seconds = math.ceil(1000 * num_samples / SAMPLE_RATE) / 1000
        needed = f"the models make a frame of {num_samples}; give {seconds:.3f} or more"
        if max_crop is not None and max_crop < num_samples:
            raise UserError(f"--max_crop_seconds {settings.max_crop_seconds:g}: {max_crop} samples at 16 kHz, {needed}")
        for subset, batches in self.batches.items():
            manifest = self.datasets[subset].manifest
            shortest = min(itertools.chain(*batches), key=manifest.lengths.__getitem__)
            if (length := manifest.lengths[shortest]) < num_samples:
                path = manifest.full_path(shortest)
                found = f"--min_seconds {settings.min_seconds:g} lets in {path}, which has {length} samples at 16 kHz"
                raise UserError(f"{found}; {needed}")


class LabelledDataModule(BatchDataModule):
    """Batches of whole utterances of a labelled list, bucketed and padded.

    If the list has no clips for validation, a tenth of the training clips is held out, drawn by the seed: a tenth of
    each label of clips with labels.

    Raises:
        UserError: a clip cannot be used (see :func:`labels.batches.checked_lengths`), or there are too few.
    """

    datasets: dict[str, LabelledDataset]

    def __init__(self, settings: BatchSettings, probe: Probe, frames: FrameTimes) -> None:
        train, valid = (probe.train, probe.valid) if probe.valid else held_out(probe, settings.seed)
        clips = {TRAIN_SUBSET: train, VALID_SUBSET: valid, TEST_SUBSET: probe.test}
        max_samples = settings.seconds_per_batch * SAMPLE_RATE
        lengths = {split: checked_lengths(probe, clips[split], frames, max_samples) for split in clips}
        datasets = {split: LabelledDataset(probe.kind, clips[split], lengths[split], frames) for split in clips}
        super().__init__(settings, TRAIN_SUBSET, datasets, whole=True)
        self.probe, self.clips = probe, clips
        for split, dataset in datasets.items():
            if probe.kind == SEGMENTS and not any((dataset.target(i) >= 0).any() for i in range(len(dataset))):
                raise UserError(
                    f"{probe.path}: no segment of the {split} clips holds the middle of a frame of the model, "
                    f"expected segments of {frames.hop / SAMPLE_RATE:g} s or more"
                )

    def fingerprint(self) -> str:
        folder = self.probe.path.parent
        digest = hashlib.sha256(repr(self.probe.labels).encode())
        for split, clips in self.clips.items():
            rows = [(split, os.path.relpath(clip.path, folder), clip.target) for clip in clips]
            digest.update(repr(rows).encode(errors="surrogateescape"))
            digest.update(self.datasets[split].lengths.tobytes())
        return digest.hexdigest()[:16]


def held_out(probe: Probe, seed: int) -> tuple[tuple[Clip, ...], tuple[Clip, ...]]:
    """Split a list's training clips into nine tenths and a tenth, the latter with at least one clip of each label."""
    groups: dict[Any, list[int]] = {}
    for index, clip in enumerate(probe.train):
        groups.setdefault(None if probe.kind in (TEXT, SEGMENTS) else clip.target, []).append(index)
    if min(map(len, groups.values())) < 2:
        raise UserError(
            f"{probe.path}: one file is there to train on, expected two or more, or some with the split valid"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen: set[int] = set()
    for group in groups.values():
        count = max(1, round(VALID_SHARE * len(group)))
        chosen.update(group[i] for i in torch.randperm(len(group), generator=generator)[:count].tolist())
    train = tuple(clip for index, clip in enumerate(probe.train) if index not in chosen)
    return train, tuple(probe.train[index] for index in sorted(chosen))
