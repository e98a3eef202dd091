"""A light extractor: its layers, and what of the model it leaves alone."""

import re

import pytest
import torch
from helpers import SMALL_LIGHT_LAYERS, random_model, small_config

from training.extractor import light_layers, with_extractor
from wav2vec2.components import FeatureExtractor
from wav2vec2.config import ModelConfig, check_config
from wav2vec2.files.checkpoint import model_of
from wav2vec2.files.errors import UserError


def config(layers: list) -> ModelConfig:
    return check_config(small_config("hubert", extractor_conv_layer_config=layers))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (
            [[128, 10, 5]] + [[128, 3, 2]] * 4 + [[128, 2, 2]] * 2,
            [[128, 40, 40], [192, 6, 4], [128, 2, 2]],
        ),
        ([[10, 10, 5], [12, 3, 2], [8, 3, 2], [9, 2, 2]], [[9, 5, 5], [13, 8, 4], [9, 2, 2]]),
    ],
)
def test_light_layers(layers, expected):
    assert light_layers(config(layers)) == expected
    own, light = (FeatureExtractor(config(each)) for each in (layers, expected))
    assert (light.stride, light.receptive_field) == (own.stride, own.receptive_field)


def test_layers_of_the_flag_take_the_place_of_the_students():
    """Everything but the extractor is the student's, whose own extractor may have been pruned."""
    model = random_model(small_config("wavlm", "large"))
    contents = {"config": model.config, "state_dict": model.state_dict()}
    light = with_extractor(contents, SMALL_LIGHT_LAYERS)
    student = model_of(light, "student.pth")
    assert student.config == {**model.config, "extractor_conv_layer_config": SMALL_LIGHT_LAYERS}
    assert torch.equal(student.feature_extractor.dummy_weight, torch.ones(9))
    for name, weight in student.encoder.state_dict().items():
        assert torch.equal(weight, model.encoder.state_dict()[name])
    assert contents["state_dict"].keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        # Refused without memory for them.
        ([[2**20, 2**20, 1], [2**20, 2**20, 40]], "found (40, 2097151, 1048576)"),
        ([], "expected a list of 1 to 64"),
        ([[9, 60.5, 40]], "expected a list of 1 to 64 layers"),
        ([[7, 20, 10], [9, 5, 2]], "channels of the last layer (40, 60, 9), as the model's are; found (20, 60, 9)"),
        ([[7, 20, 10], [9, 6, 4]], "; found (40, 70, 9)"),
        ([[7, 20, 10], [8, 5, 4]], "; found (40, 60, 8)"),
        ("light", None),
    ],
)
def test_layers_that_do_not_fit(layers, message):
    model = random_model(small_config("hubert"))
    contents = {"config": model.config, "state_dict": model.state_dict()}
    if message is None:
        contents["config"] |= {"extractor_conv_layer_config": [[9, 10, 5]]}
        message = "made for frames of 400 samples every 320, the model's are of 10 every 5; give the layers in JSON"
    with pytest.raises(UserError, match=f"^--extractor.*: .*{re.escape(message)}"):
        with_extractor(contents, layers)


def test_a_model_that_streams_keeps_its_own():
    model = random_model(small_config("hubert", encoder_chunk_frames=4))
    with pytest.raises(UserError, match="--extractor: the model streams, expected one that does not"):
        with_extractor({"config": model.config, "state_dict": model.state_dict()}, SMALL_LIGHT_LAYERS)
