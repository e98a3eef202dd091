"""A run, from its settings to its last checkpoint: what a distillation is, and what all stages that train share."""

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed import DistNetworkError, DistStoreError

from cli import AllProcessesError
from lightning import DistillLoss, DistillModule, check_pair, linear_warmup_decay, make_projections
from training.arguments import PRECISIONS, FinetuneRunSettings, MachineSettings, RunSettings
from training.callbacks import (
    CheckpointIO,
    RunCheckpoints,
    SizeCheckpoints,
    StopRequest,
    UpdateGuard,
    UpdateProgressBar,
    WeightAverage,
)
from training.checkpoints import (
    AUTO,
    CONTINUE,
    changed_settings,
    choose_checkpoint,
    exclusive,
    fingerprint,
    print_line,
    split_state_dict,
)
from training.data import VALID_SUBSET, BatchDataModule
from training.objectives import find_units, new_objectives
from training.speed import (
    FastTeacher,
    FetchTimer,
    Throughput,
    check_compiler,
    compile_steps,
    keep_freed_memory,
    update_flops,
)
from training.task import Task, TaskScore, ValidScores, train_head
from wav2vec2.fast import fast_paths, plain_paths
from wav2vec2.files import checkpoint as ckpt
from wav2vec2.files.errors import UserError, one_line
from wav2vec2.files.heads import TaskModel
from wav2vec2.model import Wav2Vec2Model


def new_projections(settings: RunSettings, teacher: Wav2Vec2Model, student: Wav2Vec2Model) -> nn.ModuleList:
    """Freshly initialised projections from a student to its teacher.

    Raises:
        UserError: the two do not fit, see :func:`lightning.check_pair`.
    """
    models, groups = settings.models, settings.layer_groups
    try:
        check_pair(teacher, student, [i for group in groups for layers in group for i in layers], models.distill_mode)
    except UserError as error:
        raise UserError(
            f"--student_ckpt {models.student_ckpt}, --distill_layers {models.distill_layers}: {error}"
        ) from None
    dims = [model.config["encoder_embed_dim"] for model in (student, teacher)]
    return make_projections(models.distill_mode, groups, *dims)


def train(
    settings: RunSettings,
    data: BatchDataModule,
    teacher: Wav2Vec2Model,
    student: Wav2Vec2Model,
    projections: nn.ModuleList,
    learnt_objectives: dict[str, Tensor] | None = None,
) -> None:
    """Train ``student`` for ``--max_updates`` and say where the result is.

    Args:
        settings, data: of the run.
        teacher, student, projections: as of :class:`lightning.DistillModule`.
        learnt_objectives: the state dict of the objectives of the stage before, if there was one.

    Raises:
        UserError: a crop is too short for a frame, the checkpoint to continue from is not of this run, or the run
            cannot go on.
        Interrupted: a signal stopped the run; its last update is saved.
    """
    machine, stage = settings.machine, settings.stage
    data.check_crops(teacher.feature_extractor.receptive_field)
    objectives = new_objectives(settings, teacher, student, learnt_objectives)
    if settings.task.is_on:
        objectives["task"] = Task(settings.task.task_weight, student)
    module = make_module(settings, teacher, student, projections, objectives)
    check_sizes(settings, module)
    recorded = {**settings.recorded(), **_fingerprints(settings, data)}
    resumed = choose_checkpoint(machine.resume_checkpoint, machine.exp_dir)
    start = 0
    if resumed is not None:
        start = check_resumed(*resumed, settings, recorded, module)
        if start >= settings.optimisation.max_updates:
            print(f"{stage}: complete already, {start} updates done: {resumed[0]}")
            return
    elif "units" in objectives and not learnt_objectives:
        find_units(settings, data, teacher, objectives["units"])

    student.recompute_activations(machine.checkpoint_activations)
    if settings.models.student_dropout is not None:
        student.set_dropout(settings.models.student_dropout)
    ema, sizes = settings.optimisation.ema, settings.pruning.sizes if settings.pruning else []
    callbacks = [
        *([FastTeacher()] if not machine.plain else []),
        *([] if ema is None else [WeightAverage(ema)]),
        *([SizeCheckpoints(machine.exp_dir, sizes)] if sizes else []),
        *([TaskScore(ValidScores(data.probe, data.clips[VALID_SUBSET]))] if settings.task.is_on else []),
    ]
    fit(
        settings,
        data,
        module,
        resumed,
        flops=update_flops(module),
        record=lambda: distillation_record(settings, recorded, module),
        title=_title(settings, data, module),
        callbacks=callbacks,
        validates_last=settings.task.is_on,
    )


def distillation_record(settings: RunSettings, recorded: dict[str, Any], module: DistillModule) -> dict[str, Any]:
    """What a checkpoint says of a distillation; prune.py and the report read it."""
    budget = module.budget
    record = {
        "student_config": module.student_model.config,
        "target_sparsity": budget.target_sparsity if budget else None,
        "original_num_params": budget.original_size if budget else None,
        "settings": recorded,
        "round_to": settings.pruning.round_to if settings.pruning else None,
    }
    if isinstance(module.student_model, TaskModel):
        record["head"] = module.student_model.head_settings.to_dict()
    if (macs_budget := module.macs_budget) is not None:
        record["target_macs"] = macs_budget.target_sparsity
        record["original_num_macs"] = macs_budget.original_size
    return {"distillation": record}


def fit(
    settings: RunSettings | FinetuneRunSettings,
    data: BatchDataModule,
    module: pl.LightningModule,
    resumed: tuple[Path, dict[str, Any]] | None,
    *,
    flops: Callable[[int], float],
    record: Callable[[], dict[str, Any]],
    title: str,
    callbacks: Sequence[pl.Callback] = (),
    validates_last: bool = False,
) -> pl.Trainer:
    """Train a module for ``--max_updates``, and say where its last checkpoint is.

    Args:
        settings, data: of the run.
        module: what is trained. It has the ``parameter_groups`` of its optimiser, ``warmup_updates`` and
            ``max_updates`` of its schedule, the ``scalars`` of the last batch, and ``compiled_steps``.
        resumed: path and contents of the checkpoint to continue from, if any; it is known to fit.
        flops: operations of one waveform's share of an update, by its samples.
        record: what a checkpoint says of the run.
        title: one line, printed at the start.
        callbacks: the stage's own; they see an update before it is saved.
        validates_last: validate the last update, wherever it falls.

    Raises:
        UserError: the run cannot go on.
        Interrupted: a signal stopped the run; its last update is saved.
    """
    machine, stage = settings.machine, settings.stage
    start = resumed[1]["global_step"] if resumed is not None else 0
    _quiet_lightning()
    with StopRequest() as stop, plain_paths(machine.plain), contextlib.ExitStack() as stack:
        if fast_paths() and machine.devices[0] == "cpu":
            keep_freed_memory()
        if machine.compile:
            check_compiler(machine.devices[0])
            compile_steps(module)
        guard = UpdateGuard(
            stop,
            clip_norm=settings.optimisation.clip_norm,
            skip_nonfinite=settings.optimisation.skip_nonfinite,
            max_bad_files=data.max_bad_files,
        )
        batches = data.sampler(data.train_subset, machine.num_processes, 0, settings.optimisation.accum_grad)
        io = CheckpointIO(resumed)
        checkpoints = RunCheckpoints(
            machine.exp_dir,
            guard,
            io,
            record=record,
            save_interval=machine.save_interval,
            updates_per_epoch=len(batches) // settings.optimisation.accum_grad,
            validates_last=validates_last,
        )
        timer = FetchTimer()
        watching = [
            LearningRateMonitor(logging_interval="step"),
            guard,
            Throughput(timer, flops, machine.precision, machine.compile),
            UpdateProgressBar(stage),
            *callbacks,
            checkpoints,
        ]
        trainer = make_trainer(settings, len(batches), watching, io, timer, start)
        if validates_last:
            loop = trainer.fit_loop.epoch_loop
            is_due = loop._should_check_val_fx
            loop._should_check_val_fx = lambda *args: is_due(*args) or trainer.global_step == trainer.max_steps
        stop.launcher = trainer.strategy.launcher
        if trainer.is_global_zero:
            stack.enter_context(exclusive(machine.exp_dir))
            print(title, flush=True)
        resumed_from = None
        if resumed is not None:
            resumed_from = resumed[0]
            if trainer.is_global_zero:
                print(f"{stage}: continuing {resumed_from} after update {start}", flush=True)
            _adapt(resumed[1], module, settings.optimisation.accum_grad)
        resumed = None  # Lightning frees it once it is restored
        try:
            with refusals_of_lightning(MisconfigurationException):
                trainer.fit(module, datamodule=data, ckpt_path=resumed_from, weights_only=True)
        except (DistNetworkError, DistStoreError) as error:
            raise UserError(
                f"the processes of this run do not reach each other: {one_line(error)}; look at the others' output, "
                "and at MASTER_ADDR and MASTER_PORT if you set them"
            ) from error
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of GPU memory ({str(error).splitlines()[0][:200]}); lower --seconds_per_batch (--accum_grad "
                f"keeps the total batch), or add --checkpoint_activations, then {CONTINUE}"
            ) from error
    if trainer.is_global_zero:
        print(f"{stage}: {trainer.global_step} updates done: {checkpoints.path}")
    return trainer


def make_module(
    settings: RunSettings,
    teacher: Wav2Vec2Model,
    student: Wav2Vec2Model,
    projections: nn.ModuleList,
    objectives: nn.ModuleDict,
) -> DistillModule:
    """The module that trains ``student``."""
    models, optimisation, pruning = settings.models, settings.optimisation, settings.pruning
    sparsity: dict[str, Any] = {}
    if pruning is not None:
        sparsity = {
            "use_reg": True,
            "reg_learning_rate": pruning.reg_learning_rate,
            "target_sparsity": pruning.target_sparsity,
            "sparsity_warmup_updates": pruning.sparsity_warmup_updates,
            "sparsity_control": pruning.sparsity_control,
            "target_macs": pruning.target_macs,
        }
    module = DistillModule(
        teacher_model=teacher,
        student_model=student,
        distill_mode=models.distill_mode,
        distill_layers=[layers for group in settings.layer_groups for layers in group],
        distill_linear_projs=projections,
        distill_loss=DistillLoss(
            models.l2_weight, models.l1_weight, models.cos_weight, models.cos_type, models.distill_weight
        ),
        learning_rate=optimisation.learning_rate,
        weight_decay=optimisation.weight_decay,
        warmup_updates=optimisation.warmup_updates,
        max_updates=optimisation.max_updates,
        objectives=objectives,
        **sparsity,
    )
    if "task" in objectives:
        train_head(student)
    elif isinstance(student, TaskModel) and student.head is not None:  # it is only kept
        student.head.requires_grad_(False)
    return module


def check_sizes(settings: RunSettings, module: DistillModule) -> None:
    """Check that the target, on its way up, reaches all that ``--save_at_sparsity`` names.

    Raises:
        UserError: names one that it does not.
    """
    for size in settings.pruning.sizes if settings.pruning else ():
        first, last = (module.budget.target(step) for step in (0, settings.optimisation.max_updates))
        if not first < float(size) <= last:
            raise UserError(
                f"--save_at_sparsity {size}: the target rises from {first:.4f} to {last:.4f} in this run (see "
                "--sparsity_warmup_updates, --max_updates); give sparsities between them"
            )


def make_trainer(
    settings: RunSettings | FinetuneRunSettings,
    batches_per_epoch: int,
    callbacks: list[pl.Callback],
    io: CheckpointIO,
    timer: FetchTimer,
    start: int,
) -> pl.Trainer:
    """The trainer of a run.

    Args:
        settings: of the run.
        batches_per_epoch: of one process.
        callbacks: all of them.
        io: writes the checkpoints.
        timer: of the wait for batches.
        start: updates done before.
    """
    machine, optimisation = settings.machine, settings.optimisation
    accelerator, devices = machine.devices
    with refusals_of_lightning(MisconfigurationException, ValueError, RuntimeError):
        environment = cluster_environment(devices, machine.num_nodes)
        if environment is not None:
            environment.validate_settings(devices, machine.num_nodes)
        trainer = pl.Trainer(
            default_root_dir=machine.exp_dir,
            accelerator=accelerator,
            devices=devices,
            num_nodes=machine.num_nodes,
            # No process needs another's buffers: they are constants.
            strategy=DDPStrategy(gradient_as_bucket_view=True, broadcast_buffers=False)
            if machine.num_processes > 1
            else "auto",
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
            plugins=[io, *([environment] if environment else [])],
            logger=[
                TensorBoardLogger(machine.exp_dir, name="tensorboard", version=0, purge_step=start),
                # A version for each start of the run.
                CSVLogger(machine.exp_dir, name="csv", flush_logs_every_n_steps=machine.log_interval),
            ],
            profiler=timer,
            callbacks=callbacks,
        )
    # Its handlers would answer SIGTERM with a collective in the middle of an update, and it would exchange after every
    # batch what UpdateGuard exchanges once an update.
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    return trainer


def cluster_environment(processes_per_node: int, num_nodes: int) -> ClusterEnvironment | None:
    """Who starts the processes of a run: torchrun, or ``srun`` in a SLURM job; None where Lightning finds out itself.

    One process needs no srun in a SLURM job, nor do several in a job of one task: Lightning starts the others.

    Raises:
        AllProcessesError: srun is missing, or there are other processes than ``--gpus`` and ``--num_nodes`` say.
    """
    wanted = f"{processes_per_node}(x{num_nodes})" if num_nodes > 1 else f"{processes_per_node}"
    if TorchElasticEnvironment.detect():
        environment = TorchElasticEnvironment()
        if environment.world_size() != processes_per_node * num_nodes:
            raise AllProcessesError(
                f"--gpus {processes_per_node} --num_nodes {num_nodes}: torchrun has started {environment.world_size()} "
                f"processes; start it with --nnodes {num_nodes} --nproc_per_node {processes_per_node}"
            )
        return environment
    if not SLURMEnvironment.detect():
        return None
    # SLURM_NTASKS is the whole job's in its script. srun sets this one, in the processes that it starts: "4(x2)" are 4
    # on each of 2 nodes. A shell in a job may be a step of one task.
    started = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
    if started == "1" and num_nodes == 1 and "1" in (wanted, os.environ["SLURM_NTASKS"]):
        return LightningEnvironment()
    if started != wanted:
        raise AllProcessesError(
            f"--gpus {processes_per_node} --num_nodes {num_nodes}: this SLURM job has started {started} of these "
            f"processes per node; put srun --nodes={num_nodes} --ntasks-per-node={processes_per_node} in front of the "
            "command, or change --gpus and --num_nodes"
        )
    os.environ["SLURM_NTASKS_PER_NODE"] = started.partition("(")[0]  # Lightning wants it, and srun -n does not set it
    return SLURMEnvironment(auto_requeue=False)  # RunCheckpoints requeues, from the end of an update


@contextlib.contextmanager
def refusals_of_lightning(*kinds: type[Exception]) -> Iterator[None]:
    """Say in one line what Lightning refuses.

    Raises:
        UserError: in the place of errors of these kinds.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(
            f"{one_line(error)} (see --accelerator, --gpus, --num_nodes and --precision; --debug shows where)"
        ) from error


def _fingerprints(settings: RunSettings, data: BatchDataModule) -> dict[str, str]:
    """What the files of a run are, wherever they lie."""
    return {
        "task_tsv" if settings.task.is_on else "train_subset": data.fingerprint(),
        "teacher_ckpt": fingerprint(settings.models.teacher_ckpt),
        "student_ckpt": fingerprint(settings.models.student_ckpt),
    }


def check_resumed(
    path: Path, contents: dict[str, Any], settings: RunSettings, recorded: dict[str, Any], module: DistillModule
) -> int:
    """Check that a checkpoint can be continued with these settings; returns the updates done in it.

    ``auto`` continues the same run only; a path given by the user may be continued with other settings, which are
    printed.

    Raises:
        UserError: it is of another stage or model, or (with ``auto``) of a run with other settings.
    """
    if not contents["distillation"]:
        raise UserError(
            f"--resume_checkpoint {path}: a checkpoint of the published program, which does not record the settings "
            "and the data of its run, cannot be continued; prune.py and save_final_ckpt.py take it, and all "
            "scripts take the published models"
        )
    check_settings(path, contents["distillation"], recorded, settings.machine)
    student, projections, objectives = split_state_dict(contents["state_dict"])
    ckpt.load_state(module.student_model, student, f"{path} in the model of --student_ckpt")
    ckpt.load_state(module.distill_linear_projs, projections, f"{path} (projections; see --distill_layers)")
    ckpt.load_state(module.objectives, objectives, f"{path} (objectives; see --unit_weight)")
    return contents["global_step"]


def check_settings(path: Path, about: dict[str, Any], recorded: dict[str, Any], machine: MachineSettings) -> None:
    """Check that a checkpoint is continued with the settings that it was made with.

    Args:
        path: of the checkpoint.
        about: what it says of its run.
        recorded: settings of this run.
        machine: of this run; says whether the user has named the checkpoint.

    Raises:
        UserError: names the settings that differ; a checkpoint that the user has named goes on with a warning.
    """
    changes = changed_settings(about.get("settings"), recorded)
    if changes and machine.resume_checkpoint == AUTO:
        raise UserError(
            f"{path}: made with other settings: {'; '.join(changes)}. Give the same settings; or another --exp_dir for "
            f"a new run; or --resume_checkpoint {path} to continue it with these"
        )
    if changes:
        print_line(f"warning: {path} is continued with other settings: {'; '.join(changes)}")


def _adapt(checkpoint: dict[str, Any], module: pl.LightningModule, accum_grad: int) -> None:
    """Count the batches of a checkpoint by this run's ``accum_grad``, and start from this run's learning rates.

    With the settings that the checkpoint was made with, this changes nothing.
    """
    step = checkpoint["global_step"]
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        shift = step * accum_grad - counts["ready"]
        counts.update({name: count + shift for name, count in counts.items()})
    factor = linear_warmup_decay(module.warmup_updates, module.max_updates)(step)
    groups = module.parameter_groups()
    checkpoint["lr_schedulers"][0]["base_lrs"] = [group["lr"] for group in groups]
    for saved, group in zip(checkpoint["optimizer_states"][0]["param_groups"], groups, strict=True):
        rates = {"lr": group["lr"] * factor, "initial_lr": group["lr"], "weight_decay": group["weight_decay"]}
        saved.update(**rates, name=group["name"])  # the first group's was another once
        saved["fused"] = fast_paths()


def _title(settings: RunSettings, data: BatchDataModule, module: DistillModule) -> str:
    num_params = [sum(p.numel() for p in model.parameters()) for model in (module.teacher_model, module.student_model)]
    layers = f"layers {settings.models.distill_layers}" if settings.has_projections else "the task alone"
    return (
        f"{settings.stage}: teacher {num_params[0]:,} parameters, student {num_params[1]:,}; {layers}; "
        f"{data_and_machine(data, settings.machine)}"
    )


def data_and_machine(data: BatchDataModule, machine: MachineSettings) -> str:
    """The end of the first line of a run."""
    batches = data.batches[data.train_subset]
    return (
        f"{sum(map(len, batches))} utterances in {len(batches)} batches; {machine.num_processes} x "
        f"{machine.devices[0]}, precision {machine.precision}{', compiled' if machine.compile else ''}"
    )


def _quiet_lightning() -> None:
    """Keep Lightning's hints that do not concern users of this program off their terminal."""
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
