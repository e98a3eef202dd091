"""What a model's frozen features know: linear probes on labelled clips, a SUPERB in miniature.

As in SUPERB, a probe sees a learnt softmax-weighted sum of all hidden states. It is a linear classifier of the mean
over a clip's frames. The mean of a weighted sum is the weighted sum of means, so each clip goes through the model
once and probes train on what is kept: (clips, layers, D).

Layers differ in scale, so each feature is brought to zero mean and unit deviation over the training clips, before the
sum and after it: otherwise the layer weights would say more about scales than about content. The penalty on the
squares of all weights, those of the layers included, is the one with the lowest loss on a held-out fifth of the
training clips; then the probe is trained on all of them. The test clips are looked at once, at the end.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cli import progress
from dataset.labels import read_table
from dataset.speech import load_audio
from evaluation.features import hidden_states
from wav2vec2.audio import SAMPLE_RATE, AudioError
from wav2vec2.errors import UserError, short_repr
from wav2vec2.model import Wav2Vec2Model, wav2vec2_model

SPLITS = ("train", "test")
COLUMNS = ("split", "path", "label")
# What the squared weights are multiplied by before they are added to the mean cross entropy.
PENALTIES = (1.0, 0.1, 1e-2, 1e-3, 1e-4)
HELD_OUT_SHARE = 0.2
# Of L-BFGS, which mostly stops before, once the loss changes by less than the second.
MAX_ITERATIONS = 100
TOLERANCE = 1e-5


class Clip(NamedTuple):
    """A labelled audio file; ``label`` is a number from 0."""

    path: Path
    label: int


@dataclass(frozen=True)
class Probe:
    """A task: labelled clips to learn from and to test on.

    Attributes:
        name: the file's, without its ending.
        path: the ``.tsv`` file.
        labels: the names of the classes.
        train, test: the clips.
    """

    name: str
    path: Path
    labels: tuple[str, ...]
    train: tuple[Clip, ...]
    test: tuple[Clip, ...]

    def summary(self) -> dict[str, Any]:
        """The sizes, and the accuracy on the test clips of always giving the training clips' most frequent label."""
        counts = torch.bincount(targets(self.train), minlength=len(self.labels))
        chance = float((targets(self.test) == counts.argmax()).double().mean())
        sizes = {"num_classes": len(self.labels), "num_train": len(self.train), "num_test": len(self.test)}
        return {**sizes, "chance": 100 * chance}


def targets(clips: Sequence[Clip]) -> Tensor:
    """(N,) int64 labels."""
    return torch.tensor([clip.label for clip in clips])


def read_probe(path: Path) -> Probe:
    """Read a tab-separated list with the header ``split path label``; paths are relative to its folder.

    Raises:
        UserError: the file is missing or no such list, a split is missing, there are fewer than two classes, a class
            has fewer than two training clips, a test clip has a label that no training clip has, a file is listed
            twice, or does not exist.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a list of labelled clips with the header split, path, label")
    rows = _read_rows(path)
    names = {split: [label for found, _, label in rows if found == split] for split in SPLITS}
    for split in SPLITS:
        if not names[split]:
            raise UserError(f"{path}: no line has the split {split}, expected clips of both train and test")
    labels = sorted(set(names["train"]))
    if len(labels) < 2:
        raise UserError(f"{path}: the training clips have one label, {short_repr(labels[0])}, expected two or more")
    for label in labels:
        if names["train"].count(label) < 2:
            raise UserError(
                f"{path}: one training clip has the label {short_repr(label)}, expected two or more of each, "
                "because the penalty is chosen on held-out ones"
            )
    if unknown := sorted(set(names["test"]) - set(labels)):
        raise UserError(
            f"{path}: test clips have the label {short_repr(unknown[0])}, which no training clip has; take them "
            "out, or add such clips for training"
        )
    clips: dict[str, list[Clip]] = {split: [] for split in SPLITS}
    for split, file, label in rows:
        clips[split].append(Clip(file, labels.index(label)))
    return Probe(path.stem, path, tuple(labels), *(tuple(clips[split]) for split in SPLITS))


def _read_rows(path: Path) -> list[tuple[str, Path, str]]:
    """Split, audio file and label of each line."""
    rows: list[tuple[str, Path, str]] = []
    lines_of: dict[Path, int] = {}
    header, table = read_table(path)
    missing = [column for column in COLUMNS if column not in header]
    if missing:
        raise UserError(
            f"{path}: line 1 is {short_repr(header)}, expected the columns split, path and label, separated by "
            f"tabs ({', '.join(missing)} missing)"
        )
    for number, row in table:
        split, name, label = (row[column] for column in COLUMNS)
        place = f"{path}: line {number}"
        if split not in SPLITS or not name or not label:
            raise UserError(
                f"{place} has split {short_repr(split)}, path {short_repr(name)} and label "
                f"{short_repr(label)}, expected train or test, a path and a label, separated by tabs"
            )
        clip = path.parent / name
        if clip in lines_of:
            raise UserError(f"{place} lists {clip}, which line {lines_of[clip]} does already; take one out")
        if not clip.is_file():
            raise UserError(f"{place}: {clip} does not exist, expected an audio file")
        lines_of[clip] = number
        rows.append((split, clip, label))
    return rows


# ---------------------------------------------------------------------------------------------------
# Features: (clips, layers, D), on the CPU
# ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def pooled_states(model: Wav2Vec2Model, source: str, probe: Probe, clips: Sequence[Clip]) -> Tensor:
    """The mean over frames of every hidden state of every clip: (clips, layers + 1, D).

    Clips go through the model one at a time, whole, so that nothing is padded.

    Args:
        model: in eval mode.
        source: its name in errors.
        probe: what the clips belong to.
        clips: of the probe.

    Raises:
        UserError: a clip cannot be read or is too short, or a hidden state is not finite.
    """
    device = next(model.parameters()).device
    rows = []
    for clip in progress(clips, f"{source}: {probe.name}", unit="clip", leave=False):
        waveform = _read_clip(probe, clip).to(device)
        states = hidden_states(model, waveform, None, source, f"{probe.path}: {clip.path}")
        rows.append(torch.stack([state.mean(0) for state in states]).float().cpu())
    return torch.stack(rows)


def log_mel_statistics(probe: Probe, clips: Sequence[Clip]) -> Tensor:
    """Mean and deviation over frames of 80 log-mel energies (25 ms windows every 10 ms): (clips, 1, 160)."""
    from torchaudio.transforms import MelSpectrogram  # imported late: nothing else here needs torchaudio

    mel = MelSpectrogram(SAMPLE_RATE, n_fft=400, hop_length=160, n_mels=80)
    rows = []
    for clip in progress(clips, f"log-mel: {probe.name}", unit="clip", leave=False):
        waveform = _read_clip(probe, clip)
        if waveform.numel() <= mel.n_fft // 2:
            raise UserError(f"{probe.path}: {clip.path}: has {waveform.numel()} samples, expected more; take it out")
        energies = torch.log(mel(waveform) + 1e-6)  # (80, frames)
        rows.append(torch.cat([energies.mean(1), energies.std(1, correction=0)])[None])
    return torch.stack(rows)


def _read_clip(probe: Probe, clip: Clip) -> Tensor:
    """(T,) at 16 kHz."""
    try:
        waveform = load_audio(clip.path)
    except AudioError as error:
        raise UserError(f"{probe.path}: {error}; mend the file or take its line out") from error
    if not waveform.isfinite().all():
        raise UserError(f"{probe.path}: {clip.path} holds samples that are NaN or infinite; take its line out")
    return waveform


# ---------------------------------------------------------------------------------------------------
# The probe
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

    def forward(self, standardized: Tensor) -> Tensor:
        """(N, layers, D) -> (N, classes)"""
        combined = torch.einsum("l,nld->nd", self.layer_weights, standardized)
        return F.linear(self.norm(combined), self.weight, self.bias)


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


def run_probe(train: Tensor, test: Tensor, probe: Probe, seed: int) -> dict[str, Any]:
    """Choose the penalty, train, test.

    Args:
        train, test: features (N, layers, D) of the probe's clips.
        probe: the task.
        seed: of the held-out clips and the initial weights.

    Returns:
        ``accuracy`` in per cent, ``layer_weights``, ``penalty``.
    """
    generator = torch.Generator().manual_seed(seed)
    labels, num_classes = targets(probe.train), len(probe.labels)
    out = held_out(labels, generator)

    def held_out_loss(penalty: float) -> float:
        trained = train_probe(train[~out], labels[~out], num_classes, penalty, generator)
        return _loss(trained, train[out], labels[out])

    penalty = min(PENALTIES, key=held_out_loss)  # of equals the strongest
    trained = train_probe(train, labels, num_classes, penalty, generator)
    with torch.no_grad():
        correct = trained(trained.standardized(test)).argmax(1) == targets(probe.test)
    return {
        "accuracy": 100 * float(correct.double().mean()),
        "layer_weights": trained.layer_weights.tolist(),
        "penalty": penalty,
    }


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation (of a sample; 0 for one run) of the accuracies, and the mean layer weights."""
    accuracies = [run["accuracy"] for run in runs]
    mean = math.fsum(accuracies) / len(accuracies)
    squares = math.fsum((accuracy - mean) ** 2 for accuracy in accuracies)
    weights = torch.tensor([run["layer_weights"] for run in runs], dtype=torch.float64)
    return {
        "mean": mean,
        "std": math.sqrt(squares / max(1, len(runs) - 1)),
        "accuracies": accuracies,
        "layer_weights": weights.mean(0).tolist(),
        "penalties": [run["penalty"] for run in runs],
    }


def probe_features(
    features: Callable[[Probe, Sequence[Clip]], Tensor], probes: Sequence[Probe], seeds: Sequence[int]
) -> dict[str, Any]:
    """Run probes on fixed features.

    Args:
        features: makes (clips, layers, D) of a probe's clips.
        probes: the tasks.
        seeds: one run each.

    Returns:
        For each probe's name what :func:`summarize` returns.
    """
    found = {}
    for probe in probes:
        train, test = (features(probe, clips) for clips in (probe.train, probe.test))
        found[probe.name] = summarize([run_probe(train, test, probe, seed) for seed in seeds])
    return found


def probe_model(model: Wav2Vec2Model, source: str, probes: Sequence[Probe], seeds: Sequence[int]) -> dict[str, Any]:
    """Run probes on a model's frozen hidden states, see :func:`probe_features`; ``source`` is named in errors."""
    return probe_features(lambda probe, clips: pooled_states(model, source, probe, clips), probes, seeds)


def probe_random_models(
    config: dict[str, Any], probes: Sequence[Probe], seeds: Sequence[int], device: torch.device
) -> dict[str, Any]:
    """Run probes on models that nothing has trained: for each seed another initialisation of the same shape."""
    runs: dict[str, list[dict[str, Any]]] = {probe.name: [] for probe in probes}
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = wav2vec2_model(**config).eval().to(device)
        for probe in probes:
            train, test = (pooled_states(model, "random weights", probe, clips) for clips in (probe.train, probe.test))
            runs[probe.name].append(run_probe(train, test, probe, seed))
    return {name: summarize(found) for name, found in runs.items()}
