"""What watches over a run: its checkpoints, how it stops, continues, and meets trouble.

A run is a sequence of updates. Batches, crops and noise are pure functions of the seed and the update
(``dataset.batches.TrainingSampler``), so a checkpoint at the end of an update is all that a run needs to go on as
if nothing had happened. :class:`Watch` writes these checkpoints; between updates it also finds out, for all
processes together, whether someone asked the run to stop, whether loss and gradient are finite, and which
audio files had to be replaced.
"""

import csv
import math
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor, distributed

from cli import AllProcessesError, Interrupted
from dataset.speech import Batch
from training.checkpoints import CHECKPOINTS, LAST_CHECKPOINT, PREVIOUS_CHECKPOINT, print_line
from wav2vec2 import checkpoint as ckpt
from wav2vec2.errors import UserError
from wav2vec2.files import atomic_path

LISTED_FILES = 20


class StopRequest:
    """Notes SIGINT, SIGTERM and SIGUSR1 until the run is where it can stop.

    SIGTERM is what SLURM sends before it takes a job's machine away, SIGUSR1 what run.sh asks it to send
    before the time limit. A second Ctrl-C ends the process at once.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    # Launchers pass a Ctrl-C on that the terminal has sent to all processes already.
    _ECHO_SECONDS = 1.0

    def __init__(self) -> None:
        self.signum = 0
        self._noted_at = -math.inf
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._previous = {signum: signal.signal(signum, self._note) for signum in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _: FrameType | None) -> None:
        if signum == signal.SIGINT == self.signum and time.monotonic() - self._noted_at > self._ECHO_SECONDS:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.signum = signum
        self._noted_at = time.monotonic()


def ignore_stop_signals(_worker: int) -> None:
    """For loader processes, which get the same signals: they end with the process that they work for."""
    for signum in StopRequest.SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def requeue_slurm_job() -> str:
    """Put this SLURM job back into the queue; returns what came of it, in words."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return "not a SLURM job, so not requeued"
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        result = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"job {job} could not be requeued ({error}); submit it again"
    if result.returncode:
        return f"job {job} could not be requeued ({result.stderr.strip()}); submit it again"
    return f"job {job} requeued"


class CheckpointIO(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, and keeps the one before; reads plain data only.

    A checkpoint that cannot be written (a full disk) must not cost the run: ``error`` says what happened.

    Args:
        loaded: path and contents of a checkpoint that has been read already, so that it is not read twice.
    """

    def __init__(self, loaded: tuple[Path, dict[str, Any]] | None = None) -> None:
        super().__init__()
        self._loaded = loaded
        # A run that goes on from previous.ckpt does so because last.ckpt is damaged: that must not replace it.
        self._keep_previous = loaded is not None and loaded[0].name == PREVIOUS_CHECKPOINT
        self.error: str | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        self.error = None
        try:
            if path.exists() and not self._keep_previous:
                _keep_as(path, path.with_name(PREVIOUS_CHECKPOINT))
            ckpt.save(path, checkpoint)
            self._keep_previous = False
        except OSError as error:
            self.error = str(error)
        except RuntimeError as error:  # torch's archive writer, when it cannot finish what a full disk cut short
            self.error = str(error.__context__ or error)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        loaded, self._loaded = self._loaded, None
        if loaded is not None and loaded[0] == Path(path):
            return loaded[1]
        return ckpt.read(path)


def _keep_as(path: Path, name: Path) -> None:
    """Give the file at ``path`` a second name, or copy it where the file system cannot do that."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{name.name}.", dir=path.parent))
    try:
        try:
            os.link(path, temporary / name.name)
        except OSError:
            shutil.copyfile(path, temporary / name.name)
        os.replace(temporary / name.name, name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class ContinuedCSVLogger(CSVLogger):
    """One ``csv/version_0/metrics.csv`` for the whole run, however often it was interrupted.

    Args:
        exp_dir: of the run.
        start: updates done so far; rows from there on, which the interrupted run wrote after its last
            checkpoint, are dropped.
    """

    def __init__(self, exp_dir: Path, start: int) -> None:
        super().__init__(exp_dir, name="csv", version=0, flush_logs_every_n_steps=1)
        self._start = start

    @property
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            path = Path(self.log_dir) / ExperimentWriter.NAME_METRICS_FILE
            if path.is_file():
                with path.open(newline="") as file:
                    reader = csv.DictReader(file)
                    columns = list(reader.fieldnames or ())
                    rows = [
                        row for row in reader if (row.get("step") or "").isdecimal() and int(row["step"]) < self._start
                    ]
                with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
                    writer = csv.DictWriter(file, columns)
                    writer.writeheader()
                    writer.writerows(rows)
            self._experiment = _ContinuedWriter(self.log_dir)
        return self._experiment


class _ContinuedWriter(ExperimentWriter):
    """Lightning's writer, which would delete the file that is there."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or ())


class Watch(pl.Callback):
    """Saves, stops, and judges every update before it changes a weight.

    What it decides it decides for all processes alike, after one small exchange per update, so that
    no process waits for one that has left.

    Args:
        exp_dir: of the run; checkpoints go to ``ckpts/last.ckpt`` in it.
        io: the trainer's checkpoint writer.
        stop: noted signals.
        save_interval: updates between checkpoints.
        updates_per_epoch: an epoch's end is saved too.
        skip_nonfinite: updates with a loss or gradient that is not finite to pass over before the run ends.
        max_bad_files: audio files to replace before the run ends.
    """

    def __init__(
        self,
        exp_dir: Path,
        io: CheckpointIO,
        stop: StopRequest,
        *,
        save_interval: int,
        updates_per_epoch: int,
        skip_nonfinite: int,
        max_bad_files: int,
    ) -> None:
        self.path = exp_dir / CHECKPOINTS / LAST_CHECKPOINT
        self._io = io
        self._stop = stop
        self._save_interval = save_interval
        self.updates_per_epoch = updates_per_epoch
        self._skip_nonfinite = skip_nonfinite
        self._max_bad_files = max_bad_files
        self.skipped = 0
        self.bad_files: dict[str, str] = {}
        self._new_bad_files: dict[str, str] = {}
        self._update_files: list[str] = []
        self._last_saved: int | None = None
        self._updates_done = 0
        self._agreed_signal = 0
        self._save_after_validation = False
        self.started = False

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "bad_files": dict(self.bad_files)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = int(state_dict["skipped"])
        self.bad_files = {str(path): str(reason) for path, reason in state_dict["bad_files"].items()}

    # --- an update ---------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = True
        self._updates_done = trainer.global_step
        self._last_saved = trainer.global_step if trainer.ckpt_path else None
        starts = _gather(trainer.global_step)
        if len(set(starts)) > 1:
            raise AllProcessesError(
                f"the processes would continue from different updates ({starts}): they do not see the same "
                f"{self.path}; give its path to --resume_checkpoint on a file system that all nodes share"
            )

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        # Not at the end of the batch before: its row of the log is written in between.
        if self._agreed_signal:
            self._leave(trainer)
        pl_module.log("epoch", float(trainer.global_step // self.updates_per_epoch))
        self._note_files(batch)
        if isinstance(batch, Batch):
            self._update_files += batch.paths

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any
    ) -> None:
        self._note_files(batch)

    def _note_files(self, batch: Any) -> None:
        if isinstance(batch, Batch):
            self._new_bad_files |= {p: r for p, r in batch.bad_files.items() if p not in self.bad_files}

    def before_update(
        self,
        module: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
        norm: Tensor,
        logs: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Called by the module before the optimiser uses the gradient.

        Args:
            module: that trains.
            optimizer: its optimiser; loses the gradient of an update that must not be made.
            norm: of the gradient, over all processes' batches.
            logs: scalars of each of this process's batches, ``train_loss`` among them.

        Returns:
            Their means over the update's batches of all processes.

        Raises:
            UserError: loss or gradient is not finite, or too many audio files were replaced.
        """
        files, self._update_files = self._update_files, []
        losses = torch.stack([values["train_loss"] for values in logs])
        columns = zip(*(values.values() for values in logs), strict=True)
        means = torch.stack([torch.stack(column).float().mean() for column in columns])
        noted = [self._stop.signum == signum for signum in StopRequest.SIGNALS]
        notes = torch.tensor([len(self._new_bad_files), *noted], dtype=means.dtype, device=means.device)
        infinite = torch.stack([~losses.isfinite().all(), ~norm.isfinite()])
        exchanged = torch.cat([infinite.to(notes), notes, means])
        num_processes = 1
        if distributed.is_initialized():
            distributed.all_reduce(exchanged)
            num_processes = distributed.get_world_size()
        num_notes = len(infinite) + len(notes)
        bad_loss, bad_gradient, num_bad_files, *signals = exchanged[:num_notes].tolist()
        self._agreed_signal = max(n for n, count in zip((*StopRequest.SIGNALS, 0), (*signals, 1), strict=True) if count)
        if num_bad_files:
            self._count_bad_files()
        if bad_loss or (bad_gradient and not _is_scaler_overflow(module.trainer)):
            self._pass_over(module, losses, norm, files)
            optimizer.zero_grad(set_to_none=True)
        return dict(zip(logs[0], exchanged[num_notes:] / num_processes, strict=True))

    def _pass_over(self, module: pl.LightningModule, losses: Tensor, norm: Tensor, files: list[str]) -> None:
        """Count an update that must not be made, or end the run with all that is known about it."""
        self.skipped += 1
        is_bad = not bool(losses.isfinite().all())
        reports = _gather((is_bad, losses.tolist(), files))
        # Only a loss tells which process its batch was on: gradients are averaged.
        chosen = [report for report in reports if report[0]] or reports
        what = f"the loss is {chosen[0][1]}" if chosen[0][0] else f"the gradient's norm is {float(norm)}"
        paths = [path for _, _, paths in chosen for path in paths]
        kept = f"{self.path} (update {self._last_saved})" if self._last_saved is not None else "none yet"
        message = f"update {module.global_step}: {what}; its files: {_listed(paths)}; last good checkpoint: {kept}"
        if self.skipped > self._skip_nonfinite:
            allowed = f" ({self._skip_nonfinite} skipped before)" if self._skip_nonfinite else ""
            raise AllProcessesError(
                f"{message}{allowed}; look at these files, lower --learning_rate, or pass over such updates with "
                f"--skip_nonfinite {max(10, 2 * self.skipped)}"
            )
        if module.trainer.is_global_zero:
            print_line(f"skipped {self.skipped} of at most {self._skip_nonfinite} updates: {message}")

    def _count_bad_files(self) -> None:
        gathered: dict[str, str] = {}
        for found in _gather(self._new_bad_files):
            gathered |= found
        self._new_bad_files = {}
        for path, reason in gathered.items():
            if path not in self.bad_files:
                self.bad_files[path] = reason
                if _is_first_process():
                    print_line(
                        f"bad file {len(self.bad_files)} (at most {self._max_bad_files}), replaced by another: {reason}"
                    )
        if len(self.bad_files) > self._max_bad_files:
            raise AllProcessesError(too_many_bad_files(self.bad_files, self._max_bad_files))

    # --- saving and stopping -----------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._updates_done:
            return  # in the middle of an update
        self._updates_done = trainer.global_step
        if self._skip_nonfinite:
            pl_module.log("skipped_updates", float(self.skipped))
        is_due = (
            self._agreed_signal
            or trainer.global_step % self._save_interval == 0
            or trainer.global_step % self.updates_per_epoch == 0
            or trainer.global_step == trainer.max_steps
        )
        # A run continued from before a validation would not make up for it.
        self._save_after_validation = bool(is_due) and (batch_idx + 1) % trainer.val_check_batch == 0
        if is_due and not self._save_after_validation:
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._save_after_validation:
            self._save_after_validation = False
            self._save(trainer)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log("epoch", float(max(trainer.global_step - 1, 0) // self.updates_per_epoch))

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.path, weights_only=False)
        if self._io.error is None:
            self._last_saved = trainer.global_step
            return
        kept = f"that of update {self._last_saved} stays" if self._last_saved is not None else "there is none before it"
        message = f"{self.path}: update {trainer.global_step} could not be saved ({self._io.error}); {kept}"
        if self._agreed_signal or trainer.global_step == trainer.max_steps:
            raise UserError(f"{message}; make room, then continue with --resume_checkpoint auto")
        print_line(f"warning: {message}; training goes on")

    def _leave(self, trainer: pl.Trainer) -> None:
        signum = signal.Signals(self._agreed_signal)
        then = "continue with --resume_checkpoint auto"
        if signum == signal.SIGUSR1 and trainer.is_global_zero:
            then = f"{requeue_slurm_job()}; {then}"
        raise Interrupted(signum, f"{signum.name}: saved update {trainer.global_step} in {self.path}; {then}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.path.with_name(PREVIOUS_CHECKPOINT).unlink(missing_ok=True)
            if self.bad_files:
                print_line(
                    f"{len(self.bad_files)} bad files were replaced by others; prepare_data.py leaves such files out"
                )
            if self.skipped:
                print_line(f"{self.skipped} updates were skipped because loss or gradient was not finite")


def too_many_bad_files(bad_files: dict[str, str], limit: int) -> str:
    """The message that ends a run."""
    return (
        f"--max_bad_files: at most {limit} bad audio files are allowed, found {len(bad_files)}: "
        f"{_listed(list(bad_files.values()))}; mend them, run prepare_data.py again, or raise --max_bad_files"
    )


def _listed(items: list[str]) -> str:
    more = len(items) - LISTED_FILES
    return ", ".join(items[:LISTED_FILES]) + (f" and {more} more" if more > 0 else "")


def _is_scaler_overflow(trainer: pl.Trainer) -> bool:
    """Whether a gradient that is not finite is the loss scaler's business, which lowers its scale and goes on.

    A scale below one means that it has been lowered for many updates in vain.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.get_scale() >= 1.0


def _gather(value: Any) -> list[Any]:
    """The value of every process, in order of rank."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def _is_first_process() -> bool:
    return not distributed.is_initialized() or distributed.get_rank() == 0


@contextmanager
def plain_failures(watch: Watch, resumed_from: Path | None) -> Iterator[None]:
    """Around a whole training: failures that users can do something about become one line.

    Raises:
        UserError: out of memory, a lost process, a lost loader process, a training state that does not fit.
    """
    go_on = "continue with --resume_checkpoint auto"
    try:
        yield
    except (UserError, Interrupted):
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory ({str(error).splitlines()[0][:200]}); lower --seconds_per_batch "
            f"(--accum_grad keeps the total batch), then {go_on}"
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        text = str(error)
        if "DataLoader worker" in text:
            raise UserError(
                f"a loader process was lost ({text.splitlines()[0]}), often for want of memory; "
                f"lower --num_workers, then {go_on}"
            ) from error
        if "DataLoader timed out" in text:
            raise UserError(
                f"no batch came from the loader processes ({text.splitlines()[0]}): the disk hangs, or one of them did "
                f"not start; {go_on}"
            ) from error
        if any(word in text for word in _LOST_PEER) and distributed.is_initialized():
            raise UserError(
                f"another process of this run was lost ({text.splitlines()[0][:200]}); look for its error above, "
                f"then {go_on}"
            ) from error
        if resumed_from is not None and not watch.started:
            raise UserError(
                f"{resumed_from}: its training state cannot be restored ({type(error).__name__}: "
                f"{text.splitlines()[0][:200] if text else ''}); it was damaged, or made with other settings"
            ) from error
        raise


# What gloo and NCCL say when the other side is gone.
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "gloo")
