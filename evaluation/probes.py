"""What a model's frozen features know: linear probes on labelled audio, a SUPERB in miniature.

As in SUPERB, a probe sees a learnt softmax-weighted sum of all hidden states. What it makes of it is one linear layer,
by the kind of list (:mod:`labels.lists`):

    clips          classes of the mean over a clip's frames; accuracy
    segments       classes of each labelled frame; accuracy over frames
    text           units of each frame, by CTC, decoded greedily; error rate of units
    verification   an embedding of the mean over a clip's frames, learnt from the training labels; equal error rate

Layers differ in scale, so each feature is brought to zero mean and unit deviation over the training clips before the
sum: otherwise the layer weights would say more about scales than about content. The test clips are looked at once, at
the end.

Clips go through the model one at a time, whole. The mean of a weighted sum is the weighted sum of means, so of the
clips and the verification little is kept, (clips, layers, D), and L-BFGS trains on all of it, with the penalty on the
squares of all weights that has the lowest loss on a held-out fifth. The frames of the others lie on disk, in half
precision; Adam trains on a few at a time.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torchaudio.functional import edit_distance

from evaluation.features import Features, Frames, ModelFeatures, frames_on_disk, pooled_features
from evaluation.scores import Scored
from labels.batches import frame_labels
from labels.lists import CLIPS, SEGMENTS, TEXT, VERIFICATION, Clip, Probe
from labels.scores import METRICS, EqualErrorRate, Score, Share
from wav2vec2.model import wav2vec2_model

# What the squared weights are multiplied by before they are added to the mean cross entropy.
PENALTIES = (1.0, 0.1, 1e-2, 1e-3, 1e-4)
HELD_OUT_SHARE = 0.2
# Of L-BFGS, which mostly stops before, once the loss changes by less than the second.
MAX_ITERATIONS = 100
TOLERANCE = 1e-5
# Of Adam, with one cycle of the learning rate; layer weights learn faster, as there are few of them.
FRAME_EPOCHS, FRAMES_PER_BATCH = 10, 512
TEXT_EPOCHS, CLIPS_PER_BATCH = 20, 16
LEAST_UPDATES = 400  # of short lists: more epochs
LEARNING_RATE, LAYER_LEARNING_RATE = 3e-3, 3e-2


def targets(clips: Sequence[Clip]) -> Tensor:
    """(N,) int64 labels."""
    return torch.tensor([clip.target for clip in clips])


def summary(probe: Probe) -> dict[str, Any]:
    """Kind, metric and sizes of a probe, and the score of always answering with the most frequent label."""
    metric, _ = METRICS[probe.kind]
    sizes = {"num_classes": len(probe.labels), "num_train": len(probe.train), "num_test": len(probe.test)}
    return {"kind": probe.kind, "metric": metric, **sizes, "chance": _chance(probe)}


def _chance(probe: Probe) -> float:
    if probe.kind == VERIFICATION:
        return 50.0
    if probe.kind == TEXT:  # no unit at all is said
        return 100.0
    if probe.kind == CLIPS:
        trained, tested = ((clip.target, 1.0) for clip in probe.train), [(clip.target, 1.0) for clip in probe.test]
    else:
        trained, tested = (
            [(segment.label, segment.end - segment.start) for clip in clips for segment in clip.target]
            for clips in (probe.train, probe.test)
        )
    weights = np.zeros(len(probe.labels))
    for label, weight in trained:
        weights[label] += weight
    most = int(weights.argmax())
    return 100 * sum(weight for label, weight in tested if label == most) / sum(weight for _, weight in tested)


# ---------------------------------------------------------------------------------------------------
# Of whole clips
# ---------------------------------------------------------------------------------------------------


class LinearProbe(nn.Module):
    """A linear classifier of a softmax-weighted sum of layers.

    Args:
        features: (N, layers, D) to take mean and deviation from.
        num_classes: outputs.
        generator: of the initial weights.
    """

    def __init__(self, features: Tensor, num_classes: int, generator: torch.Generator) -> None:
        super().__init__()
        _, num_layers, num_dims = features.shape
        deviation = features.std(0, correction=0)
        self.register_buffer("mean", features.mean(0))
        # A feature that never varies says nothing; it must not become rounding errors divided by each other.
        self.register_buffer("scale", torch.where(deviation > 1e-6, 1 / deviation, 0.0))
        self.layer_scores = nn.Parameter(torch.zeros(num_layers))
        # With a momentum of 1 it keeps the statistics of the last batch, which is always the whole training set.
        self.norm = nn.BatchNorm1d(num_dims, eps=1e-6, momentum=1.0, affine=False)
        self.weight = nn.Parameter(0.01 * torch.randn(num_classes, num_dims, generator=generator))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    @property
    def layer_weights(self) -> Tensor:
        """(layers,), their sum is 1."""
        return self.layer_scores.softmax(0)

    def standardized(self, features: Tensor) -> Tensor:
        """(N, layers, D) to zero mean and unit deviation, as on the training clips."""
        return (features - self.mean) * self.scale

    def combined(self, standardized: Tensor) -> Tensor:
        """The weighted sum of layers: (N, layers, D) -> (N, D)."""
        return self.norm(torch.einsum("l,nld->nd", self.layer_weights, standardized))

    def forward(self, standardized: Tensor) -> Tensor:
        """(N, layers, D) -> (N, classes)"""
        return F.linear(self.combined(standardized), self.weight, self.bias)


def train_probe(
    features: Tensor, labels: Tensor, num_classes: int, penalty: float, generator: torch.Generator
) -> LinearProbe:
    """Minimise cross entropy plus the penalty with L-BFGS, from small random weights.

    Args:
        features: (N, layers, D).
        labels: (N,).
        num_classes: number of them.
        penalty: of the squared weights.
        generator: of the initial weights.

    Returns:
        The probe in eval mode.
    """
    probe = LinearProbe(features, num_classes, generator)
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
    """(N,) bool: a random fifth of each class, at least one clip of it and never all."""
    chosen = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        (members,) = torch.nonzero(labels == label, as_tuple=True)
        count = max(1, round(HELD_OUT_SHARE * len(members)))
        chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return chosen


@torch.no_grad()
def _loss(probe: LinearProbe, features: Tensor, labels: Tensor) -> float:
    return float(F.cross_entropy(probe(probe.standardized(features)), labels))


def fit_probe(features: Tensor, labels: Tensor, num_classes: int, seed: int) -> LinearProbe:
    """Choose the penalty on a held-out fifth, then train on all.

    Args:
        features: (N, layers, D).
        labels: (N,).
        num_classes: number of them.
        seed: of the held-out clips and the initial weights.
    """
    generator = torch.Generator().manual_seed(seed)
    out = held_out(labels, generator)

    def held_out_loss(penalty: float) -> float:
        trained = train_probe(features[~out], labels[~out], num_classes, penalty, generator)
        return _loss(trained, features[out], labels[out])

    penalty = min(PENALTIES, key=held_out_loss)  # of equals the strongest
    return train_probe(features, labels, num_classes, penalty, generator)


class Run(NamedTuple):
    """One run of a probe: what it reached, and the weight of each layer (their sum is 1)."""

    score: Score
    layer_weights: list[float]


def run_clips(train: Tensor, test: Tensor, probe: Probe, seed: int) -> Run:
    """Classify clips: features (N, layers, D) of the probe's training and test clips."""
    trained = fit_probe(train, targets(probe.train), len(probe.labels), seed)
    with torch.no_grad():
        correct = trained(trained.standardized(test)).argmax(1) == targets(probe.test)
    return Run(Share(correct.double().numpy(), np.ones(len(correct))), trained.layer_weights.tolist())


def run_verification(train: Tensor, test: Tensor, probe: Probe, seed: int) -> Run:
    """Compare clips of labels that training has not, by the scores that a classifier of its labels gives them."""
    trained = fit_probe(train, targets(probe.train), len(probe.labels), seed)
    with torch.no_grad():
        embeddings = F.linear(trained.combined(trained.standardized(test)), trained.weight)
        embeddings -= F.linear(trained.combined(trained.standardized(train)), trained.weight).mean(0)
    return Run(EqualErrorRate(embeddings.numpy(), targets(probe.test).numpy()), trained.layer_weights.tolist())


# ---------------------------------------------------------------------------------------------------
# Of frames
# ---------------------------------------------------------------------------------------------------


class FrameProbe(nn.Module):
    """A linear layer on a softmax-weighted sum of standardised layers.

    Args:
        frames: to take mean and deviation from.
        num_outputs: of the linear layer, which begins at zero.
    """

    def __init__(self, frames: Frames, num_outputs: int) -> None:
        super().__init__()
        mean, deviation = frames.moments
        self.register_buffer("mean", mean)
        self.register_buffer("scale", torch.where(deviation > 1e-6, 1 / deviation, 0.0))
        self.layer_scores = nn.Parameter(torch.zeros(len(mean)))
        self.weight = nn.Parameter(torch.zeros(num_outputs, mean.shape[1]))
        self.bias = nn.Parameter(torch.zeros(num_outputs))

    @property
    def layer_weights(self) -> Tensor:
        """(layers,), their sum is 1."""
        return self.layer_scores.softmax(0)

    def forward(self, rows: Tensor) -> Tensor:
        """(n, layers, D) -> (n, outputs)"""
        combined = torch.einsum("l,nld->nd", self.layer_weights, (rows - self.mean) * self.scale)
        return F.linear(combined, self.weight, self.bias)


def _batches(count: int, size: int, epochs: int, generator: torch.Generator) -> list[Tensor]:
    """Indices of ``count`` things in batches, every epoch in another order; at least :data:`LEAST_UPDATES`."""
    epochs = max(epochs, math.ceil(LEAST_UPDATES / math.ceil(count / size)))
    return [batch for _ in range(epochs) for batch in torch.randperm(count, generator=generator).split(size)]


def _train(probe: FrameProbe, batches: Sequence[Tensor], loss: Callable[[Tensor], Tensor]) -> None:
    """One cycle of Adam over batches."""
    optimizer = torch.optim.Adam(
        [{"params": [probe.layer_scores]}, {"params": [probe.weight, probe.bias]}], LEARNING_RATE
    )
    rates = [LAYER_LEARNING_RATE, LEARNING_RATE]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=len(batches) + 1)
    for batch in batches:
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
        schedule.step()


def _is_labelled(clip: Clip, times: Tensor) -> Tensor:
    return frame_labels(clip, times) >= 0


def _is_any(_: Clip, times: Tensor) -> Tensor:
    return torch.ones_like(times, dtype=torch.bool)


def _all_labels(frames: Frames, clips: Sequence[Clip]) -> Tensor:
    counts = torch.bincount(frames.clips, minlength=len(clips)).tolist()
    return torch.cat([frame_labels(clip, times) for clip, times in zip(clips, frames.times.split(counts), strict=True)])


def run_segments(train: Frames, test: Frames, probe: Probe, seed: int) -> Run:
    """Classify the labelled frames of the probe's clips."""
    generator = torch.Generator().manual_seed(seed)
    trained = FrameProbe(train, len(probe.labels))
    labels = _all_labels(train, probe.train)
    batches = _batches(len(labels), FRAMES_PER_BATCH, FRAME_EPOCHS, generator)
    _train(trained, batches, lambda batch: F.cross_entropy(trained(train.rows(batch)), labels[batch]))
    wanted, correct = _all_labels(test, probe.test), []
    with torch.no_grad():
        for part in torch.arange(len(wanted)).split(8192):
            correct.append(trained(test.rows(part)).argmax(1) == wanted[part])
    counts = torch.bincount(test.clips, minlength=len(probe.test)).double()
    found = torch.zeros_like(counts).index_add_(0, test.clips, torch.cat(correct).double())
    return Run(Share(found.numpy(), counts.numpy()), trained.layer_weights.tolist())


def _parts(frames: Frames, num_clips: int) -> list[Tensor]:
    """The indices of the frames of each clip."""
    return list(torch.arange(len(frames.clips)).split(torch.bincount(frames.clips, minlength=num_clips).tolist()))


def run_text(train: Frames, test: Frames, probe: Probe, seed: int) -> Run:
    """Recognise the units of the probe's clips with CTC; output 0 is the blank."""
    generator = torch.Generator().manual_seed(seed)
    trained = FrameProbe(train, 1 + len(probe.labels))
    parts = _parts(train, len(probe.train))

    def loss(batch: Tensor) -> Tensor:
        chosen = batch.tolist()
        lengths = torch.tensor([len(parts[clip]) for clip in chosen])
        scores = trained(train.rows(torch.cat([parts[clip] for clip in chosen]))).split(lengths.tolist())
        units = [torch.tensor(probe.train[clip].target) + 1 for clip in chosen]
        return F.ctc_loss(
            pad_sequence(scores).log_softmax(-1),
            torch.cat(units),
            lengths,
            torch.tensor([len(each) for each in units]),
            zero_infinity=True,  # a text of more units than frames cannot be learnt, and must not spoil the others
        )

    _train(trained, _batches(len(parts), CLIPS_PER_BATCH, TEXT_EPOCHS, generator), loss)
    errors, counts = [], []
    with torch.no_grad():
        for clip, part in zip(probe.test, _parts(test, len(probe.test)), strict=True):
            best = trained(test.rows(part)).argmax(1).unique_consecutive()
            errors.append(edit_distance((best[best > 0] - 1).tolist(), list(clip.target)))
            counts.append(len(clip.target))
    return Run(Share(np.array(errors, dtype=float), np.array(counts, dtype=float)), trained.layer_weights.tolist())


# ---------------------------------------------------------------------------------------------------
# All kinds
# ---------------------------------------------------------------------------------------------------


class Probed(NamedTuple):
    """The runs of a probe on one kind of features.

    Attributes:
        scored: what they reached.
        layer_weights: the mean over the runs.
        by_layer: the mean score of each layer alone, where that was asked for.
    """

    scored: Scored
    layer_weights: list[float]
    by_layer: list[float] | None = None

    def summary(self) -> dict[str, Any]:
        """What :meth:`evaluation.scores.Scored.summary` says, ``layer_weights`` and ``by_layer``."""
        return {**self.scored.summary(), "layer_weights": self.layer_weights, "by_layer": self.by_layer}


def run_probe(features: Features, probe: Probe, seeds: Sequence[int], layers_alone: bool = False) -> Probed:
    """Run a probe once for each seed, on the same features of its clips.

    Args:
        features: of what is measured.
        probe: the task.
        seeds: of held-out clips, initial weights and the order of batches.
        layers_alone: run it on each layer alone, too.

    Raises:
        UserError: a clip cannot be read or is too short, or a feature is not finite.
    """
    with ExitStack() as stack:
        if probe.kind in (CLIPS, VERIFICATION):
            run = run_clips if probe.kind == CLIPS else run_verification
            train, test = (pooled_features(features, probe, clips) for clips in (probe.train, probe.test))
            alone = [(train[:, [layer]], test[:, [layer]]) for layer in range(train.shape[1])]
        else:
            run, wanted = (run_segments, _is_labelled) if probe.kind == SEGMENTS else (run_text, _is_any)
            train, test = (
                stack.enter_context(frames_on_disk(features, probe, clips, wanted))
                for clips in (probe.train, probe.test)
            )
            alone = [(train.of_layer(layer), test.of_layer(layer)) for layer in range(len(train.scale))]
        runs = [run(train, test, probe, seed) for seed in seeds]
        by_layer = None
        if layers_alone:
            by_layer = [float(np.mean([run(*layer, probe, seed).score.value() for seed in seeds])) for layer in alone]
        weights = np.array([each.layer_weights for each in runs]).mean(0).tolist()
        return Probed(Scored([each.score for each in runs], len(probe.test)), weights, by_layer)


def probe_random_models(config: Mapping[str, Any], probe: Probe, seeds: Sequence[int], device: torch.device) -> Probed:
    """Run a probe on models that nothing has trained: for each seed another initialisation of the same shape."""
    scores, weights = [], []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = wav2vec2_model(**config).eval().to(device)
        probed = run_probe(ModelFeatures(model, "random weights"), probe, [seed])
        scores += probed.scored.runs
        weights.append(probed.layer_weights)
    return Probed(Scored(scores, len(probe.test)), np.array(weights).mean(0).tolist())
