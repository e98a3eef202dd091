"""``--checkpoint_activations`` and ``--seconds_per_batch auto``: less memory, and all of it."""

import os
import re
import signal
import sys

import pytest
import torch
from helpers import (
    FAMILIES,
    PRUNING,
    assert_same_run,
    error_line,
    largest_difference,
    last_checkpoint,
    make_module,
    random_model,
    random_waveforms,
    run_command,
    run_script,
    run_to_exit,
    send,
    small_config,
    small_run,
)

from lightning import DistillModule
from training import batch_size
from training.batch_size import MemoryMeter, fitting_seconds, measure
from wav2vec2.errors import UserError
from wav2vec2.model import PRUNING_UNITS, with_masks

NOISE = {"encoder_dropout": 0.1, "encoder_attention_dropout": 0.1, "encoder_ff_interm_dropout": 0.1}


# ---------------------------------------------------------------------------------------------- activations


def update(module: DistillModule, waveforms: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients, and the bytes that the forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(0)  # masks and dropout
    module.zero_grad()
    batch = (waveforms, None)
    targets = module.targets(batch)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = module.loss(batch, targets, "train")
    loss.backward()
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "size"), FAMILIES)
def test_recomputed_activations_are_the_same(family, size, bfloat16):
    """Loss and gradients to the last bit, with every mask and dropout, for a fraction of the memory."""
    config = small_config(family, size, **NOISE)
    student = random_model(with_masks(config, PRUNING_UNITS), seed=1)
    module = make_module(teacher_model=random_model(config), student_model=student)
    module._log_training = lambda values: None
    waveforms = random_waveforms(16000, 16000)[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss, gradients, kept = update(module, waveforms)
        student.recompute_activations()
        again, others, kept_now = update(module, waveforms)
    assert torch.equal(loss, again) and gradients.keys() == others.keys() and len(gradients) > 50
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]), name
    assert kept_now < 0.6 * kept


def test_a_run_with_recomputed_activations(manifests, small_teacher, tmp_path, monkeypatch):
    flags = (*small_run(manifests, small_teacher, max_updates=3), *PRUNING)
    run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "kept")
    run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "recomputed", "--checkpoint_activations")
    assert_same_run(tmp_path / "kept", tmp_path / "recomputed")


# ---------------------------------------------------------------------------------------------- teacher


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


# ---------------------------------------------------------------------------------------------- auto


def test_what_fits():
    peaks = {15.0: 3.0e9, 45.0: 7.0e9}  # 1 GB and 2 / 15 GB a second
    assert fitting_seconds(11.5e9, peaks, 15.0) == 75
    assert fitting_seconds(3.1e9, peaks, 15.0) == 15
    assert fitting_seconds(3.3e9, {15.0: 3.0e9}, 15.0) == 15  # one trial: all of it grows with the audio
    assert fitting_seconds(3.0, {0.2: 0.1, 1.0: 0.1}, 0.2) == 30  # noise
    with pytest.raises(UserError, match=r"one utterance of 15 s needs 3\.00 GB, 2\.90 GB may be used here"):
        fitting_seconds(2.9e9, peaks, 15.0)


def test_the_second_trial_is_left_out_where_it_might_not_fit():
    tried = []

    def trial(num_utterances: int) -> float:
        tried.append(num_utterances)
        return 100.0 * num_utterances + 50

    assert measure(trial, 1000.0, 15.0, reserved=10.0) == {15.0: 160.0, 45.0: 360.0}
    assert measure(trial, 479.0, 15.0, reserved=10.0) == {15.0: 160.0}
    assert measure(trial, 1e9, 0.25)[30.0] == 12050
    assert tried == [1, 3, 1, 1, 120]


def test_meter_sees_what_is_freed_again():
    meter = MemoryMeter(torch.device("cpu"))
    megabytes = [meter(lambda n=n: torch.ones(n << 20).mul(2)) / 1e6 for n in (16, 32)]  # twice 67, 134 MB
    assert 125 < megabytes[0] < 160 and 255 < megabytes[1] < 310


def test_free_memory_is_shared():
    alone, shared = (batch_size.free_memory(torch.device("cpu"), n) for n in (1, 4))
    assert 1e8 < alone < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert shared == pytest.approx(alone / 4, rel=0.2)


AUTO = {"seconds_per_batch": "auto", "max_crop_seconds": None}


def test_a_run_fills_the_memory_and_resumes(manifests, small_teacher, tmp_path, monkeypatch, disturb, capsys):
    """The number is printed and recorded; resumed with auto, the run keeps it, whatever is free then."""
    flags = (*small_run(manifests, small_teacher, **AUTO), *PRUNING)
    monkeypatch.setattr(batch_size, "measure", lambda *_: {4.0: 1.0e9, 12.0: 2.0e9})
    monkeypatch.setattr(batch_size, "free_memory", lambda *_: 1.7e9 / batch_size.SHARE)
    run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "whole")
    output = capsys.readouterr().out
    assert "--seconds_per_batch 5 fills the memory, 5 s an update" in output
    assert last_checkpoint(tmp_path / "whole")["distillation"]["settings"]["seconds_per_batch"] == 5

    stopped = (*flags, "--exp_dir", tmp_path / "stopped", "--resume_checkpoint", "auto")
    disturb.at[4] = send(signal.SIGTERM)
    assert run_to_exit(monkeypatch, "distill", *stopped) == 143
    monkeypatch.setattr(batch_size, "free_memory", lambda *_: 9e9)
    run_script(monkeypatch, "distill", *stopped)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    given = (*small_run(manifests, small_teacher, **{**AUTO, "seconds_per_batch": 5}), *PRUNING)
    run_script(monkeypatch, "distill", *given, "--exp_dir", tmp_path / "given")
    assert largest_difference(*(last_checkpoint(tmp_path / name) for name in ("whole", "given"))) == 0


def test_measured_for_real(manifests, small_teacher, tmp_path, monkeypatch, capsys):
    """A trial leaves no trace, and no batch is larger than gives every update of an epoch its own."""
    flags = (*small_run(manifests, small_teacher, **AUTO, accum_grad=4), *PRUNING)
    monkeypatch.setattr(batch_size, "free_memory", lambda *_: 4e9)
    run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "auto")
    seconds = float(re.search(r"--seconds_per_batch ([\d.]+) fills", capsys.readouterr().out)[1])
    assert seconds in (5, 10)  # 16 utterances of 2.1 to 4 s in four batches
    given = (*small_run(manifests, small_teacher, **{**AUTO, "seconds_per_batch": seconds}, accum_grad=4), *PRUNING)
    run_script(monkeypatch, "distill", *given, "--exp_dir", tmp_path / "given")
    assert largest_difference(*(last_checkpoint(tmp_path / name) for name in ("auto", "given"))) == 0


def test_nothing_fits(manifests, small_teacher, tmp_path, monkeypatch, capsys):
    flags = (*small_run(manifests, small_teacher, **AUTO), *PRUNING, "--exp_dir", tmp_path)
    monkeypatch.setattr(batch_size, "free_memory", lambda *_: 1e4)
    assert run_to_exit(monkeypatch, "distill", *flags) == 1
    message = error_line(capsys)
    assert "--seconds_per_batch auto: an update on one utterance" in message
    assert "add --checkpoint_activations" in message
    assert not (tmp_path / "ckpts").exists()


def test_two_processes(manifests, small_teacher, tmp_path):
    """They agree on the seconds, and their common gradient is the one of recomputed activations."""
    flags = (*small_run(manifests, small_teacher, **AUTO, gpus=2, max_updates=3), *PRUNING)
    result = run_command(sys.executable, "distill.py", *flags, "--exp_dir", tmp_path / "auto")
    assert result.returncode == 0, result.stderr
    (seconds,) = re.findall(r"--seconds_per_batch ([\d.]+) fills", result.stdout)
    given = small_run(manifests, small_teacher, **{**AUTO, "seconds_per_batch": seconds}, gpus=2, max_updates=3)
    more = (*PRUNING, "--checkpoint_activations", "--exp_dir", tmp_path / "given")
    result = run_command(sys.executable, "distill.py", *given, *more)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "auto", tmp_path / "given")


@pytest.mark.parametrize(("value", "message"), [("much", "seconds_or_auto"), ("-1", "a number above 0 or auto")])
def test_bad_values(manifests, small_teacher, monkeypatch, capsys, value, message):
    status = run_to_exit(
        monkeypatch, "distill", *small_run(manifests, small_teacher, seconds_per_batch=value), *PRUNING
    )
    assert status in (1, 2) and message in capsys.readouterr().err
