"""Traces a model with ``torch.export``, with any batch and length: for a .pt2 file, and for ONNX (export_onnx.py).

The traced function is ``(waveforms, lengths) -> (hidden state or states, frames)``: (B, T) samples at 16 kHz, (B,)
valid samples of each; (B, frames, D), or (layers + 1, B, frames, D) for all of them; (B,) valid frames.
"""

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..fast import plain_paths
from ..files import atomic_path
from ..model import Wav2Vec2Model

OUTPUTS = ("last", "all")

# Of an exported model from PyTorch's; relative to the largest value of a hidden state, where that is above 1: float32
# resolves no better.
LARGEST_DIFFERENCE = 1e-4

# Frames of each waveform of each batch that an export is checked on; 0 frames are less than the receptive field.
CHECKED_BATCHES = ((77,), (131, 62, 2, 0), (38, 38), (347, 250))
_TRACED_BATCH = (11, 7)

Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Difference(NamedTuple):
    """Of an exported model's hidden states from PyTorch's, over the valid frames of :data:`CHECKED_BATCHES`.

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
        outputs: "last" for what ``forward`` gives, "all" for what ``extract_features`` gives.
    """

    def __init__(self, model: Wav2Vec2Model, outputs: str) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        if self.outputs == "last":
            return self.model(waveforms, lengths)
        hidden_states, frames = self.model.extract_features(waveforms, lengths)
        return torch.stack(hidden_states), frames


def min_samples(model: Wav2Vec2Model, num_frames: int) -> int:
    """The samples that ``num_frames`` frames take at least."""
    return model.feature_extractor.num_samples(num_frames)


def trace(model: Wav2Vec2Model, outputs: str, plain: bool) -> "torch.export.ExportedProgram":
    """Trace a model for any batch and any length of at least two frames.

    Args:
        model: without masks.
        outputs: one of :data:`OUTPUTS`.
        plain: take the plain paths, whose operators every format has.
    """
    function = Outputs(_with_plain_convolution(model), outputs).eval()
    dynamic = torch.export.Dim.DYNAMIC  # torch derives the least length itself: what makes two frames
    with plain_paths(plain), torch.no_grad(), quiet():
        program = torch.export.export(
            function,
            _waveforms(model, _TRACED_BATCH, seed=0),
            dynamic_shapes={"waveforms": {0: dynamic, 1: dynamic}, "lengths": {0: dynamic}},
            strict=False,
        )
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # the file need not tell where this project lies on this machine
    return program


def _with_plain_convolution(model: Wav2Vec2Model) -> Wav2Vec2Model:
    """A copy whose positional convolution has its weight, and not the two factors that training wants."""
    model = copy.deepcopy(model).requires_grad_(False)
    normed = model.encoder.transformer.pos_conv_embed.conv
    channels = len(normed.bias)
    with torch.device("meta"):
        conv = nn.Conv1d(channels, channels, normed.kernel_size, padding=normed.padding, groups=normed.groups)
    conv.weight, conv.bias = nn.Parameter(normed.weight, requires_grad=False), normed.bias
    model.encoder.transformer.pos_conv_embed.conv = conv
    return model


def export_torch(model: Wav2Vec2Model, path: Path, outputs: str) -> Difference:
    """Write a .pt2 file that ``torch.export.load`` loads, after comparing it with the model.

    Raises:
        UserError: it differs by more than :data:`LARGEST_DIFFERENCE`.
    """
    program = trace(model, outputs, plain=False)
    with atomic_path(path) as temporary, quiet():
        with temporary.open("wb") as file:
            torch.export.save(program, file)
        with temporary.open("rb") as file:
            loaded = torch.export.load(file).module()
        difference = compare(model, outputs, loaded)
        check_difference(difference, path)
    return difference


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what torch and the exporters warn of on the way, which is nothing that a user could change."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def compare(model: Wav2Vec2Model, outputs: str, run: Run) -> Difference:
    """How ``run``, an exported model, differs from the model on batches that it was not traced with.

    Raises:
        UserError: its outputs have other shapes or other valid frames.
    """
    function = Outputs(model, outputs).eval()
    differences, cosines = [], []
    for waveforms, lengths in _check_inputs(model):
        with torch.inference_mode():
            wanted, wanted_frames = function(waveforms, lengths)
            found, frames = run(waveforms, lengths)
        if found.shape != wanted.shape or not torch.equal(frames, wanted_frames):
            raise UserError(
                f"the exported model gives {list(found.shape)} with {frames.tolist()} valid frames, expected "
                f"{list(wanted.shape)} with {wanted_frames.tolist()}; please report it"
            )
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


def _check_inputs(model: Wav2Vec2Model) -> Iterator[tuple[Tensor, Tensor]]:
    for seed, batch in enumerate(CHECKED_BATCHES, start=1):
        yield _waveforms(model, batch, seed)


def _waveforms(model: Wav2Vec2Model, batch: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Noise (B, T) with an offset, which shows a lost normalisation, of this many frames each; and lengths (B,)."""
    generator = torch.Generator().manual_seed(seed)
    # Any number of samples but less than one more frame.
    lengths = [max(min_samples(model, frames + 1) - 1 - 7 * row, 5) for row, frames in enumerate(batch)]
    rows = [0.1 * torch.randn(length, generator=generator) + 0.02 for length in lengths]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(lengths)
