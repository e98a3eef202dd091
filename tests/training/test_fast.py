"""Training the fast way gives what the plain way gives: losses, clipping, whole updates."""

from typing import Any

import pytest
import torch
from helpers import FAMILIES, PRUNING, make_module, run_script, save_small_model, small_run
from torch import Tensor

from lightning import DistillLoss, DistillModule, clip_gradients
from wav2vec2.fast import fast_paths, plain_paths


@pytest.mark.parametrize("weights", [(0, 1, 1, "raw"), (1, 0, 0, "raw"), (0.5, 1, 2, "log_sig")], ids=str)
def test_loss_without_stacking(weights):
    generator = torch.Generator().manual_seed(0)
    student, teacher = ([torch.randn(2, 7, 16, generator=generator) for _ in range(3)] for _ in range(2))
    module = make_module(distill_loss=DistillLoss(*weights))
    stacked, parts = module.distill_loss(torch.stack(student, 1), torch.stack(teacher, 1))
    total, layer_parts = module._layerwise_loss(student, teacher)
    torch.testing.assert_close(total, stacked, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer_parts, parts, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("family", "size"), FAMILIES)
def test_whole_updates(manifests, tmp_path, monkeypatch, family, size):
    """Through the script, with --plain and without: fused optimiser, no padding mask, losses layer by layer."""
    teacher = save_small_model(tmp_path / "teacher.pth", family, size)
    flags = (*small_run(manifests, teacher, max_updates=8, seconds_per_batch=0.6), *PRUNING)
    run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "fast")
    run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "plain", "--plain")
    states = [torch.load(tmp_path / name / "ckpts" / "last.ckpt", weights_only=True) for name in ("fast", "plain")]
    assert [state["optimizer_states"][0]["param_groups"][0]["fused"] for state in states] == [True, False]
    for key, value in states[0]["state_dict"].items():
        torch.testing.assert_close(
            value, states[1]["state_dict"][key], rtol=1e-3, atol=2e-4, msg=lambda t, k=key: f"{k}: {t}"
        )
    assert fast_paths()


def test_a_run_can_change_paths(manifests, small_teacher, tmp_path, monkeypatch):
    """The optimiser follows the switch, not the checkpoint."""
    flags = (*small_run(manifests, small_teacher, max_updates=4, warmup_updates=1), "--exp_dir", tmp_path)
    run_script(monkeypatch, "distill", *flags)
    path = tmp_path / "ckpts" / "last.ckpt"
    more = (*small_run(manifests, small_teacher, max_updates=8, warmup_updates=1), "--exp_dir", tmp_path / "more")
    run_script(monkeypatch, "distill", *more, "--resume_checkpoint", path, "--plain")
    trained = torch.load(tmp_path / "more" / "ckpts" / "last.ckpt", weights_only=True)
    assert trained["optimizer_states"][0]["param_groups"][0]["fused"] is False and trained["global_step"] == 8


def test_training_folds_the_teacher(manifests, tmp_path, monkeypatch):
    """Also a run that is continued: loading its checkpoint puts the teacher's weights back."""
    teacher = save_small_model(tmp_path / "teacher.pth", "hubert", "base")
    folded = []
    targets = DistillModule.targets

    def noting(module: DistillModule, batch: Any) -> list[Tensor]:
        conv = module.teacher_model.encoder.transformer.pos_conv_embed.conv
        if module.training:  # the check of validation that comes first has nothing to be quick for
            folded.append(conv.folded_weight is not None)
        return targets(module, batch)

    monkeypatch.setattr(DistillModule, "targets", noting)
    for max_updates in (1, 2):
        flags = small_run(manifests, teacher, exp_dir=tmp_path / "exp", max_updates=max_updates, warmup_updates=1)
        last = tmp_path / "exp" / "ckpts" / "last.ckpt"
        resume = ("--resume_checkpoint", last) if last.exists() else ()
        run_script(monkeypatch, "distill", *flags, *PRUNING, "--sparsity_warmup_updates", 1, *resume)
    assert folded == [True, True]


@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
@pytest.mark.parametrize("scale", [0.01, 100.0, float("nan")])
def test_clipping_is_torchs(scale, plain):
    """Also where the fast path leaves gradients alone, and where nothing is to be clipped at all."""
    generator = torch.Generator().manual_seed(0)
    gradients = [scale * torch.randn(shape, generator=generator) for shape in ((5, 4), (7,))]
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    optimizer = torch.optim.AdamW(parameters)

    def clipped(max_norm: float | None) -> tuple[Tensor, list[Tensor]]:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        with plain_paths(plain):
            norm = clip_gradients(optimizer, max_norm)
        return norm, [parameter.grad for parameter in parameters]

    norm, found = clipped(10.0)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    expected_norm = torch.nn.utils.clip_grad_norm_(parameters, 10.0)
    torch.testing.assert_close(norm, expected_norm, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found, [p.grad for p in parameters], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(clipped(None)[1], gradients, rtol=0, atol=0, equal_nan=True)
