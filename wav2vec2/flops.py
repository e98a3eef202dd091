"""Parameters and operations of a forward pass, by part of the model."""

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import nn

from .config import with_masks
from .model import Wav2Vec2Model, wav2vec2_model
from .operations import macs_of

# Utterance on which multiply-adds are counted: the mean length of LibriSpeech test-clean (5.4 h in 2,620 utterances).
UTTERANCE_SECONDS = 7.42


# Parts of operations that do not have their kind's name.
_PART_OF = {"positional": "projection"}


class Parts(NamedTuple):
    """One number for each part of a model."""

    conv: int
    projection: int  # and positional convolution, with the norms that belong to no block
    attention: int
    feed_forward: int


def count_params(model: Wav2Vec2Model) -> Parts:
    """Parameters of each part; an output layer (``aux``) or a task head counts towards the projection."""

    def count(*modules: nn.Module | None) -> int:
        return sum(parameter.numel() for module in modules if module for parameter in module.parameters())

    layers = model.encoder.transformer.layers
    conv = count(model.feature_extractor)
    attention = count(*(layer.attention for layer in layers))
    feed_forward = count(*(layer.feed_forward for layer in layers))
    return Parts(conv, count(model) - conv - attention - feed_forward, attention, feed_forward)


def count_flops(config: dict[str, Any], num_samples: int, num_layers: int | None = None) -> Parts:
    """Operations of ``extract_features`` on one waveform without padding; a multiplication and its addition are two.

    Convolutions and matrix products are counted, including those of attention. Biases, norms, activations, softmax and
    the weight norm of the positional convolution are not, and masks cost nothing. ``num_samples`` is at 16 kHz;
    ``num_layers`` counts the first layers of the transformer only.
    """
    with torch.device("meta"):
        model = wav2vec2_model(**with_masks(config, ()))
    macs: Counter[str] = Counter()
    for operation in model.operations(num_samples, num_layers):
        macs[_PART_OF.get(operation.kind, operation.kind)] += 2 * int(macs_of([operation]))
    return Parts(*(macs[part] for part in Parts._fields))
