"""Loss, schedule and training, held against the numbers of the released program.

``data/reference/trace_*.pt`` hold 24 updates of small models from given weights, with every logged value before each.
"""

import copy
import json
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from helpers import (
    REFERENCE,
    made_up_profile,
    make_module,
    random_model,
    random_waveforms,
    randomize,
    read_reference,
    small_config,
    train_on,
)
from torch.utils.data import DataLoader

from hardconcrete import HardConcrete
from lightning import (
    DistillLoss,
    DistillModule,
    SparsityBudget,
    States,
    Term,
    linear_warmup_decay,
    make_projections,
)
from training.settings import parse_distill_layers
from training.signals import StopRequest
from training.updates import UpdateGuard
from wav2vec2.fast import plain_paths
from wav2vec2.flops import count_flops
from wav2vec2.model import PRUNING_UNITS, Wav2Vec2Model, wav2vec2_model, with_masks
from wav2vec2.operations import MACS
from wav2vec2.profiles import Profile
from wav2vec2.sparsity import Size, size_of

TRACES = ["trace_hubert_prune", "trace_hubert_large_prune", "trace_wavlm_prune"]
# The trace's names -> ours.
LOGGED = {
    "loss": "train_loss",
    "loss_distill": "train_loss_distill",
    "l1": "train_loss_l1",
    "cos": "train_loss_cos",
    "loss_reg": "train_loss_reg",
    "expected": "sparsity_expected",
    "target": "sparsity_target",
    "lambda1": "lambda1",
    "lambda2": "lambda2",
}


def trace_models(reference: dict[str, Any]) -> tuple[Wav2Vec2Model, Wav2Vec2Model]:
    """Teacher and student with the weights that a trace starts from."""
    models = []
    for role in ("teacher", "student"):
        models.append(wav2vec2_model(**reference[f"{role}_config"]))
        models[-1].load_state_dict(reference[f"{role}_state_dict"])
    return models[0], models[1]


def run_trace(
    reference: dict[str, Any], teacher: Wav2Vec2Model, student: Wav2Vec2Model, penalised: bool
) -> list[dict[str, float]]:
    """Train on the reference's batches with a Lightning Trainer; returns what was logged before each update."""
    settings = reference["settings"]
    rows = []

    class Recording(DistillModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            torch.manual_seed(1000 + self.global_step)
            loss = super().training_step(batch, batch_idx)
            row = {name: float(value) for name, value in self.scalars.items()}
            rows.append(row | {"lr": self.optimizers().param_groups[0]["lr"]})
            return loss

    groups = parse_distill_layers(settings["distill_layers"])
    module = Recording(
        teacher_model=teacher,
        student_model=student,
        distill_mode="layer2layer",
        distill_layers=[layer for group in groups for layer in group],
        distill_linear_projs=make_projections("layer2layer", groups, 32, 32),
        distill_loss=DistillLoss(*(settings[name] for name in ("l2_weight", "l1_weight", "cos_weight", "cos_type"))),
        learning_rate=settings["learning_rate"],
        weight_decay=0.0,
        warmup_updates=settings["warmup_updates"],
        max_updates=settings["max_updates"],
        use_reg=penalised,
        reg_learning_rate=settings["reg_learning_rate"],
        target_sparsity=settings["target_sparsity"],
        sparsity_warmup_updates=settings["sparsity_warmup_updates"],
    )
    guard = UpdateGuard(module, StopRequest(), clip_norm=settings["clip_norm"], max_bad_files=0)
    make_trainer(settings["max_updates"], callbacks=[guard]).fit(
        module, DataLoader([(waveforms, None) for waveforms in reference["waveforms"]], batch_size=None)
    )
    return rows


def bare_losses(reference: dict[str, Any], teacher: Wav2Vec2Model, student: Wav2Vec2Model) -> list[float]:
    """The losses of the final stage, by a loop of torch alone on the plain paths; clipping does not act in it."""
    settings = reference["settings"]
    groups = parse_distill_layers(settings["distill_layers"])
    linears = [torch.nn.Linear(32, 32) for _ in groups]
    for linear in linears:
        linear.weight.data, linear.bias.data = torch.eye(32), torch.zeros(32)
    parameters = [p for part in (student, *linears) for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, settings["learning_rate"], weight_decay=0.0)
    losses = []
    for step in range(settings["max_updates"]):
        waveforms = reference["waveforms"][step % len(reference["waveforms"])]
        rise, fall = settings["warmup_updates"], settings["max_updates"]
        share = (step + 1) / rise if step < rise else (fall - step - 1) / (fall - rise)
        optimizer.param_groups[0]["lr"] = share * settings["learning_rate"]
        with torch.no_grad():
            expected, _ = teacher.eval().extract_features(waveforms)
        found, _ = student.train().extract_features(waveforms)
        x = torch.stack([linear(found[i]) for linear, group in zip(linears, groups, strict=True) for i in group], 1)
        y = torch.stack([expected[i] for group in groups for i in group], 1)
        loss = settings["l1_weight"] * (x - y).abs().mean()
        loss = loss - settings["cos_weight"] * torch.cosine_similarity(x, y, dim=-1).mean()
        optimizer.zero_grad()
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(parameters, settings["clip_norm"]) < settings["clip_norm"]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def make_trainer(max_steps: int, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
@pytest.mark.parametrize("name", TRACES)
def test_training_trace(name, plain):
    reference = read_reference(name)
    with plain_paths(plain):
        rows = run_trace(reference, *trace_models(reference), penalised=True)
    assert len(rows) == len(reference["rows"]) == 24
    for expected, row in zip(reference["rows"], rows, strict=True):
        for key, value in expected.items():
            if key == "step":
                continue
            if key == "lr":
                assert row["lr"] == pytest.approx(value, rel=1e-9, abs=1e-12)
                continue
            tolerance = 1e-4
            if name == "trace_wavlm_prune":
                # The released program leaves gates and table out of the expected count, so the penalty differs,
                # and with it a little of everything else.
                tolerance = 5e-3 if key in ("loss_distill", "l1", "cos", "target") else 3e-2
            assert row[LOGGED[key]] == pytest.approx(value, abs=tolerance), (expected["step"], key)


@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
def test_training_trace_of_the_final_stage(plain):
    """The released program's start and learning rates, then every update of a student moved off that start.

    At the start the student computes what its teacher does: the first gradient is rounding noise, which Adam scales to
    full steps, so no other machine can follow that trace. A student with a little noise in its weights is followed
    update by update, against a loop of torch alone.
    """
    reference = read_reference("trace_hubert_final")
    with plain_paths(plain):
        rows = run_trace(reference, *trace_models(reference), penalised=False)
    for key in ("loss", "loss_distill", "l1", "cos"):
        assert rows[0][LOGGED[key]] == pytest.approx(reference["rows"][0][key], abs=1e-4)
    assert [row["lr"] for row in rows] == pytest.approx([row["lr"] for row in reference["rows"]], rel=1e-9, abs=1e-12)

    teacher, student = trace_models(reference)
    randomize(student, seed=3)
    with plain_paths():
        expected = bare_losses(reference, teacher, copy.deepcopy(student))
    with plain_paths(plain):
        rows = run_trace(reference, teacher, student, penalised=False)
    assert [row["train_loss"] for row in rows] == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0] - 0.05


def test_loss_parts():
    reference = read_reference("distill_loss")
    for case in reference["cases"]:
        loss = DistillLoss(case["l2_weight"], case["l1_weight"], case["cos_weight"], case["cos_type"])
        total, parts = loss(reference["student"], reference["teacher"])
        assert float(total) == pytest.approx(case["loss"], rel=1e-5)
        for part, key in zip(parts, ("mse", "l1", "cos"), strict=True):
            assert float(part) == pytest.approx(case[key], rel=1e-5), key


def test_learning_rate_schedule():
    for case in json.loads((REFERENCE / "lr_schedule.json").read_text()):
        factor = linear_warmup_decay(case["warmup_updates"], case["max_updates"])
        used = [case["learning_rate"] * factor(step) for step in range(len(case["lr_used_at_step"]))]
        assert used == pytest.approx(case["lr_used_at_step"], rel=1e-9, abs=1e-15)


def test_sparsity_target_rises_linearly():
    budget = SparsityBudget(1000, target_sparsity=0.8, warmup_updates=4)
    assert [budget.target(step) for step in range(6)] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 0.8])
    assert budget.size(2) == pytest.approx(600)
    assert SparsityBudget(1000, 0.8, warmup_updates=0).target(0) == 0.8


def test_multipliers_climb_and_masks_close():
    """Below the target, λ1·(s − t) falls as λ1 grows negative: ascent lowers λ1, raises λ2, and masks follow."""
    module = make_module(learning_rate=0.0, reg_learning_rate=0.05, max_updates=15, sparsity_warmup_updates=0)
    before = float(module.student_model.get_num_params().detach())
    batch = (random_waveforms(800, 800)[0], None)
    make_trainer(15).fit(module, DataLoader([batch] * 15, batch_size=None))
    assert module.lambda1 < 0 < module.lambda2
    assert float(module.student_model.get_num_params().detach()) < before


def exact_module(**changes: Any) -> DistillModule:
    """Controlled exactly, with a budget that masks on every unit can meet."""
    student = random_model(with_masks(small_config("hubert"), PRUNING_UNITS), seed=1)
    return make_module(**{"student_model": student, "sparsity_control": "exact", "target_sparsity": 0.6, **changes})


def train_and_record(module: DistillModule, num_updates: int) -> list[dict[str, float]]:
    """The scalars of every update of a run."""
    rows = []

    class Recording(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            rows.append({name: float(value) for name, value in module.scalars.items()})

    batch = (random_waveforms(800, 800)[0], None)
    make_trainer(num_updates, callbacks=[Recording()]).fit(module, DataLoader([batch] * num_updates, batch_size=None))
    return rows


def test_exact_control_is_on_its_target_at_every_update():
    """From the sparsity that masks begin with, which no target is below, to the end, the last update included."""
    module = exact_module(reg_learning_rate=0.2, max_updates=12, sparsity_warmup_updates=8)
    rows = train_and_record(module, 12)
    assert [row["sparsity_expected"] for row in rows] == pytest.approx(
        [row["sparsity_target"] for row in rows], abs=2e-5
    )
    targets = [row["sparsity_target"] for row in rows]
    assert targets[0] == pytest.approx(module.budgets["sparsity"].start) and module.budgets["sparsity"].start > 0
    assert targets[0] < targets[1] < targets[7] < targets[8] == targets[-1] == pytest.approx(0.6)
    assert not {"lambda1", "lambda2", "train_loss_reg"} & rows[0].keys()
    size = float(module.student_model.get_num_params().detach())
    assert size == pytest.approx(0.4 * module.budgets["sparsity"].original_size, rel=2e-5)
    before = copy.deepcopy(module.state_dict())
    module.meet_target(12)  # as where a run is continued
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_two_budgets_are_never_exceeded():
    """The target of multiply-adds rises as that of parameters, from the same masks; one of the two is always met."""
    module = exact_module(reg_learning_rate=0.2, max_updates=8, sparsity_warmup_updates=6, target_macs=0.7)
    rows = train_and_record(module, 8)
    margins = [[row[f"{name}_expected"] - row[f"{name}_target"] for name in ("sparsity", "macs")] for row in rows]
    assert [min(margin) for margin in margins] == pytest.approx([0] * 8, abs=2e-5)
    assert rows[-1]["macs_target"] == pytest.approx(0.7)
    assert rows[-1]["macs_expected"] >= 0.7 - 2e-5
    assert module.budgets["macs"].original_size == sum(count_flops(module.teacher_model.config, 118_720)) / 2


def test_a_profile_of_multiply_adds_is_the_target_of_multiply_adds():
    """Update for update: masks that only differ by rounding."""
    units = [unit for unit in PRUNING_UNITS if unit != "embed"]  # of which the positional convolution has the square
    student, teacher = random_model(with_masks(small_config("hubert"), units), 1), random_model(small_config("hubert"))
    contents = made_up_profile(teacher, 7.42, lambda operation, x, y: MACS[operation.kind](x, y, **operation.fixed))
    rows = []
    for name in ("macs", "latency"):
        targets = {"target_sparsity": 0.5, f"target_{name}": 0.7, "profile": Profile(contents)}
        module = exact_module(student_model=copy.deepcopy(student), max_updates=6, sparsity_warmup_updates=4, **targets)
        torch.manual_seed(0)
        rows.append(train_and_record(module, 6))
    for macs, latency in zip(*rows, strict=True):
        assert macs["macs_expected"] == pytest.approx(latency["latency_expected"], abs=1e-5)
        assert macs["sparsity_expected"] == pytest.approx(latency["sparsity_expected"], abs=1e-5)
        assert macs["train_loss"] == pytest.approx(latency["train_loss"], rel=1e-4)
    assert rows[1][-1]["latency_expected"] >= 0.7 - 2e-5


@pytest.mark.parametrize("name", Size._fields)
def test_exact_control_follows_the_gradient_at_constant_size(name):
    """The gradient is that of the loss of masks moved back to the size, by finite differences in double precision."""
    targets: dict[str, Any] = {"target_sparsity": 0.6}
    if name != "params":
        contents = made_up_profile(random_model(small_config("hubert")), 0.05, lambda _, x, y: 1000 + 30 * x * y**0.5)
        targets = {"target_sparsity": None, f"target_{name}": 0.6, "profile": Profile(contents)}
    module = exact_module(sparsity_warmup_updates=0, **targets).double()
    module.trainer = make_trainer(1)
    module.meet_target(0)
    module.student_model.eval()  # soft masks without noise
    masks = [m for m in module.student_model.modules() if isinstance(m, HardConcrete)]
    weights = [torch.randn(mask.n_in, dtype=torch.double, generator=torch.Generator().manual_seed(9)) for mask in masks]

    def loss() -> torch.Tensor:
        return sum((w * m.log_alpha.sigmoid()).sum() for w, m in zip(weights, masks, strict=True))

    loss().backward()
    module.on_after_backward()
    found = [mask.log_alpha.grad.clone() for mask in masks]
    assert float(sum(gradient.sum() for gradient in found)) == pytest.approx(0, abs=1e-9)
    module.on_after_backward()
    assert all(torch.allclose(mask.log_alpha.grad, gradient) for mask, gradient in zip(masks, found, strict=True))

    def size() -> torch.Tensor:
        return getattr(size_of(module.student_model, module.profile), name)

    step, wanted = 1e-3, float(size().detach())
    for mask, gradient in list(zip(masks, found, strict=True))[::4]:
        values = []
        for sign in (1, -1):
            before = [each.log_alpha.detach().clone() for each in masks]
            with torch.no_grad():
                mask.log_alpha[0] += sign * step
                # To the size by Newton's method: the bisection stops too early for a difference quotient.
                for _ in range(4):
                    with torch.enable_grad():
                        gradients = torch.autograd.grad(size(), [each.log_alpha for each in masks])
                    offset = (wanted - size()) / sum(each.sum() for each in gradients)
                    for each in masks:
                        each.log_alpha += offset
                values.append(float(loss()))
                for each, log_alpha in zip(masks, before, strict=True):
                    each.log_alpha.copy_(log_alpha)
        assert float(gradient[0]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize(
    ("family", "size", "control"),
    [
        ("hubert", "base", "lagrangian"),
        ("hubert", "large", "exact"),
        ("wavlm", "base", "exact"),
        ("wavlm", "large", "lagrangian"),
    ],
)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"encoder_use_attention": [False, True, True]},
        {"encoder_use_feed_forward": [True, False, True]},
        {"aux_num_out": 5},
    ],
)
@pytest.mark.parametrize(
    ("mode", "layers"),
    [("layer2layer", [0, 1, 3]), ("layer2layer", [0, 2]), ("layer2layer", [0]), ("predlayer", [1, 2])],
)
def test_every_trained_parameter_gets_a_gradient(family, size, control, changes, mode, layers):
    """DDP waits for the gradient of each parameter that asks for one, and a frozen one must have had none."""
    config = small_config(family, size, **changes)
    student = random_model(with_masks(config, PRUNING_UNITS))
    module = make_module(
        sparsity_control=control,
        teacher_model=random_model(small_config(family, size), seed=1),
        student_model=student,
        distill_mode=mode,
        distill_layers=layers,
        distill_linear_projs=make_projections(mode, [layers], 16, 16),
    )
    frozen = [parameter for parameter in student.parameters() if not parameter.requires_grad]
    module.trainer = make_trainer(1)
    train_on(module, random_waveforms(800, 700)).backward()
    without = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    # What was frozen is unreached indeed: asking for its gradient gives none.
    for parameter in frozen:
        if parameter is not student.feature_extractor.dummy_weight:  # frozen by the method, not for DDP
            parameter.requires_grad_(True)
    train_on(module, random_waveforms(800, 700)).backward()
    assert all(parameter.grad is None for parameter in frozen)


def test_teacher_stays_in_eval_mode_and_out_of_the_checkpoint():
    module = make_module()
    assert module.student_model.training
    module.eval()
    module.train()
    assert not module.teacher_model.training and module.student_model.training
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    prefixes = {key.split(".")[0] for key in checkpoint["state_dict"]}
    assert prefixes == {"student_model", "distill_linear_projs", "lambda1", "lambda2"}
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=True)


def test_optimizer_groups():
    module = make_module(weight_decay=0.1)
    groups = {group["name"]: group for group in module.configure_optimizers()["optimizer"].param_groups}
    assert set(groups) == {"main_params", "log_alpha", "lambda"}
    assert groups["main_params"]["weight_decay"] == 0.1
    assert groups["log_alpha"]["weight_decay"] == groups["lambda"]["weight_decay"] == 0
    assert groups["lambda"]["maximize"] and not groups["main_params"]["maximize"]
    members = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert len(members) == len(set(members))
    trained = {id(p) for name, p in module.named_parameters() if p.requires_grad}
    assert set(members) == trained


def test_projections():
    projections = make_projections("layer2layer", [[0], [4, 8]], 6, 6)
    assert len(projections) == 3 and projections[1] is projections[2] is not projections[0]
    x = torch.randn(2, 6)
    torch.testing.assert_close(projections[0](x), x)  # starts as the identity
    predictors = make_projections("predlayer", [[4, 8]], 6, 10)
    assert len({id(predictor) for predictor in predictors}) == 2
    assert predictors[0](x).shape == (2, 10)


def test_predlayer_predicts_every_layer_from_the_last_output():
    module = make_module(
        distill_mode="predlayer",
        distill_layers=[1, 2],
        distill_linear_projs=make_projections("predlayer", [[1, 2]], 16, 16),
    )
    waveforms = random_waveforms(1200, 1200)[0]
    module.student_model.eval()  # masks without noise
    last = module.student_model.extract_features(waveforms)[0][-1]
    targets = module.targets(waveforms, None)
    losses = [module.distill_loss(p(last), t)[0] for p, t in zip(module.distill_linear_projs, targets, strict=True)]
    loss, *_ = module.distillation(waveforms, None, targets)
    torch.testing.assert_close(loss, torch.stack(losses).mean())


class Smoothness(Term):
    """A term of one's own: each frame of the student's layer 2 should resemble the next, as far as the teacher's do."""

    name, weight, teacher_layers, student_depth = "smoothness", 0.5, (2,), 2

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, states: States) -> torch.Tensor:
        ours, theirs = (x[:, 1:] - x[:, :-1] for x in (states.student[2], states.teacher[2]))
        return (self.scale * ours.abs().mean() - theirs.abs().mean()).abs()


@pytest.mark.parametrize("alone", [False, True])
def test_a_term_beside_equation_1_or_alone(alone):
    projections = make_projections("layer2layer", [], 16, 16)
    changes = {"distill_layers": [], "distill_linear_projs": projections} if alone else {}
    module = make_module(term=Smoothness(), **changes)
    batch = (random_waveforms(800, 800)[0], None)
    loss, scalars = module.loss(batch, "train")
    parts = scalars["train_loss_distill"] + 0.5 * scalars["train_loss_smoothness"] + scalars["train_loss_reg"]
    torch.testing.assert_close(loss.detach(), parts)
    assert scalars["train_loss_smoothness"] > 0
    assert (scalars["train_loss_distill"] == 0) == alone
    assert module.teacher_layers == ([2] if alone else [0, 1, 2, 3]) and module.student_depth == (2 if alone else 3)
    assert any(parameter is module.term.scale for parameter in module.parameter_groups()[0]["params"])
    module.trainer = make_trainer(1)
    train_on(module, random_waveforms(800, 800)).backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
