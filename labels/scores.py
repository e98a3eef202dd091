"""Scores of labelled clips: a share of clips, frames or units, or an equal error rate; and their intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torchaudio.functional import edit_distance

from labels.lists import CLIPS, SEGMENTS, TEXT, VERIFICATION, Clip
from wav2vec2.files.heads import greedy_units

# The score of each kind of list, and whether more of it is better.
METRICS = {
    CLIPS: ("accuracy", True),
    SEGMENTS: ("frame accuracy", True),
    TEXT: ("unit error rate", False),
    VERIFICATION: ("equal error rate", False),
}
# Bootstrap samples of the test clips, and the share of them that an interval holds.
NUM_SAMPLES = 1000
COVERAGE = 0.95


class Score(Protocol):
    """The result of one run on the clips of a split."""

    def value(self, weights: np.ndarray | None = None) -> float:
        """Return the score in per cent; ``weights`` (clips,) counts each clip so often, None counts each once."""


@dataclass(frozen=True)
class Share:
    """A share of frames, clips or units: (clips,) how many count in each clip, and of how many."""

    counted: np.ndarray
    of: np.ndarray

    def value(self, weights: np.ndarray | None = None) -> float:
        weights = np.ones(len(self.of)) if weights is None else weights
        return float(100 * (weights @ self.counted) / (weights @ self.of))


class EqualErrorRate:
    """The share of pairs with one label that is rejected where an equal share of the other pairs is accepted.

    All pairs of two clips are compared, by the cosine of their embeddings (clips, D); labels are (clips,).
    """

    def __init__(self, embeddings: np.ndarray, labels: np.ndarray) -> None:
        normed = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True).clip(min=1e-12)
        self._first, self._second = np.triu_indices(len(labels), k=1)
        scores = (normed @ normed.T)[self._first, self._second]
        order = np.argsort(scores, kind="stable")
        self._first, self._second = self._first[order], self._second[order]
        self._is_same = labels[self._first] == labels[self._second]
        # Thresholds lie between different scores only.
        scores = scores[order]
        self._ends = np.flatnonzero(np.append(scores[1:] > scores[:-1], True))

    def value(self, weights: np.ndarray | None = None) -> float:
        pairs = np.ones(len(self._first)) if weights is None else weights[self._first] * weights[self._second]
        same, other = pairs * self._is_same, pairs * ~self._is_same
        if not same.any() or not other.any():  # a bootstrap sample that says nothing
            return float("nan")
        rejected = np.concatenate([[0.0], np.cumsum(same)[self._ends] / same.sum()])
        accepted = np.concatenate([[1.0], 1 - np.cumsum(other)[self._ends] / other.sum()])
        crossing = np.argmax(rejected >= accepted)
        # Between two thresholds both rates are taken to change in proportion.
        gap = [accepted[i] - rejected[i] for i in (crossing - 1, crossing)]
        share = gap[0] / (gap[0] - gap[1])
        return float(100 * (rejected[crossing - 1] + share * (rejected[crossing] - rejected[crossing - 1])))


def clip_results(kind: str, logits: Tensor, lengths: Tensor | None, targets: Tensor) -> list[list[float]]:
    """Count in each clip what is right (or the errors of a text) and how much there is; a verification keeps logits.

    Args:
        logits: (B, frames, outputs), or (B, outputs) for whole clips.
        lengths: (B,) valid frames, or None if all are; read for texts.
        targets: (B, N), see :func:`labels.batches.target_of`; -1 is padding.
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
    ends = len(logits) * [None] if lengths is None else lengths.tolist()
    for row, end, target in zip(logits, ends, targets.tolist(), strict=True):
        wanted = [unit for unit in target if unit >= 0]
        results.append([float(edit_distance(greedy_units(row[:end]), wanted)), float(len(wanted))])
    return results


def score_of(
    kind: str, results: Sequence[Sequence[float]], clips: Sequence[Clip], centre: np.ndarray | None = None
) -> Score:
    """Score all clips of a split from their :func:`clip_results`.

    ``centre`` (outputs,) is taken from a verification's logits, in its precision, before they are compared; None takes
    their mean.
    """
    values = np.array(results, dtype=float)
    if kind == VERIFICATION:
        embeddings = values - values.mean(0) if centre is None else values.astype(centre.dtype) - centre
        return EqualErrorRate(embeddings, np.array([clip.target for clip in clips]))
    return Share(*values.T)


def bootstrap_weights(num_clips: int) -> np.ndarray:
    """Draw how often each clip counts, (samples, clips): the same draws for all models that are compared."""
    return np.random.default_rng(0).multinomial(num_clips, np.full(num_clips, 1 / num_clips), NUM_SAMPLES)


def interval(samples: np.ndarray) -> list[float]:
    """Return the lower and upper end of the middle of bootstrap samples."""
    tails = (100 * (1 - COVERAGE) / 2, 100 * (1 + COVERAGE) / 2)
    return [float(end) for end in np.nanpercentile(samples, tails)]


@dataclass(frozen=True)
class Scored:
    """The scores of several runs on the same clips, one for each seed."""

    runs: Sequence[Score]
    num_clips: int  # of the test

    @property
    def mean(self) -> float:
        """The mean over the runs, in per cent."""
        return float(np.mean([run.value() for run in self.runs]))

    @cached_property
    def samples(self) -> np.ndarray:
        """The mean over the runs in each bootstrap sample of the test clips, (samples,)."""
        return np.array(
            [np.mean([run.value(weights) for run in self.runs]) for weights in bootstrap_weights(self.num_clips)]
        )

    def summary(self) -> dict[str, Any]:
        """Return ``mean`` and ``std`` over the runs (0 for one), their ``values``, and ``interval`` over the clips."""
        values = [run.value() for run in self.runs]
        return {
            "mean": self.mean,
            "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
            "values": values,
            "interval": interval(self.samples),
        }
