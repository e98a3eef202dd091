"""A streaming model chunk by chunk: each frame is computed once, as the sound comes."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .audio import SAMPLE_RATE
from .components import Heard
from .files.errors import UserError, short_repr
from .kinds import SEGMENTS
from .model import Wav2Vec2Model
from .samples import as_samples, check_finite
from .task_model import TaskModel


class State(NamedTuple):
    """The state of B streams between chunks; its size does not grow."""

    num_frames: Tensor  # (B,) before the chunk
    heard: Heard | None  # of all samples before the chunk's first
    taps: Tensor  # (B, kernel - 1, D): frames before the chunk, for the positional convolution
    pasts: list[list[Tensor]]  # keys and values (B, H, L, K) of each layer with attention


def check_streaming(model: Wav2Vec2Model, source: str) -> None:
    """Raise a :class:`UserError` if a model does not stream; ``source`` names it."""
    if model.encoder.chunk_frames is None:
        raise UserError(
            f"{source}: not a streaming model (no encoder_chunk_frames in its config); make a streaming student with "
            "make_student.py --streaming, and train it"
        )


def first_state(model: Wav2Vec2Model, batch: int) -> State:
    """Return the state before the first chunk."""
    encoder, parameter = model.encoder, model.feature_extractor.dummy_weight
    zeros = parameter.new_zeros
    pasts = []
    for layer in encoder.transformer.layers:
        if (attention := layer.attention) is not None:
            shape = batch, attention.num_heads, encoder.left_frames, attention.head_dim
            pasts.append([zeros(shape), zeros(shape)])
    heard = model.feature_extractor.heard
    taps = zeros(batch, encoder.transformer.pos_conv_embed.conv.kernel_size - 1, encoder.embed_dim)
    count = torch.zeros(batch, dtype=torch.long, device=parameter.device)
    return State(count, None if heard is None else heard.nothing(batch), taps, pasts)


def step(model: Wav2Vec2Model, chunk: Tensor, lengths: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
    """Compute the frames of the next chunk; arguments and the rest as in :func:`step_states`.

    They are the last hidden states (B, C, D) as ``model.forward`` gives them; with a head their logits (B, C, outputs),
    unless the head is for whole clips.
    """
    states, valid, state = step_states(model, chunk, lengths, state)
    return _frames(model, states), valid, state


def _frames(model: Wav2Vec2Model, states: list[Tensor]) -> Tensor:
    output = model.encoder.transformer.finished(states[-1])
    if isinstance(model, TaskModel) and model.kind == SEGMENTS:
        return model.logits(states, output, None)
    return model.apply_aux(output)


def step_states(
    model: Wav2Vec2Model, chunk: Tensor, lengths: Tensor, state: State
) -> tuple[list[Tensor], Tensor, State]:
    """Compute the hidden states of the next chunk.

    Args:
        model: a streaming model in eval mode, without masks.
        chunk: samples (B, T) of ``encoder_chunk_frames`` frames; the last of them are the next chunk's first, too.
        lengths: (B,) valid samples; all but in the last chunk.
        state: of :func:`first_state`, or of the step before.

    Returns:
        Hidden states (B, C, D) as ``model.extract_features`` gives them, (B,) valid frames, and the next step's state.
    """
    extractor, heard, moments = model.feature_extractor, state.heard, None
    if extractor.heard is not None and heard is not None:
        moments = extractor.heard(heard + extractor.heard.sums(chunk, lengths))
        heard = heard + extractor.heard.sums(chunk, lengths.clamp(max=extractor.fresh))
    features = extractor.chunk_frame_features(chunk, lengths, moments)
    valid = extractor.num_frames(lengths)
    pasts = [list(past) for past in state.pasts]
    states, taps = model.encoder.step(features, valid, state.num_frames, state.taps, pasts)
    return states, valid, State(state.num_frames + valid, heard, taps, pasts)


def steps(model: Wav2Vec2Model, waveform: Tensor) -> Iterator[list[Tensor]]:
    """Yield the hidden states (1, frames, D) of each chunk of a waveform (T,)."""
    extractor, state = model.feature_extractor, first_state(model, 1)
    window = extractor.num_samples(model.encoder.chunk_frames or 1)
    for start in range(0, len(waveform) - extractor.receptive_field + 1, extractor.hop):
        samples = waveform[None, start : start + window].to(extractor.dummy_weight)
        lengths = torch.full((1,), samples.size(1), device=samples.device)
        states, valid, state = step_states(model, F.pad(samples, (0, window - samples.size(1))), lengths, state)
        yield [each[:, : int(valid)] for each in states]


class Stream:
    """Frames of a streaming model as samples come, for one stream or several that run together.

    Args:
        model: a streaming model without masks; it is put in eval mode.
        batch: number of streams that get equally many samples at a time; None for one, whose tensors have no batch.

    Raises:
        UserError: the model does not stream.
    """

    def __init__(self, model: Wav2Vec2Model, batch: int | None = None) -> None:
        check_streaming(model, "model")
        self.model, self.batch = model.eval(), batch
        self._state = first_state(model, batch or 1)
        self._samples = model.feature_extractor.dummy_weight.detach().new_zeros(batch or 1, 0)
        self._window = model.feature_extractor.num_samples(model.encoder.chunk_frames or 1)
        self._is_finished = False

    def push(self, samples: Any, sample_rate: int = SAMPLE_RATE) -> Tensor:
        """Take samples (n,), any number, as floats at full scale 1 or as integers; return the frames (m, D) made.

        With several streams (batch, n) -> (batch, m, D). With a head, frames are logits, unless it is for whole clips.

        Raises:
            UserError: the samples are of another rate, type or shape, or the stream is finished; it is as it was then.
        """
        self._check_open()
        if sample_rate != SAMPLE_RATE:
            raise UserError(
                f"push: sample_rate: expected {SAMPLE_RATE}, found {short_repr(sample_rate)}; resample first"
            )
        new = as_samples(samples, "push", 1 if self.batch is None else 2)
        if self.batch is not None and len(new) != self.batch:
            raise UserError(f"push: expected samples of {self.batch} streams (batch, samples), found {len(new)}")
        check_finite(new, "push")
        self._samples = torch.cat([self._samples, new.view(self.batch or 1, -1).to(self._samples)], dim=1)
        frames, hop = [], self.model.feature_extractor.hop
        while self._samples.size(1) >= self._window:
            frames.append(self._step(self._samples[:, : self._window]))
            self._samples = self._samples[:, hop:].clone()  # not a view, which would keep all that came
        return self._joined(frames)

    def finish(self) -> Tensor:
        """End the stream, and return the frames of what is left of it, with shapes as in :meth:`push`."""
        self._check_open()
        self._is_finished = True
        has_frames = self.model.feature_extractor.num_frames(self._samples.size(1)) > 0
        return self._joined([self._step(self._samples)] if has_frames else [])

    def _check_open(self) -> None:
        if self._is_finished:
            raise UserError("the stream is finished, expected an open one; make another with wav2vec2.stream")

    @torch.inference_mode()
    def _step(self, samples: Tensor) -> Tensor:
        lengths = torch.full((len(samples),), samples.size(1), device=samples.device)
        chunk = F.pad(samples, (0, self._window - samples.size(1)))
        frames, valid, self._state = step(self.model, chunk, lengths, self._state)
        return frames[:, : int(valid[0])]

    def _joined(self, frames: list[Tensor]) -> Tensor:
        if not frames:
            none = self._samples.new_zeros(self.batch or 1, 0, self.model.encoder.embed_dim)
            with torch.inference_mode():
                frames = [_frames(self.model, [none] * (len(self.model.encoder.transformer.layers) + 1))]
        joined = torch.cat(frames, dim=1)
        return joined[0] if self.batch is None else joined
