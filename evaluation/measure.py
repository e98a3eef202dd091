"""Measures models side by side, for evaluate.py: reads all input, then cost, fidelity, probes, heads and quality."""

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation.backends import Subject, check_backends, exported, read_speech, torch_subject
from evaluation.cost import cost, counted_on, made_by, measure_speed
from evaluation.features import LogMel
from evaluation.fidelity import HeldOutSpeech, Student, make_student, measure_fidelity
from evaluation.probes import Probed, probe_random_models, run_probe, summary
from evaluation.scores import LOG_MEL, figure_of_merit
from labels.lists import TEXT, Probe, read_probe
from labels.scores import METRICS, Scored
from labels.tasks import fitting_probe, score_head
from wav2vec2.files.checkpoint import read_model_file
from wav2vec2.files.errors import UserError
from wav2vec2.files.heads import TaskModel, model_with_its_head

# The probes of models or controls, by their name and the probe's.
AllProbed = dict[str, dict[str, Probed]]


@dataclass(frozen=True)
class Inputs:
    """All that is measured: models as PyTorch runs them, the teacher first; with --tsv, students and their speech.

    ``calibration`` is speech for int8.
    """

    device: torch.device
    subjects: list[Subject]
    probes: list[Probe]
    speech: HeldOutSpeech | None
    students: list[Student]
    calibration: list[Tensor]


def chosen_device(name: str | None) -> torch.device:
    """Return --device, or the GPU if there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU; give --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


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
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--names: two models are called {name}; give each its own name")
    models = [model_with_its_head(read_model_file(path), path).eval().to(device) for path in paths]
    return [
        torch_subject(name, path, model, is_teacher=bool(args.teacher) and number == 0)
        for number, (name, path, model) in enumerate(zip(names, paths, models, strict=True))
    ]


def read_probes(paths: Sequence[Path]) -> list[Probe]:
    """Read the probes, each with a name of its own.

    Raises:
        UserError: see :func:`labels.lists.read_probe`; or two have one name.
    """
    probes = [read_probe(path) for path in paths]
    names = [probe.name for probe in probes]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--probes: two lists are called {name}; rename one of the files")
    return probes


def read_inputs(args: argparse.Namespace, layers: list[int], backends: Sequence[str]) -> Inputs:
    """Read all input before anything is measured, so that faults in it show at once.

    Raises:
        UserError: names the option or the file.
    """
    device = chosen_device(args.device)
    check_backends(backends, device)
    probes = read_probes(args.probes)
    calibration = read_speech(args.tsv) if args.tsv and "onnx-int8" in backends else []
    subjects = load_subjects(args, device)
    if not args.tsv:
        return Inputs(device, subjects, probes, None, [], calibration)
    teacher, *others = subjects
    min_samples = max(subject.model.feature_extractor.receptive_field for subject in subjects)
    speech = HeldOutSpeech(args.tsv, args.max_seconds, min_samples)
    students = [
        make_student(each.name, each.path, each.model, teacher.model, layers, args.distill_mode) for each in others
    ]
    return Inputs(device, subjects, probes, speech, students, calibration)


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


def probe_controls(inputs: Inputs, seeds: Sequence[int]) -> AllProbed:
    """Probe log-mel features, and models of random weights in the first model's shape."""
    if not inputs.probes:
        return {}
    config = inputs.subjects[0].model.config
    log_mel = {probe.name: Probed.of(run_probe(LogMel(), probe, seeds), probe) for probe in inputs.probes}
    random = {
        probe.name: Probed.of(probe_random_models(config, probe, seeds, inputs.device), probe)
        for probe in inputs.probes
    }
    return {LOG_MEL: log_mel, "random weights": random}


def measure_quality(
    inputs: Inputs, probed: AllProbed, controls: AllProbed
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Place the models between log-mel features and the teacher, see :func:`evaluation.scores.figure_of_merit`."""
    if not (controls and inputs.subjects[0].is_teacher):
        return {}, {}
    scored = {
        name: {probe: each.scored for probe, each in found.items()}
        for name, found in {**probed, LOG_MEL: controls[LOG_MEL]}.items()
    }
    more_is_better = {probe.name: METRICS[probe.kind][1] for probe in inputs.probes}
    return figure_of_merit(scored, more_is_better, inputs.subjects[0].name, LOG_MEL)


def _summaries(probed: dict[str, Probed]) -> dict[str, Any]:
    return {name: found.summary() for name, found in probed.items()}


def evaluate(args: argparse.Namespace, layers: list[int], backends: Sequence[str]) -> dict[str, Any]:
    """Measure what the flags of evaluate.py ask for; returns its results, see :mod:`evaluation.tables`.

    ``layers`` and ``backends`` are the flags that are lists in words.

    Raises:
        UserError: a file or option cannot be used.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    inputs = read_inputs(args, layers, backends)
    subjects, teacher = inputs.subjects, inputs.subjects[0]
    fidelity = {}
    if inputs.speech is not None:
        compared = measure_fidelity(teacher.model, inputs.students, layers, inputs.speech)
        fidelity = {student.name: found for student, found in zip(inputs.students, compared, strict=True)}
    heads = {
        each.name: head_summary(each.model, inputs.probes, each.name)
        for each in subjects
        if isinstance(each.model, TaskModel)
    }
    with tempfile.TemporaryDirectory() as folder:
        every = list(subjects)
        for number, subject in enumerate(subjects):
            every += exported(subject, backends, Path(folder) / str(number), inputs.calibration)
        speeds = measure_speed([subject.run for subject in every], args.speed_seconds, inputs.device)
        probed = {
            subject.name: {
                probe.name: Probed.of(run_probe(subject.features, probe, args.seeds), probe) for probe in inputs.probes
            }
            for subject in every
        }
    controls = probe_controls(inputs, args.seeds)
    merit, left_out = measure_quality(inputs, probed, controls)
    return {
        "made_by": {**made_by(inputs.device), "seeds": args.seeds},
        "teacher": teacher.name if args.teacher else None,
        "models": [
            {
                "name": subject.name,
                "path": os.fspath(subject.path),
                "backend": subject.backend,
                "is_teacher": subject.is_teacher,
                "config": subject.model.config,
                "cost": {**cost(subject.model, subject.num_bytes), "speed": speed},
                "fidelity": {**fidelity[subject.name], "tsv": str(args.tsv)} if subject.name in fidelity else None,
                "probes": _summaries(probed[subject.name]),
                "head": heads.get(subject.name),
                "quality": merit.get(subject.name),
            }
            for subject, speed in zip(every, speeds, strict=True)
        ],
        "controls": {name: _summaries(control) for name, control in controls.items()},
        "probes": {probe.name: summary(probe) for probe in inputs.probes},
        "left_out": left_out,
        "macs_counted_on": counted_on(),
    }
