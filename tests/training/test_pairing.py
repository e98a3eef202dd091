"""Teachers and students that do not fit each other."""

import json

import pytest
import torch
from helpers import (
    SMALL_LIGHT_LAYERS,
    made_up_profile,
    make_module,
    random_model,
    random_waveforms,
    small_config,
)

from lightning import student_layer
from training.pairing import check_budgets, check_pair, targets
from training.settings import PruningSettings
from wav2vec2.files.errors import UserError
from wav2vec2.model import Wav2Vec2Model, with_masks
from wav2vec2.sparsity import size_of


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


def test_targets_in_time(tmp_path):
    """A share of the teacher's time, or milliseconds for a second of audio, which two waveforms of 0.5 s make."""
    teacher = random_model(small_config("hubert"))
    contents = made_up_profile(teacher, 0.5, lambda op, x, y: 100 * x * y) | {"batch": 2}
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(contents))

    def of(target: str) -> PruningSettings:
        return PruningSettings(target_latency=target, latency_profile=path, sparsity_control="exact")

    original = size_of(teacher, of("0.5").profile)
    milliseconds = float(original.latency) / 1e3
    assert targets(of("0.5"), original) == (None, None, 0.5)
    assert targets(of(f"{milliseconds / 4:.6f}ms/s"), original).latency == pytest.approx(0.75, abs=1e-6)
    slow = f"{milliseconds + 1:.3f}ms/s"
    with pytest.raises(
        UserError, match=rf"--target_latency {slow}: the teacher takes .*ms/s on the machine of .*profile"
    ):
        targets(of(slow), original)
    student = random_model(with_masks(teacher.config, ["interm"]))
    with pytest.raises(
        UserError, match=r"--target_latency 0.9: pruning .* removes at most 0\.\d+ of the teacher's time"
    ):
        check_budgets(of("0.9"), teacher, student)
