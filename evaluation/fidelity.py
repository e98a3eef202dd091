"""Fidelity: L1, cosine and linear CKA between the hidden states of students and their teacher on held-out speech."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cli import progress
from dataset.manifest import read_manifest
from evaluation.features import Run, hidden_states
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


class Student:
    """A model in eval mode to compare with its teacher, utterance after utterance.

    L1 and cosine are those of the distillation loss, through the learnt projections in the model's file, averaged over
    each utterance's frames and then over the utterances. CKA compares the hidden states as they are, without
    projections, over the frames of all utterances together.

    Args:
        path: the file of ``model``.
        teacher: in eval mode, on the same device.
        layers: the distilled layers, in the order of training.
        mode: None takes that of the projections, and without any layer2layer, or predlayer if the model has no layer at
            the depth of one of these.

    Raises:
        UserError: the projections do not fit the layers, the mode or the models, or the models do not fit each other.
    """

    def __init__(
        self,
        path: Path,
        model: Wav2Vec2Model,
        teacher: Wav2Vec2Model,
        layers: Sequence[int],
        mode: DistillMode | None = None,
    ) -> None:
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
        self.path, self.mode, self.layers = path, mode, layers
        self.sources = [own_depth] * len(layers)  # the hidden states that stand for the layers
        if mode == "layer2layer":
            self.sources = [student_layer(layer, depth, own_depth) for layer in layers]
        self._run = up_to(max(self.sources), model)
        dims = model.config["encoder_embed_dim"], teacher.config["encoder_embed_dim"]
        device = next(model.parameters()).device
        self._projections: nn.ModuleList | None = None  # without any, nothing but CKA is compared
        self._note: str | None = None
        if state:
            num_found = sum(key.endswith("weight") for key in state)
            if num_found != len(layers):
                raise UserError(
                    f"{path}: has {num_found} projections, expected one for each of the {len(layers)} distilled layers "
                    f"{','.join(map(str, layers))}; give the layers that it was trained with, in their order"
                )
            self._projections = make_projections(mode, [[layer] for layer in layers], *dims)
            load_state(self._projections, state, path)
            self._projections.to(device)
        elif dims[0] == dims[1]:
            self._projections = nn.ModuleList(nn.Identity() for _ in layers)
            self._note = "no projections in the file: L1 and cosine are those of the raw hidden states"
        else:
            self._note = "no projections in the file, and other dimensions than the teacher's: no L1 and cosine"
        self._has_own = bool(state)
        self._cka = [LinearCKA(dims, device) for _ in layers]
        self._sums = np.zeros((len(layers), 2))  # of L1 and cosine
        self._num_utterances = 0

    def update(self, waveform: Tensor, expected: Sequence[Tensor], audio_source: str) -> None:
        """Add an utterance (T,) and the teacher's hidden states of it, (frames, D) each."""
        self._num_utterances += 1
        actual = hidden_states(self._run, waveform, str(self.path), audio_source)
        for number, (layer, source) in enumerate(zip(self.layers, self.sources, strict=True)):
            x, y = actual[source], expected[layer]
            self._cka[number].update(x, y)
            if self._projections is not None:
                predicted = self._projections[number](x)
                l1, cosine = F.l1_loss(predicted, y), F.cosine_similarity(predicted, y, dim=-1).mean()
                self._sums[number] += float(l1), float(cosine)

    def summary(self) -> dict[str, Any]:
        """Return the results as JSON takes them.

        These are ``mode``, ``projections`` (True if the file has any), ``num_utterances``, ``note`` (why numbers are
        missing, or None) and ``layers``: for each distilled layer ``layer``, ``source`` (the student's hidden state),
        ``l1`` and ``cosine`` (None if sizes differ and there is no projection) and ``cka``.
        """
        means: list[list[float | None]] = [[None, None]] * len(self.layers)
        if self._projections is not None:
            means = (self._sums / self._num_utterances).tolist()
        rows = zip(self.layers, self.sources, means, self._cka, strict=True)
        return {
            "mode": self.mode,
            "projections": self._has_own,
            "num_utterances": self._num_utterances,
            "note": self._note,
            "layers": [
                {"layer": layer, "source": source, "l1": l1, "cosine": cosine, "cka": cka.compute()}
                for layer, source, (l1, cosine), cka in rows
            ],
        }


def _read_projections(path: Path) -> dict[str, Any]:
    """Read the state dict of a model file's projections; empty if it has none."""
    state = read_model_file(path).get("distill_linear_projs") or {}
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{path}: distill_linear_projs is {short_repr(state)}, expected a dict from names to tensors")
    return state


def held_out_speech(path: Path, max_seconds: float, min_samples: int) -> list[tuple[str, int]]:
    """List the audio files and samples of a manifest's utterances, from short to long.

    Longer utterances than ``max_seconds`` are left out, and shorter ones than ``min_samples``, which make a frame.

    Raises:
        UserError: see :func:`dataset.manifest.read_manifest`; no utterance is left, or a file does not exist.
    """
    manifest = read_manifest(path)
    utterances = [
        (manifest.full_path(index), int(manifest.lengths[index]))
        for index in np.argsort(manifest.lengths, kind="stable").tolist()
        if min_samples <= manifest.lengths[index] <= round(max_seconds * SAMPLE_RATE)
    ]
    if not utterances:
        raise UserError(
            f"{path}: none of {len(manifest.lengths)} utterances lasts {min_samples / SAMPLE_RATE:.3f} to "
            f"{max_seconds:g} s; raise --max_seconds, or give another manifest"
        )
    for audio, _ in utterances:
        if not Path(audio).is_file():
            raise UserError(
                f"{path}: {audio} does not exist, expected an audio file; run prepare_data.py on the corpus where it "
                "is now"
            )
    return utterances


def up_to(layer: int, model: Wav2Vec2Model) -> Run:
    """Run a model no further than it takes for the hidden state of a layer; at least one layer runs."""
    return lambda waveforms: model.extract_features(waveforms, num_layers=max(1, layer))[0]


@torch.inference_mode()
def measure_fidelity(
    teacher: Wav2Vec2Model, students: Sequence[Student], speech: Sequence[tuple[str, int]]
) -> list[dict[str, Any]]:
    """Compare students with their teacher on the same utterances, see :meth:`Student.summary`.

    Raises:
        UserError: a file cannot be read or has changed, or a model's hidden states are not finite.
    """
    device, run = next(teacher.parameters()).device, up_to(max(students[0].layers), teacher)
    for path, length in progress(speech, "fidelity", unit="utterance"):
        waveform = read_audio(path, 0, length, length).to(device)
        expected = hidden_states(run, waveform, "the teacher", path)
        for student in students:
            student.update(waveform, expected, path)
    hours = sum(length for _, length in speech) / SAMPLE_RATE / 3600
    return [{**student.summary(), "hours": hours} for student in students]
