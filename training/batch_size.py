"""``--seconds_per_batch auto``: as much audio in a batch as the memory holds, found by trial.

Two forward and backward passes, with few and with more utterances of the greatest length, show how memory grows with
the audio: linearly, since a batch of shorter utterances and the same audio needs less (attention). A batch may then
take :data:`SHARE` of the memory that is free.
"""

import contextlib
import ctypes
import math
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import distributed

from cli import AllProcessesError
from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.errors import UserError

AUTO = "auto"


def give_back_freed_memory() -> None:
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


# The rest is for what varies: fragments, the loader, the libraries' own memory.
SHARE = 0.9
# The second trial's audio, so that what is measured is more than noise.
TRIAL_SECONDS = 30
# The result is a multiple of this many seconds, or the longest utterance if that is more.
STEP_SECONDS = 5
_ADVICE = "add --checkpoint_activations, lower --max_crop_seconds, or take a machine with more memory"


def seconds_or_auto(text: str) -> float | str:
    """The value of ``--seconds_per_batch``: seconds, or "auto" as it is."""
    return AUTO if text == AUTO else float(text)


def fitting_seconds(budget: float, peaks: dict[float, float], longest_seconds: float) -> float:
    """Seconds of audio whose update needs at most ``budget``, rounded down.

    Args:
        budget: bytes.
        peaks: bytes needed at the highest by updates on one or two amounts of audio, by seconds.
        longest_seconds: of one utterance; a batch must hold it.

    Raises:
        UserError: not even that fits.
    """
    (least, least_peak), (most, most_peak) = min(peaks.items()), max(peaks.items())
    if math.isinf(least_peak):
        raise UserError(
            f"--seconds_per_batch auto: there is no memory for an update on one utterance of {longest_seconds:g} s; "
            f"{_ADVICE}"
        )
    per_second = (most_peak - least_peak) / (most - least) if most > least else 0.0
    if per_second <= 0:  # one amount only, or lost in noise: as if all of it grew with the audio
        per_second = most_peak / most
    fixed = max(0.0, most_peak - per_second * most)
    seconds = (budget - fixed) / per_second
    if seconds < longest_seconds:
        raise UserError(
            f"--seconds_per_batch auto: an update on one utterance of {longest_seconds:g} s needs "
            f"{(fixed + per_second * longest_seconds) / 1e9:.2f} GB, {budget / 1e9:.2f} GB may be used here; {_ADVICE}"
        )
    return rounded_down(seconds, longest_seconds)


def rounded_down(seconds: float, longest_seconds: float) -> float:
    """A multiple of :data:`STEP_SECONDS`, or what the longest utterance needs if that is more."""
    return max(seconds // STEP_SECONDS * STEP_SECONDS, math.ceil(longest_seconds * 1000) / 1000)


def measure(
    trial: Callable[[int], float], budget: float, longest_seconds: float, reserved: float = 0.0
) -> dict[float, float]:
    """The bytes that updates need at the highest, by their seconds of audio, for :func:`fitting_seconds`.

    Args:
        trial: makes an update on so many utterances of the greatest length and says what it needed.
        budget: bytes that may be used; the second trial is left out if it could need more.
        longest_seconds: of an utterance.
        reserved: bytes that training needs besides, such as the optimiser's.
    """
    peaks = {longest_seconds: trial(1) + reserved}
    more = max(3, math.ceil(TRIAL_SECONDS / longest_seconds))
    if more * peaks[longest_seconds] <= budget:
        peaks[more * longest_seconds] = trial(more) + reserved
    return peaks


# ---------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------


def free_memory(device: torch.device, num_processes: int) -> float:
    """Bytes that this process may still take on its device.

    Args:
        device: a GPU of its own, or a CPU.
        num_processes: processes that share the memory of a CPU.

    Raises:
        UserError: the system does not say.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info(device)[0])
    give_back_freed_memory()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    except (OSError, StopIteration):
        raise UserError(
            "--seconds_per_batch auto: this system does not say how much memory is free; give a number"
        ) from None
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limits = [Path("/sys/fs/cgroup", name) for name in (limit, used)]  # of a container or a SLURM job
        if all(path.is_file() for path in limits):
            most, now = (path.read_text().strip() for path in limits)
            free = min(free, int(most) - int(now)) if most != "max" else free
    return free / num_processes


class MemoryMeter:
    """Measures what work needs at its highest above what this process held when the meter was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        give_back_freed_memory()
        self._before = torch.cuda.memory_allocated(device) if device.type == "cuda" else _status_bytes("VmRSS")

    def __call__(self, work: Callable[[], None]) -> float:
        """Bytes."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            work()
            return float(torch.cuda.max_memory_allocated(self._device) - self._before)
        give_back_freed_memory()  # or the work would take from it, and seem to need less
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        work()
        return float(_status_bytes("VmHWM") - self._before)


def _status_bytes(name: str) -> int:
    """A number of bytes from /proc/self/status (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


# ---------------------------------------------------------------------------------------------------
# In a run
# ---------------------------------------------------------------------------------------------------


class FillMemory(pl.Callback):
    """Chooses the seconds per batch when models and gradients are where they will be, before any batch is made.

    Args:
        num_samples: of the longest crop.
        most_seconds: no more than this, however large the memory.
        use: called with the seconds, which are the same in all processes: the fewest that one of them found.
    """

    def __init__(self, num_samples: int, most_seconds: float, use: Callable[[float], None]) -> None:
        self._num_samples = num_samples
        self._most_seconds = most_seconds
        self._use = use

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        try:
            found: float | str = self._measure(trainer, pl_module)
        except UserError as error:
            found = str(error)
        everyones = [found]
        if distributed.is_initialized():
            everyones = [found] * distributed.get_world_size()
            distributed.all_gather_object(everyones, found)
        for other in everyones:
            if isinstance(other, str):
                raise AllProcessesError(other)
        self._use(min(everyones))

    def _measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> float:
        device = trainer.strategy.root_device
        longest_seconds = self._num_samples / SAMPLE_RATE
        budget = SHARE * free_memory(device, trainer.num_devices)
        trainer.strategy.barrier()  # no process takes memory before all have looked
        meter = MemoryMeter(device)
        # AdamW keeps two numbers for each that it trains, from the first update on.
        reserved = sum(2 * p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)

        def trial(num_utterances: int) -> float:
            return meter(lambda: module.trial(num_utterances, self._num_samples))

        try:
            peaks = measure(trial, budget, longest_seconds, reserved)
        except torch.OutOfMemoryError:
            peaks = {longest_seconds: math.inf}
        return min(fitting_seconds(budget, peaks, longest_seconds), rounded_down(self._most_seconds, longest_seconds))
