"""Judging an update before it changes a weight: loss and gradient, audio files that were replaced, signals."""

import itertools
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, distributed, nn

from cli import AllProcessesError, print_line
from lightning import ScheduledModule
from training.checkpoints import CONTINUE
from training.processes import gather
from training.signals import StopRequest

_LISTED_FILES = 20
# Updates in a row that the loss scaler may skip: it starts with 65536 and halves, so that its scale is below 1 by then,
# and a loss or gradient that is not finite is no longer the scale's fault.
SCALER_SKIPS = 20


def exchange(
    is_bad: Tensor, num_bad_files: int, signum: int, batches: list[dict[str, Tensor]]
) -> tuple[float, float, float, int, dict[str, Tensor]]:
    """Sum the notes of all processes, in one small collective.

    Takes of this process, and returns of all: whether loss and gradient are not finite (2,), new bad files, a signal or
    0, and the scalars of the batches, of which it returns the means.
    """
    columns = zip(*(scalars.values() for scalars in batches), strict=True)
    means = torch.stack([torch.stack(values).float().mean() for values in columns])
    notes = means.new_tensor([num_bad_files, *(signum == each for each in StopRequest.SIGNALS)])
    exchanged = torch.cat([is_bad.to(notes), notes, means])
    num_processes = 1
    if distributed.is_initialized():
        distributed.all_reduce(exchanged)
        num_processes = distributed.get_world_size()
    bad_losses, bad_gradients, bad_files, *counts = exchanged[: -len(means)].tolist()
    agreed = max((each for each, count in zip(StopRequest.SIGNALS, counts, strict=True) if count), default=0)
    named = dict(zip(batches[0], exchanged[-len(means) :] / num_processes, strict=True))
    return bad_losses, bad_gradients, bad_files, agreed, named


class BadFiles:
    """Counts the audio files that had to be replaced by others, over all processes; too many end the run."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.found: dict[str, str] = {}  # path to reason
        self.new: dict[str, str] = {}  # those of this process that the others do not know of

    def note(self, batch: Any) -> None:
        """Note the files that were replaced in a batch."""
        replaced = getattr(batch, "bad_files", {})
        self.new |= {path: reason for path, reason in replaced.items() if path not in self.found}

    def share(self, prints: bool) -> None:
        """Tell the other processes, name each new file if ``prints``, and end all if there are too many."""
        for path, reason in itertools.chain.from_iterable(new.items() for new in gather(self.new)):
            if path not in self.found:
                self.found[path] = reason
                if prints:
                    print_line(f"bad file {len(self.found)} (at most {self._limit}), replaced by another: {reason}")
        self.new = {}
        if len(self.found) > self._limit:
            raise AllProcessesError(too_many_bad_files(self.found, self._limit))


def too_many_bad_files(bad_files: dict[str, str], limit: int) -> str:
    """The message that ends a run."""
    return (
        f"--max_bad_files: at most {limit} bad audio files are allowed, found {len(bad_files)}: "
        f"{_listed(list(bad_files.values()))}; mend them, run prepare_data.py again, or raise --max_bad_files"
    )


def _listed(items: list[str]) -> str:
    more = len(items) - _LISTED_FILES
    return ", ".join(items[:_LISTED_FILES]) + (f" and {more} more" if more > 0 else "")


class UpdateGuard(Callback):
    """Judges every update before it changes a weight, clips its gradient, and logs it.

    All processes decide alike, after one exchange per update. A loss or gradient that is not finite ends the run. With
    a loss scaler (--precision 16) such an update is skipped, as the published program does, until there are
    ``SCALER_SKIPS`` in a row; a gradient that overflows is how the scaler finds its scale, and is not counted.
    """

    def __init__(self, module: ScheduledModule, stop: StopRequest, *, clip_norm: float, max_bad_files: int) -> None:
        self._module, self._stop, self._clip_norm = module, stop, clip_norm
        self.signum = 0  # the signal that all processes have agreed to stop for; 0 for none
        self.skipped = 0  # updates that were skipped because of their loss
        self._scaler_skips = 0  # in a row
        self.bad_files = BadFiles(max_bad_files)
        self._batches: list[dict[str, Tensor]] = []  # the scalars of each batch since the last update
        self._paths: list[str] = []  # of these batches

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "bad_files": dict(self.bad_files.found)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]
        self.bad_files.found = state_dict["bad_files"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        self.on_validation_batch_start(trainer, pl_module, batch)
        self._paths += getattr(batch, "paths", [])

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        self._stop.note_batch()
        # The noise of a batch (masks, dropout, hidden frames) is its own, wherever and whenever it runs.
        if (seed := getattr(batch, "seed", None)) is not None:
            torch.manual_seed(seed)
        self.bad_files.note(batch)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches.append(self._module.scalars)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Judge the gradient of the whole update, unscaled.

        Raises:
            AllProcessesError: loss or gradient is not finite, or too many audio files were replaced.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        losses = torch.stack([scalars["train_loss"] for scalars in self._batches])
        is_bad = torch.stack([~losses.isfinite().all(), ~norm.isfinite()])
        bad_losses, bad_gradients, bad_files, self.signum, means = exchange(
            is_bad, len(self.bad_files.new), self._stop.signum, self._batches
        )
        paths, self._batches, self._paths = self._paths, [], []
        self._stop.is_agreed = bool(self.signum)
        pl_module.log("grad_norm", norm)
        pl_module.log_dict(dict(means))
        if bad_files:
            self.bad_files.share(trainer.is_global_zero)
        if bad_losses or bad_gradients:
            self._skip_or_end(trainer, bool(bad_losses), losses, norm, paths)
            optimizer.zero_grad(set_to_none=True)  # without a gradient the optimiser changes nothing
            return
        self._scaler_skips = 0
        if self._clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm)

    def _skip_or_end(self, trainer: Trainer, is_loss: bool, losses: Tensor, norm: Tensor, paths: list[str]) -> None:
        """Count an update that the loss scaler skips, or end the run with all that is known about the update."""
        has_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._scaler_skips += has_scaler
        is_last = not has_scaler or self._scaler_skips > SCALER_SKIPS
        if not (is_loss or is_last):
            return
        self.skipped += 1
        message = f"update {trainer.global_step}: {_described(losses, norm, paths)}"
        if is_last:
            advice = "look at these files, or lower --learning_rate"
            if has_scaler:
                message += f"; the loss scaler has skipped {SCALER_SKIPS} updates in a row before"
                advice += ", or give --precision bf16"
            raise AllProcessesError(f"{message}; {advice}; then {CONTINUE}")
        if trainer.is_global_zero:
            count = f"{self._scaler_skips} in a row of at most {SCALER_SKIPS}"
            print_line(f"skipped by the loss scaler, {count}: {message}")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.skipped:
            pl_module.log("skipped_updates", float(self.skipped))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        count = len(self.bad_files.found)
        if trainer.is_global_zero and count:
            print_line(f"{count} bad files were replaced by others; prepare_data.py leaves such files out")
        if trainer.is_global_zero and self.skipped:
            print_line(f"{self.skipped} updates were skipped because the loss was not finite")


def _described(losses: Tensor, norm: Tensor, paths: list[str]) -> str:
    """Say what is not finite, and the files of the batches that made it so, from all processes."""
    reports = gather((not bool(losses.isfinite().all()), losses.tolist(), paths))
    # Only a loss tells which process its batch was on: gradients are averaged.
    chosen = [report for report in reports if report[0]] or reports
    what = f"the loss is {chosen[0][1]}" if chosen[0][0] else f"the gradient's norm is {float(norm)}"
    return f"{what}; its files: {_listed([path for _, _, paths in chosen for path in paths])}"
