"""Models as they are deployed: what runs them, and what that gives and takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from evaluation.features import Features, ModelFeatures
from wav2vec2.errors import UserError
from wav2vec2.hub import WEIGHTS
from wav2vec2.model import Wav2Vec2Model
from wav2vec2.utils.export_traced import DEFAULT_OPSET, ONNX, ONNX_INT8, check_onnx, onnx_session, trace, write_onnx

BACKENDS = {"torch": None, "onnx": ONNX, "onnx-int8": ONNX_INT8}


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


class OnnxFeatures:
    """All hidden states of a model that ONNX Runtime runs on the CPU."""

    def __init__(self, run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], model: Wav2Vec2Model, name: str) -> None:
        self.name = name
        self.window = model.feature_extractor.receptive_field
        self.hop = model.feature_extractor.stride
        self._run = run
        # A file of traced operations takes two frames at least; a zero behind the end makes none.
        self._least = model.feature_extractor.num_samples(2)

    def frames(self, waveform: Tensor, place: str) -> Tensor:
        if len(waveform) < self.window:
            raise UserError(
                f"{place}: has {len(waveform)} samples at 16 kHz, expected at least {self.window}, which make one frame"
            )
        padded = torch.nn.functional.pad(waveform, (0, max(0, self._least - len(waveform))))
        states, frames = self._run(padded[None], torch.tensor([len(waveform)]))
        if not states.isfinite().all():
            raise UserError(f"{self.name}: hidden states of {place} hold NaN or infinite values, expected numbers")
        return states[:, 0, : int(frames[0])]

    def pooled(self, waveform: Tensor, place: str) -> Tensor:
        """The mean over frames."""
        return self.frames(waveform, place).mean(1)


def exported(subject: Subject, backends: Sequence[str], folder: Path) -> list[Subject]:
    """The same model as these other backends run it, from files that are written into ``folder``.

    Raises:
        UserError: the model cannot be exported, see :func:`wav2vec2.utils.export_traced.write_onnx`.
    """
    names = [name for name in backends if name != "torch"]
    if not names:
        return []
    model = subject.model.cpu()
    files = write_onnx(trace(model, "all"), model, "all", folder, DEFAULT_OPSET, "onnx-int8" in names)
    found = []
    for backend in names:
        (file,) = (file for file in files if file.path.name == BACKENDS[backend])
        session = onnx_session(file.path)
        name = f"{subject.name} ({backend})"

        def run(waveforms: Tensor, session: Callable[..., object] = session) -> object:
            return session(waveforms, torch.full((len(waveforms),), waveforms.shape[1]))

        found.append(
            replace(
                subject,
                name=name,
                backend=backend,
                is_teacher=False,
                features=OnnxFeatures(session, model, name),
                run=run,
                num_bytes=file.num_bytes,
            )
        )
    return found
