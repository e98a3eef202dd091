"""Training meets numbers that are not finite and audio that cannot be read."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import soundfile
import torch
from helpers import (
    PRUNING,
    error_line,
    last_checkpoint,
    make_module,
    random_model,
    random_waveforms,
    run_script,
    run_to_exit,
    small_config,
    small_run,
    start_ranks,
)
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from cli import AllProcessesError
from dataset.speech import SpeechDataset
from lightning import DistillLoss, make_projections
from training import data as datamodule
from training.signals import StopRequest
from training.updates import UpdateGuard
from wav2vec2.fast import plain_paths
from wav2vec2.model import with_masks

pytestmark = pytest.mark.slow

LOUD = "train-clean-100/1/2/1-2-0003.flac"


@pytest.fixture
def own_corpus(corpus, tmp_path, monkeypatch) -> Path:
    """A copy of the corpus to damage, with manifests from before the damage in ``data``."""
    root = tmp_path / "LibriSpeech"
    shutil.copytree(corpus, root)
    # prepare_data.py counts what is there: the loud file must be one that any format can hold.
    samples, rate = soundfile.read(root / LOUD)
    (root / LOUD).unlink()
    soundfile.write((root / LOUD).with_suffix(".wav"), samples, rate, subtype="FLOAT")
    run_script(monkeypatch, "prepare_data", "--data", root, "--out", tmp_path / "data")
    return root


@pytest.fixture
def loud_file(own_corpus) -> Path:
    """A recording with samples so large, yet finite, that the arithmetic of the plain paths overflows.

    On CPUs the fast ones take the first norm's statistics in float64, and do not.
    """
    path = (own_corpus / LOUD).with_suffix(".wav")
    samples, rate = soundfile.read(path, dtype="float32")
    soundfile.write(path, np.where(samples > 0, np.float32(3e38), np.float32(-3e38)), rate, subtype="FLOAT")
    return path


# --- not finite ------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run(loud_file, small_teacher, tmp_path, monkeypatch, capsys):
    flags = small_run(tmp_path / "data", small_teacher, seconds_per_batch=0.4, max_updates=30, save_interval=1)
    with plain_paths():
        assert run_to_exit(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "exp") == 1
    message = error_line(capsys)
    last = tmp_path / "exp" / "ckpts" / "last.ckpt"
    trained = torch.load(last, weights_only=True)
    assert f"update {trained['global_step']}: the loss is [nan]" in message and str(loud_file) in message
    assert "continue with --resume_checkpoint auto" in message
    assert all(value.isfinite().all() for value in trained["state_dict"].values())


class Overflowing(nn.Module):
    """A loss whose gradient is infinite in float16 at the scaler's first scales, and not at lower ones.

    Args:
        loss: of the layers.
        gain: the loss is larger by it.
        nan_at: batches, from 0, whose loss is NaN.
    """

    weight = 1.0

    def __init__(self, loss: DistillLoss, gain: float, nan_at: Sequence[int]) -> None:
        super().__init__()
        self.loss, self.gain, self.nan_at = loss, gain, nan_at
        self.num_calls = 0

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> Any:
        total, parts = self.loss(student, teacher)
        batch, self.num_calls = self.num_calls // 2, self.num_calls + 1  # two layers
        return total * (float("nan") if batch in self.nan_at else self.gain), parts


def train_with_scaler(
    gain: float, updates: int, tmp_path: Path, scale: float = 2.0**32, nan_at: Sequence[int] = ()
) -> tuple[Any, Any, Any, Any]:
    config = small_config("hubert")
    module = make_module(
        student_model=random_model(with_masks(config, ["interm"]), seed=2),
        distill_layers=[0, 3],
        distill_linear_projs=make_projections("layer2layer", [[0, 3]], 16, 16),
        distill_loss=Overflowing(DistillLoss(0, 1, 1, "raw"), gain, nan_at),
        max_updates=updates,
        use_reg=False,
    )
    guard = UpdateGuard(module, StopRequest(), clip_norm=10, max_bad_files=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer = pl.Trainer(
        max_steps=updates,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        callbacks=[guard],
    )
    batch = (random_waveforms(800, 800)[0], None)
    trainer.fit(module, DataLoader([batch] * updates, batch_size=None))
    return trainer, module, guard, scaler


def test_overflow_that_the_scaler_handles_is_no_trouble(tmp_path):
    trainer, module, guard, scaler = train_with_scaler(1.0, 24, tmp_path)
    assert scaler.get_scale() < 2.0**32 and trainer.global_step == 24 and guard.skipped == 0
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert float(trainer.callback_metrics["grad_norm"]) < 100  # of the gradient itself, not of the scaled one


def test_overflow_at_any_scale_is_trouble(tmp_path):
    with pytest.raises(AllProcessesError, match=r"update 20: the gradient's norm is (nan|inf).* --precision bf16"):
        train_with_scaler(1e30, 22, tmp_path, scale=4.0)


def test_the_scaler_skips_losses_that_are_not_finite(tmp_path, capsys):
    """The published program skips them, too; here each is counted and named, and twenty in a row are too many."""
    nan_at = [1, *range(3, 23)]
    trainer, module, guard, scaler = train_with_scaler(1.0, 24, tmp_path, scale=4.0, nan_at=nan_at)
    assert trainer.global_step == 24 and guard.skipped == 21 and scaler.get_scale() == 4.0 / 2**21
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    printed = capsys.readouterr().err
    assert "skipped by the loss scaler, 1 in a row of at most 20: update 1: the loss is [nan]" in printed
    with pytest.raises(AllProcessesError, match=r"update 21: the loss is \[nan\].* has skipped 20 updates in a row"):
        train_with_scaler(1.0, 22, tmp_path, scale=4.0, nan_at=range(1, 22))


@pytest.mark.parametrize("clip_norm", [0.01, 1e6, 0.0])
def test_the_gradient_is_clipped_as_torch_does(clip_norm):
    """To a norm of at most ``clip_norm``, of all that the optimiser trains together; 0 leaves it alone."""
    module, logged_values = make_module(), {}
    module.log = lambda name, value: logged_values.update({name: value})
    module.log_dict = logged_values.update
    optimizer = module.configure_optimizers()["optimizer"]
    guard = UpdateGuard(module, StopRequest(), clip_norm=clip_norm, max_bad_files=0)
    loss, module.scalars = module.loss((random_waveforms(800, 800)[0], None), "train")
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    before = [p.grad.clone() for p in parameters]
    guard.on_after_backward(None, module)
    guard.on_before_optimizer_step(SimpleNamespace(is_global_zero=True), module, optimizer)
    found = [p.grad.clone() for p in parameters]
    for parameter, gradient in zip(parameters, before, strict=True):
        parameter.grad = gradient
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm or float("inf"))
    assert logged_values["grad_norm"] == norm > 0.01
    torch.testing.assert_close(found, [p.grad for p in parameters], rtol=0, atol=0)


# --- audio -----------------------------------------------------------------------------------------


def damage(root: Path, *kinds: str) -> list[Path]:
    """Damage a recording for each kind, so that its header shows it or not."""
    paths = [root / f"train-clean-100/1/2/1-2-000{5 + number}.flac" for number in range(len(kinds))]
    for path, kind in zip(paths, kinds, strict=True):
        if kind == "missing":
            path.unlink()
        elif kind == "cut":
            contents = path.read_bytes()
            path.write_bytes(contents[: len(contents) // 3])
        elif kind == "silent":
            samples, rate = soundfile.read(path)
            soundfile.write(path, np.zeros_like(samples), rate)
    return paths


def test_bad_audio_is_replaced_and_counted(own_corpus, small_teacher, tmp_path, monkeypatch, capsys):
    paths = {str(path) for path in damage(own_corpus, "missing", "cut", "silent")}
    flags = small_run(tmp_path / "data", small_teacher, seconds_per_batch=0.6, max_updates=8, max_bad_files=3)
    run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "exp")
    printed = capsys.readouterr().err
    lines = [line for line in printed.splitlines() if line.startswith("bad file ")]
    assert len(lines) == 3 and lines[0].startswith("bad file 1 (at most 3), replaced by another: ")
    assert {line.split(": ")[1] for line in lines} == paths
    assert "3 bad files were replaced by others" in printed
    assert set(last_checkpoint(tmp_path / "exp")["callbacks"]["UpdateGuard"]["bad_files"]) == paths


@pytest.mark.parametrize("kind", ["missing", "silent"])
def test_too_much_bad_audio_ends_the_run(own_corpus, small_teacher, tmp_path, monkeypatch, capsys, kind):
    """Before training where the header shows it, during it otherwise."""
    (path,) = damage(own_corpus, kind)
    flags = small_run(tmp_path / "data", small_teacher, seconds_per_batch=0.6, max_updates=20)
    assert run_to_exit(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "exp") == 1
    message = error_line(capsys)
    assert "--max_bad_files: at most 0 bad audio files are allowed" in message and str(path) in message
    assert (tmp_path / "exp").exists() == (kind != "missing")


def test_bad_audio_in_the_second_of_two_processes(own_corpus, small_teacher, tmp_path):
    """Both processes learn of it, and neither waits for the other."""
    damage(own_corpus, "silent")
    flags = small_run(tmp_path / "data", small_teacher, seconds_per_batch=0.4, max_updates=40, gpus=2)
    processes = start_ranks("distill", *flags, "--exp_dir", tmp_path / "exp", output=tmp_path / "output")
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [1, 0]  # the first one speaks for both
    printed = (tmp_path / "output").read_text()
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "--max_bad_files: at most 0" in errors[0] and "Traceback" not in printed


def test_loader_processes_that_hang(manifests, small_teacher, tmp_path, monkeypatch, capsys):
    """A disk that hangs, a process that never started: not waited for without end."""

    def hang(dataset: SpeechDataset, crop: object) -> None:
        time.sleep(60)

    monkeypatch.setattr(datamodule, "WORKER_TIMEOUT", 1)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # the wait for the process to end
    monkeypatch.setattr(SpeechDataset, "__getitem__", hang)
    flags = small_run(manifests, small_teacher, num_workers=1)
    assert run_to_exit(monkeypatch, "distill", *flags, *PRUNING, "--exp_dir", tmp_path) == 1
    assert "loader processes: DataLoader timed out after 1 seconds" in error_line(capsys)
