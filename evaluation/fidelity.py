"""How near a student's hidden states are to its teacher's: L1, cosine and linear CKA on held-out speech."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from cli import progress
from dataset.batches import BatchSampler, make_batches
from dataset.manifest import Manifest, read_manifest
from dataset.speech import SpeechDataset
from evaluation.features import hidden_states
from lightning import DistillMode, make_projections, student_layer
from training.pairing import check_pair
from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.files.checkpoint import load_state, read_model_file
from wav2vec2.files.errors import UserError, short_repr
from wav2vec2.model import Wav2Vec2Model


class LinearCKA:
    """Linear centred kernel alignment (Kornblith et al., arXiv 1905.00414) of two features, batch after batch.

    1 means equal up to rotation and scale, 0 uncorrelated. Only moments are kept, in float64.

    Args:
        num_dims: dimensions of both features, (Dx, Dy).
        device: of the batches.
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
        """CKA of all frames so far; None if a feature does not vary."""
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
    """A model to compare with its teacher.

    Attributes:
        name: in progress bars.
        path: the file that it comes from.
        model: in eval mode.
        mode: "layer2layer" or "predlayer", see :class:`lightning.DistillModule`.
        projections: the learnt ones, one per distilled layer; None where the file has none.
    """

    name: str
    path: Path
    model: Wav2Vec2Model
    mode: DistillMode
    projections: nn.ModuleList | None

    def source(self, layer: int, num_teacher_layers: int) -> int:
        """The layer that learns this layer of the teacher."""
        num_layers = len(self.model.encoder.transformer.layers)
        return student_layer(layer, num_teacher_layers, num_layers) if self.mode == "layer2layer" else num_layers


def make_student(
    name: str,
    path: Path,
    model: Wav2Vec2Model,
    teacher: Wav2Vec2Model,
    layers: Sequence[int],
    mode: DistillMode | None = None,
) -> Student:
    """Read the projections that a model file holds, and check that all fits.

    Args:
        name: in progress bars.
        path: the model's file.
        model: what it holds, in eval mode.
        teacher: in eval mode.
        layers: the distilled layers, in the order of training.
        mode: "layer2layer" or "predlayer"; None takes that of the projections, and without any layer2layer, or
            predlayer where the model has no layer at the depth of one of these.

    Raises:
        UserError: the projections do not fit the layers, the mode or the models, or the models do not fit each other.
    """
    state = _read_projections(path)
    found = None
    if state:  # a projection of predlayer is a Linear and an activation, with the names of a Sequential
        found = "predlayer" if any(key.endswith(".0.weight") for key in state) else "layer2layer"
    if found and mode not in (None, found):
        raise UserError(f"{path}: its projections are those of distill_mode {found}, expected those of {mode}")
    mode = mode or found
    if mode is None:  # of others' models, which may have no layer at the depth of each of the teacher's
        depths = [len(each.encoder.transformer.layers) for each in (teacher, model)]
        mode = "predlayer" if any(layer * depths[1] % depths[0] for layer in layers) else "layer2layer"
    try:
        check_pair(teacher, model, layers, mode)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    projections = None
    if state:
        num_found = sum(key.endswith("weight") for key in state)
        if num_found != len(layers):
            raise UserError(
                f"{path}: has {num_found} projections, expected one for each of the {len(layers)} distilled layers "
                f"{','.join(map(str, layers))}; give the layers that it was trained with, in "
                "their order"
            )
        dims = (each.config["encoder_embed_dim"] for each in (model, teacher))
        projections = make_projections(mode, _shared_groups(state, len(layers)), *dims)
        load_state(projections, state, path)
    return Student(name, path, model, mode, projections)


def _read_projections(path: Path) -> dict[str, Any]:
    """The state dict of a model file's projections, not checked any further; empty if it has none."""
    state = read_model_file(path).get("distill_linear_projs")
    if state is None:
        return {}
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{path}: distill_linear_projs is {short_repr(state)}, expected a dict from names to tensors")
    return state


def _shared_groups(state: dict[str, Any], num_layers: int) -> list[list[int]]:
    """Which neighbouring projections of a file are one: they have their memory in common."""
    groups: list[list[int]] = []
    last = None
    for layer in range(num_layers):
        weight = state.get(f"{layer}.weight")
        is_plain = isinstance(weight, Tensor) and weight.layout is torch.strided
        address = weight.data_ptr() if is_plain else None
        if groups and address is not None and address == last:
            groups[-1].append(layer)
        else:
            groups.append([layer])
        last = address
    return groups


class _Distances:
    """What is summed up for one student and one distilled layer."""

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
        found = {"l1": self.l1 / self.num_utterances, "cosine": self.cosine / self.num_utterances}
        return {**(found if self.is_comparable else dict.fromkeys(found)), "cka": self.cka.compute()}


class HeldOutSpeech:
    """The utterances of a manifest up to ``max_seconds``, one at a time and whole.

    Args:
        path: the manifest.
        max_seconds: longer utterances are left out.
        min_samples: shorter ones too: what the models need for a frame.

    Raises:
        UserError: see :func:`dataset.manifest.read_manifest`; no utterance is left, or a file does not exist.
    """

    def __init__(self, path: Path, max_seconds: float, min_samples: int) -> None:
        self.manifest: Manifest = read_manifest(path)
        lengths = self.manifest.lengths
        try:
            self._batches = make_batches(
                lengths, batch_size=1, min_len=min_samples, max_len=round(max_seconds * SAMPLE_RATE)
            )
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        self.num_samples = sum(int(lengths[index]) for (index,) in self._batches)
        for (index,) in self._batches:
            if not Path(self.manifest.full_path(index)).is_file():
                raise UserError(
                    f"{path}: {self.manifest.full_path(index)} does not exist, expected an audio file; "
                    "run prepare_data.py on the corpus where it is now"
                )

    def __len__(self) -> int:
        return len(self._batches)

    def loader(self) -> DataLoader:
        """Batches of one utterance, from short to long."""
        sampler = BatchSampler(self.manifest.lengths, self._batches, 1, 0, shuffle=False, seed=0, drop_last=True)
        return DataLoader(SpeechDataset(self.manifest), sampler=sampler, batch_size=None)


@torch.inference_mode()
def measure_fidelity(
    teacher: Wav2Vec2Model, students: Sequence[Student], layers: Sequence[int], speech: HeldOutSpeech
) -> list[dict[str, Any]]:
    """Compare students with their teacher on the same utterances.

    L1 and cosine are those of the distillation loss, through the learnt projections, averaged over each utterance's
    frames and then over the utterances. CKA compares the hidden states as they are, without projections, over the
    frames of all utterances together.

    Args:
        teacher: in eval mode, on the device of the students.
        students: from :func:`make_student`.
        layers: the distilled layers.
        speech: what to measure on.

    Returns:
        For each student ``mode``, ``projections`` (whether it has any), ``num_utterances``, ``hours``, ``note`` (None,
        or why numbers are missing) and ``layers``: per distilled layer ``layer``, ``source`` (the student's hidden
        state), ``l1``, ``cosine`` (None where sizes differ and there is no projection) and ``cka``.

    Raises:
        UserError: a file cannot be used, or a model's hidden states are not finite.
    """
    device = next(teacher.parameters()).device
    teacher_dim, depth = teacher.config["encoder_embed_dim"], len(teacher.encoder.transformer.layers)
    sources = [[student.source(each, depth) for each in layers] for student in students]
    sums: list[list[_Distances]] = []
    for student in students:
        projections = [None] * len(layers) if student.projections is None else student.projections.to(device)
        dims = student.model.config["encoder_embed_dim"], teacher_dim
        sums.append([_Distances(dims, projection, device) for projection in projections])
    for batch in progress(speech.loader(), "fidelity", unit="utterance"):
        if batch.bad_files:
            raise UserError(next(iter(batch.bad_files.values())))
        waveform, (path,) = batch.waveforms[0].to(device), batch.paths
        expected = hidden_states(teacher, waveform, _depth(layers), "the teacher", path)
        for student, own, distances in zip(students, sources, sums, strict=True):
            actual = hidden_states(student.model, waveform, _depth(own), str(student.path), path)
            for of_teacher, of_student, distance in zip(layers, own, distances, strict=True):
                distance.update(actual[of_student], expected[of_teacher])
    return [
        {
            "mode": student.mode,
            "projections": student.projections is not None,
            "num_utterances": len(speech),
            "hours": speech.num_samples / SAMPLE_RATE / 3600,
            "note": _note(student, distances[0]),
            "layers": [
                {"layer": of_teacher, "source": of_student, **distance.means()}
                for of_teacher, of_student, distance in zip(layers, own, distances, strict=True)
            ],
        }
        for student, own, distances in zip(students, sources, sums, strict=True)
    ]


def _depth(layers: Sequence[int]) -> int:
    """The number of layers that must run for these."""
    return max(1, *layers)


def _note(student: Student, distance: _Distances) -> str | None:
    if student.projections is not None:
        return None
    if distance.is_comparable:
        return "no projections in the file: L1 and cosine are those of the raw hidden states"
    return "no projections in the file, and other dimensions than the teacher's: no L1 and cosine"


def shared_min_samples(models: Sequence[Wav2Vec2Model]) -> int:
    """Samples that make a frame in every one of these models."""
    return max(model.feature_extractor.receptive_field for model in models)
