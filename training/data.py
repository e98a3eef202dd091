"""The data of a distillation: the manifests of two subsets, their batches, and who of the processes gets which."""

import os
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from dataset.batches import BatchSampler, TrainingSampler, make_batches
from dataset.manifest import Manifest, read_manifest
from dataset.speech import SpeechDataset, check_files
from training import callbacks
from training.arguments import parse_max_bad_files
from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.errors import UserError

VALID_SUBSET = "valid"
# Length buckets that batches are filled from (paper's program).
NUM_BUCKETS = 1000
# Seconds without a batch after which the loader processes count as hanging: a disk may, and a process that is forked
# while another thread calls into Python may never start (seen with Python 3.11.7 and gloo).
WORKER_TIMEOUT = 600


class SpeechDataModule(pl.LightningDataModule):
    """Batches of ``TSV_DIR/TRAIN_SUBSET.tsv`` and ``TSV_DIR/valid.tsv``, bucketed and cropped.

    Manifests are read and batches are made here and now, so that bad input ends the run before any
    model is built.

    Args:
        tsv_dir: where prepare_data.py wrote its manifests.
        train_subset: name of the training manifest without ``.tsv``.
        seconds_per_batch: audio of one batch of one process, before cropping to the shortest; None where
            :meth:`fill_batches` will say it.
        num_workers: loader processes.
        min_seconds, max_seconds: utterances outside these lengths are left out.
        max_crop_seconds: crop every utterance to at most this length; None means to the batch's shortest only.
        seed: of the batches' order and the crops.
        max_bad_files: audio files that may be bad, "1%" of the training manifest or a number.

    Raises:
        UserError: see :func:`read_manifest`, :func:`make_batches` and :func:`check_files`.
    """

    def __init__(
        self,
        tsv_dir: str | os.PathLike,
        train_subset: str,
        seconds_per_batch: float | None,
        num_workers: int,
        min_seconds: float,
        max_seconds: float,
        max_crop_seconds: float | None,
        seed: int,
        max_bad_files: str = "1%",
    ) -> None:
        super().__init__()
        self.train_subset = train_subset
        self.num_workers = num_workers
        self.seed = seed
        self.max_crop = None if max_crop_seconds is None else round(max_crop_seconds * SAMPLE_RATE)
        self.limits = (round(min_seconds * SAMPLE_RATE), round(max_seconds * SAMPLE_RATE))
        self.manifests: dict[str, Manifest] = {}
        self.batches: dict[str, list[list[int]]] = {}
        for subset in (train_subset, VALID_SUBSET):
            self.manifests[subset] = read_manifest(Path(tsv_dir) / f"{subset}.tsv")
        num_samples = {subset: self._num_samples(subset) for subset in self.manifests}
        self.longest_crop = max(int(counts.max(initial=1)) for counts in num_samples.values())
        self.train_seconds = float(num_samples[train_subset].sum() / SAMPLE_RATE)
        # Short batches show what is wrong with the manifests as well.
        self.fill_batches(self.longest_crop / SAMPLE_RATE if seconds_per_batch is None else seconds_per_batch)
        self.max_bad_files = parse_max_bad_files(max_bad_files, len(self.manifests[train_subset].paths))
        bad_files: dict[str, str] = {}
        for manifest in self.manifests.values():
            bad_files |= check_files(manifest, self.max_bad_files)
        if len(bad_files) > self.max_bad_files:
            raise UserError(callbacks.too_many_bad_files(bad_files, self.max_bad_files))

    def _num_samples(self, subset: str) -> np.ndarray:
        """(N,) of the utterances within the limits, as far as the longest crop allows."""
        lengths = self.manifests[subset].lengths
        lengths = lengths[(lengths >= self.limits[0]) & (lengths <= self.limits[1])]
        return lengths if self.max_crop is None else np.minimum(lengths, self.max_crop)

    def fill_batches(self, seconds_per_batch: float) -> None:
        """Make the batches of both subsets.

        Raises:
            UserError: no utterance is within the limits, or the longest does not fit into a batch.
        """
        for subset, manifest in self.manifests.items():
            is_training = subset == self.train_subset
            try:
                self.batches[subset] = make_batches(
                    manifest.lengths,
                    num_buckets=NUM_BUCKETS,
                    max_tokens=seconds_per_batch * SAMPLE_RATE,
                    min_len=self.limits[0],
                    max_len=self.limits[1],
                    max_crop=self.max_crop,
                    generator=torch.Generator().manual_seed(self.seed) if is_training else None,
                )
            except UserError as error:
                advice = "see --seconds_per_batch, --min_seconds and --max_seconds"
                raise UserError(f"{manifest.path}: {error}; {advice}") from None

    @property
    def num_shapes(self) -> int:
        """Different shapes (utterances, samples) of training batches."""
        lengths = self.manifests[self.train_subset].lengths
        longest = self.max_crop or self.limits[1]
        return len({(len(batch), min(int(lengths[batch].min()), longest)) for batch in self.batches[self.train_subset]})

    def sampler(self, subset: str, num_replicas: int, rank: int, accum_grad: int = 1) -> BatchSampler:
        """The batches of one process; those of the training subset are shuffled and cropped at random."""
        is_training = subset == self.train_subset
        return BatchSampler(
            self.manifests[subset].lengths,
            self.batches[subset],
            num_replicas=num_replicas,
            rank=rank,
            shuffle=is_training,
            seed=self.seed,
            # Validation on one process needs no batch twice to make the processes even.
            drop_last=not is_training and num_replicas == 1,
            max_crop=self.max_crop,
            accum_grad=accum_grad,
        )

    def _loader(self, subset: str, sampler: BatchSampler | TrainingSampler) -> DataLoader:
        # batch_size=None: the sampler's entries are whole batches already.
        return DataLoader(
            SpeechDataset(self.manifests[subset]),
            sampler=sampler,
            batch_size=None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            # Lightning copies what is pinned to the GPU without waiting for the end of it.
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            timeout=WORKER_TIMEOUT if self.num_workers else 0,
            worker_init_fn=callbacks.ignore_stop_signals,
            # Its own, so that the global one, which makes masks and dropout, does not depend on the loader.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def train_dataloader(self) -> DataLoader:
        """All batches of the run that are left, one epoch after the other."""
        trainer = self.trainer
        accum_grad = trainer.accumulate_grad_batches
        batches = self.sampler(self.train_subset, trainer.world_size, trainer.global_rank, accum_grad)
        return self._loader(
            self.train_subset,
            TrainingSampler(batches, end=trainer.max_steps * accum_grad, start=trainer.global_step * accum_grad),
        )

    def val_dataloader(self) -> DataLoader:
        return self._loader(VALID_SUBSET, self.sampler(VALID_SUBSET, self.trainer.world_size, self.trainer.global_rank))
