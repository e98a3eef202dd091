"""Operations of a forward pass, counted by torch itself, by part of the model."""

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .fast import plain_paths
from .model import Wav2Vec2Model, wav2vec2_model

# What multiply-adds are counted on: the mean length of LibriSpeech test-clean (5.4 h in 2,620 utterances).
UTTERANCE_SECONDS = 7.42


class Parts(NamedTuple):
    """A number for each part of a model.

    Attributes:
        conv: the convolutional extractor.
        projection: projection and positional convolution, with the norms that no block has of its own.
        attention: all attention blocks.
        feed_forward: all feed-forward blocks.
    """

    conv: int
    projection: int
    attention: int
    feed_forward: int


def _modules(model: Wav2Vec2Model) -> dict[str, list[nn.Module]]:
    """The modules of each part but ``projection``, which is what is left."""
    layers = model.encoder.transformer.layers
    return {
        "conv": [model.feature_extractor],
        "attention": [layer.attention for layer in layers if layer.attention is not None],
        "feed_forward": [layer.feed_forward for layer in layers if layer.feed_forward is not None],
    }


def _parts(counts: Counter[str], total: int) -> Parts:
    return Parts(
        projection=total - counts.total(), **{part: counts[part] for part in Parts._fields if part != "projection"}
    )


def count_params(model: Wav2Vec2Model) -> Parts:
    """The parameters of each part; an output layer (``aux``) or task head counts to the projection's."""
    counts: Counter[str] = Counter()
    for part, modules in _modules(model).items():
        counts[part] = sum(parameter.numel() for module in modules for parameter in module.parameters())
    return _parts(counts, sum(parameter.numel() for parameter in model.parameters()))


def count_flops(config: dict[str, Any], num_samples: int, num_layers: int | None = None) -> Parts:
    """Operations of ``extract_features`` on one waveform without padding; a multiplication and its addition are two.

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
    counter = FlopCounterMode(display=False)
    counts: Counter[str] = Counter()
    for part, modules in _modules(model).items():
        for module in modules:
            module.register_forward_pre_hook(lambda *_, part=part: counts.subtract({part: counter.get_total_flops()}))
            module.register_forward_hook(lambda *_, part=part: counts.update({part: counter.get_total_flops()}))
    with torch.no_grad(), plain_paths(), counter:
        model.extract_features(waveforms, num_layers=num_layers)
    return _parts(counts, counter.get_total_flops())
