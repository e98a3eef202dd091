"""Learning a task beside distillation, or instead of it: the term of the loss, and the score in each validation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from labels.batches import FrameTimes, LabelledBatch
from labels.lists import CLIPS, VERIFICATION, Clip, Probe
from labels.scores import METRICS, clip_results, score_of
from labels.tasks import read_task, task_loss
from lightning import States, Term
from training.data import VALID_SUBSET, LabelledDataModule
from training.processes import gather
from training.settings import BatchSettings, TaskSettings
from wav2vec2.files.checkpoint import build_model
from wav2vec2.files.heads import TaskModel


def train_head(model: TaskModel) -> None:
    """Unfreeze what a head reads where :func:`training.pairing.freeze_unreached` has frozen it."""
    if model.head_settings.layers == "last":  # it reads the output of all norms
        model.encoder.transformer.layer_norm.requires_grad_(True)
    if model.aux is not None:
        model.aux.requires_grad_(model.head is None)


class ValidScores:
    """Collects the results of a validation on these clips of a list, until all processes have seen theirs."""

    def __init__(self, probe: Probe, clips: Sequence[Clip]) -> None:
        # Where training knows the labels of a verification's clips, they are classified.
        is_known = probe.kind == VERIFICATION and clips[0].target < len(probe.labels)
        self.kind = CLIPS if is_known else probe.kind
        self.metric, self.more_is_better = METRICS[self.kind]
        self._clips = clips
        self._results: list[tuple[list[int], list[list[float]]]] = []

    def note(self, batch: LabelledBatch, logits: Tensor, lengths: Tensor | None) -> None:
        """Count a batch; ``lengths`` (B,) are valid frames, None if all are."""
        self._results.append((batch.indices, clip_results(self.kind, logits, lengths, batch.targets)))

    def score(self, trainer: pl.Trainer) -> float | None:
        """Score all clips in per cent, each once, whichever process had it; None in Lightning's sanity check."""
        batches = [batch for found in gather(self._results) for batch in found]
        self._results = []
        if trainer.sanity_checking:
            return None
        found = {index: result for indices, results in batches for index, result in zip(indices, results, strict=True)}
        return score_of(self.kind, [found[index] for index in range(len(self._clips))], self._clips).value()


def with_task(
    contents: dict[str, Any], task: TaskSettings, batches: BatchSettings, source: Path
) -> tuple[dict[str, Any], LabelledDataModule]:
    """Give a student's contents a head for ``--task_tsv``, and make the batches of that list.

    Raises:
        UserError: the list cannot be used, see :class:`~training.data.LabelledDataModule`.
    """
    options = {"units": task.task_units, "layers": task.task_layers, "pooling": task.task_pooling}
    probe, contents, whose = read_task(task.task_tsv, contents, source, batches.seed, prefix="task_", **options)
    with torch.device("meta"):
        model = build_model(contents["config"], source)
    data = LabelledDataModule(batches, probe, FrameTimes.of(model))
    metric = ValidScores(probe, data.clips[VALID_SUBSET]).metric
    rank_zero_only(print)(f"task of {task.task_tsv}: {whose} head, {len(probe.labels)} labels, {metric}", flush=True)
    return contents, data


class Task(Term):
    """The loss of the student's head on the labels of a batch, with its weight in the sum of losses."""

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
        output, encoder = None, states.model.encoder
        if not self.reads_student:
            output = encoder(states.frames, states.lengths)
        elif self.head_settings.layers == "last":
            output = encoder.transformer.finished(states.student[-1])
        return task_loss(kind, self.logits(states.student, output, lengths), lengths, targets)


class TaskScore(pl.Callback):
    """Logs the score of a student's head in each validation, with masks as pruning will make them."""

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
