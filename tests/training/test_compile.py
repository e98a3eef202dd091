"""``--compile`` computes what the plain code computes, for few shapes of batches, each compiled once."""

import csv
import re
import signal
from pathlib import Path

import numpy as np
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

from dataset.batches import BatchSampler, choose_crop_lengths, make_batches
from lightning import DistillModule
from training import compiling
from wav2vec2.errors import UserError
from wav2vec2.fast import plain_paths
from wav2vec2.model import PRUNING_UNITS, with_masks

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


# ---------------------------------------------------------------------------------------------- crops


def speech_like_lengths(num: int = 3000) -> np.ndarray:
    """Lengths as LibriSpeech's: most of 12 to 16 s."""
    generator = np.random.default_rng(0)
    return np.clip(16000 * (17 - generator.gamma(1.5, 3.0, num)), 32000, 250000).astype(np.int64)


def lost(lengths: np.ndarray, crop_lengths: list[int]) -> float:
    crops = np.asarray(crop_lengths)[np.searchsorted(crop_lengths, lengths, side="right") - 1]
    return 1 - crops.sum() / lengths.sum()


def test_few_crop_lengths_lose_little():
    lengths = speech_like_lengths()
    chosen = choose_crop_lengths(lengths)
    assert chosen == sorted(set(chosen)) and chosen[0] == lengths.min() and len(chosen) <= 32
    assert lost(lengths, chosen) <= 0.02
    fewer = choose_crop_lengths(lengths, len(chosen) - 1)
    assert len(fewer) == len(chosen) - 1 and 0.02 < lost(lengths, fewer) < 0.03
    # 8 frames of the published extractors, the ends apart.
    assert all((length - 80) % 2560 == 0 or length in (lengths.min(), lengths.max()) for length in chosen)


def test_crop_lengths_are_the_best_there_are():
    """Against every choice of three."""
    lengths = np.array([2000, 9000, 9500, 14000, 18000, 18500, 19000, 26000])
    candidates = [2000, 2640, 5200, 7760, 10320, 12880, 15440, 18000, 20560, 23120, 25680, 26000]
    best = min(
        lost(lengths, sorted({2000, one, other})) for one in candidates for other in candidates if 2000 < one < other
    )
    assert lost(lengths, choose_crop_lengths(lengths, 3)) == pytest.approx(best)
    assert choose_crop_lengths(lengths, 1) == [2000]
    assert choose_crop_lengths(np.array([3200, 3200])) == [3200]


def test_batches_have_as_many_shapes_as_crop_lengths():
    lengths = speech_like_lengths()
    crop_lengths = choose_crop_lengths(lengths, 6)
    generator = torch.Generator().manual_seed(0)
    batches = make_batches(lengths, max_tokens=80 * 16000, generator=generator, crop_lengths=crop_lengths)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    shapes = set()
    for replicas in (1, 3):
        sampler = BatchSampler(lengths, batches, replicas, 0, shuffle=True, seed=1, crop_lengths=crop_lengths)
        for crop in sampler:
            shapes.add((len(crop.indices), crop.num_samples))
            assert crop.num_samples in crop_lengths and len(crop.indices) * crop.num_samples <= 80 * 16000
            ends = np.array(crop.offsets) + crop.num_samples
            assert (ends <= lengths[list(crop.indices)]).all() and min(crop.offsets) >= 0
    assert len(shapes) <= 7
    assert {int(80 * 16000 // length) for length in crop_lengths} <= {rows for rows, _ in shapes}


# ---------------------------------------------------------------------------------------------- a run


def compiled_run(manifests: Path, teacher: Path, **changes: object) -> list[object]:
    """Whole utterances of 2.1 to 4 s, cropped to two lengths."""
    settings = {"max_crop_seconds": None, "seconds_per_batch": 9, "crop_lengths": 2, "max_updates": 9, **changes}
    return [*small_run(manifests, teacher, **settings), *PRUNING]


def test_a_run_compiles_each_shape_once_and_resumes(
    manifests, small_teacher, tmp_path, monkeypatch, disturb, capsys, graphs
):
    """Stopped in the second epoch and continued it is the same run; one without --compile may continue it too.

    With --plain, as the dropout of the fast paths has other noise on CPUs.
    """
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    flags = compiled_run(manifests, small_teacher)
    run_script(monkeypatch, "distill", *flags, "--compile", "--exp_dir", tmp_path / "whole")
    said = re.search(r"--crop_lengths 2: (\d) shapes, (\d+\.\d)% of audio lost", capsys.readouterr().out)
    assert 2 <= int(said[1]) <= 3 and 0 < float(said[2]) < 40
    assert graphs() == 2 * int(said[1])  # teacher and student
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


def test_crop_lengths_are_a_setting(manifests, small_teacher, tmp_path, monkeypatch, capsys):
    flags = (*compiled_run(manifests, small_teacher, max_updates=2), "--exp_dir", tmp_path)
    run_script(monkeypatch, "distill", *flags)
    other = compiled_run(manifests, small_teacher, max_updates=2, crop_lengths=3)
    assert run_to_exit(monkeypatch, "distill", *other, "--exp_dir", tmp_path, "--resume_checkpoint", "auto") == 1
    assert "--crop_lengths: 2 there, 3 now" in error_line(capsys)


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
