"""Features of audio: a model's hidden states or log-mel energies, over a whole clip or frame by frame on disk."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from labels.batches import FrameTimes, read_clips, target_of
from labels.lists import SEGMENTS, Clip, Probe
from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.files.errors import UserError
from wav2vec2.model import Wav2Vec2Model

# (B, T) without padding -> all hidden states, each (B, frames, D), however the model is run.
Run = Callable[[Tensor], Sequence[Tensor] | Tensor]

# Every published model makes a frame of 400 samples every 320.
_WINDOW, _HOP = 400, 320


def hidden_states(run: Run, waveform: Tensor, model_source: str, audio_source: str) -> list[Tensor]:
    """Run a model on one waveform (T,) on its device; returns its hidden states, (frames, D) each.

    Raises:
        UserError: a hidden state holds NaN or infinite values; both sources are named.
    """
    states = [state[0] for state in run(waveform[None])]
    for layer, state in enumerate(states):
        if not state.isfinite().all():
            raise UserError(
                f"{model_source}: hidden state {layer} holds NaN or infinite values for {audio_source}, expected "
                "numbers; the model's training failed, or its file is damaged"
            )
    return states


class Features:
    """Makes features of a waveform; errors show ``name`` and the ``place`` of the waveform."""

    name: str
    times: FrameTimes

    def frames(self, waveform: Tensor, place: str) -> Tensor:
        """(T,) at 16 kHz -> (layers, frames, D) on the CPU."""
        raise NotImplementedError

    def pooled(self, waveform: Tensor, place: str) -> Tensor:
        """(T,) at 16 kHz -> (layers, D'), by default the mean over frames."""
        return self.frames(waveform, place).mean(1)


class ModelFeatures(Features):
    """All hidden states of a model in eval mode, or of an exported file if ``run`` is given."""

    def __init__(self, model: Wav2Vec2Model, name: str, run: Run | None = None) -> None:
        self.name = name
        self.times = FrameTimes.of(model)
        self.run: Run = run or (lambda waveforms: model.extract_features(waveforms)[0])
        self._device = next(model.parameters()).device

    @torch.no_grad()
    def frames(self, waveform: Tensor, place: str) -> Tensor:
        return torch.stack(hidden_states(self.run, waveform.to(self._device), self.name, place)).float().cpu()


class LogMel(Features):
    """80 log-mel energies in the windows of a published model's frames: features without any model."""

    name = "log-mel"
    times = FrameTimes(_HOP, _WINDOW)

    def __init__(self) -> None:
        from torchaudio.transforms import MelSpectrogram

        options = {"sample_rate": SAMPLE_RATE, "n_fft": _WINDOW, "n_mels": 80}
        self._mel = MelSpectrogram(hop_length=_HOP, center=False, **options)
        self._fine_mel = MelSpectrogram(hop_length=_HOP // 2, **options)

    def frames(self, waveform: Tensor, place: str) -> Tensor:
        return torch.log(self._mel(waveform) + 1e-6).T[None]

    def pooled(self, waveform: Tensor, place: str) -> Tensor:
        """(1, 160): mean and deviation over frames, every 10 ms; the mean alone would say little of speech."""
        energies = torch.log(self._fine_mel(waveform) + 1e-6)
        return torch.cat([energies.mean(1), energies.std(1, correction=0)])[None]


def pooled_features(features: Features, probe: Probe, clips: Sequence[Clip]) -> Tensor:
    """Make features of whole clips: (clips, layers, D)."""
    read = read_clips(probe, clips, features.times.window, features.name)
    return torch.stack([features.pooled(waveform, probe.place(clip)) for clip, waveform in read])


@dataclass(frozen=True)
class Frames:
    """Frames of many clips, in half precision on disk: they need not all fit into memory."""

    data: Tensor  # (N, layers, D) float16 in a mapped file; each layer divided by its scale
    scale: Tensor  # (layers,), so that no number is too large for half precision
    counts: list[int]  # frames of each clip
    targets: list[Tensor]  # of each clip, see labels.batches.target_of; of segments, one label for each frame

    @property
    def parts(self) -> list[Tensor]:
        """The indices of each clip's frames."""
        return list(torch.arange(len(self.data)).split(self.counts))

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
def frames_on_disk(features: Features, probe: Probe, clips: Sequence[Clip]) -> Iterator[Frames]:
    """Keep the frames of some clips, of segments the labelled ones, in a temporary file while the block runs.

    Raises:
        UserError: a clip cannot be read or is too short, or a feature is not finite.
    """
    with tempfile.TemporaryDirectory(prefix="probe-") as folder:
        path, shape, scale = Path(folder) / "frames", torch.Size(), torch.ones(0)
        counts, targets = [], []
        with path.open("wb") as file:
            for clip, waveform in read_clips(probe, clips, features.times.window, features.name):
                found = features.frames(waveform, probe.place(clip)).transpose(0, 1)  # (frames, layers, D)
                if not len(scale):  # pre-norm models reach values that half precision does not
                    shape, scale = found.shape[1:], found.abs().amax((0, 2)).clamp(min=1.0)
                target = target_of(probe.kind, clip, features.times.middles(len(found)))
                if probe.kind == SEGMENTS:
                    found, target = found[target >= 0], target[target >= 0]
                half = (found / scale[:, None]).half()
                if not half.isfinite().all():
                    raise UserError(
                        f"{features.name}: features of {probe.place(clip)} are over 65,000 times as large as others"
                    )
                file.write(half.contiguous().numpy().tobytes())
                counts.append(len(half))
                targets.append(target)
        if not (count := sum(counts)):
            raise UserError(f"{probe.path}: no frame of its clips is labelled; expected longer segments")
        size = count * shape.numel()
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.float16).view(count, *shape)
        yield Frames(data, scale, counts, targets)
