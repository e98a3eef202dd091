"""``--compile`` computes what the plain code computes, for few shapes of batches, each compiled once."""

import csv
import signal
from pathlib import Path

import pytest
import torch
from helpers import (
    PRUNING,
    assert_same_run,
    error_line,
    last_checkpoint,
    make_module,
    random_model,
    random_waveforms,
    run_script,
    run_to_exit,
    send,
    small_config,
    small_run,
)
from torch._dynamo.utils import counters

from lightning import DistillModule
from training import compiling
from wav2vec2.errors import UserError
from wav2vec2.model import PRUNING_UNITS, with_masks
from wav2vec2.paths import plain_paths

NOISE = {"encoder_dropout": 0.1, "encoder_attention_dropout": 0.1, "encoder_ff_interm_dropout": 0.1}


@pytest.fixture
def graphs(monkeypatch):
    """Counts compiled graphs from zero; without Inductor, whose code takes minutes to build on a small machine."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    yield compiling.num_compiled_graphs
    torch._dynamo.reset()


def noisy_module(family: str, size: str) -> DistillModule:
    """Every kind of mask and dropout."""
    config = small_config(family, size, **NOISE)
    module = make_module(
        teacher_model=random_model(config, seed=1),
        student_model=random_model(with_masks(config, PRUNING_UNITS), seed=1),
    )
    module._log_training = lambda values: None
    return module


def loss_and_gradients(module: DistillModule, num_rows: int, num_samples: int) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(0)  # masks and dropout
    module.zero_grad()
    batch = (random_waveforms(*[num_samples] * num_rows)[0], None)
    loss = module.loss(batch, module.targets(batch), "train")
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("family", "size", "recompute"), [("hubert", "base", True), ("wavlm", "large", False)])
def test_same_numbers_with_the_same_noise(graphs, family, size, recompute):
    """One graph each (``fullgraph``: nothing in it waits for the device), losses and gradients under noise."""
    module = noisy_module(family, size)
    names = list(module.state_dict())
    with plain_paths():  # on CPUs the fast paths have other noise
        plain = loss_and_gradients(module, 2, 1200)
    module.student_model.recompute_activations(recompute)
    module.compile_steps(1)
    for _ in range(2):
        loss, gradients = loss_and_gradients(module, 2, 1200)
        assert loss == pytest.approx(plain[0], rel=1e-6)
        assert gradients.keys() == plain[1].keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, plain[1][name], rtol=1e-4, atol=1e-6)
    assert graphs() == 2
    assert list(module.state_dict()) == names


def test_validation_does_without(graphs):
    module = make_module()
    module.compile_steps(1)
    batch = (random_waveforms(1200)[0], None)
    module.eval()
    module.log_dict = lambda *args, **kwargs: None
    module.loss(batch, module.targets(batch), "valid")
    assert graphs() == 0


# ---------------------------------------------------------------------------------------------- a run


def compiled_run(manifests: Path, teacher: Path, **changes: object) -> list[object]:
    """Batches of five crops of 0.2 s, and what is left of 16 utterances: two shapes."""
    settings = {"seconds_per_batch": 1, "max_updates": 9, **changes}
    return [*small_run(manifests, teacher, **settings), *PRUNING]


def test_a_run_compiles_each_shape_once_and_resumes(manifests, small_teacher, tmp_path, monkeypatch, disturb, graphs):
    """Stopped in the second epoch and continued it is the same run; one without --compile may continue it too.

    With --plain, as the dropout of the fast paths has other noise on CPUs.
    """
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    flags = compiled_run(manifests, small_teacher)
    run_script(monkeypatch, "distill", *flags, "--compile", "--exp_dir", tmp_path / "whole")
    with (tmp_path / "whole" / "csv" / "version_0" / "metrics.csv").open(newline="") as file:
        numbers = [float(row["compiled_graphs"]) for row in csv.DictReader(file) if row["compiled_graphs"]]
    assert len(numbers) == 9 and numbers[-3:] == [graphs()] * 3  # an epoch has six batches

    for name, compiles in (("stopped", ["--compile"]), ("plain", ["--plain"])):
        stopped = (*flags, "--exp_dir", tmp_path / name, "--resume_checkpoint", "auto")
        torch._dynamo.reset()  # a process of its own would have compiled nothing
        disturb.at[6] = send(signal.SIGTERM)
        assert run_to_exit(monkeypatch, "distill", *stopped, "--compile") == 143
        torch._dynamo.reset()
        run_script(monkeypatch, "distill", *stopped, *compiles)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    ours, theirs = (last_checkpoint(tmp_path / name)["state_dict"] for name in ("plain", "whole"))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=2e-4)


def test_what_cannot_be_compiled(manifests, small_teacher, tmp_path, monkeypatch, capsys):
    flags = (*compiled_run(manifests, small_teacher), "--exp_dir", tmp_path, "--compile")
    assert run_to_exit(monkeypatch, "distill", *flags, "--plain") == 1
    assert "--compile and --plain" in error_line(capsys)
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    torch._inductor.cpp_builder.cpp_compiler_search.cache_clear()
    assert run_to_exit(monkeypatch, "distill", *flags) == 1
    message = error_line(capsys)
    assert "--compile: torch.compile needs a C++ compiler" in message and "install g++" in message
    torch._inductor.cpp_builder.cpp_compiler_search.cache_clear()
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    with pytest.raises(UserError, match="needs Triton"):
        compiling.check_compiler("gpu")
