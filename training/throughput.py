"""What users compare: how fast a run trains, what it waits for, and how much of the hardware it uses."""

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.profilers import Profiler

from dataset.speech import Batch
from training.compiling import num_compiled_graphs
from wav2vec2.audio import SAMPLE_RATE

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
# What is logged; these differ from run to run.
COLUMNS = (
    "audio_seconds_per_second",
    "updates_per_second",
    "data_wait",
    "tflops_per_second",
    "share_of_peak",
    "peak_memory_gb",
    "compiled_graphs",
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Operations a second that a device can do in "32", "16" or "bf16"; None for one that is not known."""
    for name, (half, single) in PEAK_TFLOPS.items():
        if name in device_name:
            return 1e12 * (single if precision == "32" else half)
    return None


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


class Throughput(pl.Callback):
    """Logs :data:`COLUMNS` of this process, each over the updates since they were logged last.

    ``data_wait`` is the share of the time that training waited for a batch; ``tflops_per_second`` counts the teacher's
    forward pass once and the student's three times (its backward pass is about two); ``share_of_peak`` is that of the
    device's data sheet, and missing for devices that are not in :data:`PEAK_TFLOPS`; ``compiled_graphs`` (with
    ``--compile``) ends its rise when no shape of batches is new. Validation is left out.

    Args:
        timer: the trainer's profiler.
        flops: operations of one update's share of one waveform, by its samples.
        precision: "32", "16" or "bf16".
    """

    def __init__(self, timer: FetchTimer, flops: Callable[[int], float], precision: str) -> None:
        self._timer = timer
        self._flops = flops
        self._precision = precision
        self._restart(0)
        self._validation_since = 0.0

    def _restart(self, update: int) -> None:
        self._since, self._first_update = time.perf_counter(), update
        self._timer.seconds = 0.0
        self._audio_seconds, self._operations, self._left_out = 0.0, 0.0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restart(trainer.global_step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validation_since = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._left_out += time.perf_counter() - self._validation_since

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(batch, Batch):
            num_rows, num_samples = batch.waveforms.shape
            self._audio_seconds += num_rows * num_samples / SAMPLE_RATE
            self._operations += num_rows * self._flops(num_samples)
        updates = trainer.global_step - self._first_update
        if not updates or trainer.global_step % trainer.log_every_n_steps:
            return
        seconds = time.perf_counter() - self._since - self._left_out
        values = {
            "audio_seconds_per_second": self._audio_seconds / seconds,
            "updates_per_second": updates / seconds,
            "data_wait": self._timer.seconds / seconds,
            "tflops_per_second": self._operations / seconds / 1e12,
        }
        device = trainer.strategy.root_device
        if device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(device), self._precision)
            if peak is not None:
                values["share_of_peak"] = self._operations / seconds / peak
            values["peak_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        else:
            unit = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in
            values["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
        if pl_module.compiles:
            values["compiled_graphs"] = num_compiled_graphs()
        pl_module.log_dict({name: float(value) for name, value in values.items()})
        self._restart(trainer.global_step)
