"""Compares what was exported with the model that it was made from."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wav2vec2.files.errors import UserError
from wav2vec2.model import Wav2Vec2Model

# The largest accepted difference of hidden states from PyTorch's, relative to the largest value of a hidden state if
# that is above 1, since float32 resolves no better.
LARGEST_DIFFERENCE = 1e-4

# The batches that an export is checked on, as frames of each waveform; 0 frames: shorter than the receptive field.
CHECKED_BATCHES = ((77,), (131, 62, 2, 0), (38, 38), (347, 250))

# (B, T) samples at 16 kHz and (B,) valid samples of each -> hidden state (B, frames, D), or all (layers + 1, B, frames,
# D), or logits of a task head, (B, frames, outputs) or, of whole clips, (B, classes); and (B,) valid frames.
Run = Callable[[Tensor, Tensor], Any]


class Difference(NamedTuple):
    """The difference of an exported model's hidden states from PyTorch's, over valid frames."""

    largest: float  # absolute, or relative as LARGEST_DIFFERENCE says
    mean_cosine: float  # similarity of frames, at the worst of the hidden states
    lowest_cosine: float

    def check(self, name: str) -> None:
        """Refuse an export, named in the error, that is not the model.

        Raises:
            UserError: the difference is above :data:`LARGEST_DIFFERENCE`.
        """
        if not self.largest <= LARGEST_DIFFERENCE:  # NaN is not smaller either
            raise UserError(
                f"{name}: the exported model's hidden states differ from PyTorch's by {self.largest:.1e}, expected at "
                f"most {LARGEST_DIFFERENCE:.0e}; it was not written; please report it"
            )


def compare(function: Run, run: Run, batches: Iterable[tuple[Tensor, Tensor]]) -> Difference:
    """Compare an exported model with the function that it was made from.

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


def noise(model: Wav2Vec2Model, batches: Iterable[tuple[int, ...]]) -> list[tuple[Tensor, Tensor]]:
    """Make batches (B, T) of noise, which reaches every number of a model, and their lengths (B,).

    Args:
        model: decides how many samples make a frame.
        batches: the number of frames of each waveform.
    """
    made, num_samples = [], model.feature_extractor.num_samples
    for seed, batch in enumerate(batches, start=1):
        generator = torch.Generator().manual_seed(seed)
        # Any number of samples but less than one more frame.
        lengths = [max(num_samples(frames + 1) - 1 - 7 * row, 5) for row, frames in enumerate(batch)]
        # The offset shows a lost normalisation.
        rows = [0.1 * torch.randn(length, generator=generator) + 0.02 for length in lengths]
        made.append((nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(lengths)))
    return made
