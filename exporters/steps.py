"""A streaming model's step as the function of a file, with the tensors of its state as further inputs and outputs."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wav2vec2.files.errors import UserError
from wav2vec2.model import Wav2Vec2Model
from wav2vec2.streaming import State, first_state, step
from wav2vec2.task_model import CLIPS, TaskModel

from .comparison import Run

# Samples of a chunk (1, T), how many are valid (1,), and the tensors of the state -> frames (1, C, D), how many are
# valid (1,), and the tensors of the next state.
StepRun = Callable[..., Sequence[Tensor]]


class StepFunction(nn.Module):
    """The function of a file: a :data:`StepRun` whose state is one argument."""

    def __init__(self, model: Wav2Vec2Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, samples: Tensor, length: Tensor, state: State) -> tuple[Tensor, ...]:
        frames, valid, following = step(self.model, samples, length, state)
        return frames, valid, *_named(self.model, following).values()


def streams(model: Wav2Vec2Model) -> bool:
    """Return whether the model's files are of one step."""
    return model.encoder.chunk_frames is not None


def check_step(model: Wav2Vec2Model, outputs: str) -> None:
    """Raise a :class:`UserError` if a model streams, but its steps do not have the outputs (see ``OUTPUTS``)."""
    if streams(model) and outputs == "all":
        raise UserError(
            "onnx format: found outputs 'all', expected 'last', which alone a streaming model's steps have; leave out "
            "--outputs, or, in evaluate.py, the backends of ONNX"
        )
    if streams(model) and isinstance(model, TaskModel) and model.kind == CLIPS:
        raise UserError(
            "onnx format: found a streaming model whose head labels whole clips, expected frames; give --drop_head"
        )


def first_step(model: Wav2Vec2Model) -> tuple[Tensor, Tensor, State]:
    """Return the inputs of a stream's first step, with silence for its samples."""
    samples = torch.zeros(1, model.feature_extractor.num_samples(model.config["encoder_chunk_frames"]))
    return samples, torch.tensor([samples.size(1)]), first_state(model, 1)


def _named(model: Wav2Vec2Model, state: State) -> dict[str, Tensor]:
    """Name the tensors of a state, in its order; layers count from 1."""
    heard = {} if state.heard is None else {f"heard_{name}": x for name, x in state.heard._asdict().items()}
    named = {"num_frames": state.num_frames, **heard, "taps": state.taps}
    layers = [number for number, layer in enumerate(model.encoder.transformer.layers, 1) if layer.attention is not None]
    for number, (keys, values) in zip(layers, state.pasts, strict=True):
        named |= {f"keys_{number}": keys, f"values_{number}": values}
    return named


def names_of_step(model: Wav2Vec2Model, output: str) -> tuple[list[str], list[str]]:
    """Name the inputs and outputs of a file whose frames are called ``output``."""
    names = list(_named(model, first_state(model, 1)))
    return ["samples", "length", *names], [output, "frames", *(f"next_{name}" for name in names)]


def description(model: Wav2Vec2Model) -> dict[str, Any]:
    """Describe a file for programs: its inputs and outputs, numbers of samples, and the shapes of the state."""
    samples, _, state = first_step(model)
    return {
        "inputs": "samples of a chunk; length: how many are valid, all but at the end; the state, zeros at first",
        "outputs": "the chunk's frames; frames: how many are valid; next_NAME: the input NAME of the next step",
        "chunk_samples": samples.size(1),
        "hop_samples": model.feature_extractor.hop,  # from the beginning of a chunk to the next one's
        "chunk_frames": model.config["encoder_chunk_frames"],
        "state": {name: list(x.shape) for name, x in _named(model, state).items()},
    }


def stepped(run: StepRun, model: Wav2Vec2Model, waveform: Tensor) -> Iterator[tuple[list[Tensor], Sequence[Tensor]]]:
    """Yield the inputs and the outputs of each step of a waveform (T,)."""
    extractor, (first, _, state) = model.feature_extractor, first_step(model)
    size, tensors = first.size(1), list(_named(model, state).values())
    for start in range(0, extractor.num_frames(len(waveform)) * extractor.stride, extractor.hop):
        samples = waveform[start : start + size]
        padded = nn.functional.pad(samples, (0, size - len(samples)))
        inputs = [padded[None], torch.tensor([len(samples)]), *tensors]
        outputs = run(*inputs)
        yield inputs, outputs
        tensors = list(outputs[2:])


def by_steps(run: StepRun, model: Wav2Vec2Model) -> Run:
    """Apply a step to whole waveforms, each of which is a stream of its own."""

    def whole(waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        rows, valid = [], []
        for waveform, length in zip(waveforms, lengths.tolist(), strict=True):
            outputs = [outputs for _, outputs in stepped(run, model, waveform[:length])]
            rows.append([frames[0] for frames, *_ in outputs])
            valid.append(sum(int(count) for _, count, *_ in outputs))
        most = max(valid)
        padding = torch.zeros(most, next(row[0].size(1) for row in rows if row))
        found = [torch.cat([*row, padding])[:most] for row in rows]
        return torch.stack(found), torch.tensor(valid)

    return whole
