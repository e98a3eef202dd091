"""What watches over a run: who judges an update, when to save, how to stop, what the terminal shows.

Batches, crops and noise are pure functions of the seed and the update (``dataset.batches``), so a checkpoint at the end
of an update is all that a run needs to go on as if nothing had happened.
"""

import math
import os
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, distributed, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from cli import AllProcessesError, Interrupted, progress
from training.checkpoints import (
    AVERAGED,
    CHECKPOINTS,
    CONTINUE,
    LAST_CHECKPOINT,
    PREVIOUS_CHECKPOINT,
    SIZE_FOLDER,
    print_line,
)
from wav2vec2.files import checkpoint as ckpt
from wav2vec2.files.errors import UserError

_LISTED_FILES = 20
# Updates in a row that the loss scaler may skip: it starts with 65536 and halves, so that its scale is below 1 by then,
# and a loss or gradient that is not finite is no longer the scale's fault.
SCALER_SKIPS = 20


# ---------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------


class StopRequest:
    """Notes SIGINT, SIGTERM and SIGUSR1 until the run is where it can stop.

    SIGTERM is what SLURM sends before it takes a job's machine away, SIGUSR1 what run.sh asks it to send
    before the time limit.

    Where there is nothing to save, or the run does not come to where it can stop, a signal ends the process: before
    training; at a second Ctrl-C; and where several processes train and this one has begun no batch for
    ``PATIENCE_SECONDS``, because it waits for one that is gone. While a process waits for others, outside Python, no
    handler of Python's runs. So a thread does this, which Python's own handler wakes by writing the signal to a pipe.

    Attributes:
        signum: the last signal; 0 for none.
        is_agreed: all processes will stop after this update, once the run is saved.
        launcher: Lightning's, which knows the processes that this one has started.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    PATIENCE_SECONDS = 120.0
    # Launchers pass a Ctrl-C on that the terminal has sent to all processes already.
    _ECHO_SECONDS = 1.0

    def __init__(self) -> None:
        self.signum = 0
        self.launcher: Any = None
        self.is_agreed = False
        self._alive_at = math.inf  # when the last batch began; training has not begun yet
        self._undo = ExitStack()

    def __enter__(self) -> "StopRequest":
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        thread = threading.Thread(target=self._watch, args=(reader,), daemon=True)
        for descriptor in (reader, writer):
            self._undo.callback(os.close, descriptor)
        self._undo.callback(thread.join)
        self._undo.callback(os.write, writer, b"\0")
        self._undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer, warn_on_full_buffer=False))
        for signum in self.SIGNALS:
            self._undo.callback(signal.signal, signum, signal.signal(signum, self._note))
        thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def note_batch(self) -> None:
        """A batch begins: training has begun, and this process waits for no other."""
        self._alive_at = time.monotonic()

    def _note(self, signum: int, _: FrameType | None) -> None:
        self.signum = signum

    def _watch(self, reader: int) -> None:
        """Read signals from the pipe, until a 0, and end the process where nothing else will."""
        last, noted_at = 0, 0.0
        while True:
            ready, _, _ = select.select([reader], [], [], 1.0 if last else None)
            now = time.monotonic()
            for signum in os.read(reader, 1) if ready else ():
                if signum == 0:
                    return
                if signum not in self.SIGNALS:
                    continue
                if self._alive_at == math.inf or (
                    signum == signal.SIGINT == last and now - noted_at > self._ECHO_SECONDS
                ):
                    self._end(signum, "")
                last, noted_at = signum, now
            if (
                last
                and not self.is_agreed
                and distributed.is_initialized()
                and now - max(noted_at, self._alive_at) > self.PATIENCE_SECONDS
            ):
                self._end(last, f"no batch for {self.PATIENCE_SECONDS:.0f} s: a process of this run may be gone; ")

    def _end(self, signum: int, reason: str) -> None:
        """End this process and those that it has started, as the signal would without a handler."""
        try:
            for process in getattr(self.launcher, "procs", []):
                process.kill()
            if reason or rank_zero_only.rank == 0:
                print_line(f"{signal.Signals(signum).name}: {reason}ended without saving")
        finally:
            os._exit(128 + signum)


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


# ---------------------------------------------------------------------------------------------------
# An update
# ---------------------------------------------------------------------------------------------------


class UpdateGuard(pl.Callback):
    """Judges every update before it changes a weight, clips its gradient, and logs it.

    It decides for all processes alike, after one small exchange per update: whether loss and gradient are finite,
    which audio files had to be replaced, and whether someone asked the run to stop.

    With a loss scaler (--precision 16) an update that is not finite is skipped, as the published program does, until
    ``SCALER_SKIPS`` in a row; a gradient that overflows is how the scaler finds its scale, and is not counted.

    Args:
        stop: noted signals.
        clip_norm: the largest norm of the gradient; 0 switches clipping off.
        skip_nonfinite: without a scaler, updates with a loss or gradient that is not finite to pass over before the
            run ends.
        max_bad_files: audio files to replace before the run ends.

    Attributes:
        signum: the signal that all processes have agreed to stop for; 0 for none.
        skipped: updates that were passed over.
        bad_files: path to reason, of the audio files that were replaced.
    """

    def __init__(self, stop: StopRequest, *, clip_norm: float, skip_nonfinite: int, max_bad_files: int) -> None:
        self._stop = stop
        self._clip_norm = clip_norm
        self._skip_nonfinite = skip_nonfinite
        self._max_bad_files = max_bad_files
        self.signum = 0
        self.skipped = 0
        self._scaler_skips = 0  # in a row
        self.bad_files: dict[str, str] = {}
        self._new_bad_files: dict[str, str] = {}
        self._batches: list[dict[str, Tensor]] = []  # the scalars of each batch since the last update
        self._paths: list[str] = []  # of these batches

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "bad_files": dict(self.bad_files)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]
        self.bad_files = state_dict["bad_files"]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        self._begin(batch)
        self._paths += getattr(batch, "paths", [])

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any
    ) -> None:
        self._begin(batch)

    def _begin(self, batch: Any) -> None:
        self._stop.note_batch()
        # The noise of a batch (masks, dropout, hidden frames) is its own, wherever and whenever it runs.
        if (seed := getattr(batch, "seed", None)) is not None:
            torch.manual_seed(seed)
        found = getattr(batch, "bad_files", {})
        self._new_bad_files |= {path: reason for path, reason in found.items() if path not in self.bad_files}

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batches.append(pl_module.scalars)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Lightning calls this with the gradient of the whole update, unscaled.

        Raises:
            AllProcessesError: loss or gradient is not finite, or too many audio files were replaced.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        losses = torch.stack([scalars["train_loss"] for scalars in self._batches])
        means = torch.stack(
            [torch.stack(values).float().mean() for values in zip(*(s.values() for s in self._batches), strict=True)]
        )
        names, paths = list(self._batches[0]), self._paths
        self._batches, self._paths = [], []

        noted = [self._stop.signum == signum for signum in StopRequest.SIGNALS]
        notes = torch.tensor([len(self._new_bad_files), *noted], dtype=means.dtype, device=means.device)
        is_bad = torch.stack([~losses.isfinite().all(), ~norm.isfinite()])
        exchanged = torch.cat([is_bad.to(notes), notes, means])
        if distributed.is_initialized():
            distributed.all_reduce(exchanged)
        bad_loss, bad_gradient, num_bad_files, *signals = exchanged[: -len(means)].tolist()
        self.signum = max(
            signum for signum, count in zip((*StopRequest.SIGNALS, 0), (*signals, 1), strict=True) if count
        )
        self._stop.is_agreed = bool(self.signum)
        pl_module.log("grad_norm", norm)
        pl_module.log_dict(dict(zip(names, exchanged[-len(means) :] / trainer.world_size, strict=True)))
        if num_bad_files:
            self._count_bad_files()
        if bad_loss or bad_gradient:
            has_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None
            self._scaler_skips += has_scaler
            if bad_loss or not has_scaler or self._scaler_skips > SCALER_SKIPS:
                self._pass_over(trainer, losses, norm, paths)
            optimizer.zero_grad(set_to_none=True)  # without a gradient the optimiser changes nothing
            return
        self._scaler_skips = 0
        if self._clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm)

    def _pass_over(self, trainer: pl.Trainer, losses: Tensor, norm: Tensor, paths: list[str]) -> None:
        """Count an update that must not be made, or end the run with all that is known about it."""
        self.skipped += 1
        is_bad = not bool(losses.isfinite().all())
        reports = gather((is_bad, losses.tolist(), paths))
        # Only a loss tells which process its batch was on: gradients are averaged.
        chosen = [report for report in reports if report[0]] or reports
        what = f"the loss is {chosen[0][1]}" if chosen[0][0] else f"the gradient's norm is {float(norm)}"
        files = _listed([path for _, _, paths in chosen for path in paths])
        message = f"update {trainer.global_step}: {what}; its files: {files}"
        if self._scaler_skips > SCALER_SKIPS:
            raise AllProcessesError(
                f"{message}; the loss scaler has skipped {SCALER_SKIPS} updates in a row before; look at these "
                f"files, lower --learning_rate, or give --precision bf16; then {CONTINUE}"
            )
        if not self._scaler_skips and self.skipped > self._skip_nonfinite:
            allowed = f" ({self._skip_nonfinite} skipped before)" if self._skip_nonfinite else ""
            raise AllProcessesError(
                f"{message}{allowed}; look at these files, lower --learning_rate, or pass over such updates with "
                f"--skip_nonfinite {max(10, 2 * self.skipped)}; then {CONTINUE}"
            )
        if trainer.is_global_zero:
            count = f"skipped {self.skipped} of at most {self._skip_nonfinite} updates"
            if self._scaler_skips:
                count = f"skipped by the loss scaler, {self._scaler_skips} in a row of at most {SCALER_SKIPS}"
            print_line(f"{count}: {message}")

    def _count_bad_files(self) -> None:
        for found in gather(self._new_bad_files):
            for path, reason in found.items():
                if path not in self.bad_files:
                    self.bad_files[path] = reason
                    if not distributed.is_initialized() or distributed.get_rank() == 0:
                        count = f"bad file {len(self.bad_files)} (at most {self._max_bad_files})"
                        print_line(f"{count}, replaced by another: {reason}")
        self._new_bad_files = {}
        if len(self.bad_files) > self._max_bad_files:
            raise AllProcessesError(too_many_bad_files(self.bad_files, self._max_bad_files))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._skip_nonfinite or self.skipped:
            pl_module.log("skipped_updates", float(self.skipped))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and self.bad_files:
            print_line(
                f"{len(self.bad_files)} bad files were replaced by others; prepare_data.py leaves such files out"
            )
        if trainer.is_global_zero and self.skipped:
            print_line(f"{self.skipped} updates were skipped because loss or gradient was not finite")


def too_many_bad_files(bad_files: dict[str, str], limit: int) -> str:
    """The message that ends a run."""
    return (
        f"--max_bad_files: at most {limit} bad audio files are allowed, found {len(bad_files)}: "
        f"{_listed(list(bad_files.values()))}; mend them, run prepare_data.py again, or raise --max_bad_files"
    )


def _listed(items: list[str]) -> str:
    more = len(items) - _LISTED_FILES
    return ", ".join(items[:_LISTED_FILES]) + (f" and {more} more" if more > 0 else "")


def gather(value: Any) -> list[Any]:
    """The value of every process, in order of rank."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


class WeightAverage(pl.Callback):
    """Keeps the moving average of what is trained, without the multipliers, beside the weights themselves.

    Lightning's own callback would copy the teacher too, and put the average in the place of a checkpoint's state_dict.

    Args:
        decay: of the average at each update, from 0 to below 1. It begins with the weights after the first one.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._average: AveragedModel | None = None
        self._loaded: dict[str, Tensor] | None = None
        self._updates_done = 0

    @staticmethod
    def _trained(pl_module: pl.LightningModule) -> nn.ModuleDict:
        """All parts but the teacher, by the names that they have in ``state_dict``."""
        return nn.ModuleDict({name: part for name, part in pl_module.named_children() if name != "teacher_model"})

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._loaded = checkpoint.get(AVERAGED)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Here, where the module is on its device and has not run yet: what a run leaves in it cannot be copied."""
        average = get_ema_multi_avg_fn(self._decay)
        self._average = AveragedModel(self._trained(pl_module), multi_avg_fn=average).requires_grad_(False)
        if self._loaded is not None:
            ckpt.load_state(self._average.module, self._loaded, f"{trainer.ckpt_path}: {AVERAGED}")
            self._average.n_averaged += 1  # not the first
            self._loaded = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._updates_done = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step > self._updates_done:
            self._updates_done = trainer.global_step
            self._average.update_parameters(self._trained(pl_module))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[AVERAGED] = dict(self._average.module.state_dict())


# ---------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------


class CheckpointIO(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, and keeps the one before; reads plain data only.

    A checkpoint that cannot be written (a full disk) must not cost the run: ``error`` says what happened.

    Args:
        loaded: path and contents of a checkpoint that has been read already, so that it is not read twice.
    """

    def __init__(self, loaded: tuple[Path, dict[str, Any]] | None = None) -> None:
        super().__init__()
        self._loaded = loaded
        # A run that goes on from the previous one does so because last.ckpt is damaged: that must not replace it.
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
        except (OSError, RuntimeError) as error:
            self.error = _reason(error)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        loaded, self._loaded = self._loaded, None
        if loaded is not None and loaded[0] == Path(path):
            return loaded[1]
        return ckpt.read(path)


def _reason(error: OSError | RuntimeError) -> str:
    """Why a checkpoint could not be written; torch's archive writer hides that a full disk cut it short."""
    return str(error if isinstance(error, OSError) else error.__context__ or error)


def save_or_end(path: Path, contents: dict[str, Any]) -> None:
    """Write what a run cannot go on without.

    Raises:
        UserError: it cannot be written.
    """
    try:
        ckpt.save(path, contents)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: could not be saved ({_reason(error)}); make room, then {CONTINUE}") from error


def _keep_as(path: Path, name: Path) -> None:
    """Give the file at ``path`` a second name, or copy it where the file system cannot do that."""
    with tempfile.TemporaryDirectory(prefix=f".{name.name}.", dir=path.parent) as folder:
        temporary = Path(folder) / name.name
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        os.replace(temporary, name)


class RunCheckpoints(pl.Callback):
    """Saves ``ckpts/last.ckpt``, and ends the run where a signal asks for it.

    Args:
        exp_dir: of the run.
        guard: knows of signals.
        io: the trainer's checkpoint writer.
        record: what a checkpoint says of the run, beside Lightning's entries.
        save_interval: updates between checkpoints.
        updates_per_epoch: an epoch's end is saved too.
        validates_last: the last update is validated, wherever it falls.
    """

    def __init__(
        self,
        exp_dir: Path,
        guard: UpdateGuard,
        io: CheckpointIO,
        *,
        record: Callable[[], dict[str, Any]],
        save_interval: int,
        updates_per_epoch: int,
        validates_last: bool,
    ) -> None:
        self.path = exp_dir / CHECKPOINTS / LAST_CHECKPOINT
        self._guard = guard
        self._io = io
        self._record = record
        self._save_interval = save_interval
        self._updates_per_epoch = updates_per_epoch
        self._validates_last = validates_last
        self._updates_done = 0
        self._last_saved: int | None = None
        self._save_after_validation = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._updates_done = trainer.global_step
        self._last_saved = trainer.global_step if trainer.ckpt_path else None
        starts = gather(trainer.global_step)
        if len(set(starts)) > 1:
            raise AllProcessesError(
                f"the processes would continue from different updates ({starts}): they do not see the same "
                f"{self.path}; give its path to --resume_checkpoint on a file system that all nodes share"
            )

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        # Not at the end of the batch before: its row of the log is written in between.
        if self._guard.signum:
            self._leave(trainer)
        pl_module.log("epoch", float(trainer.global_step // self._updates_per_epoch))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._updates_done:
            return  # in the middle of an update
        self._updates_done = trainer.global_step
        is_last = trainer.global_step == trainer.max_steps
        is_due = (
            self._guard.signum
            or trainer.global_step % self._save_interval == 0
            or trainer.global_step % self._updates_per_epoch == 0
            or is_last
        )
        is_validated = (batch_idx + 1) % trainer.val_check_batch == 0 or (is_last and self._validates_last)
        # A run continued from before a validation would not make up for it.
        self._save_after_validation = bool(is_due) and is_validated
        if is_due and not self._save_after_validation:
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._save_after_validation:
            self._save_after_validation = False
            self._save(trainer)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log("epoch", float(max(trainer.global_step - 1, 0) // self._updates_per_epoch))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint.update(self._record())

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.path, weights_only=False)
        if self._io.error is None:
            self._last_saved = trainer.global_step
            return
        kept = f"that of update {self._last_saved} stays" if self._last_saved is not None else "there is none before it"
        message = f"{self.path}: update {trainer.global_step} could not be saved ({self._io.error}); {kept}"
        if self._guard.signum or trainer.global_step == trainer.max_steps:
            raise UserError(f"{message}; make room, then {CONTINUE}")
        print_line(f"warning: {message}; training goes on")

    def _leave(self, trainer: pl.Trainer) -> None:
        signum = signal.Signals(self._guard.signum)
        then = CONTINUE
        if signum == signal.SIGUSR1 and trainer.is_global_zero:
            then = f"{requeue_slurm_job()}; {then}"
        raise Interrupted(signum, f"{signum.name}: saved update {trainer.global_step} in {self.path}; {then}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.path.with_name(PREVIOUS_CHECKPOINT).unlink(missing_ok=True)


class SizeCheckpoints(pl.Callback):
    """Saves ``sparsity_SIZE/ckpts/last.ckpt`` where the target of the masks reaches a size.

    It stands before :class:`RunCheckpoints`: a run continued from behind such an update would not make up for it.

    Args:
        exp_dir: of the run.
        sizes: sparsities.
    """

    def __init__(self, exp_dir: Path, sizes: Sequence[str]) -> None:
        self._exp_dir = exp_dir
        self._sizes = sizes
        self._updates_done = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._updates_done = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self._updates_done:
            return  # in the middle of an update
        self._updates_done = trainer.global_step
        for size in self._sizes:
            budget = pl_module.budget
            if budget.target(trainer.global_step - 1) < float(size) <= budget.target(trainer.global_step):
                self._save_size(trainer, pl_module, size)

    def _save_size(self, trainer: pl.Trainer, pl_module: pl.LightningModule, size: str) -> None:
        """Save what prune.py turns into a model of this sparsity: a checkpoint whose targets are this update's."""
        contents = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        contents["distillation"]["target_sparsity"] = float(size)
        if pl_module.macs_budget is not None:
            contents["distillation"]["target_macs"] = pl_module.macs_budget.target(trainer.global_step)
        if not trainer.is_global_zero:
            return
        path = self._exp_dir / f"{SIZE_FOLDER}{size}" / CHECKPOINTS / LAST_CHECKPOINT
        save_or_end(path, contents)
        print_line(f"sparsity {size}: saved update {trainer.global_step} in {path}")


# ---------------------------------------------------------------------------------------------------
# The terminal
# ---------------------------------------------------------------------------------------------------


class UpdateProgressBar(pl.Callback):
    """One bar over all updates: loss, the last score, expected sparsity and its target, time left."""

    _SHOWN = (
        ("loss", "train_loss"),
        ("valid", "valid_score"),
        ("sparsity", "sparsity_expected"),
        ("target", "sparsity_target"),
    )

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._bar: tqdm | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self._bar = progress(
                None, self._stage, total=trainer.max_steps, initial=trainer.global_step, unit="update", delay=0
            )

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._bar is not None and self._bar.n < trainer.global_step:
            metrics = trainer.callback_metrics
            shown = {label: f"{metrics[name]:.3f}" for label, name in self._SHOWN if name in metrics}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._bar is not None:
            self._bar.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)
