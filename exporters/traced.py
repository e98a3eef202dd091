"""Traces a model by ``torch.export``, for any batch and length, and writes it as a .pt2 file.

The program, which export_onnx.py writes as ONNX, is ``(waveforms, lengths) -> (hidden state or states, frames)``:
(B, T) samples at 16 kHz, (B,) valid samples of each; (B, frames, D), or (layers + 1, B, frames, D) for all of them;
(B,) valid frames. Of a model with a task head it gives logits, (B, frames, outputs) or, of whole clips, (B, classes).
Each file is loaded again and compared with the model before it is kept.
"""

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wav2vec2.files.errors import UserError
from wav2vec2.files.heads import TaskModel
from wav2vec2.files.storage import atomic_path
from wav2vec2.model import Wav2Vec2Model
from wav2vec2.utils.quiet import quiet

OUTPUTS = ("last", "all")
PT2 = "model.pt2"

# Of an exported model from PyTorch's; relative to the largest value of a hidden state, where that is above 1: float32
# resolves no better.
LARGEST_DIFFERENCE = 1e-4

# Frames of each waveform of each batch that an export is checked on; 0 frames are less than the receptive field.
CHECKED_BATCHES = ((77,), (131, 62, 2, 0), (38, 38), (347, 250))
_TRACED_BATCH = (11, 7)

Program = torch.export.ExportedProgram
# (waveforms, lengths) -> (hidden state or states, or logits; frames)
Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Difference(NamedTuple):
    """Of an exported model's hidden states from PyTorch's, over valid frames.

    Attributes:
        largest: the largest absolute difference, relative as :data:`LARGEST_DIFFERENCE` says.
        mean_cosine, lowest_cosine: similarity of frames, at the worst of the hidden states.
    """

    largest: float
    mean_cosine: float
    lowest_cosine: float


class Exported(NamedTuple):
    """A file that was written, its size with all that lies beside it, and how it differs from the model."""

    path: Path
    num_bytes: int
    difference: Difference


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

    def forward(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.outputs == "last":
            return self.model(waveforms, lengths)
        hidden_states, frames = self.model.extract_features(waveforms, lengths)
        return torch.stack(hidden_states), frames


def output_name(model: Wav2Vec2Model, outputs: str) -> str:
    """What the first output is called."""
    if outputs == "all":
        return "hidden_states"
    return "logits" if isinstance(model, TaskModel) else "last_hidden_state"


def trace(model: Wav2Vec2Model, outputs: str) -> Program:
    """Trace a model without masks for any batch and any length of at least two frames.

    Args:
        model: in eval mode, on the CPU.
        outputs: one of :data:`OUTPUTS`.
    """
    dynamic = torch.export.Dim.DYNAMIC  # torch derives the least length itself: what makes two frames
    shapes = {"waveforms": {0: dynamic, 1: dynamic}, "lengths": {0: dynamic}}
    return traced(Outputs(model, outputs), _waveforms(model, _TRACED_BATCH, seed=0), shapes)


def traced(function: Outputs, inputs: tuple[Tensor, ...], dynamic_shapes: dict[str, Any] | None = None) -> Program:
    """Trace a function on these inputs; without dynamic shapes it takes no others."""
    function = _with_plain_convolution(function).eval()
    with torch.no_grad(), quiet():
        program = torch.export.export(function, inputs, dynamic_shapes=dynamic_shapes, strict=False)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # the file need not tell where this project lies on this machine
    return program


def _with_plain_convolution(function: Outputs) -> Outputs:
    """A copy whose positional convolution has its weight, and not the two factors that training wants."""
    function = copy.deepcopy(function).requires_grad_(False)
    embed = function.model.encoder.transformer.pos_conv_embed
    normed, channels = embed.conv, len(embed.conv.bias)
    with torch.device("meta"):
        conv = nn.Conv1d(channels, channels, normed.kernel_size, padding=normed.padding, groups=normed.groups)
    conv.weight, conv.bias = nn.Parameter(normed.weight, requires_grad=False), normed.bias
    embed.conv = conv
    return function


def write_pt2(program: Program, model: Wav2Vec2Model, outputs: str, folder: Path) -> Exported:
    """Write model.pt2, which ``torch.export.load`` loads.

    Raises:
        UserError: it differs from the model by more than :data:`LARGEST_DIFFERENCE`; nothing is written.
    """
    path = folder / PT2
    with atomic_path(path) as temporary, quiet():
        with temporary.open("wb") as file:
            torch.export.save(program, file, extra_files=head_settings(model))
        with temporary.open("rb") as file:
            loaded = torch.export.load(file).module()
        difference = compare(Outputs(model, outputs).eval(), loaded, noise(model, CHECKED_BATCHES))
        check_difference(difference, path)
    return Exported(path, path.stat().st_size, difference)


def head_settings(model: Wav2Vec2Model) -> dict[str, str]:
    """What the logits of a model with a task head are of, as JSON for a file's metadata; nothing of other models."""
    return {"head": json.dumps(model.head_settings.to_dict())} if isinstance(model, TaskModel) else {}


def compare(function: Run, run: Run, batches: Iterable[tuple[Tensor, Tensor]]) -> Difference:
    """How ``run``, an exported model, differs from the function that it was made from.

    Args:
        function, run: what is compared.
        batches: waveforms (B, T) and their lengths (B,).

    Raises:
        UserError: its outputs have other shapes or other valid frames.
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


def min_samples(model: Wav2Vec2Model, num_frames: int) -> int:
    """The samples that ``num_frames`` frames take at least."""
    extractor = model.feature_extractor
    return extractor.num_samples(num_frames)


def noise(model: Wav2Vec2Model, batches: Iterable[tuple[int, ...]]) -> list[tuple[Tensor, Tensor]]:
    """Batches of so many frames each; noise is what no model was made for, and what reaches all of its numbers."""
    return [_waveforms(model, batch, seed) for seed, batch in enumerate(batches, start=1)]


def _waveforms(model: Wav2Vec2Model, batch: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Noise (B, T) with an offset, which shows a lost normalisation, of this many frames each; and lengths (B,)."""
    generator = torch.Generator().manual_seed(seed)
    # Any number of samples but less than one more frame.
    lengths = [max(min_samples(model, frames + 1) - 1 - 7 * row, 5) for row, frames in enumerate(batch)]
    rows = [0.1 * torch.randn(length, generator=generator) + 0.02 for length in lengths]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(lengths)
