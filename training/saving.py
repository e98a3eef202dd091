"""Saving a run: its checkpoints, those of intermediate sizes, and leaving it where a signal asks for that."""

import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.plugins.io import TorchCheckpointIO

from cli import AllProcessesError, Interrupted, print_line
from lightning import DistillModule
from training.checkpoints import (
    CHECKPOINTS,
    CONTINUE,
    DISTILLATION,
    INTERMEDIATE,
    LAST_CHECKPOINT,
    PREVIOUS_CHECKPOINT,
    SIZE_FOLDER,
)
from training.processes import gather
from training.signals import requeue_slurm_job
from training.updates import UpdateGuard
from wav2vec2.files import checkpoint as ckpt
from wav2vec2.files.errors import UserError
from wav2vec2.files.storage import atomic_path


class CheckpointIO(TorchCheckpointIO):
    """Writes checkpoints whole or not at all; reads plain data only.

    The run's own checkpoint ``last`` is written again and again: the one before is kept, and one that cannot be written
    (a full disk) must not cost the run, so ``error`` says what happened. Others are written once, or the run ends.
    ``loaded`` is the path and contents of a checkpoint that has been read already, so that it is not read twice.
    ``record`` is what a checkpoint says of its run, unless it is saved with ``storage_options`` to take its place.
    """

    def __init__(self, last: Path, loaded: tuple[Path, dict[str, Any]] | None, record: dict[str, Any]) -> None:
        super().__init__()
        self._last, self._loaded, self._record = last, loaded, record
        # A run goes on from the previous checkpoint because last.ckpt is damaged: that must not replace it.
        self._keep_previous = loaded is not None and loaded[0].name == PREVIOUS_CHECKPOINT
        self.error: str | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path, checkpoint = Path(path), {**checkpoint, **(storage_options or self._record)}
        if path != self._last:
            save_or_end(path, checkpoint)
            return
        self.error = None
        try:
            if path.exists() and not self._keep_previous:
                _keep_as(path, path.with_name(PREVIOUS_CHECKPOINT))
            ckpt.save(path, checkpoint)
            self._keep_previous = False
        except (UserError, OSError) as error:
            self.error = str(error)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        loaded, self._loaded = self._loaded, None
        if loaded is not None and loaded[0] == Path(path):
            return loaded[1]
        return ckpt.read(path)


def save_or_end(path: Path, contents: dict[str, Any]) -> None:
    """Write a file that the run cannot go on without; a UserError if it cannot be written."""
    try:
        ckpt.save(path, contents)
    except UserError as error:
        raise UserError(f"{error}; then {CONTINUE}") from error


def _keep_as(path: Path, name: Path) -> None:
    """Give the file at ``path`` a second name, or copy it where the file system cannot do that."""
    with atomic_path(name) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)


class LastValidation(Callback):
    """Validates the last update of a run with labels, wherever it falls."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == trainer.max_steps:
            trainer.val_check_batch = 1


class RunCheckpoints(Callback):
    """Saves ``ckpts/last.ckpt`` every ``save_interval`` updates and each epoch, and ends the run at a signal."""

    def __init__(
        self, path: Path, guard: UpdateGuard, io: CheckpointIO, save_interval: int, updates_per_epoch: int
    ) -> None:
        self._path, self._guard, self._io = path, guard, io
        self._save_interval, self._updates_per_epoch = save_interval, updates_per_epoch
        self._last_saved: int | None = None
        self._save_after_validation = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_saved = trainer.global_step if trainer.ckpt_path else None
        starts = gather(trainer.global_step)
        if len(set(starts)) > 1:
            raise AllProcessesError(
                f"the processes would continue from different updates ({starts}): they do not see the same "
                f"{self._path}; give its path to --resume_checkpoint on a file system that all nodes share"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # Not at the end of the batch before: its row of the log is written in between.
        if self._guard.signum:
            signum = signal.Signals(self._guard.signum)
            then = CONTINUE
            if signum == signal.SIGUSR1 and trainer.is_global_zero:
                then = f"{requeue_slurm_job()}; {then}"
            raise Interrupted(signum, f"{signum.name}: saved update {trainer.global_step} in {self._path}; {then}")
        pl_module.log("epoch", float(trainer.global_step // self._updates_per_epoch))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # in the middle of an update
        step, intervals = trainer.global_step, (self._save_interval, self._updates_per_epoch, trainer.max_steps)
        if self._guard.signum or any(step % interval == 0 for interval in intervals):
            # A run continued from before a validation would not make up for it.
            self._save_after_validation = (batch_idx + 1) % (trainer.val_check_batch or 1) == 0
            if not self._save_after_validation:
                self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._save_after_validation:
            self._save_after_validation = False
            self._save(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("epoch", float(max(trainer.global_step - 1, 0) // self._updates_per_epoch))

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self._path, weights_only=False)
        if self._io.error is None:
            self._last_saved = trainer.global_step
            return
        kept = "there is none before it" if self._last_saved is None else f"that of update {self._last_saved} stays"
        message = f"{self._io.error}; update {trainer.global_step} is not saved, {kept}"
        if self._last_saved is None or self._guard.signum or trainer.global_step == trainer.max_steps:
            raise UserError(f"{message}; then {CONTINUE}")
        print_line(f"warning: {message}; training goes on")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._path.with_name(PREVIOUS_CHECKPOINT).unlink(missing_ok=True)


class SizeCheckpoints(Callback):
    """Saves ``sparsity_SIZE/ckpts/last.ckpt`` where the target of the masks reaches a size.

    It stands before :class:`RunCheckpoints`: a run continued from behind such an update would not make up for it.
    """

    def __init__(self, module: DistillModule, exp_dir: Path, sizes: Sequence[str], record: dict[str, Any]) -> None:
        self._budgets, self._exp_dir, self._sizes, self._record = module.budgets, exp_dir, sizes, record

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # in the middle of an update
        step, budget = trainer.global_step, self._budgets["sparsity"]
        for size in self._sizes:
            if budget.target(step - 1) < float(size) <= budget.target(step):
                path = self._exp_dir / f"{SIZE_FOLDER}{size}" / CHECKPOINTS / LAST_CHECKPOINT
                # prune.py makes a model of this size from it: the targets are those of this update.
                targets = {f"target_{name}": budget.target(step) for name, budget in self._budgets.items()}
                about = self._record | targets | {INTERMEDIATE: True, "target_sparsity": float(size)}
                trainer.save_checkpoint(path, weights_only=False, storage_options={DISTILLATION: about})
                if trainer.is_global_zero:
                    print_line(f"sparsity {size}: saved update {step} in {path}")
