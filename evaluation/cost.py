"""Cost of a model: parameters, bytes, multiplications and time."""

import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.metadata import version
from operator import truediv
from pathlib import Path
from typing import Any

import torch

from cli import progress
from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.flops import UTTERANCE_SECONDS, count_flops, count_params
from wav2vec2.model import Wav2Vec2Model, hubert_base
from wav2vec2.streaming import Stream

# SUPERB's profile of HuBERT Base, as the DPHuBERT paper gives it.
SUPERB_HUBERT_BASE_MACS = 1.669e12
# Timed runs of each model and length.
REPETITIONS = 5
# Timed chunks of a stream.
STEPS = 50


def macs_per_second(config: dict[str, Any]) -> dict[str, float]:
    """Count multiply-accumulates per second of audio, for each part of the model (:class:`flops.Parts`) and in total.

    They are counted on one utterance of :data:`UTTERANCE_SECONDS`. The length matters a little, because attention costs
    more for longer utterances: HuBERT Base needs 7.0e9 per second for 2 s, 7.3e9 for these, and 7.6e9 for 15 s.
    """
    counted = count_flops(config, round(UTTERANCE_SECONDS * SAMPLE_RATE))
    macs = {name: count / 2 / UTTERANCE_SECONDS for name, count in counted._asdict().items()}
    return {**macs, "total": sum(macs.values())}


@cache
def superb_seconds() -> float:
    """Return the seconds of audio for which HuBERT Base needs :data:`SUPERB_HUBERT_BASE_MACS`, about 229.

    The utterances that SUPERB profiles models on are not published with the benchmark, so a count for this length is no
    rerun of its profile: it gives HuBERT Base the published number by construction. Other models deviate as far as
    those utterances differ in length from :data:`UTTERANCE_SECONDS` (by 1% between 2 s and 15 s) and SUPERB's profiler
    counts more than products. Compare such numbers with each other first.
    """
    with torch.device("meta"):
        config = hubert_base().config
    return SUPERB_HUBERT_BASE_MACS / macs_per_second(config)["total"]


def counted_on() -> dict[str, float]:
    """Return the seconds of audio that the numbers of multiply-accumulates are for."""
    return {"utterance_seconds": UTTERANCE_SECONDS, "superb_seconds": superb_seconds()}


def cost(model: Wav2Vec2Model, num_bytes: int | None) -> dict[str, Any]:
    """Return all costs but speed of a model, which may be on torch's meta device; its file has ``num_bytes``."""
    macs = macs_per_second(model.config)
    return {
        "num_params": int(model.get_num_params()),
        "params": count_params(model)._asdict(),
        "num_bytes": num_bytes,
        "macs_per_second": macs,
        "superb_macs": {name: count * superb_seconds() for name, count in macs.items()},
    }


def measure_speed(
    runs: Sequence[Callable[[torch.Tensor], object]], lengths: Sequence[float], device: torch.device
) -> list[list[dict[str, Any]]]:
    """Measure real-time factors: seconds of work per second of audio, with all hidden states returned.

    The models (``runs``, each taking waveforms (B, T) on the device) take turns on the same noise, one utterance at a
    time, after a warm-up each; the median of :data:`REPETITIONS` counts.

    Returns:
        For each model one entry for each of the lengths, which are in seconds.
    """
    found: list[list[dict[str, Any]]] = [[] for _ in runs]
    for seconds in progress(lengths, "speed", unit="length"):
        generator = torch.Generator().manual_seed(0)
        waveforms = torch.randn(1, round(seconds * SAMPLE_RATE), generator=generator).to(device)
        work = {str(number): partial(_timed, run, waveforms) for number, run in enumerate(runs)}
        for warm_up in work.values():
            warm_up()
        medians = take_turns(work, REPETITIONS).values()
        for entries, (median, _) in zip(found, medians, strict=True):
            factor, threads = median / seconds, torch.get_num_threads()
            entries.append({"seconds": seconds, "batch": 1, "threads": threads, "real_time_factor": factor})
    return found


def streaming_cost(model: Wav2Vec2Model) -> dict[str, float] | None:
    """Return delay in ms and real-time factor of a streaming model, one stream and one chunk at a time; else None.

    The delay is the algorithmic one, the sound that a chunk's frames need: a receptive field for the last of them.
    """
    chunk_frames = model.encoder.chunk_frames
    if chunk_frames is None:
        return None
    hop, window = model.feature_extractor.hop, model.feature_extractor.num_samples(chunk_frames)
    stream, generator = Stream(model), torch.Generator().manual_seed(0)
    stream.push(torch.randn(window, generator=generator))
    taken = [_timed(stream.push, torch.randn(hop, generator=generator)) for _ in range(STEPS)]
    return {
        "delay_ms": 1000 * window / SAMPLE_RATE,
        "real_time_factor": statistics.median(taken) * SAMPLE_RATE / hop,
    }


def _timed(run: Callable[[torch.Tensor], object], waveforms: torch.Tensor) -> float:
    """Run the model once and return the seconds it took."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    with torch.inference_mode():
        run(waveforms)
    wait()
    return time.perf_counter() - start


def take_turns(work: Mapping[str, Callable[[], float]], repetitions: int) -> dict[str, tuple[float, float]]:
    """Measure the seconds of each kind of work in turns, every other time in the opposite order.

    Returns:
        For each its median, and its speed in units of the first: the median over the turns, so that a slow minute of
        the machine, which slows both, does not count.
    """
    taken: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repetitions):
        for name in list(work)[:: -1 if turn % 2 else 1]:
            taken[name].append(work[name]())
    baseline = next(iter(taken.values()))
    return {
        name: (statistics.median(found), statistics.median(map(truediv, baseline, found)))
        for name, found in taken.items()
    }


def made_by(device: torch.device) -> dict[str, Any]:
    """Return what it takes to get the numbers again: command, versions, device and number of CPU threads."""
    versions = {name: version(name) for name in ("torch", "numpy", "soundfile")}
    return {
        "command": shlex.join(["python", *sys.argv]),
        "versions": versions | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
