"""Measures models side by side, for evaluate.py: reads all input, then cost, fidelity, probes, heads and quality."""

import argparse
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation.backends import Subject, check_backends, exported, read_speech, torch_subject
from evaluation.cost import cost, counted_on, made_by, measure_speed, streaming_cost
from evaluation.features import LogMel
from evaluation.fidelity import Student, held_out_speech, measure_fidelity
from evaluation.probes import Probed, Run, probe_random_models, run_probe, summary
from labels.lists import TEXT, Probe, read_probe
from labels.scores import METRICS, Scored, interval
from labels.tasks import fitting_probe, score_head
from wav2vec2.files.checkpoint import read_model_file
from wav2vec2.files.errors import UserError
from wav2vec2.files.heads import TaskModel, model_with_its_head

# The control that quality is measured from.
LOG_MEL = "log-mel"


def _check_distinct(option: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{option}: two are called {name}, expected a different name for each; rename one")


def load_subjects(args: argparse.Namespace, device: torch.device) -> list[Subject]:
    """Load the teacher, if there is one, and the models, in eval mode on the device.

    Raises:
        UserError: a file is no model, or two have one name.
    """
    paths = [*([args.teacher] if args.teacher else []), *args.models]
    # Compressed models all have one file name: their folders tell them apart.
    stems = [path.stem for path in paths]
    names = [path.stem if stems.count(path.stem) == 1 else str(path) for path in paths]
    if args.names:
        names[len(paths) - len(args.models) :] = args.names
    _check_distinct("--names", names)
    models = [model_with_its_head(read_model_file(path), path).eval().to(device) for path in paths]
    return [
        torch_subject(name, path, model, is_teacher=bool(args.teacher) and number == 0)
        for number, (name, path, model) in enumerate(zip(names, paths, models, strict=True))
    ]


def head_summary(model: TaskModel, probes: Sequence[Probe], name: str) -> dict[str, Any]:
    """Score a model's own head on the lists of its kind and labels.

    Returns:
        The settings of the head, its ``scores`` by the name of the list (see :meth:`labels.scores.Scored.summary`), and
        ``left_out``: the other lists, with the reason.
    """
    scores, left_out = {}, {}
    for probe in probes:
        fitting = fitting_probe(model, probe)
        if isinstance(fitting, str):
            left_out[probe.name] = fitting
            continue
        metric, _ = METRICS[probe.kind]
        if probe.kind == TEXT:
            metric = f"{str(model.head_settings.units).removesuffix('s')} error rate"
        scored = Scored([score_head(model, fitting, name)], len(probe.test))
        scores[probe.name] = {"metric": metric, **scored.summary()}
    return {**model.head_settings.to_dict(), "scores": scores, "left_out": left_out}


def figure_of_merit(
    scored: Mapping[str, Mapping[str, Scored]], more_is_better: Mapping[str, bool], top: str, bottom: str
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Give each kind of features one number: how far it comes from ``bottom`` (0) to ``top`` (100), over all probes.

    Args:
        scored: by the name of the features, then of the probe.
        more_is_better: for each probe, whether a higher score is better.
        top: the teacher's name.
        bottom: the control's name.

    Returns:
        For each name ``mean`` over the probes, ``interval``, and ``probes``, its number in each; and the probes that
        are left out, with the reason.
    """
    left_out = {}
    for probe in scored[top]:
        gain = scored[top][probe].samples - scored[bottom][probe].samples
        low, high = interval(gain if more_is_better[probe] else -gain)
        if not low > 0:
            left_out[probe] = f"{top} is not better than {bottom} by more than chance ({low:+.1f} to {high:+.1f})"
    kept = [probe for probe in scored[top] if probe not in left_out]

    def placed(name: str, probe: str, measure: Callable[[Scored], Any]) -> Any:
        low, value, high = (measure(scored[each][probe]) for each in (bottom, name, top))
        return 100 * (value - low) / (high - low)

    found = {}
    for name in scored if kept else ():
        values = {probe: float(placed(name, probe, lambda one: one.mean)) for probe in kept}
        samples = [placed(name, probe, lambda one: one.samples) for probe in kept]
        found[name] = {
            "mean": float(np.mean(list(values.values()))),
            "interval": interval(np.mean(samples, axis=0)),
            "probes": values,
        }
    return found, left_out


def probe_all(
    subjects: Sequence[Subject], probes: Sequence[Probe], seeds: Sequence[int], device: torch.device
) -> tuple[dict[str, dict[str, Probed]], dict[str, dict[str, Probed]]]:
    """Probe models, and two controls: log-mel features, and random weights in the first model's shape."""

    def of_each(run: Callable[[Probe], list[Run]]) -> dict[str, Probed]:
        return {probe.name: Probed.of(run(probe), probe) for probe in probes}

    probed = {each.name: of_each(partial(run_probe, each.features, seeds=seeds)) for each in subjects}
    if not probes:
        return probed, {}
    random = partial(probe_random_models, subjects[0].model.config, seeds=seeds, device=device)
    return probed, {LOG_MEL: of_each(partial(run_probe, LogMel(), seeds=seeds)), "random weights": of_each(random)}


def _summaries(found: Mapping[str, Mapping[str, Probed]]) -> dict[str, dict[str, Any]]:
    return {name: {probe: each.summary() for probe, each in probed.items()} for name, probed in found.items()}


def compare_with_teacher(
    args: argparse.Namespace, layers: list[int], subjects: Sequence[Subject]
) -> dict[str, dict[str, Any]]:
    """Measure the fidelity to the first model of the others, by name.

    Raises:
        UserError: the speech cannot be used, or a model does not fit the teacher.
    """
    teacher, *others = subjects
    min_samples = max(subject.model.feature_extractor.receptive_field for subject in subjects)
    speech = held_out_speech(args.tsv, args.max_seconds, min_samples)
    students = [Student(each.path, each.model, teacher.model, layers, args.distill_mode) for each in others]
    found = measure_fidelity(teacher.model, students, speech)
    return {each.name: {**fidelity, "tsv": str(args.tsv)} for each, fidelity in zip(others, found, strict=True)}


def _cost(subject: Subject, speed: list[dict[str, Any]]) -> dict[str, Any]:
    """Return all costs of a model; as a stream if PyTorch runs it, and its speed was measured."""
    streaming = streaming_cost(subject.model) if speed and subject.backend == "torch" else None
    return {**cost(subject.model, subject.num_bytes), "speed": speed, "streaming": streaming}


def evaluate(args: argparse.Namespace, layers: list[int], backends: Sequence[str]) -> dict[str, Any]:
    """Measure what the flags of evaluate.py ask for; returns its results, see :mod:`evaluation.tables`.

    All input is read before anything is measured, so that faults in it show at once. ``layers`` and ``backends`` are
    the flags that are lists in words.

    Raises:
        UserError: a file or option cannot be used.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    has_gpu = torch.cuda.is_available()
    if args.device == "cuda" and not has_gpu:
        raise UserError("--device cuda: torch finds no GPU; give --device cpu")
    device = torch.device(args.device or ("cuda" if has_gpu else "cpu"))
    check_backends(backends, device)
    probes = [read_probe(path) for path in args.probes]
    _check_distinct("--probes", [probe.name for probe in probes])
    calibration = read_speech(args.tsv) if args.tsv and "onnx-int8" in backends else []
    subjects = load_subjects(args, device)
    fidelity = compare_with_teacher(args, layers, subjects) if args.tsv else {}
    with_head = [(each.name, each.model) for each in subjects if isinstance(each.model, TaskModel)]
    heads = {name: head_summary(model, probes, name) for name, model in with_head}
    with tempfile.TemporaryDirectory() as folder:
        every = list(subjects)
        for number, subject in enumerate(subjects):
            every += exported(subject, backends, Path(folder) / str(number), calibration)
        speeds = measure_speed([subject.features.run for subject in every], args.speed_seconds, device)
        probed, controls = probe_all(every, probes, args.seeds, device)
    summaries = _summaries(probed)
    quality: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    if controls and args.teacher:
        scored = {**probed, LOG_MEL: controls[LOG_MEL]}
        more_is_better = {probe.name: METRICS[probe.kind][1] for probe in probes}
        quality, left_out = figure_of_merit(scored, more_is_better, subjects[0].name, LOG_MEL)
    return {
        "made_by": {**made_by(device), "seeds": args.seeds},
        "teacher": subjects[0].name if args.teacher else None,
        "models": [
            {
                "name": subject.name,
                "path": os.fspath(subject.path),
                "backend": subject.backend,
                "is_teacher": subject.is_teacher,
                "config": subject.model.config,
                "cost": _cost(subject, speed),
                "fidelity": fidelity.get(subject.name),
                "probes": summaries[subject.name],
                "head": heads.get(subject.name),
                "quality": quality.get(subject.name),
            }
            for subject, speed in zip(every, speeds, strict=True)
        ],
        "controls": _summaries(controls),
        "probes": {probe.name: summary(probe) for probe in probes},
        "left_out": left_out,
        "macs_counted_on": counted_on(),
    }
