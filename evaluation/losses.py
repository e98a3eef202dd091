"""What exported files lose of what their model knows, by probes or by its own head."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from evaluation.backends import RunFeatures
from evaluation.features import LogMel
from evaluation.heads import head_tasks, score_head
from evaluation.probes import run_probe
from evaluation.scores import LOG_MEL, Scored, figure_of_merit
from exporters.traced import Outputs, Run
from labels.lists import Probe
from labels.scores import METRICS
from wav2vec2.files.errors import UserError
from wav2vec2.files.heads import TaskModel
from wav2vec2.model import Wav2Vec2Model

_SEEDS = (0, 1, 2)  # as evaluate.py
_MODEL = "the model"


class Loss(NamedTuple):
    """What a file loses.

    Attributes:
        points: of quality, where log-mel features have 0 and the model 100; of a model with a head of its score.
        reached: both numbers in words.
    """

    points: float
    reached: str


def losses(model: Wav2Vec2Model, outputs: str, files: Mapping[str, Run], probes: Sequence[Probe]) -> dict[str, Loss]:
    """Probe what files give, and what the model gives.

    Args:
        model: in eval mode, on the CPU.
        outputs: of the files, see :class:`~exporters.traced.Outputs`.
        files: what each computes, by its name.
        probes: lists of labelled clips.

    Raises:
        UserError: the lists cannot tell: the model is not better than log-mel features, or its head knows other labels.
    """
    if isinstance(model, TaskModel) and outputs == "last":
        return _of_head(model, files, probes)
    scored: dict[str, dict[str, Scored]] = {}
    for name, run in {_MODEL: Outputs(model, outputs).eval(), **files}.items():
        features = RunFeatures(run, model, name)
        scored[name] = {probe.name: run_probe(features, probe, _SEEDS).scored for probe in probes}
    scored[LOG_MEL] = {probe.name: run_probe(LogMel(), probe, _SEEDS).scored for probe in probes}
    more_is_better = {probe.name: METRICS[probe.kind][1] for probe in probes}
    merit, left_out = figure_of_merit(scored, more_is_better, _MODEL, LOG_MEL)
    if not merit:
        raise UserError(f"--probes: no list tells what is lost: {'; '.join(left_out.values())}; give longer ones")
    values = {name: {probe: one.summary()["mean"] for probe, one in found.items()} for name, found in scored.items()}
    return {
        name: Loss(
            merit[_MODEL]["mean"] - merit[name]["mean"],
            f"quality {merit[name]['mean']:.1f}, the model's {merit[_MODEL]['mean']:.1f} (log-mel features: 0); "
            + _scores(probes, values[name], values[_MODEL]),
        )
        for name in files
    }


def _of_head(model: TaskModel, files: Mapping[str, Run], probes: Sequence[Probe]) -> dict[str, Loss]:
    tasks = head_tasks(model, probes)
    if not tasks.probes:
        raise UserError(f"--probes: no list is of the model's head: {'; '.join(tasks.left_out.values())}")
    wanted = {probe.name: score_head(model, probe, _MODEL).value() for probe in tasks.probes}
    found = {}
    for name, run in files.items():
        values = {probe.name: score_head(model, probe, name, run).value() for probe in tasks.probes}
        lost = [
            (wanted[probe.name] - values[probe.name]) * (1 if METRICS[probe.kind][1] else -1) for probe in tasks.probes
        ]
        found[name] = Loss(sum(lost) / len(lost), "own head: " + _scores(tasks.probes, values, wanted))
    return found


def _scores(probes: Sequence[Probe], file: Mapping[str, float], model: Mapping[str, float]) -> str:
    return ", ".join(
        f"{probe.name} {METRICS[probe.kind][0]} {file[probe.name]:.1f} (model: {model[probe.name]:.1f})"
        for probe in probes
    )
