"""Says before training what a run reads, needs and makes, and what would stop it."""

import shutil
from itertools import chain
from typing import Any

import numpy as np
import torch

from lightning import BUDGETS, DistillModule, ScheduledModule
from training.data import BatchDataModule
from training.pairing import BUDGETED
from training.settings import RunSettings
from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.config import is_wavlm
from wav2vec2.model import Wav2Vec2Model
from wav2vec2.sparsity import smallest_size

_GB = 1e9
# The last checkpoint, the one before and the one that is being written; each has weights and two moments.
_CHECKPOINTS, _PARTS = 3, 3
# Bytes for each trained parameter: itself, its gradient and two moments in float32.
_TRAINED_BYTES = 16
# What a process on a GPU needs beside tensors, and what its allocator cannot use of them.
_GPU_BYTES, _GPU_WASTE = 0.8e9, 1.15
# Share of the disk or the memory above which an estimate becomes a warning.
_MOST = 0.9


def describe(settings: RunSettings, data: BatchDataModule, module: ScheduledModule, title: str) -> list[str]:
    """Describe a run in lines: models and machine, data, target, disk and memory; what may stop it is a warning."""
    machine = settings.machine
    accelerator, devices = machine.devices
    compiled = ", compiled" if machine.compile else ""
    processes = f"{machine.num_processes} x {accelerator}, precision {machine.precision}{compiled}"
    lines = [f"{settings.stage}: {title}; {processes}", _data_line(settings, data), *_target_lines(module)]

    trained = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    place = next(
        folder for folder in (machine.exp_dir.absolute(), *machine.exp_dir.absolute().parents) if folder.is_dir()
    )
    disk, free = _CHECKPOINTS * _PARTS * trained, shutil.disk_usage(place).free
    lines.append(f"disk: {disk / _GB:.2f} GB for checkpoints, {free / _GB:.2f} GB free in {place}")
    if disk > _MOST * free:
        lines.append(f"warning: {place}: there may not be room for them; make some, or give another --exp_dir")

    memory, found = _memory(settings, data, module), torch.cuda.device_count() if accelerator == "gpu" else 0
    lines.append(f"memory: about {memory / _GB:.1f} GB a process, by the largest batch")
    if accelerator == "gpu" and found < devices:
        advice = "check where it will train, or give --gpus (and --accum_grad to keep the total batch)"
        lines.append(f"warning: --gpus: {devices} GPUs asked for, {found} found on this machine; {advice}")
    if found and memory > _MOST * (there := torch.cuda.get_device_properties(0).total_memory):
        advice = "halve --seconds_per_batch and double --accum_grad, or add --checkpoint_activations"
        lines.append(f"warning: the GPU has {there / _GB:.1f} GB; {advice}")
    return lines


def _data_line(settings: RunSettings, data: BatchDataModule) -> str:
    subset, batches = data.train_subset, data.batches[data.train_subset]
    lengths = np.asarray(data.datasets[subset].lengths)
    chosen = list(chain(*batches))
    hours, used = (part.sum() / SAMPLE_RATE / 3600 for part in (lengths, lengths[chosen]))
    accum_grad, updates = settings.optimisation.accum_grad, settings.optimisation.max_updates
    per_epoch = len(data.sampler(subset, settings.machine.num_processes, 0, accum_grad)) // accum_grad
    return (
        f"data: {subset} has {len(lengths)} utterances, {hours:.2f} h; {len(chosen)} ({used:.2f} h) are within the "
        f"limits, in {len(batches)} batches; {updates} updates are {updates / per_epoch:.1f} epochs"
    )


def _target_lines(module: ScheduledModule) -> list[str]:
    if not isinstance(module, DistillModule) or not module.budgets:
        return []
    names = dict(zip(BUDGETS, BUDGETED, strict=True))
    smallest = dict(zip(BUDGETS, smallest_size(module.student_model, module.profile), strict=True))
    return [
        f"target: without {budget.target_sparsity:g} of the teacher's {names[name]}, of which the masks can remove "
        f"{1 - float(smallest[name]) / budget.original_size:.4f}"
        for name, budget in module.budgets.items()
    ]


def _memory(settings: RunSettings, data: BatchDataModule, module: ScheduledModule) -> float:
    """Estimate the bytes of a training process from what the student's forward pass keeps for the backward pass."""
    student: Any = module.student_model if isinstance(module, DistillModule) else module.model
    kept = _kept_bytes(student, *data.largest_batch())
    if settings.machine.precision != "32":
        kept //= 2
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in module.parameters() if not p.requires_grad)
    total = frozen + _TRAINED_BYTES * trained + kept
    return _GPU_BYTES + _GPU_WASTE * total if settings.machine.devices[0] == "gpu" else total


def _kept_bytes(student: Wav2Vec2Model, batch: int, num_samples: int) -> int:
    """Count what a training step on (batch, num_samples) keeps, by a step without numbers, on torch's meta device.

    There attention keeps maps of frames by frames, which fused kernels do not; where WavLM's biases need some of them,
    all are counted.
    """
    has_maps = is_wavlm(student.config)
    state = {name: tensor.detach().to("meta") for name, tensor in student.state_dict().items()}
    parameters = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    for name in parameters:
        state[name].requires_grad_()
    own = {id(tensor.untyped_storage()) for tensor in state.values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        is_map = tensor.ndim > 2 and tensor.shape[-1] == tensor.shape[-2]
        if has_maps or not is_map:
            storage = tensor.untyped_storage()
            kept[id(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        torch.func.functional_call(student, state, (torch.empty(batch, num_samples, device="meta"),))
    return sum(storage.nbytes() for key, storage in kept.items() if key not in own)
