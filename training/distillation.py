"""A run of either distillation: its models, its module, and what its checkpoints say of it."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import nn

from lightning import BUDGETS, DistillLoss, DistillModule
from training.checkpoints import DISTILLATION, choose_checkpoint, fingerprint, split_state_dict
from training.data import VALID_SUBSET, BatchDataModule, LabelledDataModule, SpeechDataModule
from training.pairing import freeze_unreached, targets
from training.saving import SizeCheckpoints
from training.settings import DistillationSettings, DistillSettings, MachineSettings
from training.speed import FastTeacher, update_flops
from training.task import Task, TaskScore, ValidScores, train_head, with_task
from training.trainer import check_settings, fit
from wav2vec2.fast import fast_paths
from wav2vec2.files import checkpoint as ckpt
from wav2vec2.files.errors import UserError
from wav2vec2.files.heads import TaskModel
from wav2vec2.model import Wav2Vec2Model
from wav2vec2.sparsity import size_of


def read_inputs(settings: DistillationSettings) -> tuple[BatchDataModule, Wav2Vec2Model, dict[str, Any]]:
    """Seed a run, and read its batches, its teacher, and its student's contents, with a head for --task_tsv.

    Raises:
        UserError: one of them cannot be used.
    """
    models = settings.models
    data: BatchDataModule
    if settings.task is None:
        data = SpeechDataModule(settings.data)
    pl.seed_everything(settings.data.seed, verbose=False)
    teacher = ckpt.load_model(models.teacher_ckpt)
    contents = ckpt.read_model_file(models.student_ckpt)
    if settings.task is not None:
        contents, data = with_task(contents, settings.task, settings.data, models.student_ckpt)
    return data, teacher, contents


def train(
    settings: DistillationSettings,
    data: BatchDataModule,
    teacher: Wav2Vec2Model,
    student: Wav2Vec2Model,
    projections: nn.ModuleList,
) -> None:
    """Train ``student`` for ``--max_updates`` and say where the result is.

    Raises:
        UserError: a crop is too short for a frame, the checkpoint to continue from is not of this run, or the run
            cannot go on.
        Interrupted: a signal stopped the run; its last update is saved.
    """
    machine = settings.machine
    data.check_crops(teacher.feature_extractor.receptive_field)
    module = make_module(settings, teacher, student, projections)
    sizes = _checked_sizes(settings, module)
    recorded = settings.recorded() | {
        "task_tsv" if settings.task is not None else "train_subset": data.fingerprint(),
        "teacher_ckpt": fingerprint(settings.models.teacher_ckpt),
        "student_ckpt": fingerprint(settings.models.student_ckpt),
    }
    resumed = choose_checkpoint(machine.resume_checkpoint, machine.exp_dir)
    if resumed is not None:
        _check_resumed(*resumed, recorded, module, machine)
        if (done := resumed[1]["global_step"]) >= module.max_updates:
            print(f"{settings.stage}: complete already, {done} updates done: {resumed[0]}")
            return
    student.recompute_activations(machine.checkpoint_activations)
    if settings.models.student_dropout is not None:
        student.set_dropout(settings.models.student_dropout)
    record = _record(recorded, module)
    callbacks: list[pl.Callback] = [FastTeacher(teacher)] if fast_paths() else []
    if sizes:
        callbacks.append(SizeCheckpoints(module, machine.exp_dir, sizes, record))
    if isinstance(data, LabelledDataModule) and isinstance(student, TaskModel):
        callbacks.append(TaskScore(student, ValidScores(data.probe, data.clips[VALID_SUBSET])))
    num_params = [sum(p.numel() for p in model.parameters()) for model in (teacher, student)]
    layers = f"layers {settings.models.distill_layers}" if settings.distils else "the task alone"
    fit(
        settings,
        data,
        module,
        resumed,
        flops=update_flops(module),
        record={DISTILLATION: record},
        title=f"teacher {num_params[0]:,} parameters, student {num_params[1]:,}; {layers}",
        callbacks=callbacks,
    )


def make_module(
    settings: DistillationSettings, teacher: Wav2Vec2Model, student: Wav2Vec2Model, projections: nn.ModuleList
) -> DistillModule:
    """Make the module that trains ``student``, of which only what the losses reach requires a gradient."""
    models, optimisation = settings.models, settings.optimisation
    sparsity: dict[str, Any] = {}
    if isinstance(settings, DistillSettings):
        pruning = settings.pruning
        names = ("reg_learning_rate", "sparsity_warmup_updates", "sparsity_control", "profile")
        sparsity = {"use_reg": True} | {name: getattr(pruning, name) for name in names}
        shares = zip(BUDGETS, targets(pruning, size_of(teacher, pruning.profile)), strict=True)
        sparsity |= {f"target_{name}": share for name, share in shares}
    term = None
    if isinstance(student, TaskModel) and settings.task is not None:
        term = Task(settings.task.task_weight, student)
    weights = models.l2_weight, models.l1_weight, models.cos_weight
    module = DistillModule(
        teacher_model=teacher,
        student_model=student,
        distill_mode=models.distill_mode,
        distill_layers=settings.layers,
        distill_linear_projs=projections,
        distill_loss=DistillLoss(*weights, models.cos_type, models.distill_weight),
        learning_rate=optimisation.learning_rate,
        weight_decay=optimisation.weight_decay,
        warmup_updates=optimisation.warmup_updates,
        max_updates=optimisation.max_updates,
        term=term,
        **sparsity,
    )
    freeze_unreached(student, module.student_depth)
    if isinstance(student, TaskModel):
        if term is not None:
            train_head(student)
        elif student.head is not None:  # it is only kept
            student.head.requires_grad_(False)
    return module


def _checked_sizes(settings: DistillationSettings, module: DistillModule) -> list[str]:
    """The ``--save_at_sparsity``, which the target must reach on its way up."""
    sizes = settings.pruning.sizes if isinstance(settings, DistillSettings) else []
    for size in sizes:
        first, last = (module.budgets["sparsity"].target(step) for step in (0, module.max_updates))
        if not first < float(size) <= last:
            raise UserError(
                f"--save_at_sparsity {size}: the target rises from {first:.4f} to {last:.4f} in this run (see "
                "--sparsity_warmup_updates, --max_updates); give sparsities between them"
            )
    return sizes


def _record(recorded: dict[str, Any], module: DistillModule) -> dict[str, Any]:
    """Describe a distillation in its checkpoints; prune.py and the report read it."""
    sparsity, macs, latency = (module.budgets.get(name) for name in BUDGETS)
    record = {
        "student_config": module.student_model.config,
        "target_sparsity": sparsity.target_sparsity if sparsity else None,
        "original_num_params": int(module.original_size.params) if module.use_reg else None,
        "settings": recorded,
    }
    if isinstance(module.student_model, TaskModel):
        record["head"] = module.student_model.head_settings.to_dict()
    if macs is not None:
        record["target_macs"] = macs.target_sparsity
        record["original_num_macs"] = int(macs.original_size)
    if latency is not None:
        record["target_latency"] = latency.target_sparsity
        record["original_latency"] = latency.original_size
    return record


def _check_resumed(
    path: Path, contents: dict[str, Any], recorded: dict[str, Any], module: DistillModule, machine: MachineSettings
) -> None:
    """Check that the checkpoint at ``path`` can be continued: that it is of this stage, its models and settings."""
    if not contents["distillation"]:
        raise UserError(
            f"--resume_checkpoint {path}: a checkpoint of the published program, which does not record the settings "
            "and the data of its run, cannot be continued; prune.py and save_final_ckpt.py take it, and all "
            "scripts take the published models"
        )
    check_settings(path, contents["distillation"], recorded, machine)
    student, projections = split_state_dict(contents)
    ckpt.load_state(module.student_model, student, f"{path} in the model of --student_ckpt")
    ckpt.load_state(module.distill_linear_projs, projections, f"{path} (projections; see --distill_layers)")
