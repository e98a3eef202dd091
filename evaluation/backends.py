"""Models as they are deployed: what runs them, and what that gives and takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dataset.manifest import read_manifest
from evaluation.features import Features, ModelFeatures
from exporters.onnx import DEFAULT_OPSET, ONNX, ONNX_INT8, OnnxOptions, check_onnx, write_onnx
from exporters.traced import Run
from wav2vec2.audio import SAMPLE_RATE, read_audio
from wav2vec2.files.errors import UserError
from wav2vec2.files.hub import WEIGHTS
from wav2vec2.model import Wav2Vec2Model

BACKENDS = {"torch": None, "onnx": ONNX, "onnx-int8": ONNX_INT8}
# Of a manifest, for int8's ranges and for differences: so many utterances, and what of each.
_NUM_UTTERANCES, _MIN_SECONDS, _MAX_SECONDS = 32, 1.0, 10.0


def parse_backends(text: str) -> list[str]:
    """``"torch,onnx"`` -> ``["torch", "onnx"]``.

    Raises:
        UserError: a name is unknown or given twice, or torch, which the others are compared with, is missing.
    """
    names = text.split(",")
    if set(names) - BACKENDS.keys() or len(set(names)) < len(names) or "torch" not in names:
        raise UserError(f"--backends {text}: expected torch, and each once of {', '.join(BACKENDS)}")
    if len(names) > 1:
        check_onnx(DEFAULT_OPSET)
    return names


@dataclass(frozen=True)
class Subject:
    """A model to measure, as one backend runs it.

    Attributes:
        name: with the backend's, where that is not torch.
        path: the model's file.
        backend: one of :data:`BACKENDS`.
        is_teacher: the others are compared with it.
        model: in eval mode.
        features: all hidden states, by the backend.
        run: (B, T) on the model's device, without padding -> all hidden states, to be timed.
        num_bytes: of the file that the backend loads.
    """

    name: str
    path: Path
    backend: str
    is_teacher: bool
    model: Wav2Vec2Model
    features: Features
    run: Callable[[Tensor], object]
    num_bytes: int


def torch_subject(name: str, path: Path, model: Wav2Vec2Model, is_teacher: bool) -> Subject:
    """A model as PyTorch runs it; its weight norm is folded."""
    model.fold_weight_norm()
    # A folder of the hub's format holds them in one file.
    file = path / WEIGHTS if path.is_dir() else path
    run = model.extract_features
    return Subject(name, path, "torch", is_teacher, model, ModelFeatures(model, name), run, file.stat().st_size)


class RunFeatures:
    """What a model gives as it is exported: all hidden states, or the last alone.

    Args:
        run: computes it, on the CPU.
        model: that it was exported from.
        name: for progress and errors.
    """

    def __init__(self, run: Run, model: Wav2Vec2Model, name: str) -> None:
        self.name = name
        self.window = model.feature_extractor.receptive_field
        self.hop = model.feature_extractor.stride
        self._run = run
        # A file of traced operations takes two frames at least; a zero behind the end makes none.
        self._least = model.feature_extractor.num_samples(2)

    @torch.no_grad()
    def frames(self, waveform: Tensor, place: str) -> Tensor:
        if len(waveform) < self.window:
            raise UserError(
                f"{place}: has {len(waveform)} samples at 16 kHz, expected at least {self.window}, which make one frame"
            )
        padded = torch.nn.functional.pad(waveform, (0, max(0, self._least - len(waveform))))
        states, frames = self._run(padded[None], torch.tensor([len(waveform)]))
        if not states.isfinite().all():
            raise UserError(f"{self.name}: hidden states of {place} hold NaN or infinite values, expected numbers")
        return states.reshape(-1, *states.shape[-2:])[:, : int(frames[0])]

    def pooled(self, waveform: Tensor, place: str) -> Tensor:
        """The mean over frames."""
        return self.frames(waveform, place).mean(1)


def read_speech(path: Path) -> list[Tensor]:
    """Utterances (T,) from all over a manifest, the beginning of long ones.

    Raises:
        UserError: the manifest or an audio file cannot be read, or all are too short.
    """
    manifest = read_manifest(path)
    long_enough = (manifest.lengths >= _MIN_SECONDS * SAMPLE_RATE).nonzero()[0]
    if not len(long_enough):
        raise UserError(f"{path}: no utterance has {_MIN_SECONDS:g} s, expected speech of such length")
    places = torch.linspace(0, len(long_enough) - 1, min(_NUM_UTTERANCES, len(long_enough))).round().long()
    speech = []
    for index in long_enough[places.numpy()].tolist():
        length = int(manifest.lengths[index])
        wanted = min(length, round(_MAX_SECONDS * SAMPLE_RATE))
        speech.append(read_audio(manifest.full_path(index), 0, wanted, length))
    return speech


def exported(subject: Subject, backends: Sequence[str], folder: Path, speech: Sequence[Tensor] = ()) -> list[Subject]:
    """The same model as these other backends run it, from files that are written into ``folder``.

    Args:
        subject: as PyTorch runs it.
        backends: of :data:`BACKENDS`.
        folder: is made.
        speech: for the ranges of int8, see :class:`exporters.onnx.OnnxOptions`.

    Raises:
        UserError: the model cannot be exported, see :func:`exporters.onnx.write_onnx`.
    """
    names = [name for name in backends if name != "torch"]
    if not names:
        return []
    model = subject.model.cpu()
    # Hidden states are measured, of a model with a head too.
    options = OnnxOptions(outputs="all", int8="onnx-int8" in names, speech=speech)
    files = {file.path.name: file for file in write_onnx(model, options, folder)}
    found = []
    for backend in names:
        file = files[BACKENDS[backend]]
        name = f"{subject.name} ({backend})"

        def run(waveforms: Tensor, session: Run = file.run) -> object:
            return session(waveforms, torch.full((len(waveforms),), waveforms.shape[1]))

        found.append(
            replace(
                subject,
                name=name,
                backend=backend,
                is_teacher=False,
                features=RunFeatures(file.run, model, name),
                run=run,
                num_bytes=file.num_bytes,
            )
        )
    return found
