"""What a student learns beside equation 1, each against a few lines of plain torch."""

import dataclasses

import pytest
import torch
from helpers import PRUNING, error_line, make_module, random_waveforms, run_to_exit, small_run, train_on
from torch.nn import functional as F

from evaluation.fidelity import LinearCKA
from lightning import DistillLoss, mean_of, parse_distill_layers, student_layers
from training import objectives
from training.objectives import MaskedUnits, TemporalRelations, cka, nearest, temporal_relations
from wav2vec2.files.errors import UserError

NOTHING = DistillLoss(0, 0, 0, "raw")
BATCH = random_waveforms(4000, 4000)[0], None


def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, inputs))


# --- STaR ------------------------------------------------------------------------------------------


def test_temporal_relations_and_their_gradient():
    """Widths differ, and no projection bridges them."""
    teacher = [torch.randn(2, 5, 8) for _ in range(3)]
    student = [torch.randn(2, 5, 6, requires_grad=True) for _ in range(3)]
    star = TemporalRelations(1.0, [(0, 0), (2, 2)])
    assert star.teacher_layers == [0, 1, 2] and star.student_depth == 2
    loss = star(None, None, None, student, dict(enumerate(teacher)), None)
    expected = 0
    for i, j in ((0, 0), (2, 2), (1, 2)):
        for row in range(2):
            theirs, ours = teacher[i][row] @ teacher[j][row].T / 8, student[i][row] @ student[j][row].T / 6
            expected = expected + ((theirs - ours) ** 2).mean() / 2 / 3
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, *student), gradients(expected, *student))


def test_relations_of_another_depth():
    """The student's layer 1 learns the teacher's 4, from its own input on."""
    star = TemporalRelations(1.0, [(0, 0), (4, 1), (12, 3)])
    assert star.relations[3:] == [((3, 4), (0, 1)), ((11, 12), (2, 3))]


def test_relations_are_in_full_precision():
    x = torch.randn(1, 40, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = temporal_relations(x, x)
    torch.testing.assert_close(found, x @ x.transpose(1, 2) / 64)


# --- masked units ----------------------------------------------------------------------------------


def make_units(**changes: int) -> MaskedUnits:
    torch.manual_seed(0)
    settings = {"teacher_layer": 2, "num_units": 7, "teacher_dim": 16, "student_dim": 16, "student_depth": 3}
    units = MaskedUnits(0.5, **(settings | changes))
    units.centroids.data.normal_()
    return units


def test_masked_units_and_their_gradient():
    module = make_module()
    model = module.student_model.eval()
    units = make_units()
    frames, _, _ = model.extract_frames(*BATCH)
    states = [state.detach() for state in module.teacher_model.extract_features(*BATCH)[0]]
    hidden = torch.rand(frames.shape[:2]) < 0.5
    loss = units(model, frames, None, [], {2: states[2]}, hidden)

    x = model.encoder.feature_projection(frames)
    x = x * ~hidden[..., None] + units.hidden_frame * hidden[..., None]
    last = model.encoder.transformer(x)
    losses = []
    for b, t in hidden.nonzero().tolist():
        distances = [(states[2][b, t] - centroid).norm() for centroid in units.centroids]
        unit = torch.stack(distances).argmin()
        code = units.projection(last[b, t])
        logits = torch.stack([F.cosine_similarity(code, each, dim=0) for each in units.codes]) / 0.1
        losses.append(-logits.log_softmax(0)[unit])
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(loss, expected)
    inputs = (
        units.hidden_frame,
        units.codes,
        units.projection.weight,
        model.encoder.feature_projection.projection.weight,
    )
    for ours, theirs in zip(gradients(loss, *inputs), gradients(expected, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
        assert theirs.abs().sum() > 0


def test_spans_are_hidden_by_the_batchs_own_noise():
    units = make_units()
    masks = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        masks.append(units.draw([torch.zeros(4, 1)], 200))
    assert masks[0].equal(masks[1]) and not masks[0].equal(masks[2])
    assert 0.4 < masks[0].float().mean() < 0.7  # 0.8 of spans, which overlap
    for num_frames in range(1, 30):  # a short crop
        assert units.draw([torch.zeros(2, 1)], num_frames).shape == (2, num_frames)


def test_nearest():
    x, centroids = torch.randn(2, 5, 3), torch.randn(4, 3)
    expected = (x[:, :, None] - centroids).pow(2).sum(-1).argmin(-1)
    assert nearest(x, centroids).equal(expected)


# --- in the module ---------------------------------------------------------------------------------


def test_objectives_are_added_by_their_weights():
    units, star = make_units(), TemporalRelations(3.0, [(1, 1)])
    module = make_module(objectives={"star": star, "units": units})
    torch.manual_seed(5)
    loss, scalars = module.loss(BATCH, "train")
    parts = {name: scalars[f"train_loss_{name}"] for name in ("distill", "star", "units", "reg")}
    expected = parts["distill"] + 3 * parts["star"] + 0.5 * parts["units"] + parts["reg"]
    torch.testing.assert_close(loss.detach(), expected)
    members = {id(parameter) for parameter in module.parameter_groups()[0]["params"]}
    assert id(units.codes) in members and id(units.centroids) not in members


@pytest.mark.parametrize("name", ["star", "units"])
def test_each_alone_reaches_every_trained_parameter(name):
    """DDP waits for the gradient of each parameter that requires one."""
    objective = TemporalRelations(1.0, [(3, 3)]) if name == "star" else make_units()
    module = make_module(objectives={name: objective}, distill_loss=NOTHING, use_reg=False)
    train_on(module, BATCH).backward()
    for key, parameter in module.named_parameters():
        if not key.startswith("teacher_model"):
            assert (parameter.grad is not None) == parameter.requires_grad, key
    assert not any(parameter.requires_grad for parameter in module.distill_linear_projs.parameters())


def test_the_mean_of_layers_is_matched():
    groups = parse_distill_layers("0.1+2,3")
    layers = [each for group in groups for each in group]
    assert layers == [(0,), (1, 2), (3,)]
    module = make_module(distill_layers=layers, use_reg=False).eval()
    _, scalars = module.loss(BATCH, "valid")
    expected = []
    for each, projection in zip(layers, module.distill_linear_projs, strict=True):
        ours, theirs = (
            sum(model.extract_features(*BATCH)[0][layer] for layer in each) / len(each)
            for model in (module.student_model, module.teacher_model)
        )
        expected.append(module.distill_loss(projection(ours), theirs)[0])
    torch.testing.assert_close(scalars["valid_loss"], torch.stack(expected).mean().detach())


def test_mean_of_one_layer_is_that_layer():
    states = [torch.randn(1, 2, 3) for _ in range(2)]
    assert mean_of(states, (1,)) is states[1]


@pytest.mark.parametrize(
    ("layers", "depths", "expected"),
    [((0,), (12, 3), (0,)), ((4,), (12, 3), (1,)), ((7, 8), (12, 12), (7, 8)), ((3, 6), (12, 4), (1, 2))],
)
def test_layers_at_the_same_relative_depth(layers, depths, expected):
    assert student_layers(layers, *depths) == expected


def test_a_layer_between_two_of_the_students():
    with pytest.raises(UserError, match=r"layer 5 of the teacher's 12 .* choose multiples of 4"):
        student_layers((4, 5), 12, 3)


# --- groups of layers ------------------------------------------------------------------------------


def test_cka_of_all_pairs():
    features = [torch.randn(50, dims) @ torch.randn(dims, dims) for dims in (4, 6, 9)]
    similarities = cka(features)
    for i, x in enumerate(features):
        for j, y in enumerate(features):
            pair = LinearCKA((x.shape[1], y.shape[1]), torch.device("cpu"))
            pair.update(x, y)
            assert float(similarities[i, j]) == pytest.approx(pair.compute())


def test_layers_that_are_alike_are_one_group(monkeypatch, capsys):
    @dataclasses.dataclass
    class Models:
        distill_layers: str = "auto:2"
        num_auto_groups: int | None = 2

    @dataclasses.dataclass
    class Settings:
        models: Models
        has_projections: bool = True

    module = make_module()
    x, y = torch.randn(30, 6), torch.randn(30, 6)
    monkeypatch.setattr(objectives, "teacher_frames", lambda *_: [x, y, x + 0.1 * y])
    found = objectives.with_layer_groups(Settings(Models()), None, module.teacher_model)
    assert found.models.distill_layers == "0.1+3,2"
    assert "--distill_layers auto:2: 0.1+3,2" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"distill_layers": "auto:4"}, "--distill_layers auto:4: the teacher has 3 layers"),
        ({"distill_layers": "auto:0"}, "--distill_layers: expected layers and groups"),
        ({"unit_weight": 1, "unit_layer": 4}, "--unit_layer 4: the teacher has 3 layers"),
        ({"unit_weight": 1, "num_units": 100000}, "--num_units 100000: the training data make"),
        ({"unit_weight": 1, "num_units": 0}, "--num_units: expected a number above 0, found 0"),
        ({"star_weight": -1}, "--star_weight: expected 0 or more, found -1"),
        ({"l1_weight": 0, "cos_weight": 0}, "--star_weight and --unit_weight are all 0"),
    ],
)
def test_what_cannot_be_learnt(manifests, small_teacher, tmp_path, monkeypatch, capsys, flags, message):
    run = (*small_run(manifests, small_teacher, **flags), *PRUNING, "--exp_dir", tmp_path)
    assert run_to_exit(monkeypatch, "distill", *run) == 1
    assert message in error_line(capsys)
