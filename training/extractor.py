"""Give a model a light extractor: its layers, and the training in which it learns to make the frames of the old one."""

from typing import Any

import torch
from torch import nn

from training.data import SpeechDataModule
from training.distillation import train
from training.settings import LIGHT, StudentRunSettings
from wav2vec2.components import FeatureExtractor
from wav2vec2.config import ModelConfig, check_config
from wav2vec2.files.checkpoint import model_of
from wav2vec2.files.errors import UserError
from wav2vec2.model import Wav2Vec2Model, with_masks

_PREFIX = "feature_extractor."


def light_layers(config: ModelConfig) -> list[list[int]]:
    """Choose three layers that make the frames of a config's extractor.

    The first cuts the waveform into eighths of the hop. Its windows do not overlap, the second layer's do: that follows
    a teacher better than the reverse, at as many multiply-adds (docs/results.md).

    Raises:
        UserError: no such layers make these frames.
    """
    hop, window, channels = _frames(config)
    stride = hop // 8
    kernel = window // max(stride, 1) - 4  # the last layer's second window begins 4 steps later
    if hop % 8 or window % stride or kernel < 4:
        raise UserError(
            f"--extractor {LIGHT}: made for frames of 400 samples every 320, the model's are of {window} every {hop}; "
            "give the layers in JSON"
        )
    return [[channels, stride, stride], [channels * 3 // 2, kernel, 4], [channels, 2, 2]]


def with_extractor(contents: dict[str, Any], layers: Any) -> dict[str, Any]:
    """Give a model file's contents a fresh extractor.

    Args:
        contents: contents of the model file.
        layers: [[channels, kernel, stride], ...], or ``LIGHT`` for those of :func:`light_layers`.

    Raises:
        UserError: no model can have these layers, or they do not make the frames and channels of the model's own.
    """
    own = check_config(with_masks(contents["config"], ()))
    if own.encoder_chunk_frames is not None:
        raise UserError(
            "--extractor: the model streams, expected one that does not; give the model that it was made from, with "
            "--streaming in the same call"
        )
    layers = light_layers(own) if layers == LIGHT else layers
    try:
        config = check_config({**own.to_dict(), "extractor_conv_layer_config": layers})
    except ValueError as error:
        raise UserError(f"--extractor: {error}") from None
    expected, found = _frames(own), _frames(config)
    if found != expected:
        raise UserError(
            f"--extractor: expected hop, receptive field and channels of the last layer {expected}, as the model's "
            f"are; found {found}"
        )
    fresh = {_PREFIX + key: value for key, value in FeatureExtractor(config).state_dict().items()}
    kept = {key: value for key, value in contents["state_dict"].items() if not key.startswith(_PREFIX)}
    changed = {**contents["config"], "extractor_conv_layer_config": layers}
    return {**contents, "config": changed, "state_dict": kept | fresh}


def _frames(config: ModelConfig) -> tuple[int, int, int]:
    """Return hop, receptive field and channels; without memory, of which a wrong number may ask for a lot."""
    with torch.device("meta"):
        extractor = FeatureExtractor(config)
    return extractor.stride, extractor.receptive_field, config.extractor_conv_layer_config[-1][0]


def train_extractor(settings: StudentRunSettings, data: SpeechDataModule, contents: dict[str, Any]) -> dict[str, Any]:
    """Replace the extractor of a model file's contents by a light one, trained to make what the model's own makes.

    It learns by the mean squared error behind the projection, which both share and which stays as it is.

    Raises:
        UserError, Interrupted: as :func:`training.distillation.train`.
    """
    chosen = settings.student
    light = with_extractor(contents, chosen.extractor_layers)
    teacher, student = _up_to_projection(contents), _up_to_projection(light)
    student.encoder.requires_grad_(False)
    train(settings, data, teacher, student, nn.ModuleList([nn.Identity()]))
    learnt = {_PREFIX + key: value for key, value in student.feature_extractor.state_dict().items()}
    return {**light, "state_dict": light["state_dict"] | learnt}


def _up_to_projection(contents: dict[str, Any]) -> Wav2Vec2Model:
    """Build the model without dropout behind its projection, and without the blocks, which the loss does not reach."""
    without = dict.fromkeys(("encoder_use_attention", "encoder_use_feed_forward"), False)
    config = {**contents["config"], **without, "encoder_projection_dropout": 0.0}
    blocks = (".attention.", ".feed_forward.")
    state_dict = {key: value for key, value in contents["state_dict"].items() if not any(b in key for b in blocks)}
    return model_of({"config": config, "state_dict": state_dict}, "--model")
