"""What a fine-tuned model's own head reaches on the test clips of a list of its kind and labels."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchaudio.functional import edit_distance

from cli import progress
from evaluation.features import frame_times, head_logits, read_clip
from evaluation.probes import frame_labels
from evaluation.scores import Scored
from exporters.traced import Run
from labels.lists import CLIPS, TEXT, VERIFICATION, Clip, Probe, read_probe
from labels.scores import METRICS, EqualErrorRate, Score, Share
from wav2vec2.files.errors import short_repr
from wav2vec2.files.heads import TaskModel, greedy_units


class HeadTasks(NamedTuple):
    """The lists that a head can be scored on, and why not on the others."""

    probes: list[Probe]
    left_out: dict[str, str]


def head_tasks(model: TaskModel, probes: Sequence[Probe]) -> HeadTasks:
    """Choose the lists whose kind is the head's and whose labels it knows; texts are read again in its units.

    Raises:
        UserError: see :func:`labels.lists.read_probe`.
    """
    chosen, left_out = [], {}
    for probe in probes:
        kind = CLIPS if probe.kind == VERIFICATION else probe.kind
        if kind != model.kind:
            left_out[probe.name] = f"its head is one of {model.kind}, the list one of {probe.kind}"
            continue
        if kind == TEXT:
            probe = read_probe(probe.path, model.head_settings.units)
        if unknown := sorted(set(probe.labels) - set(model.labels)):
            left_out[probe.name] = f"its head does not know the label {short_repr(unknown[0])}"
        else:
            chosen.append(probe)
    return HeadTasks(chosen, left_out)


def head_summary(model: TaskModel, tasks: HeadTasks, name: str) -> dict[str, Any]:
    """The settings of the head, its ``scores`` by the name of the list (see :meth:`Scored.summary`), ``left_out``.

    Args:
        model: in eval mode.
        tasks: of :func:`head_tasks`.
        name: of the model, in progress bars and errors.

    Raises:
        UserError: a clip cannot be read or is too short, or a logit is not finite.
    """
    scores = {}
    for probe in tasks.probes:
        metric, _ = METRICS[probe.kind]
        if probe.kind == TEXT:
            metric = f"{model.head_settings.units.removesuffix('s')} error rate"
        scored = Scored([score_head(model, probe, name)], len(probe.test))
        scores[probe.name] = {"metric": metric, **scored.summary()}
    return {**model.head_settings.to_dict(), "scores": scores, "left_out": tasks.left_out}


def score_head(model: TaskModel, probe: Probe, name: str, run: Run | None = None) -> Score:
    """What the head reaches on the test clips; a verification compares its logits, from their mean over training.

    ``run`` makes the logits in the place of the model, from which it was exported.
    """
    number = {label: place for place, label in enumerate(model.labels)}
    outputs = torch.tensor([number[label] for label in probe.labels])
    if probe.kind == VERIFICATION:
        embeddings = _all_logits(model, probe, probe.test, name, run)
        embeddings -= _all_logits(model, probe, probe.train, name, run).mean(0)
        return EqualErrorRate(embeddings.numpy(), np.array([clip.target for clip in probe.test]))
    if probe.kind == CLIPS:
        wanted = outputs[[clip.target for clip in probe.test]]
        correct = _all_logits(model, probe, probe.test, name, run).argmax(1) == wanted
        return Share(correct.double().numpy(), np.ones(len(correct)))
    extractor, counted, of = model.feature_extractor, [], []
    for clip, logits in zip(probe.test, _logits(model, probe, probe.test, name, run), strict=True):
        if probe.kind == TEXT:
            # A unit that training has not is none of the head's either.
            wanted = [int(outputs[unit]) if unit >= 0 else -1 for unit in clip.target]
            counted.append(edit_distance(greedy_units(logits), wanted))
            of.append(len(wanted))
        else:
            labels = frame_labels(clip, frame_times(len(logits), extractor.receptive_field, extractor.stride))
            is_labelled = labels >= 0
            counted.append(int((logits.argmax(1)[is_labelled] == outputs[labels[is_labelled]]).sum()))
            of.append(int(is_labelled.sum()))
    return Share(np.array(counted, dtype=float), np.array(of, dtype=float))


def _logits(model: TaskModel, probe: Probe, clips: Sequence[Clip], name: str, run: Run | None) -> Iterator[Tensor]:
    shown = progress(clips, f"{name}: own head, {probe.name}", unit="clip", leave=False)
    return (head_logits(model, read_clip(probe, clip), name, probe.place(clip), run) for clip in shown)


def _all_logits(model: TaskModel, probe: Probe, clips: Sequence[Clip], name: str, run: Run | None) -> Tensor:
    """(clips, classes)"""
    return torch.stack(list(_logits(model, probe, clips, name, run)))
