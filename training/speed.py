"""Speed of a run: what makes it fast, what it logs, and the progress bar."""

import ctypes
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.profilers import Profiler
from torch import nn
from tqdm import tqdm

from cli import print_line, progress
from lightning import DistillModule, ScheduledModule
from training.settings import MachineSettings
from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.files.errors import UserError
from wav2vec2.flops import count_flops
from wav2vec2.model import Wav2Vec2Model

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's <malloc.h>


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for its next allocation; for work on a CPU, where it is not undone.

    By default glibc gives large blocks back to the system at once and asks for them anew, page by page: a training
    update of HuBERT Base on 2 x 8 s spends almost half of its time on that. The process stays as large as it once was.
    Returns False if the C library cannot do it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def cast_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of the layers that autocast runs in ``dtype``; norms stay as they are."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            module.to(dtype)


class FastTeacher(Callback):
    """Computes once what a frozen teacher needs at every step: weights in autocast's precision, folded weight norm."""

    def __init__(self, teacher: Wav2Vec2Model) -> None:
        self._teacher = teacher

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        dtype = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(str(trainer.precision))
        if dtype is not None:
            cast_products(self._teacher, dtype)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._teacher.fold_weight_norm()  # here, as loading a checkpoint undoes it


COMPILER = "inductor"


def check_compiler(accelerator: str) -> None:
    """Raise a UserError if the "gpu" or "cpu" lacks what Inductor needs and would miss in the first update."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch.utils._triton import has_triton

    needed = "a C++ compiler (install g++, or name one in CXX)"
    if accelerator == "gpu":
        needed = "Triton and a GPU that it supports (compute capability 7.0 or above)"
    try:
        found = has_triton() if accelerator == "gpu" else get_cpp_compiler()
    except Exception:  # of several kinds, none of them public
        found = None
    if not found:
        raise UserError(f"--compile: torch.compile needs {needed}, which is not found; leave out --compile")


def compile_steps(module: ScheduledModule) -> None:
    """Compile the ``compiled_steps`` of a module, each as one graph for batches of any shape.

    Noise (masks, dropout) stays torch's own, so that results are the same up to rounding, and a run may go on with
    compiled code or without. The module and its parameters keep their names.
    """
    # It would cut the graph for the sake of DDP's buckets, which cannot be done where activations are recomputed.
    torch._dynamo.config.optimize_ddp = False
    compiling: dict[str, Any] = {"options": {"fallback_random": True}} if COMPILER == "inductor" else {}
    for name in module.compiled_steps:
        step = torch.compile(getattr(module, name), fullgraph=True, dynamic=True, backend=COMPILER, **compiling)
        setattr(module, name, step)


# Dense matrix products, 1e12 operations a second, from the makers' data sheets: (16 bit, 32 bit without TF32). The
# first name that is part of the device's is taken.
PEAK_TFLOPS = {
    "H200": (989, 67),
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "A100": (312, 19.5),
    "A40": (149.7, 37.4),
    "A10": (125, 31.2),
    "L40S": (362, 91.6),
    "L40": (181, 90.5),
    "L4": (121, 30.3),
    "V100": (125, 15.7),
    "T4": (65, 8.1),
    "RTX 4090": (165, 82.6),
    "RTX 3090": (71, 35.6),
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Operations a second that a device can do in "32", "16" or "bf16"; None for one that is not known."""
    for name, (half, single) in PEAK_TFLOPS.items():
        if name in device_name:
            return 1e12 * (single if precision == "32" else half)
    return None


def forward_flops(model: Wav2Vec2Model, num_layers: int) -> Callable[[int], float]:
    """Operations of the first ``num_layers`` layers' forward pass over one waveform, by its samples.

    Counted for three lengths: attention makes it a quadratic function of the length.
    """
    seconds = np.array([2, 8, 16])
    counts = [sum(count_flops(model.config, int(n), num_layers)) for n in seconds * SAMPLE_RATE]
    polynomial = np.poly1d(np.polyfit(seconds, counts, 2))
    return lambda num_samples: float(polynomial(num_samples / SAMPLE_RATE))


def update_flops(module: DistillModule) -> Callable[[int], float]:
    """Operations that one waveform costs in an update, by its samples; a backward pass counts as two forward passes."""
    teacher = forward_flops(module.teacher_model, module.teacher_depth)
    student = forward_flops(module.student_model, max(1, module.student_depth))
    has_teacher = bool(module.teacher_layers)
    return lambda num_samples: has_teacher * teacher(num_samples) + 3 * student(num_samples)


class FetchTimer(Profiler):
    """Lightning's profiler interface, for the one thing that only it can see: the wait for the next batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self._since: float | None = None

    def start(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self._since = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if self._since is not None and action_name.endswith("train_dataloader_next"):
            self.seconds += time.perf_counter() - self._since
            self._since = None


class Throughput(Callback):
    """Logs the speed of this process over the updates since it was logged last; validation is left out.

    ``data_wait`` is the share of the time that training waited for a batch; ``tflops_per_second`` counts ``flops``, the
    operations of one waveform's share of an update, by its samples; ``share_of_peak`` is that of the device's data
    sheet, and missing for devices that are not in :data:`PEAK_TFLOPS`; ``compiled_graphs`` ends its rise when no new
    kind of batch comes.
    """

    def __init__(self, timer: FetchTimer, flops: Callable[[int], float], machine: MachineSettings) -> None:
        self._timer, self._flops, self._machine = timer, flops, machine
        self._restart(0)
        self._validation_since = 0.0

    def _restart(self, update: int) -> None:
        self._since, self._first_update = time.perf_counter(), update
        self._timer.seconds = 0.0
        self._audio_seconds, self._operations, self._left_out = 0.0, 0.0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart(trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_since = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._left_out += time.perf_counter() - self._validation_since

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        num_rows, num_samples = batch[0].shape
        self._audio_seconds += num_rows * num_samples / SAMPLE_RATE
        self._operations += num_rows * self._flops(num_samples)
        updates = trainer.global_step - self._first_update
        if not updates or trainer.global_step % self._machine.log_interval:
            return
        seconds = time.perf_counter() - self._since - self._left_out
        values = {
            "audio_seconds_per_second": self._audio_seconds / seconds,
            "updates_per_second": updates / seconds,
            "data_wait": self._timer.seconds / seconds,
            "tflops_per_second": self._operations / seconds / 1e12,
        }
        if self._machine.compile:
            values["compiled_graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        device = trainer.strategy.root_device
        if device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(device), self._machine.precision)
            if peak is not None:
                values["share_of_peak"] = self._operations / seconds / peak
            values["peak_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        else:
            unit = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in
            values["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
        pl_module.log_dict({name: float(value) for name, value in values.items()})
        self._restart(trainer.global_step)


# What the progress bar shows.
_SHOWN = {"loss": "train_loss", "valid": "valid_score", "sparsity": "sparsity_expected", "target": "sparsity_target"}
_SHOWN |= {"macs gone": "macs_expected", "time gone": "latency_expected"}


# After so long the speed of a run is known.
_SECONDS_UNTIL_KNOWN = 20.0


class UpdateProgressBar(Callback):
    """Shows one bar over all updates: loss, the last score, expected sparsity and its target, time left."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._bar: tqdm | None = None
        self._first = 0  # update of this start
        self._start: float | None = None  # when it was done; None once the time of the run has been said

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            total, done = trainer.max_steps, trainer.global_step
            self._bar = progress(None, self._stage, total=total, initial=done, unit="update", delay=0)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._bar is not None and self._bar.n < trainer.global_step:
            metrics = trainer.callback_metrics
            shown = {label: f"{metrics[name]:.3f}" for label, name in _SHOWN.items() if name in metrics}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(trainer.global_step - self._bar.n)
            self._say_time(trainer)

    def _say_time(self, trainer: Trainer) -> None:
        """Say how long the run will take, once the speed is known."""
        done, now = trainer.global_step, time.monotonic()
        if self._first == 0:  # what the first update waits for does not come again
            self._first, self._start = done, now
        elif self._start is not None and now - self._start > _SECONDS_UNTIL_KNOWN:
            rate, left = (done - self._first) / (now - self._start), trainer.max_steps - done
            print_line(f"{self._stage}: {rate:.3g} updates a second, {tqdm.format_interval(left / rate)} for {left}")
            self._start = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None:
            self._bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)
