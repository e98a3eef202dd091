"""Operations of a forward pass, counted by torch itself."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from .audio import SAMPLE_RATE
from .fast import plain_paths
from .model import Wav2Vec2Model, wav2vec2_model


class Flops(NamedTuple):
    """Operations by part; a multiplication and its addition are two.

    Attributes:
        conv: of the convolutional extractor.
        transformer: of all behind it: projection, positional convolution, layers.
    """

    conv: int
    transformer: int


def count_flops(config: dict[str, Any], num_samples: int, num_layers: int | None = None) -> Flops:
    """Operations of ``extract_features`` on one waveform without padding.

    Torch counts convolutions and matrix products, those of attention included, as it meets them: on its meta device,
    which computes shapes only. Biases, norms, activations, softmax and the weight norm of the positional convolution
    are not counted.

    Args:
        config: the model's.
        num_samples: T, at 16 kHz.
        num_layers: the transformer's first layers that run; None means all.
    """
    with torch.device("meta"):
        model = wav2vec2_model(**config).eval()
        waveforms = torch.empty(1, num_samples)
    with torch.no_grad(), plain_paths():
        with FlopCounterMode(display=False) as conv:
            features, _ = model.feature_extractor(waveforms, None)
        with FlopCounterMode(display=False) as transformer:
            model.encoder.extract_features(features, None, num_layers)
    return Flops(conv.get_total_flops(), transformer.get_total_flops())


def forward_flops(model: Wav2Vec2Model, num_layers: int) -> Callable[[int], float]:
    """Operations of the first ``num_layers`` layers' forward pass over one waveform, by its samples.

    Counted for three lengths: attention makes it a quadratic function of the length.
    """
    seconds = np.array([2, 8, 16])
    counts = [sum(count_flops(model.config, int(n), max(num_layers, 1))) for n in seconds * SAMPLE_RATE]
    polynomial = np.poly1d(np.polyfit(seconds, counts, 2))
    return lambda num_samples: float(polynomial(num_samples / SAMPLE_RATE))
