"""Runs PyTorch and exported models behind one interface."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from dataset.manifest import read_manifest
from evaluation.features import ModelFeatures, Run
from exporters.onnx import ONNX, ONNX_INT8, OnnxOptions, write_onnx
from exporters.options import DEFAULT_OPSET, check_onnx
from wav2vec2.audio import SAMPLE_RATE, read_audio
from wav2vec2.files.errors import UserError
from wav2vec2.files.hub import WEIGHTS
from wav2vec2.model import Wav2Vec2Model

# The file of each backend but torch.
FILES = {"onnx": ONNX, "onnx-int8": ONNX_INT8}
# Speech for int8's ranges: so many utterances of a manifest, and so much of each.
_NUM_UTTERANCES, _MIN_SECONDS, _MAX_SECONDS = 32, 1.0, 10.0


@dataclass(frozen=True)
class Subject:
    """A model in eval mode to measure, as one backend runs it."""

    name: str  # followed by the backend, unless that is torch
    path: Path
    backend: str
    is_teacher: bool
    model: Wav2Vec2Model
    features: ModelFeatures  # all hidden states, as the backend computes them
    num_bytes: int  # of the file that the backend loads


def torch_subject(name: str, path: Path, model: Wav2Vec2Model, is_teacher: bool) -> Subject:
    """Measure a model as PyTorch runs it, with its weight norm folded."""
    model.fold_weight_norm()
    file = path / WEIGHTS if path.is_dir() else path  # a folder of the hub's format
    return Subject(name, path, "torch", is_teacher, model, ModelFeatures(model, name), file.stat().st_size)


def read_speech(path: Path) -> list[Tensor]:
    """Read utterances (T,) from all over a manifest, the beginning of long ones.

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


def check_backends(backends: Sequence[str], device: torch.device) -> None:
    """Raise a :class:`UserError` if a package for these backends is missing, or the device is no CPU."""
    if set(backends) & FILES.keys():
        check_onnx(DEFAULT_OPSET)
        if device.type != "cpu":
            raise UserError(f"--backends {','.join(backends)}: ONNX Runtime is timed on the CPU; add --device cpu")


def exported(subject: Subject, backends: Sequence[str], folder: Path, speech: Sequence[Tensor] = ()) -> list[Subject]:
    """Export a model for these backends but torch into ``folder``, which is made; ``speech`` is for int8's ranges.

    Raises:
        UserError: the model cannot be exported, see :func:`exporters.onnx.write_onnx`.
    """
    chosen = [backend for backend in backends if backend in FILES]
    if not chosen:
        return []
    model = subject.model.cpu()
    # Hidden states are measured, of a model with a head too.
    options = OnnxOptions(outputs="all", int8="onnx-int8" in chosen, speech=speech)
    files = {file.path.name: file for file in write_onnx(model, options, folder)}
    subjects = []
    for backend in chosen:
        name, file = f"{subject.name} ({backend})", files[FILES[backend]]
        features = ModelFeatures(model, name, _run_of(file.run, model.feature_extractor.num_samples(2)))
        subjects.append(
            replace(subject, name=name, backend=backend, is_teacher=False, features=features, num_bytes=file.num_bytes)
        )
    return subjects


def _run_of(session: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], least: int) -> Run:
    """Run a file, which takes ``least`` samples or more, on waveforms without padding."""

    def run(waveforms: Tensor) -> Tensor:
        num_samples = waveforms.shape[1]
        padded = functional.pad(waveforms, (0, max(0, least - num_samples)))  # zeros behind the end make no frame
        states, frames = session(padded, torch.full((len(waveforms),), num_samples))
        return states[:, :, : int(frames[0])]

    return run
