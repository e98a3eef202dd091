"""--check says what a run will need, and trains nothing."""

import re
import shutil
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from helpers import random_model, run_to_exit, small_config, small_run

from training.check import _kept_bytes


@pytest.fixture
def check(manifests, small_teacher, tmp_path, monkeypatch, capsys) -> Callable[..., list[str]]:
    def lines(*flags: object, **changes: object) -> list[str]:
        words = [*small_run(manifests, small_teacher, **changes), "--exp_dir", tmp_path / "exp", "--check", *flags]
        assert run_to_exit(monkeypatch, "distill", *words) == 0
        assert not (tmp_path / "exp").exists()
        return capsys.readouterr().out.splitlines()

    return lines


def test_lines(check):
    models, data, target, disk, memory = check()
    assert (
        models.startswith("distill and prune: teacher 7,151 parameters, student") and "1 x cpu, precision 32" in models
    )
    assert re.search(r"train100 has 16 utterances, 0.01 h; 16 .* in 1 batches; 6 updates are \d\.\d epochs", data)
    assert re.fullmatch(
        r"target: without 0.75 of the teacher's parameters, of which the masks can remove 0\.\d{4}", target
    )
    assert re.fullmatch(r"disk: 0.00 GB for checkpoints, [\d.]+ GB free in /.*", disk)
    assert re.fullmatch(r"memory: about 0\.\d GB a process, by the largest batch", memory)


def test_memory_is_what_a_forward_pass_keeps():
    """Without computing it: near what a pass on the CPU keeps, and twice as much for twice the batch."""
    model = random_model(small_config("hubert", extractor_prune_conv_channels=True)).train()
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[id(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.zeros(2, 16_000))
    own = {id(parameter.untyped_storage()) for parameter in model.parameters()}
    found = sum(storage.nbytes() for key, storage in kept.items() if key not in own)
    estimate = _kept_bytes(model, 2, 16_000)
    assert 0.9 * found < estimate < 1.5 * found
    assert _kept_bytes(model, 4, 16_000) == pytest.approx(2 * estimate, rel=0.05)
    model.recompute_activations()
    assert _kept_bytes(model, 2, 16_000) < estimate / 2


def test_what_would_stop_the_run(check, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert any(line.startswith("warning: /") and "room for them" in line for line in check())
    lines = check("--gpus", 64, accelerator="gpu")
    assert any(line.startswith("warning: --gpus: 64 GPUs asked for, ") for line in lines)
