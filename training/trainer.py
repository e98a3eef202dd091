"""A run of any training stage, from a module and its data to the last checkpoint."""

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.distributed import DistError

from cli import print_line
from lightning import ScheduledModule, linear_warmup_decay
from training.check import describe
from training.checkpoints import (
    CHECKPOINTS,
    CONTINUE,
    LAST_CHECKPOINT,
    REMOVED_SETTINGS,
    changed_settings,
    exclusive,
    refuse,
    restorable,
    shown,
)
from training.data import MORE_SHARED_MEMORY, BatchDataModule, LabelledDataModule
from training.processes import cluster_environment, ending_together
from training.saving import CheckpointIO, LastValidation, RunCheckpoints
from training.settings import AUTO, MachineSettings, RunSettings
from training.signals import StopRequest, leave_signals_alone
from training.speed import FetchTimer, Throughput, UpdateProgressBar, check_compiler, compile_steps, keep_freed_memory
from training.updates import UpdateGuard
from wav2vec2.components import published_state
from wav2vec2.fast import fast_paths
from wav2vec2.files import checkpoint as ckpt
from wav2vec2.files.errors import UserError, one_line, short_repr, single_line

_Precision = Literal["32-true", "16-mixed", "bf16-mixed"]
# Lightning's names of --precision.
PRECISIONS: dict[str, _Precision] = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


def fit(
    settings: RunSettings,
    data: BatchDataModule,
    module: ScheduledModule,
    resumed: tuple[Path, dict[str, Any]] | None,
    *,
    flops: Callable[[int], float],
    record: dict[str, Any],
    title: str,
    callbacks: Sequence[pl.Callback] = (),
) -> pl.Trainer:
    """Train a module for ``--max_updates``, and say where its last checkpoint is.

    Args:
        resumed: path and contents of the checkpoint to continue from, if any; weights and settings are known to fit.
        flops: operations of one waveform's share of an update, by its samples.
        record: what every checkpoint says of the run.
        title: the models and what they learn, for the line that is printed at the start.
        callbacks: the stage's own; they see an update before it is saved.

    Raises:
        UserError: the run cannot go on.
        Interrupted: a signal stopped the run; its last update is saved.
    """
    machine, optimisation, accum_grad = settings.machine, settings.optimisation, settings.optimisation.accum_grad
    last = machine.exp_dir / CHECKPOINTS / LAST_CHECKPOINT
    if machine.check:
        data.check_shared_memory(machine.devices[1])
        print(*describe(settings, data, module, title), sep="\n")
        raise SystemExit(0)
    _prepare(machine, module, data)
    batches_per_epoch = len(data.sampler(data.train_subset, machine.num_processes, 0, accum_grad))
    io, timer = CheckpointIO(last, resumed, record), FetchTimer()
    start = resumed[1]["global_step"] if resumed is not None else 0
    with StopRequest() as stop, contextlib.ExitStack() as stack:
        guard = UpdateGuard(module, stop, clip_norm=optimisation.clip_norm, max_bad_files=data.max_bad_files)
        watching = [
            LearningRateMonitor(logging_interval="step"),
            guard,
            Throughput(timer, flops, machine),
            UpdateProgressBar(settings.stage),
            *([LastValidation()] if isinstance(data, LabelledDataModule) else []),
            *callbacks,
            RunCheckpoints(last, guard, io, machine.save_interval, batches_per_epoch // accum_grad),
        ]
        trainer = _make_trainer(settings, batches_per_epoch, start, callbacks=watching, plugins=[io], profiler=timer)
        stop.launcher, stop.is_first = trainer.strategy.launcher, trainer.is_global_zero
        if trainer.is_global_zero:
            stack.enter_context(exclusive(machine.exp_dir))
            print(*describe(settings, data, module, title), sep="\n", flush=True)
        if resumed is not None:
            if trainer.is_global_zero:
                print(f"{settings.stage}: continuing {resumed[0]} after update {start}", flush=True)
            _restore(*resumed, module, trainer)
        with ending_together(trainer), errors_in_one_line(MisconfigurationException):
            trainer.fit(module, datamodule=data, ckpt_path=resumed[0] if resumed else None, weights_only=True)
    if trainer.is_global_zero:
        print(f"{settings.stage}: {trainer.global_step} updates done: {last}")
    return trainer


def _make_trainer(
    settings: RunSettings, batches_per_epoch: int, start: int, *, plugins: list[Any], **options: Any
) -> pl.Trainer:
    """Make the trainer of a run that starts from update ``start``; the batches are those of one process."""
    machine, optimisation = settings.machine, settings.optimisation
    accelerator, devices = machine.devices
    with errors_in_one_line(MisconfigurationException, ValueError, RuntimeError):
        environment = cluster_environment(devices, machine.num_nodes)
        if environment is not None:
            environment.validate_settings(devices, machine.num_nodes)
            plugins = [*plugins, environment]
        # No process needs another's buffers: they are constants.
        strategy = DDPStrategy(gradient_as_bucket_view=True, broadcast_buffers=False)
        trainer = pl.Trainer(
            default_root_dir=machine.exp_dir,
            accelerator=accelerator,
            devices=devices,
            num_nodes=machine.num_nodes,
            strategy=strategy if machine.num_processes > 1 else "auto",
            precision=PRECISIONS[machine.precision],
            max_steps=optimisation.max_updates,
            max_epochs=-1,
            accumulate_grad_batches=optimisation.accum_grad,
            # To Lightning the whole run is one epoch, which can be left and entered at any update.
            val_check_interval=machine.valid_interval or batches_per_epoch,
            check_val_every_n_epoch=None,
            use_distributed_sampler=False,  # the batch sampler deals to the ranks itself
            log_every_n_steps=machine.log_interval,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,  # RunCheckpoints does it
            plugins=plugins,
            logger=[
                TensorBoardLogger(machine.exp_dir, name="tensorboard", version=0, purge_step=start),
                # A version for each start of the run.
                CSVLogger(machine.exp_dir, name="csv", flush_logs_every_n_steps=machine.log_interval),
            ],
            **options,
        )
    leave_signals_alone(trainer)
    return trainer


@contextlib.contextmanager
def errors_in_one_line(*refusals: type[Exception]) -> Iterator[None]:
    """Turn Lightning's refusals, a full GPU, and lost loader and other processes into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory ({str(error).splitlines()[0][:200]}); lower --seconds_per_batch (--accum_grad "
            f"keeps the total batch), or add --checkpoint_activations, then {CONTINUE}"
        ) from error
    except refusals as error:
        raise UserError(
            f"{one_line(error)} (see --accelerator, --gpus, --num_nodes and --precision; --debug shows where)"
        ) from error
    except Exception as error:
        # torch raises its errors of loader processes wherever this process is, and a library there may raise its own.
        at: BaseException | None = error
        while at is not None:
            if isinstance(at, RuntimeError) and (explanation := explained(at)) is not None:
                raise UserError(explanation) from error
            at = at.__cause__ or at.__context__
        raise


def explained(error: RuntimeError) -> str | None:
    """Say what has happened, and what to do, if ``error`` says that this run lost a process; otherwise None."""
    text = str(error).strip()
    if "iter(combined_loader)" in text:  # Lightning's, after loader processes could not be started
        text = str(error.__context__)
    # torch's errors of loader processes are told apart by their text alone; one from inside ends with what happened.
    last = single_line(text.rpartition("\n")[2]).rstrip(".")
    if isinstance(error, DistError) or "gloo/" in text:
        return (
            f"the processes of this run do not reach each other: {one_line(error)}; look at the others' output, and at "
            "MASTER_ADDR, MASTER_PORT, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME if you set them"
        )
    if "Too many open files" in text:
        return f"loader processes: {last}; raise the limit (ulimit -n), or lower --num_workers; then {CONTINUE}"
    if "shared memory" in text or "file </torch_" in text:
        return f"loader processes: {last}; {MORE_SHARED_MEMORY}; then {CONTINUE}"
    if text.startswith(("DataLoader ", "[Errno")):
        return (
            f"loader processes: {last}; if the system's log (dmesg) says that memory was full, lower --num_workers or "
            f"--seconds_per_batch; --num_workers 0 needs no loader processes; then {CONTINUE}"
        )
    return None


def check_settings(path: Path, about: dict[str, Any], recorded: dict[str, Any], machine: MachineSettings) -> None:
    """Check that the checkpoint at ``path``, which is ``about`` a run, is continued with the settings of that run.

    Raises:
        UserError: names the settings that differ; a checkpoint that the user has named goes on with a warning.
    """
    before = about.get("settings")
    gone = set(REMOVED_SETTINGS) - recorded.keys()
    if isinstance(before, dict) and (removed := sorted(gone & before.keys())):
        given = ", ".join(f"--{name} {shown(before[name])}" for name in removed)
        raise UserError(
            f"{path}: made with {given}, which this version does not have; continue it with the version before "
            "(students of another shape, or with a light extractor, are made by make_student.py now)"
        )
    changes = changed_settings(before, recorded)
    if changes and machine.resume_checkpoint == AUTO:
        raise UserError(
            f"{path}: made with other settings: {'; '.join(changes)}. Give the same settings; or another --exp_dir for "
            f"a new run; or --resume_checkpoint {path} to continue it with these"
        )
    if changes:
        print_line(f"warning: {path} is continued with other settings: {'; '.join(changes)}")


def _restore(path: Path, checkpoint: dict[str, Any], module: ScheduledModule, trainer: Any) -> None:
    """Leave in a checkpoint what Lightning shall restore, held to what this run would save.

    The optimiser's settings, the schedule and the counts of batches are this run's: with the settings of the
    checkpoint, they are the same.

    Raises:
        UserError: something is missing, or does not belong to this run.
    """
    own: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(own)
    weights = published_state(checkpoint["state_dict"])
    ckpt.check_weights(own["state_dict"], weights, path)
    configured: Any = module.configure_optimizers()
    groups = configured["optimizer"].state_dict()["param_groups"]
    parameters = [p.detach() for group in configured["optimizer"].param_groups for p in group["params"]]
    moments = {i: {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for i, p in enumerate(parameters)}
    numbers = [{"params": group["params"]} for group in groups]
    expected = {
        "global_step": 0,
        "loops": {"fit_loop": trainer.fit_loop.state_dict()},
        "callbacks": {callback.state_key: state for callback in trainer.callbacks if (state := callback.state_dict())},
        "optimizer_states": [{"state": moments, "param_groups": numbers}],
    }
    scaler, name = trainer.precision_plugin.state_dict(), type(trainer.precision_plugin).__qualname__
    if scaler and name in checkpoint:  # not if it was trained with another --precision
        expected[name] = scaler
    restored = restorable(expected, checkpoint, str(path))
    optimiser, loops, step = restored["optimizer_states"][0], restored["loops"]["fit_loop"], restored["global_step"]
    if optimiser["param_groups"] != numbers:
        refuse(f"{path}: optimizer_states: param_groups", short_repr(numbers), short_repr(optimiser["param_groups"]))
    if any(each["step"] < 0 or (each["exp_avg_sq"] < 0).any() for each in optimiser["state"].values()):
        refuse(f"{path}: optimizer_states: state", "squares and steps", "negative numbers")
    done = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    if done != step:
        refuse(f"{path}: loops", f"the counts of {step} updates", f"{done}")

    ready = step * trainer.accumulate_grad_batches
    for counts in (loops["epoch_loop.batch_progress"][name] for name in ("total", "current")):
        is_behind = counts["completed"] < counts["ready"]  # saved at the end of a batch
        counts |= dict.fromkeys(counts, ready) | {"completed": ready - is_behind}
    factor = linear_warmup_decay(module.warmup_updates, module.max_updates)(step)
    rates = [group["initial_lr"] * factor for group in groups]
    optimiser["param_groups"] = [{**group, "lr": rate} for group, rate in zip(groups, rates, strict=True)]
    schedule = configured["lr_scheduler"]["scheduler"].state_dict()
    schedule |= {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    checkpoint.clear()
    checkpoint |= {**restored, "state_dict": weights, "lr_schedulers": [schedule]}
    checkpoint["pytorch-lightning_version"] = pl.__version__  # nothing is left to migrate


def _prepare(machine: MachineSettings, module: ScheduledModule, data: BatchDataModule) -> None:
    """Check the room for batches, set up this process, compile the module, and keep hints off the user's terminal."""
    data.check_shared_memory(machine.devices[1])
    if fast_paths() and machine.devices[0] == "cpu":
        keep_freed_memory()
    if machine.compile:
        check_compiler(machine.devices[0])
        compile_steps(module)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    for message in (
        "does not have many workers",
        "number of training batches .* is smaller than the logging interval",
        "module.s. in eval mode at the start of training",  # the teacher, on purpose
        "isinstance.treespec, LeafSpec.. is deprecated",  # Lightning's own use of torch
        "resuming from a checkpoint that ended before the epoch ended",  # TrainingSampler starts where it should
    ):
        warnings.filterwarnings("ignore", f".*{message}.*")
    if "SLURM_JOB_ID" not in os.environ:
        warnings.filterwarnings("ignore", ".*`srun` command is available.*")  # outside a job it is of no use
