"""Another extractor for the student: its layers, and the phase in which it learns what the student's own makes."""

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor, nn

from training.data import BatchDataModule
from training.distillation import train
from training.settings import LIGHT, DistillSettings, ExtractorSettings, FinalSettings
from wav2vec2.components import FeatureExtractor
from wav2vec2.config import ModelConfig, check_config
from wav2vec2.files.checkpoint import model_of
from wav2vec2.files.errors import UserError
from wav2vec2.model import Wav2Vec2Model, with_masks

# Of fresh layers: higher than for weights that were trained before.
LEARNING_RATE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractorRun(FinalSettings):
    """All settings of the phase in which the extractor learns."""

    stage = "extractor"
    extractor: ExtractorSettings


def light_layers(extractor: FeatureExtractor) -> list[list[int]]:
    """Three layers that make the frames of ``extractor``: the first cuts the waveform into eighths of its hop.

    Its windows do not overlap, the second layer's do: that follows a teacher better than the reverse, at as many
    multiply-adds (docs/results.md).

    Raises:
        UserError: there are none for such frames.
    """
    channels, stride = extractor.conv_layers[-1].conv.out_channels, extractor.stride // 8
    kernel = extractor.receptive_field // max(stride, 1) - 4  # the last layer's second window begins 4 steps later
    if extractor.stride % 8 or extractor.receptive_field % stride or kernel < 4:
        raise UserError(
            f"--student_extractor {LIGHT}: made for frames of 400 samples every 320, --student_ckpt's are of "
            f"{extractor.receptive_field} every {extractor.stride}; give the layers in JSON"
        )
    return [[channels, stride, stride], [channels * 3 // 2, kernel, 4], [channels, 2, 2]]


def with_extractor(contents: dict[str, Any], settings: ExtractorSettings, source: str | os.PathLike) -> dict[str, Any]:
    """A model file's contents with a fresh extractor of the layers of ``--student_extractor``.

    Args:
        contents: of the model file.
        settings: that name the layers.
        source: the file, named in errors.

    Raises:
        UserError: no model can have these layers, or they do not make the frames and channels of its own.
    """
    option = f"--student_extractor {settings.student_extractor}"

    def checked(layers: Any) -> ModelConfig:
        try:
            return check_config({**with_masks(contents["config"], ()), "extractor_conv_layer_config": layers})
        except ValueError as error:
            raise UserError(f"{option}: {error}") from None

    def output(extractor: FeatureExtractor) -> tuple[int, int, int]:
        return extractor.stride, extractor.receptive_field, extractor.conv_layers[-1].conv.out_channels

    with torch.device("meta"):  # a wrong number may ask for more memory than there is
        own = FeatureExtractor(checked(contents["config"]["extractor_conv_layer_config"]))
        layers = light_layers(own) if settings.student_extractor == LIGHT else settings.layers
        config = checked(layers)
        found, expected = output(FeatureExtractor(config)), output(own)
    if found != expected:
        frames = "every {} samples, of {} samples and {} channels"
        raise UserError(
            f"{option}: expected frames {frames.format(*expected)}, as those of {source} are; found "
            f"{frames.format(*found)} (hop, receptive field, channels of the last layer)"
        )
    fresh = {f"feature_extractor.{key}": value for key, value in FeatureExtractor(config).state_dict().items()}
    kept = {key: value for key, value in contents["state_dict"].items() if not key.startswith("feature_extractor.")}
    return {
        **contents,
        "config": {**contents["config"], "extractor_conv_layer_config": layers},
        "state_dict": {**kept, **fresh},
    }


def learn_extractor(
    settings: DistillSettings, data: BatchDataModule, original: dict[str, Any], light: dict[str, Any]
) -> dict[str, Tensor]:
    """Train the extractor of ``light`` to make what that of ``original`` makes, a run of its own in EXP_DIR/extractor.

    It learns by the mean squared error behind the projection, layer 0, which both share and which stays as it is.

    Args:
        settings: of the distillation that follows.
        data: of both.
        original: contents of --student_ckpt.
        light: what :func:`with_extractor` made of them.

    Returns:
        The state dict of the extractor that has learnt.

    Raises:
        UserError, Interrupted: as :func:`training.trainer.train`.
    """
    num_updates = settings.extractor.extractor_updates
    models = {
        "distill_layers": "0",
        "distill_mode": "layer2layer",
        "l2_weight": 1.0,
        "l1_weight": 0.0,
        "cos_weight": 0.0,
        "student_dropout": None,
        "distill_weight": 1.0,
    }
    schedule = {
        "learning_rate": LEARNING_RATE,
        "warmup_updates": num_updates // 10,
        "max_updates": num_updates,
    }
    phase = ExtractorRun(
        data=settings.data,
        student=settings.student,
        extractor=settings.extractor,
        models=dataclasses.replace(settings.models, **models),
        optimisation=dataclasses.replace(settings.optimisation, **schedule),
        machine=dataclasses.replace(settings.machine, exp_dir=settings.machine.exp_dir / "extractor"),
    )
    teacher, student = _up_to_projection(original), _up_to_projection(light)
    student.encoder.requires_grad_(False)
    train(phase, data, teacher, student, nn.ModuleList([nn.Identity()]))
    return student.feature_extractor.state_dict()


def _up_to_projection(contents: dict[str, Any]) -> Wav2Vec2Model:
    """The model without dropout behind its projection, and without the blocks that the loss does not reach."""
    config = {**contents["config"], "encoder_projection_dropout": 0.0}
    model = model_of({**contents, "config": config}, "--student_ckpt")
    for layer in model.encoder.transformer.layers:
        layer.attention = layer.feed_forward = None
    return model
