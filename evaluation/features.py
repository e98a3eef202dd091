"""Features of audio, frame by frame: hidden states of a model, log-mel energies; checked, and kept in little memory."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from cli import progress
from exporters.traced import Run
from labels.lists import Clip, Probe
from wav2vec2.audio import SAMPLE_RATE, read_audio
from wav2vec2.files.errors import UserError
from wav2vec2.files.heads import TaskModel
from wav2vec2.model import Wav2Vec2Model

# Of every published model: a frame is made of 400 samples, the next begins 320 later.
_WINDOW, _HOP = 400, 320
_MELS = 80


@torch.inference_mode()
def hidden_states(
    model: Wav2Vec2Model, waveform: Tensor, num_layers: int | None, model_source: str, audio_source: str
) -> list[Tensor]:
    """The projected extractor output and each layer's output for a waveform (T,): tensors (frames, D).

    Args:
        model: in eval mode.
        waveform: at 16 kHz, on the model's device.
        num_layers: stop after this many layers; None runs all.
        model_source, audio_source: what to name in errors.

    Raises:
        UserError: the waveform is too short for a frame, or a hidden state is not finite.
    """
    _check_length(waveform, model.feature_extractor.receptive_field, audio_source)
    states, _ = model.extract_features(waveform[None], num_layers=num_layers)
    for layer, state in enumerate(states):
        if not state.isfinite().all():
            raise UserError(
                f"{model_source}: hidden state {layer} holds NaN or infinite values for {audio_source}, expected "
                "numbers; the model's training failed, or its file is damaged"
            )
    return [state[0] for state in states]


@torch.inference_mode()
def head_logits(
    model: TaskModel, waveform: Tensor, model_source: str, audio_source: str, run: Run | None = None
) -> Tensor:
    """The logits of a waveform (T,), on the CPU: (frames, outputs), or (classes,) of clips; see :func:`hidden_states`.

    ``run`` makes them in the place of the model, from which it was exported.

    Raises:
        UserError: the waveform is too short for a frame, or a logit is not finite.
    """
    _check_length(waveform, model.feature_extractor.receptive_field, audio_source)
    if run is None:
        (logits,), _ = model(waveform[None].to(next(model.parameters()).device))
    else:
        (logits,), _ = run(waveform[None], torch.tensor([len(waveform)]))
    if not logits.isfinite().all():
        raise UserError(
            f"{model_source}: its head gives NaN or infinite values for {audio_source}, expected numbers; its "
            "training failed, or its file is damaged"
        )
    return logits.float().cpu()


def frame_times(count: int, window: int, hop: int) -> Tensor:
    """The middles of this many frames in seconds; each has ``window`` samples, ``hop`` behind those of the last."""
    return (torch.arange(count) * hop + window / 2) / SAMPLE_RATE


def _check_length(waveform: Tensor, needed: int, audio_source: str) -> None:
    if waveform.numel() < needed:
        raise UserError(
            f"{audio_source}: has {waveform.numel()} samples at 16 kHz, expected at least {needed}, which make one "
            "frame; take it out of the list"
        )


class Features(Protocol):
    """Makes features of a waveform.

    Attributes:
        name: for progress and errors.
        window, hop: samples that a frame is made of, and from the beginning of one to that of the next.
    """

    name: str
    window: int
    hop: int

    def frames(self, waveform: Tensor, place: str) -> Tensor:
        """(T,) at 16 kHz -> (layers, frames, D) on the CPU; ``place`` is named in errors."""

    def pooled(self, waveform: Tensor, place: str) -> Tensor:
        """(T,) at 16 kHz -> (layers, D'): of all frames together."""


class ModelFeatures:
    """All hidden states of a model in eval mode."""

    def __init__(self, model: Wav2Vec2Model, name: str) -> None:
        self.name = name
        self._model = model
        self.window = model.feature_extractor.receptive_field
        self.hop = model.feature_extractor.stride

    def frames(self, waveform: Tensor, place: str) -> Tensor:
        waveform = waveform.to(next(self._model.parameters()).device)
        return torch.stack(hidden_states(self._model, waveform, None, self.name, place)).float().cpu()

    def pooled(self, waveform: Tensor, place: str) -> Tensor:
        """The mean over frames."""
        return self.frames(waveform, place).mean(1)


class LogMel:
    """80 log-mel energies in the windows of a published model's frames: what there is without any model."""

    name = "log-mel"
    window, hop = _WINDOW, _HOP

    def __init__(self) -> None:
        from torchaudio.transforms import MelSpectrogram  # imported late: nothing else here needs torchaudio

        options = {"sample_rate": SAMPLE_RATE, "n_fft": _WINDOW, "n_mels": _MELS}
        self._mel = MelSpectrogram(hop_length=_HOP, center=False, **options)
        self._fine_mel = MelSpectrogram(hop_length=_HOP // 2, **options)

    def frames(self, waveform: Tensor, place: str) -> Tensor:
        _check_length(waveform, _WINDOW, place)
        return torch.log(self._mel(waveform) + 1e-6).T[None]

    def pooled(self, waveform: Tensor, place: str) -> Tensor:
        """Mean and deviation over frames, every 10 ms: the mean alone would say little of speech."""
        _check_length(waveform, _WINDOW, place)
        energies = torch.log(self._fine_mel(waveform) + 1e-6)
        return torch.cat([energies.mean(1), energies.std(1, correction=0)])[None]


def read_clip(probe: Probe, clip: Clip) -> Tensor:
    """(T,) at 16 kHz, of finite numbers.

    Raises:
        UserError: it cannot be read; the line of the list is named.
    """
    try:
        waveform = read_audio(clip.path)
    except UserError as error:
        raise UserError(f"{probe.place(clip)}: {error}; mend the file or take its line out") from error
    if not waveform.isfinite().all():
        raise UserError(f"{probe.place(clip)}: {clip.path} holds samples that are NaN or infinite; take its line out")
    return waveform


def pooled_features(features: Features, probe: Probe, clips: Sequence[Clip]) -> Tensor:
    """Features of whole clips: (clips, layers, D)."""
    shown = progress(clips, f"{features.name}: {probe.name}", unit="clip", leave=False)
    return torch.stack([features.pooled(read_clip(probe, clip), probe.place(clip)) for clip in shown])


@dataclass(frozen=True)
class Frames:
    """Frames of many clips, in half precision on disk: all of them need not fit into memory.

    Attributes:
        data: (N, layers, D) float16 in a file that is mapped; each layer divided by ``scale``.
        scale: (layers,), so that no number is too large for half precision.
        clips: (N,), which clip each frame is of.
        times: (N,), the middle of each frame in seconds.
    """

    data: Tensor
    scale: Tensor
    clips: Tensor
    times: Tensor

    def of_layer(self, layer: int) -> "Frames":
        """The same frames of one layer alone."""
        return replace(self, data=self.data[:, layer : layer + 1], scale=self.scale[layer : layer + 1])

    def rows(self, index: Tensor) -> Tensor:
        """(n,) indices -> (n, layers, D) float32."""
        return self.data[index].float() * self.scale[:, None]

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each feature over all frames, (layers, D) each."""
        total = torch.zeros(self.data.shape[1:], dtype=torch.float64)
        squares = total.clone()
        for part in torch.arange(len(self.data)).split(8192):
            rows = self.rows(part).double()
            total += rows.sum(0)
            squares += rows.square().sum(0)
        mean = total / len(self.data)
        return mean.float(), (squares / len(self.data) - mean.square()).clamp(min=0).sqrt().float()


@contextmanager
def frames_on_disk(
    features: Features, probe: Probe, clips: Sequence[Clip], wanted: Callable[[Clip, Tensor], Tensor]
) -> Iterator[Frames]:
    """The wanted frames of some clips, in a temporary file for the length of the block.

    Args:
        features: makes them.
        probe, clips: what of.
        wanted: (clip, times of its frames) -> which of them are kept, bool.

    Raises:
        UserError: a clip cannot be read or is too short, or a feature is not finite.
    """
    with tempfile.TemporaryDirectory(prefix="probe-") as folder:
        path, shape, scale = Path(folder) / "frames", torch.Size(), torch.ones(0)
        numbers, times = [], []
        with path.open("wb") as file:
            for number, clip in enumerate(progress(clips, f"{features.name}: {probe.name}", unit="clip", leave=False)):
                found = features.frames(read_clip(probe, clip), probe.place(clip)).transpose(0, 1)
                middles = frame_times(len(found), features.window, features.hop)
                kept = wanted(clip, middles)
                if not len(scale):  # pre-norm models reach values that half precision does not
                    shape, scale = found.shape[1:], found.abs().amax((0, 2)).clamp(min=1.0)
                half = (found[kept] / scale[:, None]).half()
                if not half.isfinite().all():
                    raise UserError(
                        f"{features.name}: features of {probe.place(clip)} are over 65,000 times as large as others"
                    )
                file.write(half.contiguous().numpy().tobytes())
                numbers.append(torch.full((len(half),), number))
                times.append(middles[kept])
        count = sum(map(len, numbers))
        if count == 0:
            raise UserError(f"{probe.path}: no frame of its clips is labelled; expected longer segments")
        size = count * shape.numel()
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.float16).view(count, *shape)
        yield Frames(data, scale, torch.cat(numbers), torch.cat(times))
