"""Runs a model chunk by chunk, for streaming: a window of fixed length goes in, the frames of its chunk come out."""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.files.errors import UserError
from wav2vec2.model import Wav2Vec2Model
from wav2vec2.task_model import CLIPS, TaskModel

from .comparison import Run


class Chunk(NamedTuple):
    """A chunk and its context, counted in frames."""

    frames: int  # length of the chunk, whose frames come out
    left: int  # context before it
    right: int  # context behind it

    @property
    def window(self) -> int:
        """All frames that are computed for a chunk."""
        return sum(self)


def chosen_chunk(model: Wav2Vec2Model, args: argparse.Namespace) -> Chunk | None:
    """Turn the seconds of export.py's flags into frames of a model; None without --chunk_seconds.

    Raises:
        UserError: a chunk is less than a frame, or the model's head labels whole clips.
    """
    if args.chunk_seconds is None:
        return None
    if isinstance(model, TaskModel) and model.kind == CLIPS and args.outputs == "last":
        raise UserError("--chunk_seconds: the model's head labels whole clips; give --drop_head or --outputs all")
    hop = model.feature_extractor.stride / SAMPLE_RATE
    seconds = args.chunk_seconds, args.left_seconds, args.right_seconds
    chunk = Chunk(*(round(one / hop) for one in seconds))
    if chunk.frames == 0:
        raise UserError(f"--chunk_seconds {args.chunk_seconds:g}: expected at least {hop:g}, which is one frame")
    return chunk


def chunk_windows(waveform: Tensor, model: Wav2Vec2Model, chunk: Chunk) -> Tensor:
    """Cut a waveform (T,) into windows (chunks, 1, samples), with zeros before it and behind its end."""
    extractor = model.feature_extractor
    num_chunks = -(-extractor.num_frames(len(waveform)) // chunk.frames)
    size, hop, left = (
        extractor.num_samples(chunk.window),
        chunk.frames * extractor.stride,
        chunk.left * extractor.stride,
    )
    right = max(0, (num_chunks - 1) * hop + size - left - len(waveform))
    return nn.functional.pad(waveform, (left, right)).unfold(0, size, hop)[:num_chunks, None]


def by_chunks(run: Callable[[Tensor], Tensor], model: Wav2Vec2Model, chunk: Chunk) -> Run:
    """Apply ``run``, (1, samples of a window) -> the frames of its chunk, to whole waveforms."""

    def whole(waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        frames, rows = model.feature_extractor.num_frames(lengths), []
        for waveform, length, count in zip(waveforms, lengths.tolist(), frames.tolist(), strict=True):
            windows = chunk_windows(waveform[:length], model, chunk)
            row = torch.cat([run(window) for window in windows], -2)[..., :count, :]
            rows.append(nn.functional.pad(row, (0, 0, 0, int(frames.max()) - count)))
        return torch.cat(rows, -3), frames

    return whole
