"""What a probe reached on its test clips, how far chance in the choice of clips moves that, and one figure of all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from labels.scores import Score

# The control that quality is measured from.
LOG_MEL = "log-mel"
# Bootstrap samples of the test clips, and the share of them that an interval holds.
NUM_SAMPLES = 1000
COVERAGE = 0.95


def bootstrap_weights(num_clips: int, num_samples: int = NUM_SAMPLES) -> np.ndarray:
    """How often each clip is drawn, (samples, clips): the same draws for every model that is compared."""
    return np.random.default_rng(0).multinomial(num_clips, np.full(num_clips, 1 / num_clips), num_samples)


def interval(samples: np.ndarray) -> list[float]:
    """The middle of bootstrap samples, its lower and upper end."""
    tails = (100 * (1 - COVERAGE) / 2, 100 * (1 + COVERAGE) / 2)
    return [float(end) for end in np.nanpercentile(samples, tails)]


@dataclass(frozen=True)
class Scored:
    """The runs of a probe on one kind of features.

    Attributes:
        runs: one score for each seed.
        num_clips: test clips.
    """

    runs: Sequence[Score]
    num_clips: int

    @cached_property
    def samples(self) -> np.ndarray:
        """The mean over the runs in each bootstrap sample of the test clips, (samples,)."""
        return np.array(
            [np.mean([run.value(weights) for run in self.runs]) for weights in bootstrap_weights(self.num_clips)]
        )

    def summary(self) -> dict[str, Any]:
        """``mean`` and ``std`` over the runs (of a sample; 0 for one), ``values`` of each, ``interval`` over clips."""
        values = [run.value() for run in self.runs]
        return {
            "mean": float(np.mean(values)),
            "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
            "values": values,
            "interval": interval(self.samples),
        }


def placed(score: Any, bottom: Any, top: Any) -> Any:
    """Where scores, numbers or arrays of them, lie between the control's (0) and the teacher's (100)."""
    return 100 * (score - bottom) / (top - bottom)


def figure_of_merit(
    scored: Mapping[str, Mapping[str, Scored]], more_is_better: Mapping[str, bool], top: str, bottom: str
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """One number for each kind of features: how far it comes from ``bottom`` (0) to ``top`` (100), over all probes.

    Args:
        scored: by the name of the features, then of the probe.
        more_is_better: of each probe's score.
        top: of the teacher.
        bottom: of the control.

    Returns:
        For each name ``mean`` over the probes, ``interval``, and ``probes``, its number in each; and the probes that
        are left out, with the reason.
    """
    samples = {name: {probe: one.samples for probe, one in probes.items()} for name, probes in scored.items() if probes}
    values = {
        name: {probe: np.mean([run.value() for run in one.runs]) for probe, one in scored[name].items()}
        for name in samples
    }
    left_out = {}
    for probe in scored[top]:
        gain = (samples[top][probe] - samples[bottom][probe]) * (1 if more_is_better[probe] else -1)
        low, high = interval(gain)
        if not low > 0:
            left_out[probe] = f"{top} is not better than {bottom} by more than chance ({low:+.1f} to {high:+.1f})"
    kept = [probe for probe in scored[top] if probe not in left_out]
    found = {}
    for name in samples:
        of_probes = {probe: placed(values[name][probe], values[bottom][probe], values[top][probe]) for probe in kept}
        if kept:
            parts = [placed(samples[name][probe], samples[bottom][probe], samples[top][probe]) for probe in kept]
            found[name] = {
                "mean": float(np.mean(list(of_probes.values()))),
                "interval": interval(np.mean(parts, axis=0)),
                "probes": {probe: float(value) for probe, value in of_probes.items()},
            }
    return found, left_out
