"""Teachers and students that do not fit each other."""

import pytest
import torch
from helpers import SMALL_LIGHT_LAYERS, make_module, random_model, random_waveforms, small_config

from lightning import student_layer
from training.pairing import check_pair
from wav2vec2.files.errors import UserError
from wav2vec2.model import Wav2Vec2Model


@pytest.mark.parametrize(
    ("layer", "depths", "expected"), [(0, (12, 3), 0), (4, (12, 3), 1), (7, (12, 12), 7), (6, (12, 4), 2)]
)
def test_layers_at_the_same_relative_depth(layer, depths, expected):
    assert student_layer(layer, *depths) == expected


def test_a_layer_between_two_of_the_students():
    with pytest.raises(UserError, match=r"layer 5 of the teacher's 12 .* choose multiples of 4"):
        student_layer(5, 12, 3)


def test_pairs_that_do_not_fit():
    teacher = random_model(small_config("hubert"))
    check_pair(teacher, random_model(small_config("hubert")), [0, 3], "layer2layer")
    with pytest.raises(UserError, match=r"layer 4 .* has 3 layers"):
        check_pair(teacher, teacher, [0, 4], "layer2layer")


def with_layers(layers: list[list[int]]) -> Wav2Vec2Model:
    return random_model(small_config("hubert", extractor_conv_layer_config=layers))


@pytest.mark.parametrize("layers", [SMALL_LIGHT_LAYERS, [[4, 60, 40]], [[4, 25, 5], [5, 4, 4], [9, 2, 2]]], ids=str)
def test_pairs_of_other_layers_that_make_the_same_frames(layers):
    teacher, student = random_model(small_config("hubert")), with_layers(layers)
    check_pair(teacher, student, [0, 3], "layer2layer")
    for model in (teacher, student):
        assert [model.feature_extractor.num_frames(n) for n in range(400)] == [
            max((n - 60) // 40 + 1, 0) for n in range(400)
        ]


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        ([[10, 10, 5], [12, 3, 2], [8, 3, 2]], "one of 40 samples every 20"),
        ([[7, 20, 10], [9, 6, 4]], "one of 70 samples every 40"),  # the same frame rate
        ([[7, 20, 10], [9, 5, 2]], "one of 60 samples every 20"),  # the same receptive field
    ],
)
def test_pairs_of_other_frames(layers, found):
    message = f"frames do not fit the teacher's: {found}, the teacher's one of 60 samples every 40;"
    with pytest.raises(UserError, match=message):
        check_pair(random_model(small_config("hubert")), with_layers(layers), [0], "layer2layer")


def test_pairs_that_normalize_differently():
    """A warning behind group_norm extractors, where each keeps its own input form; an error behind others."""
    teacher = random_model(small_config("hubert"))
    student = random_model(small_config("hubert", normalize_waveform=True))
    with pytest.warns(UserWarning, match="student's normalize_waveform is True, the teacher's False.*move.* little"):
        check_pair(teacher, student, [0], "layer2layer")
    module = make_module(student_model=student, teacher_model=teacher)
    waveforms = 5 + 3 * random_waveforms(1200, 1200)[0]
    torch.testing.assert_close(module.targets(waveforms, None)[0], teacher.extract_features(waveforms)[0][0])
    assert module.student_model.normalize_waveform and not module.teacher_model.normalize_waveform
    large = [random_model(small_config("hubert", "large", normalize_waveform=value)) for value in (True, False)]
    with pytest.raises(UserError, match="normalize_waveform is False, the teacher's True; give models"):
        check_pair(*large, [0], "layer2layer")
