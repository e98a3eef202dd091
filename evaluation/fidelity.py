"""Fidelity: L1, cosine and linear CKA between the hidden states of students and their teacher on held-out speech."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cli import progress
from dataset.manifest import read_manifest
from evaluation.features import check_finite
from lightning import DistillMode, make_projections, student_layer
from training.pairing import check_pair
from wav2vec2.audio import SAMPLE_RATE, read_audio
from wav2vec2.files.checkpoint import load_state, read_model_file
from wav2vec2.files.errors import UserError, short_repr
from wav2vec2.model import Wav2Vec2Model


class LinearCKA:
    """Linear centred kernel alignment (Kornblith et al., arXiv 1905.00414) of two features, batch after batch.

    1 means equal up to rotation and scale, 0 uncorrelated. Only moments are kept, in float64. ``num_dims`` are the
    dimensions of both features, (Dx, Dy).
    """

    _PAIRS = ((0, 0), (1, 1), (0, 1))

    def __init__(self, num_dims: tuple[int, int], device: torch.device) -> None:
        self._num_frames = 0
        self._sums = [torch.zeros(dims, dtype=torch.float64, device=device) for dims in num_dims]
        # x'x, y'y and x'y, of features that are not centred yet.
        self._products = [
            torch.zeros(num_dims[i], num_dims[j], dtype=torch.float64, device=device) for i, j in self._PAIRS
        ]

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add frames: (frames, Dx) and (frames, Dy)."""
        features = x.double(), y.double()
        self._num_frames += len(x)
        for total, feature in zip(self._sums, features, strict=True):
            total += feature.sum(0)
        for product, (i, j) in zip(self._products, self._PAIRS, strict=True):
            product.addmm_(features[i].T, features[j])

    def compute(self) -> float | None:
        """Return the CKA of all frames so far; None if a feature does not vary."""
        covariances = [
            product - torch.outer(self._sums[i], self._sums[j]) / self._num_frames
            for product, (i, j) in zip(self._products, self._PAIRS, strict=True)
        ]
        x, y, both = (float(covariance.square().sum()) for covariance in covariances)
        # What is left of constant features is rounding.
        x_scale, y_scale, _ = (float(product.square().sum()) for product in self._products)
        if x <= 1e-24 * x_scale or y <= 1e-24 * y_scale:
            return None
        return both / (x * y) ** 0.5


@dataclass(frozen=True)
class Student:
    """A model in eval mode to compare with its teacher.

    Attributes:
        mode: "layer2layer" or "predlayer" (see :class:`lightning.DistillModule`).
        sources: for each distilled layer the student's layer that stands for it.
        projections: the learnt ones, one for each distilled layer; None if the file has none.
    """

    name: str
    path: Path
    model: Wav2Vec2Model
    mode: DistillMode
    sources: list[int]
    projections: nn.ModuleList | None


def make_student(
    name: str,
    path: Path,
    model: Wav2Vec2Model,
    teacher: Wav2Vec2Model,
    layers: Sequence[int],
    mode: DistillMode | None = None,
) -> Student:
    """Read the projections that a model's file holds, and check that all fits.

    Args:
        name, path, model: the student in eval mode, and its file.
        teacher: in eval mode.
        layers: the distilled layers, in the order of training.
        mode: "layer2layer" or "predlayer"; None takes that of the projections, and without any layer2layer, or
            predlayer if the model has no layer at the depth of one of these.

    Raises:
        UserError: the projections do not fit the layers, the mode or the models, or the models do not fit each other.
    """
    state = _read_projections(path)
    depth, own_depth = (len(each.encoder.transformer.layers) for each in (teacher, model))
    if state:  # a projection of predlayer is a Linear and an activation, with the names of a Sequential
        found: DistillMode = "predlayer" if any(key.endswith(".0.weight") for key in state) else "layer2layer"
        if mode not in (None, found):
            raise UserError(f"{path}: its projections are those of distill_mode {found}, expected those of {mode}")
        mode = found
    if mode is None:  # models of other programs may have no layer at the depth of each of the teacher's
        mode = "predlayer" if any(layer * own_depth % depth for layer in layers) else "layer2layer"
    try:
        check_pair(teacher, model, layers, mode)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if mode == "layer2layer":
        sources = [student_layer(layer, depth, own_depth) for layer in layers]
    else:
        sources = [own_depth] * len(layers)
    projections = None
    if state:
        num_found = sum(key.endswith("weight") for key in state)
        if num_found != len(layers):
            raise UserError(
                f"{path}: has {num_found} projections, expected one for each of the {len(layers)} distilled layers "
                f"{','.join(map(str, layers))}; give the layers that it was trained with, in their order"
            )
        dims = (each.config["encoder_embed_dim"] for each in (model, teacher))
        projections = make_projections(mode, [[layer] for layer in layers], *dims)
        load_state(projections, state, path)
    return Student(name, path, model, mode, sources, projections)


def _read_projections(path: Path) -> dict[str, Any]:
    """Read the state dict of a model file's projections; empty if it has none."""
    state = read_model_file(path).get("distill_linear_projs")
    if state is None:
        return {}
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{path}: distill_linear_projs is {short_repr(state)}, expected a dict from names to tensors")
    return state


class _Distances:
    """Sums over the utterances for one student and one distilled layer."""

    def __init__(self, dims: tuple[int, int], projection: nn.Module | None, device: torch.device) -> None:
        self.cka = LinearCKA(dims, device)
        self.projection = projection
        # Without a projection, states of one size can still be compared as they are.
        self.is_comparable = projection is not None or dims[0] == dims[1]
        self.l1 = self.cosine = 0.0
        self.num_utterances = 0

    def update(self, actual: Tensor, expected: Tensor) -> None:
        """Add an utterance: (frames, Dx) and (frames, Dy)."""
        self.num_utterances += 1
        self.cka.update(actual, expected)
        if self.is_comparable:
            predicted = actual if self.projection is None else self.projection(actual)
            self.l1 += float(F.l1_loss(predicted, expected))
            self.cosine += float(F.cosine_similarity(predicted, expected, dim=-1).mean())

    def means(self) -> dict[str, float | None]:
        """Return ``l1``, ``cosine`` and ``cka``."""
        l1, cosine = self.l1 / self.num_utterances, self.cosine / self.num_utterances
        comparable: dict[str, float | None] = {"l1": l1, "cosine": cosine}
        return {**(comparable if self.is_comparable else dict.fromkeys(comparable)), "cka": self.cka.compute()}


class HeldOutSpeech:
    """The whole utterances of a manifest, from short to long.

    Longer utterances than ``max_seconds`` are left out, and shorter ones than ``min_samples``, which make a frame.

    Raises:
        UserError: see :func:`dataset.manifest.read_manifest`; no utterance is left, or a file does not exist.
    """

    def __init__(self, path: Path, max_seconds: float, min_samples: int) -> None:
        manifest = read_manifest(path)
        order = np.argsort(manifest.lengths, kind="stable").tolist()
        lengths = [(index, int(manifest.lengths[index])) for index in order]
        self.utterances = [
            (manifest.full_path(index), length)
            for index, length in lengths
            if min_samples <= length <= round(max_seconds * SAMPLE_RATE)
        ]
        if not self.utterances:
            raise UserError(
                f"{path}: none of {len(order)} utterances lasts {min_samples / SAMPLE_RATE:.3f} to {max_seconds:g} s; "
                "raise --max_seconds, or give another manifest"
            )
        self.num_samples = sum(length for _, length in self.utterances)
        for audio, _ in self.utterances:
            if not Path(audio).is_file():
                raise UserError(
                    f"{path}: {audio} does not exist, expected an audio file; run prepare_data.py on the corpus where "
                    "it is now"
                )

    def __len__(self) -> int:
        return len(self.utterances)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the path and the waveform (T,) of each utterance.

        Raises:
            AudioError: a file cannot be read, or has changed.
        """
        for path, length in self.utterances:
            yield path, read_audio(path, 0, length, length)


def hidden_states(
    model: Wav2Vec2Model, waveform: Tensor, num_layers: int, model_source: str, audio_source: str
) -> list[Tensor]:
    """Run a model up to a layer on one waveform (T,): the projected extractor output and the layers' (frames, D).

    Raises:
        UserError: a hidden state is not finite; the sources are named.
    """
    # extract_features runs at least one layer.
    states, _ = model.extract_features(waveform[None], num_layers=max(1, num_layers))
    check_finite(states, model_source, audio_source)
    return [state[0] for state in states]


@torch.inference_mode()
def measure_fidelity(
    teacher: Wav2Vec2Model, students: Sequence[Student], layers: Sequence[int], speech: HeldOutSpeech
) -> list[dict[str, Any]]:
    """Compare students with their teacher on the same utterances.

    L1 and cosine are those of the distillation loss, through the learnt projections, averaged over each utterance's
    frames and then over the utterances. CKA compares the hidden states as they are, without projections, over the
    frames of all utterances together.

    All models are on one device, and the students made for the same layers.

    Returns:
        For each student ``mode``, ``projections`` (whether it has any), ``num_utterances``, ``hours``, ``note`` (None,
        or why numbers are missing) and ``layers``: for each distilled layer ``layer``, ``source`` (the student's hidden
        state), ``l1``, ``cosine`` (None if sizes differ and there is no projection) and ``cka``.

    Raises:
        UserError: a file cannot be used, or a model's hidden states are not finite.
    """
    device = next(teacher.parameters()).device
    sums: list[list[_Distances]] = []
    for student in students:
        dims = student.model.config["encoder_embed_dim"], teacher.config["encoder_embed_dim"]
        projections: list[nn.Module | None] = [None] * len(layers)
        if student.projections is not None:
            projections = list(student.projections.to(device))
        sums.append([_Distances(dims, projection, device) for projection in projections])
    for path, waveform in progress(speech, "fidelity", unit="utterance"):
        waveform = waveform.to(device)
        expected = hidden_states(teacher, waveform, max(layers), "the teacher", path)
        for student, distances in zip(students, sums, strict=True):
            actual = hidden_states(student.model, waveform, max(student.sources), str(student.path), path)
            for layer, source, distance in zip(layers, student.sources, distances, strict=True):
                distance.update(actual[source], expected[layer])
    return [
        {
            "mode": student.mode,
            "projections": student.projections is not None,
            "num_utterances": len(speech),
            "hours": speech.num_samples / SAMPLE_RATE / 3600,
            "note": _note(student, distances[0]),
            "layers": [
                {"layer": layer, "source": source, **distance.means()}
                for layer, source, distance in zip(layers, student.sources, distances, strict=True)
            ],
        }
        for student, distances in zip(students, sums, strict=True)
    ]


def _note(student: Student, distance: _Distances) -> str | None:
    if student.projections is not None:
        return None
    if distance.is_comparable:
        return "no projections in the file: L1 and cosine are those of the raw hidden states"
    return "no projections in the file, and other dimensions than the teacher's: no L1 and cosine"
