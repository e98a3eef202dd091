"""Fast paths give the same numbers, and what a run logs of its speed adds up."""

import re
import signal
from typing import Any

import pytest
import torch
from helpers import (
    FAMILIES,
    PRUNING,
    SPEED_COLUMNS,
    assert_same_run,
    error_line,
    hubert_base_flops,
    last_checkpoint,
    logged,
    logged_speed,
    make_module,
    one_layer_config,
    random_model,
    random_waveforms,
    run_script,
    run_to_exit,
    save_small_model,
    send,
    small_config,
    small_run,
)
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode

from lightning import DistillModule
from training import speed
from training.speed import FetchTimer, forward_flops, peak_flops, update_flops
from wav2vec2.fast import fast_paths, plain_paths
from wav2vec2.files import checkpoint
from wav2vec2.files.errors import UserError
from wav2vec2.model import PRUNING_UNITS, hubert_base, with_masks

NOISE = {"encoder_dropout": 0.1, "encoder_attention_dropout": 0.1, "encoder_ff_interm_dropout": 0.1}


def noisy_module(family: str, size: str) -> DistillModule:
    """A module with every kind of mask and dropout."""
    config = small_config(family, size, **NOISE)
    student = random_model(with_masks(config, PRUNING_UNITS), seed=1)
    return make_module(teacher_model=random_model(config), student_model=student)


def update(module: DistillModule, *num_samples: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients, and the bytes that the forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(0)  # masks and dropout
    module.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = module.loss((random_waveforms(*num_samples)[0], None), "train")
    loss.backward()
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, sum(size for place, size in kept.items() if place not in weights)


# --- activations and the teacher -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "size", "bfloat16"), [("hubert", "base", False), ("wavlm", "base", True), ("wavlm", "large", False)]
)
def test_recomputed_activations_are_the_same(family, size, bfloat16):
    """Loss and gradients to the last bit, with every mask and dropout, for a fraction of the memory."""
    module = noisy_module(family, size)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss, gradients, kept = update(module, 16000, 16000)
        module.student_model.recompute_activations()
        again, others, kept_now = update(module, 16000, 16000)
    assert torch.equal(loss, again) and gradients.keys() == others.keys() and len(gradients) > 50
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]), name
    assert kept_now < 0.6 * kept


@pytest.mark.slow
def test_a_run_with_recomputed_activations(manifests, small_teacher, tmp_path, monkeypatch):
    flags = (*small_run(manifests, small_teacher, max_updates=3), *PRUNING)
    run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "kept")
    run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "recomputed", "--checkpoint_activations")
    assert_same_run(tmp_path / "kept", tmp_path / "recomputed")


@pytest.mark.parametrize("family", ["hubert", "wavlm"])
def test_only_wanted_layers_are_kept(family):
    model = random_model(small_config(family))
    waveforms = random_waveforms(1200, 1200)[0]
    with torch.no_grad():
        every, some = (model.extract_features(waveforms, kept=kept)[0] for kept in (None, [0, 2]))
    assert len(some) == len(every) == 4 and [x.numel() > 0 for x in some] == [True, False, True, False]
    assert all(torch.equal(some[layer], every[layer]) for layer in (0, 2))


def test_the_teacher_stays_as_it_was_prepared():
    """Neither training nor validation undoes its folded weight norm or its mode."""
    module = make_module()
    module.teacher_model.fold_weight_norm()
    for mode in (False, True):
        module.train(mode)
        assert module.teacher_model.encoder.transformer.pos_conv_embed.conv.folded_weight is not None
        assert not any(part.training for part in module.teacher_model.modules())
        assert all(part.training == mode for part in module.student_model.modules()) and module.training == mode


@pytest.mark.parametrize(("family", "size"), FAMILIES)
def test_a_forward_pass_does_not_wait_for_a_gpu(family, size):
    """On a pretended GPU, whose tensors have no values: whatever asks for one raises an error."""
    with FakeTensorMode(), torch.device("cuda"):
        module = noisy_module(family, size)
        module.teacher_model.fold_weight_norm()
        for mode in (True, False):
            module.train(mode)
            loss, _ = module.loss((torch.randn(2, 1600), None), "train")
            assert loss.device.type == "cuda" and loss.requires_grad


# --- the switch -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("family", "size"), [("hubert", "base"), ("wavlm", "large")])
def test_whole_updates(manifests, tmp_path, monkeypatch, family, size):
    """Through the script, on either path: fused optimiser, no padding mask, losses layer by layer."""
    teacher = save_small_model(tmp_path / "teacher.pth", family, size)
    flags = (*small_run(manifests, teacher, max_updates=4, seconds_per_batch=0.6), *PRUNING)
    run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "fast")
    with plain_paths():
        run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "plain")
    states = [last_checkpoint(tmp_path / name) for name in ("fast", "plain")]
    assert [state["optimizer_states"][0]["param_groups"][0]["fused"] for state in states] == [True, False]
    for key, value in states[0]["state_dict"].items():
        torch.testing.assert_close(
            value, states[1]["state_dict"][key], rtol=1e-3, atol=2e-4, msg=lambda t, k=key: f"{k}: {t}"
        )
    assert fast_paths()


@pytest.mark.slow
def test_a_run_can_change_paths(finished_run, manifests, small_teacher, tmp_path, monkeypatch):
    """The optimiser follows the switch, not the checkpoint."""
    more = (*small_run(manifests, small_teacher, max_updates=8), *PRUNING, "--exp_dir", tmp_path)
    with plain_paths():
        run_script(monkeypatch, "distill", *more, "--resume_checkpoint", finished_run / "ckpts" / "last.ckpt")
    trained = last_checkpoint(tmp_path)
    assert trained["optimizer_states"][0]["param_groups"][0]["fused"] is False and trained["global_step"] == 8


@pytest.mark.slow
def test_training_folds_the_teacher(manifests, small_teacher, tmp_path, monkeypatch):
    """Also a run that is continued: loading its checkpoint puts the teacher's weights back."""
    folded = []
    targets = DistillModule.targets

    def noting(module: DistillModule, *inputs: Any) -> list[torch.Tensor]:
        conv = module.teacher_model.encoder.transformer.pos_conv_embed.conv
        if module.training:  # the check of validation that comes first has nothing to be quick for
            folded.append(conv.folded_weight is not None)
        return targets(module, *inputs)

    monkeypatch.setattr(DistillModule, "targets", noting)
    for max_updates in (1, 2):
        flags = small_run(manifests, small_teacher, exp_dir=tmp_path / "exp", max_updates=max_updates, warmup_updates=1)
        last = tmp_path / "exp" / "ckpts" / "last.ckpt"
        resume = ("--resume_checkpoint", last) if last.exists() else ()
        run_script(monkeypatch, "distill", *flags, *PRUNING, "--sparsity_warmup_updates", 1, *resume)
    assert folded == [True, True]


# --- torch.compile ---------------------------------------------------------------------------------


@pytest.fixture
def count_graphs(monkeypatch):
    """Counts compiled graphs from zero, as Dynamo makes them; building their code would take minutes."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(speed, "COMPILER", "eager")
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_run_has_the_same_numbers_and_may_go_on_without(
    manifests, tmp_path, monkeypatch, disturb, count_graphs
):
    """Losses and weights under noise, with one graph (``fullgraph``) of each model for batches of all lengths."""
    model, teacher = random_model(one_layer_config("wavlm") | NOISE), tmp_path / "teacher.pth"
    checkpoint.save(teacher, {"config": model.config, "state_dict": model.state_dict()})
    changes = {"max_crop_seconds": None, "seconds_per_batch": 12, "valid_interval": 1000, "distill_layers": "0.1"}
    flags = small_run(manifests, teacher, max_updates=8, pruning_units=",".join(PRUNING_UNITS), **changes)
    run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "eager")
    assert count_graphs() == 0
    compiled = (*flags, "--exp_dir", tmp_path / "compiled", "--resume_checkpoint", "auto")
    disturb.at[6] = send(signal.SIGTERM)
    assert run_to_exit(monkeypatch, "distill", *compiled, "--compile") == 143
    numbers = [float(row["compiled_graphs"]) for row in logged_speed(tmp_path / "compiled")]
    assert len(numbers) == 6 and numbers[-1] == count_graphs() == 4  # teacher and student, training or not
    run_script(monkeypatch, "distill", *compiled)
    eager, compiled = (
        [row for row in logged(tmp_path / name) if "train_loss" in row] for name in ("eager", "compiled")
    )
    losses = [[float(row["train_loss"]) for row in rows] for rows in (eager, compiled)]
    assert len(losses[0]) == 8 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    ours, theirs = (last_checkpoint(tmp_path / name)["state_dict"] for name in ("eager", "compiled"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=2e-4)


def test_what_cannot_be_compiled(manifests, small_teacher, tmp_path, monkeypatch, capsys):
    flags = (*small_run(manifests, small_teacher), *PRUNING, "--exp_dir", tmp_path, "--compile")
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        torch._inductor.cpp_builder.cpp_compiler_search.cache_clear()
        assert run_to_exit(monkeypatch, "distill", *flags) == 1
    message = error_line(capsys)
    assert "--compile: torch.compile needs a C++ compiler" in message and "install g++" in message
    torch._inductor.cpp_builder.cpp_compiler_search.cache_clear()
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    with pytest.raises(UserError, match="needs Triton"):
        speed.check_compiler("gpu")


# --- throughput ------------------------------------------------------------------------------------


def test_operations_of_hubert_base():
    with torch.device("meta"):
        model = hubert_base()
    for samples in (16_000, 240_000):
        assert forward_flops(model, 12)(samples) == pytest.approx(hubert_base_flops(samples), rel=2e-3)


def test_an_update_costs_the_teacher_once_and_the_student_three_times():
    module = make_module()
    teacher, student = (forward_flops(model, 3)(16000) for model in (module.teacher_model, module.student_model))
    assert update_flops(module)(16000) == pytest.approx(teacher + 3 * student)
    assert teacher == student > forward_flops(module.teacher_model, 1)(16000)  # masks cost nothing, layers count


def test_peaks():
    assert peak_flops("NVIDIA H200", "bf16") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", "32") == 19.5e12
    assert peak_flops("NVIDIA L40S", "16") == 362e12
    assert peak_flops("a device of the future", "16") is None


def test_only_fetching_counts_as_waiting(monkeypatch):
    clock = iter([1.0, 3.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    timer = FetchTimer()
    timer.start("[_TrainingEpochLoop].train_dataloader_next")
    timer.start("run_training_batch")
    timer.stop("run_training_batch")
    timer.stop("[_TrainingEpochLoop].train_dataloader_next")
    assert timer.seconds == 2.0


@pytest.mark.slow
def test_a_run_logs_its_speed(manifests, small_teacher, tmp_path, monkeypatch):
    flags = small_run(manifests, small_teacher, max_updates=6, log_interval=3, seconds_per_batch=0.6, accum_grad=2)
    run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path)
    rows = logged_speed(tmp_path)
    assert [int(row["step"]) for row in rows] == [2, 5]
    for row in rows:
        values = {name: float(row[name]) for name in SPEED_COLUMNS if row.get(name)}
        # There is no data sheet of this machine's CPU.
        assert values.keys() == set(SPEED_COLUMNS) - {"share_of_peak", "compiled_graphs"}
        assert 0 <= values["data_wait"] < 1 and values["tflops_per_second"] > 0 and values["peak_memory_gb"] > 0.1
        # Each update has two batches of up to three crops of 0.2 s.
        ratio = values["audio_seconds_per_second"] / values["updates_per_second"]
        assert 0.4 <= ratio <= 1.2 + 1e-6


def test_the_time_of_a_run_is_said_once(manifests, small_teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "_SECONDS_UNTIL_KNOWN", 0.0)
    flags = small_run(manifests, small_teacher, max_updates=5, exp_dir=tmp_path)
    run_script(monkeypatch, "distill", *flags)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "updates a second" in line]
    assert re.fullmatch(r"distill and prune: [\d.e+]+ updates a second, 00:0\d for 3", line)
