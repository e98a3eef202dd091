"""Another extractor for the student: its layers, and what training it leaves alone."""

import pytest
import torch
from helpers import SMALL_LIGHT_LAYERS, random_model, small_config

from training.extractor import light_layers, with_extractor
from training.settings import ExtractorSettings
from wav2vec2.components import FeatureExtractor
from wav2vec2.config import check_config
from wav2vec2.files.checkpoint import model_of
from wav2vec2.files.errors import UserError


def extractor(layers: list) -> FeatureExtractor:
    return FeatureExtractor(check_config(small_config("hubert", extractor_conv_layer_config=layers)))


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
    own = extractor(layers)
    assert light_layers(own) == expected
    light = extractor(expected)
    assert (light.stride, light.receptive_field) == (own.stride, own.receptive_field)


def test_layers_of_the_flag_take_the_place_of_the_students():
    """Everything but the extractor is the student's, whose own extractor may have been pruned."""
    model = random_model(small_config("wavlm", "large"))
    contents = {"config": model.config, "state_dict": model.state_dict()}
    light = with_extractor(contents, ExtractorSettings(student_extractor=str(SMALL_LIGHT_LAYERS)), "student.pth")
    student = model_of(light, "student.pth")
    assert student.config == {**model.config, "extractor_conv_layer_config": SMALL_LIGHT_LAYERS}
    assert torch.equal(student.feature_extractor.dummy_weight, torch.ones(9))
    for name, weight in student.encoder.state_dict().items():
        assert torch.equal(weight, model.encoder.state_dict()[name])
    assert contents["state_dict"].keys() == model.state_dict().keys()


def test_layers_that_are_too_large_are_refused_without_memory_for_them():
    model = random_model(small_config("hubert"))
    contents = {"config": model.config, "state_dict": model.state_dict()}
    huge = ExtractorSettings(student_extractor="[[1048576, 1048576, 1], [1048576, 1048576, 40]]")
    with pytest.raises(
        UserError, match=r"--student_extractor .* found every 40 samples, of 2097151 samples and 1048576"
    ):
        with_extractor(contents, huge, "student.pth")


@pytest.mark.parametrize("text", ["", "Light", "{}", "7", "[[", "NaN", "[" * 100_000])
def test_no_layers(text):
    with pytest.raises(UserError, match="--student_extractor: expected light, or a list of layers in JSON"):
        ExtractorSettings(student_extractor=text)
