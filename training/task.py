"""A task: the head for a list of labelled audio, its loss and score, and learning it while distilling or pruning."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torch.nn import functional as F
from torchaudio.functional import edit_distance

from labels.batches import FrameTimes, LabelledBatch
from labels.lists import CLIPS, SEGMENTS, TEXT, UNITS, VERIFICATION, Clip, Probe, read_probe
from labels.scores import METRICS, EqualErrorRate, Score, Share
from lightning import States, Term
from training.data import VALID_SUBSET, LabelledDataModule
from training.processes import gather
from training.settings import BatchSettings, TaskSettings
from wav2vec2.files.checkpoint import build_model
from wav2vec2.files.errors import UserError
from wav2vec2.files.heads import Head, TaskModel, greedy_units, head_of, with_head

# ---------------------------------------------------------------------------------------------------
# Head, loss and score
# ---------------------------------------------------------------------------------------------------


def read_task(tsv: Path, own: Head | None, prefix: str = "", **options: str | None) -> tuple[Probe, Head]:
    """A list, and the head for it.

    Args:
        tsv: the list.
        own: the head that the model has, which says what options do not.
        prefix: of the options' names.
        options: ``units``, ``layers`` and ``pooling``, None where they are not given.

    Raises:
        UserError: the list cannot be used, or an option is not for lists of its kind.
    """
    kept = {name: value or getattr(own, name, None) for name, value in options.items()}
    probe = read_probe(tsv, kept["units"] or UNITS[0])
    is_text, is_clips = probe.kind == TEXT, probe.kind in (CLIPS, VERIFICATION)
    for name, is_fitting, needed in (
        ("units", is_text, "text"),
        ("layers", not is_text or options["layers"] == "last", "label (of text the last layer is read)"),
        ("pooling", is_clips, "label and without start and end"),
    ):
        if options[name] is not None and not is_fitting:
            option = f"--{prefix}{name}"
            raise UserError(
                f"{option} {options[name]}: is for lists with the column {needed}; {tsv} is one of {probe.kind}; "
                f"leave out {option}"
            )
    if is_text:
        return probe, Head(TEXT, probe.labels, units=kept["units"] or UNITS[0])
    kind = CLIPS if is_clips else SEGMENTS
    if own is None or own.kind != kind:
        kept = options
    layers = kept["layers"] or "weighted"
    return probe, Head(kind, probe.labels, layers=layers, pooling=(kept["pooling"] or "mean") if is_clips else None)


def with_this_head(
    contents: dict[str, Any], head: Head, source: str | os.PathLike, seed: int
) -> tuple[dict[str, Any], str]:
    """A model's contents with this head, and whose it is, in words: its own if it has such a head, else a fresh one."""
    if head_of(contents, source) == head:
        return contents, "its own"
    return {**contents, **with_head(contents, head, source, torch.Generator().manual_seed(seed))}, "a fresh"


def train_head(model: TaskModel) -> None:
    """Train what a head reads and :func:`training.pairing.freeze_unreached` has frozen."""
    if model.head_settings.layers == "last":  # behind all norms
        model.encoder.transformer.layer_norm.requires_grad_(True)
    if model.aux is not None:
        model.aux.requires_grad_(model.head is None)


def task_loss(kind: str, logits: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
    """CTC of a text, its mean over units, then over utterances; else cross-entropy, its mean over clips or frames.

    Args:
        kind: of the head.
        logits: (B, frames, outputs), or (B, outputs) of clips.
        lengths: (B,) valid frames.
        targets: (B, N), as of :class:`~labels.batches.LabelledBatch`.
    """
    logits = logits.float()
    if kind == TEXT:
        # zero_infinity: a text that does not fit into its frames must not spoil the others.
        return F.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1), targets + 1, lengths, (targets >= 0).sum(1), zero_infinity=True
        )
    if kind == CLIPS:
        logits = logits[:, None]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction="sum")
    return losses / (targets >= 0).sum().clamp(min=1)  # a batch may have no frame in a segment


def clip_results(kind: str, logits: Tensor, lengths: Tensor, targets: Tensor) -> list[list[float]]:
    """What is counted of each clip: errors and units (text), what is right and how much there is; or its logits.

    Args:
        kind: of what is scored, as of :class:`~labels.lists.Probe`.
        logits, lengths, targets: as of :func:`task_loss`.
    """
    if kind == VERIFICATION:
        return logits.float().tolist()
    if kind == CLIPS:
        return [[float(right), 1.0] for right in logits.argmax(-1) == targets[:, 0]]
    if kind == SEGMENTS:
        labelled = targets >= 0
        right = (logits.argmax(-1) == targets) & labelled
        return torch.stack([right.sum(1), labelled.sum(1)], 1).double().tolist()
    results = []
    for row, length, target in zip(logits, lengths.tolist(), targets.tolist(), strict=True):
        wanted = [unit for unit in target if unit >= 0]
        results.append([float(edit_distance(greedy_units(row[:length]), wanted)), float(len(wanted))])
    return results


def score_of(kind: str, results: Sequence[Sequence[float]], clips: Sequence[Clip]) -> Score:
    """The score of all clips of a split, from :func:`clip_results`."""
    values = np.array(results, dtype=float)
    if kind == VERIFICATION:
        return EqualErrorRate(values - values.mean(0), np.array([clip.target for clip in clips]))
    return Share(*values.T)


def kind_of(probe: Probe, clips: Sequence[Clip]) -> str:
    """What is scored: of a verification, clips whose labels training knows are classified."""
    is_known = probe.kind == VERIFICATION and clips[0].target < len(probe.labels)
    return CLIPS if is_known else probe.kind


class ValidScores:
    """What is counted of the clips in a validation, until all processes have seen theirs.

    Args:
        probe: the list.
        clips: those that are validated on.

    Attributes:
        kind: what is scored, see :func:`kind_of`.
        metric: its name.
        more_is_better: of the metric.
    """

    def __init__(self, probe: Probe, clips: Sequence[Clip]) -> None:
        self.kind = kind_of(probe, clips)
        self.metric, self.more_is_better = METRICS[self.kind]
        self._clips = clips
        self._results: list[tuple[list[int], list[list[float]]]] = []

    def note(self, batch: LabelledBatch, logits: Tensor, lengths: Tensor) -> None:
        """Count a batch; ``lengths`` are valid frames."""
        self._results.append((batch.indices, clip_results(self.kind, logits, lengths, batch.targets)))

    def score(self, trainer: pl.Trainer) -> float | None:
        """Score all clips, each once, whichever process had it, in per cent; None of Lightning's first look."""
        batches = [batch for found in gather(self._results) for batch in found]
        self._results = []
        if trainer.sanity_checking:
            return None
        found = {index: result for indices, results in batches for index, result in zip(indices, results, strict=True)}
        return score_of(self.kind, [found[index] for index in range(len(self._clips))], self._clips).value()


# ---------------------------------------------------------------------------------------------------
# While distilling or pruning
# ---------------------------------------------------------------------------------------------------


def with_task(
    contents: dict[str, Any], task: TaskSettings, batches: BatchSettings, source: Path
) -> tuple[dict[str, Any], LabelledDataModule]:
    """Give a student's contents a head for ``--task_tsv``, and make the batches of that list.

    Args:
        contents: of the student's file.
        task: the list, and the head.
        batches: of the run.
        source: the student's file, named in errors.

    Raises:
        UserError: the list cannot be used, see :class:`~training.data.LabelledDataModule`.
    """
    options = {"units": task.task_units, "layers": task.task_layers, "pooling": task.task_pooling}
    probe, head = read_task(task.task_tsv, head_of(contents, source), "task_", **options)
    with torch.device("meta"):
        extractor = build_model(contents["config"], source).feature_extractor
    data = LabelledDataModule(batches, probe, FrameTimes(extractor.stride, extractor.receptive_field))
    contents, whose = with_this_head(contents, head, source, batches.seed)
    metric = ValidScores(probe, data.clips[VALID_SUBSET]).metric
    rank_zero_only(print)(f"task of {task.task_tsv}: {whose} head, {len(head.labels)} labels, {metric}", flush=True)
    return contents, data


class Task(Term):
    """The loss of the student's head on the labels of a batch.

    Args:
        weight: weight in the sum of losses.
        student: with the head.
    """

    name = "task"

    def __init__(self, weight: float, student: TaskModel) -> None:
        super().__init__()
        self.weight = weight
        transformer = student.encoder.transformer
        self.student_depth = len(transformer.layers)
        self.head_settings = student.head_settings
        self.logits = student.logits  # a method, so that the student's modules are not this one's, too
        # A pre-norm encoder's last norm needs the mask of frames that the layers had, which their outputs do not tell:
        # the encoder runs again for it.
        self.reads_student = self.head_settings.layers == "weighted" or not (
            transformer.layer_norm_first and student.encoder.hard_concrete is not None
        )
        if not self.reads_student:
            transformer.layer_drop = 0.0  # every weight takes part in every update

    def forward(self, states: States) -> Tensor:
        """Return the loss of a batch with labels."""
        targets, lengths, kind = states.targets, states.lengths, self.head_settings.kind
        if targets is None:
            raise ValueError("a task learns from batches with labels")
        if lengths is None:
            lengths = torch.full((len(states.frames),), states.frames.size(1), device=states.frames.device)
        if kind == CLIPS:  # labels that only the validation of a verification has are no outputs
            targets = targets.masked_fill(targets >= len(self.head_settings.labels), -1)
        return task_loss(kind, self.logits(states.student, self._output(states), lengths), lengths, targets)

    def _output(self, states: States) -> Tensor | None:
        """The output of the encoder's ``forward`` (B, frames, D), if the head reads it."""
        encoder = states.model.encoder
        if not self.reads_student:
            return encoder(states.frames, states.lengths)
        if self.head_settings.layers == "weighted":
            return None
        return encoder.transformer.finished(states.student[-1])


class TaskScore(pl.Callback):
    """Logs the score of a student's head in each validation, with masks as pruning will make them.

    Args:
        student: with the head.
        scores: counts the clips that are validated on.
    """

    def __init__(self, student: TaskModel, scores: ValidScores) -> None:
        self._student = student
        self._scores = scores

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: LabelledBatch, *_: Any
    ) -> None:
        logits, lengths = self._student(batch.waveforms, batch.lengths)
        self._scores.note(batch, logits, lengths)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (score := self._scores.score(trainer)) is not None:
            pl_module.log("valid_score", score)
