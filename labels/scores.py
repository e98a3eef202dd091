"""What a list of labels is scored by: a share of what there is, or the equal error rate of a verification."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from labels.lists import CLIPS, SEGMENTS, TEXT, VERIFICATION

# Of each kind: what its score is, and whether more of it is better.
METRICS = {
    CLIPS: ("accuracy", True),
    SEGMENTS: ("frame accuracy", True),
    TEXT: ("unit error rate", False),
    VERIFICATION: ("equal error rate", False),
}


class Score(Protocol):
    """What one run of a probe reached."""

    def value(self, weights: np.ndarray | None = None) -> float:
        """In per cent; ``weights`` (clips,) counts each test clip so often, None counts each once."""


@dataclass(frozen=True)
class Share:
    """A share of frames, clips or units: (clips,) how many of each clip, and how many there are."""

    counted: np.ndarray
    of: np.ndarray

    def value(self, weights: np.ndarray | None = None) -> float:
        weights = np.ones(len(self.of)) if weights is None else weights
        return float(100 * (weights @ self.counted) / (weights @ self.of))


class EqualErrorRate:
    """Of verification: the share of pairs of one label that is rejected, where as large a one of others is accepted.

    Args:
        embeddings: (clips, D), compared by their cosine, all pairs of two clips.
        labels: (clips,).
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
        if not same.any() or not other.any():  # of a bootstrap sample; nothing can be said of it
            return float("nan")
        rejected = np.concatenate([[0.0], np.cumsum(same)[self._ends] / same.sum()])
        accepted = np.concatenate([[1.0], 1 - np.cumsum(other)[self._ends] / other.sum()])
        crossing = np.argmax(rejected >= accepted)
        # Between two thresholds both rates are taken to change in proportion.
        gap = [accepted[i] - rejected[i] for i in (crossing - 1, crossing)]
        share = gap[0] / (gap[0] - gap[1])
        return float(100 * (rejected[crossing - 1] + share * (rejected[crossing] - rejected[crossing - 1])))
