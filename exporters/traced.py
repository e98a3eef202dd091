"""Traces a model by ``torch.export``, for any batch and length, and compares what was exported with the model.

The program is ``(waveforms, lengths) -> (hidden state or states, frames)``: (B, T) samples at 16 kHz and (B,) valid
samples of each -> (B, frames, D), or (layers + 1, B, frames, D) for all hidden states, and (B,) valid frames. For a
model with a task head it gives logits instead, (B, frames, outputs) or, of whole clips, (B, classes).
"""

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wav2vec2.components import ConvolutionalPositionalEmbedding
from wav2vec2.files.errors import UserError
from wav2vec2.model import Wav2Vec2Model
from wav2vec2.task_model import TaskModel
from wav2vec2.utils.quiet import quiet

# The largest accepted difference of hidden states from PyTorch's, relative to the largest value of a hidden state if
# that is above 1, since float32 resolves no better.
LARGEST_DIFFERENCE = 1e-4

# The batches that an export is checked on, as frames of each waveform; 0 frames: shorter than the receptive field.
CHECKED_BATCHES = ((77,), (131, 62, 2, 0), (38, 38), (347, 250))
_TRACED_BATCH = (11, 7)

Program = torch.export.ExportedProgram
# (waveforms, lengths) -> (hidden state or states, or logits; frames)
Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Difference(NamedTuple):
    """The difference of an exported model's hidden states from PyTorch's, over valid frames.

    Attributes:
        largest: the largest absolute difference, relative as :data:`LARGEST_DIFFERENCE` says.
        mean_cosine, lowest_cosine: similarity of frames, at the worst of the hidden states.
    """

    largest: float
    mean_cosine: float
    lowest_cosine: float


class Outputs(nn.Module):
    """The function that is exported.

    Args:
        model: in eval mode.
        outputs: "last" for what ``forward`` gives, which may be logits; "all" for what ``extract_features`` gives.
    """

    def __init__(self, model: Wav2Vec2Model, outputs: str) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if self.outputs == "last":
            return self.model(waveforms, lengths)
        hidden_states, frames = self.model.extract_features(waveforms, lengths)
        return torch.stack(hidden_states), frames


def output_name(model: Wav2Vec2Model, outputs: str) -> str:
    """Name the first output."""
    if outputs == "all":
        return "hidden_states"
    return "logits" if isinstance(model, TaskModel) else "last_hidden_state"


def trace(model: Wav2Vec2Model, outputs: str) -> Program:
    """Trace a model without masks for any batch and any length of at least two frames.

    Args:
        model: in eval mode, on the CPU.
        outputs: one of :data:`~.options.OUTPUTS`.
    """
    dynamic = torch.export.Dim.DYNAMIC  # torch derives the least length itself: that of two frames
    shapes = {"waveforms": {0: dynamic, 1: dynamic}, "lengths": {0: dynamic}}
    return traced(Outputs(model, outputs), _waveforms(model, _TRACED_BATCH, seed=0), shapes)


def traced(function: nn.Module, inputs: tuple[Tensor, ...], dynamic_shapes: dict[str, Any] | None = None) -> Program:
    """Trace a function of a model on these inputs; without dynamic shapes it takes no others."""
    function = _with_plain_convolution(function).eval()
    with torch.no_grad(), quiet():
        program = torch.export.export(function, inputs, dynamic_shapes=dynamic_shapes, strict=False)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # a published file need not tell where this project lies
    return program


def _with_plain_convolution(function: nn.Module) -> nn.Module:
    """Copy a function; the positional convolution of its model has one weight instead of weight norm's two factors."""
    function = copy.deepcopy(function).requires_grad_(False)
    embed: Any = next(module for module in function.modules() if isinstance(module, ConvolutionalPositionalEmbedding))
    normed, channels = embed.conv, len(embed.conv.bias)
    with torch.device("meta"):
        conv = nn.Conv1d(channels, channels, normed.kernel_size, padding=normed.padding, groups=normed.groups)
    conv.weight, conv.bias = nn.Parameter(normed.weight, requires_grad=False), normed.bias
    embed.conv = conv
    return function


def head_metadata(model: Wav2Vec2Model) -> dict[str, str]:
    """The settings of a model's task head, as JSON for a file's metadata; empty without a head."""
    return {"head": json.dumps(model.head_settings.to_dict())} if isinstance(model, TaskModel) else {}


def compare(
    function: Callable[[Tensor, Tensor], Any], run: Run, batches: Iterable[tuple[Tensor, Tensor]]
) -> Difference:
    """Compare ``run``, an exported model, with the function that it was made from.

    Args:
        function: gives the wanted outputs.
        run: gives the outputs to compare with them.
        batches: waveforms (B, T) and their lengths (B,).

    Raises:
        UserError: the outputs have other shapes or other valid frames.
    """
    differences, cosines = [], []
    for waveforms, lengths in batches:
        with torch.inference_mode():
            wanted, wanted_frames = function(waveforms, lengths)
            found, frames = run(waveforms, lengths)
        if found.shape != wanted.shape or not torch.equal(frames, wanted_frames):
            raise UserError(
                f"the exported model gives {list(found.shape)} with {frames.tolist()} valid frames, expected "
                f"{list(wanted.shape)} with {wanted_frames.tolist()}; please report it"
            )
        if wanted.ndim == 2:  # of whole clips: as if each were one frame
            wanted, found, wanted_frames = wanted[:, None], found[:, None], wanted_frames.clamp(max=1)
        valid = torch.arange(wanted.size(-2)) < wanted_frames[:, None]  # (B, frames)
        # (hidden states, valid frames, D)
        wanted, found = (x.reshape(-1, *x.shape[-3:])[:, valid].double() for x in (wanted, found))
        scale = wanted.abs().amax((1, 2), keepdim=True).clamp(min=1)
        differences.append(((found - wanted).abs() / scale).max())
        cosines.append(torch.cosine_similarity(found, wanted, dim=-1))
    cosine = torch.cat(cosines, dim=1)
    return Difference(float(torch.stack(differences).max()), float(cosine.mean(1).min()), float(cosine.min()))


def check_difference(difference: Difference, path: Path) -> None:
    """Refuse an export that is not the model.

    Raises:
        UserError: the difference is above :data:`LARGEST_DIFFERENCE`.
    """
    if not difference.largest <= LARGEST_DIFFERENCE:  # NaN is not smaller either
        raise UserError(
            f"{path}: the exported model's hidden states differ from PyTorch's by {difference.largest:.1e}, expected "
            f"at most {LARGEST_DIFFERENCE:.0e}; it was not written; please report it"
        )


def noise(model: Wav2Vec2Model, batches: Iterable[tuple[int, ...]]) -> list[tuple[Tensor, Tensor]]:
    """Make batches of noise, which reaches every number of a model, of so many frames for each waveform."""
    return [_waveforms(model, batch, seed) for seed, batch in enumerate(batches, start=1)]


def _waveforms(model: Wav2Vec2Model, batch: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Noise (B, T) with an offset, which shows a lost normalisation, of so many frames each; and lengths (B,)."""
    generator = torch.Generator().manual_seed(seed)
    # Any number of samples but less than one more frame.
    num_samples = model.feature_extractor.num_samples
    lengths = [max(num_samples(frames + 1) - 1 - 7 * row, 5) for row, frames in enumerate(batch)]
    rows = [0.1 * torch.randn(length, generator=generator) + 0.02 for length in lengths]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(lengths)
