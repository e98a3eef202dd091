"""Quality: one figure for all probes, and how far chance in the choice of test clips moves it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from labels.scores import Scored, interval

# The control that quality is measured from.
LOG_MEL = "log-mel"


def placed(score: Any, bottom: Any, top: Any) -> Any:
    """Place scores, numbers or arrays of them, between the control's (0) and the teacher's (100)."""
    return 100 * (score - bottom) / (top - bottom)


def figure_of_merit(
    scored: Mapping[str, Mapping[str, Scored]], more_is_better: Mapping[str, bool], top: str, bottom: str
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Give each kind of features one number: how far it comes from ``bottom`` (0) to ``top`` (100), over all probes.

    Args:
        scored: by the name of the features, then of the probe.
        more_is_better: of each probe's score.
        top: the teacher's name.
        bottom: the control's name.

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
    if not kept:
        return {}, left_out
    found = {}
    for name in samples:
        of_probes = {probe: placed(values[name][probe], values[bottom][probe], values[top][probe]) for probe in kept}
        parts = [placed(samples[name][probe], samples[bottom][probe], samples[top][probe]) for probe in kept]
        found[name] = {
            "mean": float(np.mean(list(of_probes.values()))),
            "interval": interval(np.mean(parts, axis=0)),
            "probes": {probe: float(value) for probe, value in of_probes.items()},
        }
    return found, left_out
