"""Linear probes: what a model's frozen features know of labelled audio, a SUPERB in miniature.

As in SUPERB, a probe reads a learnt softmax-weighted sum of all hidden states, through one linear layer. The kind of
list (:mod:`labels.lists`) says what the layer finds:

    clips          the class of a clip, from the mean over its frames; accuracy
    segments       the class of each labelled frame; accuracy over frames
    text           units in each frame, by CTC, decoded greedily; error rate of units
    verification   an embedding of a clip, from the mean over its frames and the training labels; equal error rate

Layers differ in scale, so each feature is brought to zero mean and unit deviation over the training clips before the
sum: otherwise the layer weights would say more about scales than about content. The test clips are looked at once, at
the end.

Clips go through the model one at a time, whole. The mean of a weighted sum is the weighted sum of means, so little is
kept of clips and verification, (clips, layers, D), and L-BFGS trains on all of it, with the penalty on squared weights
that has the lowest loss on a held-out fifth. The frames of the others lie on disk, in half precision; Adam trains on a
few at a time.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from evaluation.features import Features, Frames, ModelFeatures, frames_on_disk, pooled_features
from labels.lists import CLIPS, TEXT, VERIFICATION, Clip, Probe
from labels.scores import METRICS, Score, Scored, clip_results, score_of
from labels.tasks import task_loss
from wav2vec2.model import wav2vec2_model

# Factors of the squared weights, which are added to the mean cross entropy.
PENALTIES = (1.0, 0.1, 1e-2, 1e-3, 1e-4)
HELD_OUT_SHARE = 0.2
# L-BFGS mostly stops before, once the loss changes by less than the second.
MAX_ITERATIONS = 100
TOLERANCE = 1e-5
# Adam, with one cycle of the learning rate; the few layer weights learn faster.
FRAME_EPOCHS, FRAMES_PER_BATCH = 10, 512
TEXT_EPOCHS, CLIPS_PER_BATCH = 20, 16
LEAST_UPDATES = 400  # short lists get more epochs
LEARNING_RATE, LAYER_LEARNING_RATE = 3e-3, 3e-2


def summary(probe: Probe) -> dict[str, Any]:
    """Return kind, metric and sizes of a probe, and the score of always answering with the most frequent label."""
    metric, _ = METRICS[probe.kind]
    sizes = {"num_classes": len(probe.labels), "num_train": len(probe.train), "num_test": len(probe.test)}
    return {"kind": probe.kind, "metric": metric, **sizes, "chance": _chance(probe)}


def _chance(probe: Probe) -> float:
    if probe.kind == VERIFICATION:
        return 50.0
    if probe.kind == TEXT:  # no unit at all is said
        return 100.0

    def amounts(clips: Sequence[Clip]) -> np.ndarray:
        """The number of clips, or the seconds of segments, with each label."""
        if probe.kind == CLIPS:
            return np.bincount([clip.target for clip in clips], minlength=len(probe.labels))
        starts, ends, labels = zip(*(segment for clip in clips for segment in clip.target), strict=True)
        return np.bincount(labels, np.subtract(ends, starts), minlength=len(probe.labels))

    tested = amounts(probe.test)
    return float(100 * tested[amounts(probe.train).argmax()] / tested.sum())


class LinearProbe(nn.Module):
    """A linear layer on a softmax-weighted sum of standardised layers.

    Args:
        mean, deviation: (layers, D) of the training features.
        weight: (outputs, D) to begin with.
        norm: applied to the sum.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor, weight: Tensor, norm: nn.Module) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        # A feature that never varies says nothing; it must not become rounding errors divided by each other.
        self.register_buffer("scale", torch.where(deviation > 1e-6, 1 / deviation, 0.0))
        self.layer_scores = nn.Parameter(torch.zeros(len(mean)))
        self.norm = norm
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(len(weight)))

    @property
    def layer_weights(self) -> Tensor:
        """(layers,), their sum is 1."""
        return self.layer_scores.softmax(0)

    def standardized(self, features: Tensor) -> Tensor:
        """(N, layers, D) -> the same, with zero mean and unit deviation over the training features."""
        return (features - self.mean) * self.scale

    def forward(self, standardized: Tensor) -> Tensor:
        """(N, layers, D) -> (N, outputs)"""
        combined = torch.einsum("l,nld->nd", self.layer_weights, standardized)
        return F.linear(self.norm(combined), self.weight, self.bias)


class Run(NamedTuple):
    """One run of a probe: its score, and the weight of each layer (their sum is 1)."""

    score: Score
    layer_weights: list[float]


@dataclass(frozen=True)
class Probed(Scored):
    """The scores of a probe's runs on one kind of features, and the mean of their layer weights."""

    layer_weights: list[float]

    @classmethod
    def of(cls, runs: Sequence[Run], probe: Probe) -> "Probed":
        """Gather runs of a probe."""
        weights = np.array([run.layer_weights for run in runs]).mean(0).tolist()
        return cls([run.score for run in runs], len(probe.test), weights)

    def summary(self) -> dict[str, Any]:
        """Return :meth:`labels.scores.Scored.summary` and ``layer_weights``."""
        return {**super().summary(), "layer_weights": self.layer_weights}


# --- whole clips -----------------------------------------------------------------------------------


def train_probe(
    features: Tensor, labels: Tensor, num_classes: int, penalty: float, generator: torch.Generator
) -> LinearProbe:
    """Minimise cross entropy plus ``penalty`` times the squared weights with L-BFGS, from small random weights.

    Features are (N, layers, D), labels (N,); the probe is returned in eval mode.
    """
    num_dims = features.shape[2]
    # With a momentum of 1 it keeps the statistics of the last batch, which is always the whole training set.
    norm = nn.BatchNorm1d(num_dims, eps=1e-6, momentum=1.0, affine=False)
    weight = 0.01 * torch.randn(num_classes, num_dims, generator=generator)
    probe = LinearProbe(features.mean(0), features.std(0, correction=0), weight, norm)
    inputs = probe.standardized(features)
    optimizer = torch.optim.LBFGS(
        probe.parameters(), max_iter=MAX_ITERATIONS, tolerance_change=TOLERANCE, line_search_fn="strong_wolfe"
    )
    penalized = (probe.weight, probe.layer_scores)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(probe(inputs), labels) + penalty * sum(w.square().sum() for w in penalized)
        value.backward()
        return value

    optimizer.step(loss)
    probe(inputs)  # the line search may have tried other layer weights last
    return probe.eval()


def held_out(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a fifth of each class, at least one clip of it and never all: (N,) bool."""
    chosen = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        (members,) = torch.nonzero(labels == label, as_tuple=True)
        count = max(1, round(HELD_OUT_SHARE * len(members)))
        chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return chosen


def fit_probe(features: Tensor, labels: Tensor, num_classes: int, seed: int) -> LinearProbe:
    """Choose the penalty on a held-out fifth, then train on all; arguments as in :func:`train_probe`."""
    generator = torch.Generator().manual_seed(seed)
    out = held_out(labels, generator)

    def held_out_loss(penalty: float) -> float:
        trained = train_probe(features[~out], labels[~out], num_classes, penalty, generator)
        with torch.no_grad():
            return float(F.cross_entropy(trained(trained.standardized(features[out])), labels[out]))

    penalty = min(PENALTIES, key=held_out_loss)  # the strongest of equals
    return train_probe(features, labels, num_classes, penalty, generator)


def run_pooled(train: Tensor, test: Tensor, probe: Probe, seed: int) -> Run:
    """Classify clips, or compare clips of unknown labels by the logits of a classifier of the training labels.

    ``train`` and ``test`` are features (N, layers, D); the seed chooses held-out clips and initial weights.
    """
    labels, wanted = (torch.tensor([clip.target for clip in clips]) for clips in (probe.train, probe.test))
    trained = fit_probe(train, labels, len(probe.labels), seed)
    with torch.no_grad():
        logits, centre = trained(trained.standardized(test)), trained(trained.standardized(train)).mean(0).numpy()
    results = clip_results(probe.kind, logits, None, wanted[:, None])
    return Run(score_of(probe.kind, results, probe.test, centre), trained.layer_weights.tolist())


# --- frames ----------------------------------------------------------------------------------------


def _train(probe: LinearProbe, loss: Callable[[Tensor], Tensor], count: int, size: int, epochs: int, seed: int) -> None:
    """Run one cycle of Adam over batches of ``count`` indices, in another order every epoch."""
    generator = torch.Generator().manual_seed(seed)
    epochs = max(epochs, math.ceil(LEAST_UPDATES / math.ceil(count / size)))
    batches = [batch for _ in range(epochs) for batch in torch.randperm(count, generator=generator).split(size)]
    parameters = [{"params": [probe.layer_scores]}, {"params": [probe.weight, probe.bias]}]
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE)
    rates = [LAYER_LEARNING_RATE, LEARNING_RATE]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=len(batches) + 1)
    for batch in batches:
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
        schedule.step()


def run_frames(train: Frames, test: Frames, probe: Probe, seed: int) -> Run:
    """Classify labelled frames, or recognise the units of texts with CTC, whose output 0 is the blank."""
    is_text, labels, parts = probe.kind == TEXT, torch.cat(train.targets), train.parts
    weight = torch.zeros(is_text + len(probe.labels), train.data.shape[2])
    trained = LinearProbe(*train.moments, weight, nn.Identity())

    def logits(frames: Frames, index: Tensor) -> Tensor:
        return trained(trained.standardized(frames.rows(index)))

    def text_loss(batch: Tensor) -> Tensor:
        chosen = batch.tolist()
        lengths = [len(parts[clip]) for clip in chosen]
        rows = logits(train, torch.cat([parts[clip] for clip in chosen])).split(lengths)
        units = pad_sequence([train.targets[clip] for clip in chosen], batch_first=True, padding_value=-1)
        return task_loss(TEXT, pad_sequence(rows, batch_first=True), torch.tensor(lengths), units)

    def frame_loss(batch: Tensor) -> Tensor:
        return F.cross_entropy(logits(train, batch), labels[batch])

    if is_text:
        _train(trained, text_loss, len(parts), CLIPS_PER_BATCH, TEXT_EPOCHS, seed)
    else:
        _train(trained, frame_loss, len(labels), FRAMES_PER_BATCH, FRAME_EPOCHS, seed)
    results: list[list[float]] = []
    with torch.no_grad():
        for part, target in zip(test.parts, test.targets, strict=True):
            results += clip_results(probe.kind, logits(test, part)[None], None, target[None])
    return Run(score_of(probe.kind, results, probe.test), trained.layer_weights.tolist())


# --- all kinds -------------------------------------------------------------------------------------


def run_probe(features: Features, probe: Probe, seeds: Sequence[int]) -> list[Run]:
    """Run a probe once for each seed, on the same features of its clips.

    Raises:
        UserError: a clip cannot be read or is too short, or a feature is not finite.
    """
    if probe.kind in (CLIPS, VERIFICATION):
        pooled, pooled_test = (pooled_features(features, probe, clips) for clips in (probe.train, probe.test))
        return [run_pooled(pooled, pooled_test, probe, seed) for seed in seeds]
    with frames_on_disk(features, probe, probe.train) as train, frames_on_disk(features, probe, probe.test) as test:
        return [run_frames(train, test, probe, seed) for seed in seeds]


def probe_random_models(
    config: Mapping[str, Any], probe: Probe, seeds: Sequence[int], device: torch.device
) -> list[Run]:
    """Run a probe on models that nothing has trained: for each seed another initialisation of the same shape."""
    runs = []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = wav2vec2_model(**config).eval().to(device)
        runs += run_probe(ModelFeatures(model, "random weights"), probe, [seed])
    return runs
