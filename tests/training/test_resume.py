"""A run that was stopped, killed or hindered ends as one that was not."""

import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    PRUNING,
    REPOSITORY,
    assert_same_run,
    disturb_run,
    error_line,
    largest_difference,
    last_checkpoint,
    logged,
    run_script,
    run_to_exit,
    save_small_model,
    send,
    small_run,
    start_script,
)

import lightning
from training import saving
from wav2vec2.files import checkpoint
from wav2vec2.files.errors import UserError

pytestmark = pytest.mark.slow

SIZES = {"save_at_sparsity": "0.26,0.2"}  # with PRUNING, the target reaches them with updates 5 and 7


def assert_same_sizes(one: Path, other: Path) -> None:
    """The intermediate sizes of two runs are the same, too."""
    for size, update in (("0.2", 5), ("0.26", 7)):
        ones, others = (last_checkpoint(exp_dir / f"sparsity_{size}") for exp_dir in (one, other))
        assert ones["global_step"] == update and ones["distillation"]["target_sparsity"] == float(size)
        assert ones["distillation"] == others["distillation"] and largest_difference(ones, others) == 0


# --- stopped and continued -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "size", "changes", "updates"),
    [
        ("wavlm", "base", {"valid_interval": 3, "save_interval": 2, "num_workers": 1}, (1, 3, 7)),  # epochs of 6, 7
        ("hubert", "large", {"accum_grad": 3, "target_macs": 0.35}, (2, 3)),  # an epoch has two
    ],
)
def test_stopped_at_any_update(manifests, tmp_path, monkeypatch, disturb, family, size, changes, updates):
    """In the middle and at the end of epochs, beside a validation or not: resumed, the run is the same."""
    teacher = save_small_model(tmp_path / "teacher.pth", family, size)
    flags = (*small_run(manifests, teacher, max_updates=updates[-1] + 1, seconds_per_batch=0.6, **changes), *PRUNING)
    run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "whole")
    flags = (*flags, "--exp_dir", tmp_path / "stopped", "--resume_checkpoint", "auto")
    for update in updates:
        disturb.at[update] = send(signal.SIGTERM)
        assert run_to_exit(monkeypatch, "distill", *flags) == 143
        assert last_checkpoint(tmp_path / "stopped")["global_step"] == update
    run_script(monkeypatch, "distill", *flags)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_stopped_while_a_size_is_saved(manifests, small_teacher, tmp_path, monkeypatch, capsys):
    """The run goes on from before it, and saves it then; nothing is saved again behind it."""
    flags = (*small_run(manifests, small_teacher, max_updates=8, save_interval=3, **SIZES), *PRUNING)
    run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "whole")
    save, exp_dir = saving.ckpt.save, tmp_path / "killed"

    def fail(path: Path, contents: dict[str, Any]) -> None:
        if path.parent.parent.name == "sparsity_0.26":
            raise UserError(f"{path}: could not be written (No space left on device); make room")
        save(path, contents)

    flags = (*flags, "--exp_dir", exp_dir, "--resume_checkpoint", "auto")
    capsys.readouterr()
    with monkeypatch.context() as context:
        context.setattr(saving.ckpt, "save", fail)
        assert run_to_exit(context, "distill", *flags) != 0
    path = exp_dir / "sparsity_0.26" / "ckpts" / "last.ckpt"
    message = error_line(capsys)
    assert message.startswith(f"{path}: could not be written (No space left on device); make room; then continue with")
    assert last_checkpoint(exp_dir)["global_step"] == 6
    first = (exp_dir / "sparsity_0.2" / "ckpts" / "last.ckpt").stat().st_mtime_ns
    run_script(monkeypatch, "distill", *flags)
    assert (exp_dir / "sparsity_0.2" / "ckpts" / "last.ckpt").stat().st_mtime_ns == first
    assert_same_run(tmp_path / "whole", exp_dir)
    assert_same_sizes(tmp_path / "whole", exp_dir)


def test_killed_at_random_moments(manifests, small_teacher, tmp_path, monkeypatch):
    """SIGKILL to a real process, twice: nothing is cleaned up, nothing is flushed."""
    changes = {"max_updates": 40, "seconds_per_batch": 0.6, "save_interval": 2, "log_interval": 2}
    flags = (*small_run(manifests, small_teacher, **changes), *PRUNING)
    run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "whole")

    exp_dir = tmp_path / "killed"
    flags = (*flags, "--exp_dir", exp_dir, "--resume_checkpoint", "auto")
    moments = random.Random(0)
    reached = []
    for _ in range(2):
        log = exp_dir / "csv" / f"version_{len(reached)}" / "metrics.csv"
        process = start_script("distill", *flags, output=tmp_path / "output")
        while process.is_alive() and not (log.is_file() and (exp_dir / "ckpts" / "last.ckpt").is_file()):
            time.sleep(0.02)
        time.sleep(moments.uniform(0.0, 0.2))
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        reached.append(last_checkpoint(exp_dir)["global_step"])
    assert 0 < reached[0] <= reached[1] < 40
    run_script(monkeypatch, "distill", *flags)
    assert_same_run(tmp_path / "whole", exp_dir, killed_after=reached)
    assert [path.name for path in (exp_dir / "ckpts").iterdir() if not path.name.startswith(".")] == ["last.ckpt"]


def test_killed_during_a_validation(manifests, small_teacher, tmp_path, monkeypatch):
    """The update before it is made once more, as a run that went on from behind it would lack the validation."""
    flags = (*small_run(manifests, small_teacher, valid_interval=3, save_interval=1), *PRUNING)
    run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "whole")

    def kill(module: lightning.DistillModule, *_: Any) -> None:
        if module.global_step == 3:
            raise KeyboardInterrupt  # where a kill would strike

    flags = (*flags, "--exp_dir", tmp_path / "killed", "--resume_checkpoint", "auto")
    with monkeypatch.context() as context:
        context.setattr(lightning.DistillModule, "on_validation_batch_start", kill, raising=False)
        assert run_to_exit(context, "distill", *flags) != 0
    assert last_checkpoint(tmp_path / "killed")["global_step"] == 2
    run_script(monkeypatch, "distill", *flags)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_finished_run_is_not_run_again(finished_run, manifests, small_teacher, tmp_path, monkeypatch, capsys):
    last = shutil.copytree(finished_run, tmp_path / "exp") / "ckpts" / "last.ckpt"
    before = (last.stat().st_mtime_ns, last.read_bytes())
    flags = (*small_run(manifests, small_teacher), *PRUNING, "--exp_dir", tmp_path / "exp")
    run_script(monkeypatch, "distill", *flags, "--resume_checkpoint", "auto")
    assert "complete already, 6 updates done" in capsys.readouterr().out
    assert (last.stat().st_mtime_ns, last.read_bytes()) == before


def test_later_stages_are_not_run_again(finished_run, manifests, small_teacher, tmp_path, monkeypatch, capsys):
    """prune.py and save_final_ckpt.py leave an output alone that is whole and made from the same input."""
    checkpoints = shutil.copytree(finished_run, tmp_path / "exp") / "ckpts"
    prune = ("prune", "--distilled_ckpt", checkpoints / "last.ckpt", "--original_ckpt", small_teacher)
    pruned = checkpoints / "pruned_hubert_base.pth"
    run_script(monkeypatch, *prune)
    final = small_run(manifests, small_teacher, student_ckpt=pruned, max_updates=2)
    run_script(monkeypatch, "final_distill", *final, "--exp_dir", tmp_path / "exp" / "final")
    last = tmp_path / "exp" / "final" / "ckpts" / "last.ckpt"
    save = ("save_final_ckpt", "--config_path", pruned, "--ckpt_after_final_distill", last)
    run_script(monkeypatch, *save)
    for command, out in ((prune, pruned), (save, last.parent / "pruned_hubert_base.pth")):
        capsys.readouterr()
        before = (out.stat().st_mtime_ns, out.read_bytes())
        run_script(monkeypatch, *command)
        printed = capsys.readouterr()
        assert "made already" in printed.out + printed.err
        assert (out.stat().st_mtime_ns, out.read_bytes()) == before
        out.write_bytes(before[1][: len(before[1]) // 2])  # half of it is not whole
        run_script(monkeypatch, *command)
        assert out.read_bytes() == before[1]
    run_script(monkeypatch, *prune, "--target_sparsity", 0.3)
    assert checkpoint.read_model_file(pruned)["made_by"]["target_sparsity"] == 0.3


# --- what auto and a path do -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped_run(manifests, small_teacher, tmp_path_factory) -> tuple[list[object], Path]:
    flags = [*small_run(manifests, small_teacher, save_interval=2), *PRUNING]
    exp_dir = tmp_path_factory.mktemp("stopped") / "exp"
    with pytest.MonkeyPatch.context() as monkeypatch:
        disturb_run(monkeypatch).at[4] = send(signal.SIGTERM)
        assert run_to_exit(monkeypatch, "distill", *flags, "--exp_dir", exp_dir) == 143
    return flags, exp_dir


@pytest.fixture
def half_run(stopped_run, tmp_path) -> tuple[list[object], Path]:
    """A run stopped at update 4 of 6: its flags and exp_dir."""
    flags, exp_dir = stopped_run
    return [*flags, "--exp_dir", shutil.copytree(exp_dir, tmp_path / "exp")], tmp_path / "exp"


# Its leaves are countless, and it takes no room.
ENDLESS: Any = ["ha"]
for _ in range(40):
    ENDLESS = [ENDLESS, ENDLESS]


def put(value: Any, contents: Any, *place: Any) -> None:
    """Put a value into nested dicts and lists."""
    for key in place[:-1]:
        contents = contents[key]
    contents[place[-1]] = value


def changed(flags: list[object], **changes: object) -> list[object]:
    flags = list(flags)
    for name, value in changes.items():
        if f"--{name}" in flags:
            flags[flags.index(f"--{name}") + 1] = value
        else:
            flags += [f"--{name}", value]
    return flags


def test_a_run_does_not_overwrite_another(half_run, tmp_path, monkeypatch, capsys):
    """Neither a fresh one nor one that goes on from a checkpoint of elsewhere."""
    flags, exp_dir = half_run
    elsewhere = shutil.copytree(exp_dir / "ckpts", tmp_path / "elsewhere") / "last.ckpt"
    before = (exp_dir / "ckpts" / "last.ckpt").read_bytes()
    for choice, advice in (((), "; add --resume_checkpoint auto"), (("--resume_checkpoint", elsewhere), "")):
        assert run_to_exit(monkeypatch, "distill", *flags, *choice) == 1
        assert f"which would be overwritten{advice}" in error_line(capsys)
        assert (exp_dir / "ckpts" / "last.ckpt").read_bytes() == before


def test_auto_continues_the_same_run_only(half_run, monkeypatch, capsys):
    flags, exp_dir = half_run
    assert run_to_exit(monkeypatch, "distill", *changed(flags, learning_rate=5e-4), "--resume_checkpoint", "auto") == 1
    message = error_line(capsys)
    assert "made with other settings: learning_rate: 0.0002 there, 0.0005 now" in message
    # What does not change the result may change.
    machine = {"log_interval": 2, "num_workers": 1, "save_interval": 3, "valid_interval": 5}
    run_script(monkeypatch, "distill", *changed(flags, **machine), "--resume_checkpoint", "auto")
    assert last_checkpoint(exp_dir)["global_step"] == 6


def test_a_path_continues_with_other_settings_and_says_so(half_run, tmp_path, monkeypatch, capsys):
    flags, exp_dir = half_run
    path = exp_dir / "ckpts" / "last.ckpt"
    new = changed(flags, learning_rate=5e-4, max_updates=9, accum_grad=2, exp_dir=tmp_path / "other")
    run_script(monkeypatch, "distill", *new, "--resume_checkpoint", path)
    warning = capsys.readouterr().err
    for change in (
        "learning_rate: 0.0002 there, 0.0005 now",
        "max_updates: 6 there, 9 now",
        "accum_grad: 1 there",
    ):
        assert change in warning
    trained = last_checkpoint(tmp_path / "other")
    assert trained["global_step"] == 9
    assert trained["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] == 18
    name = "lr-AdamW/main_params"
    rates = {int(row["step"]): float(row[name]) for row in logged(tmp_path / "other") if name in row}
    assert rates == pytest.approx({step: 5e-4 * lightning.linear_warmup_decay(2, 9)(step) for step in range(4, 9)})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", torch.ones(2), "made with other settings: learning_rate: <Tensor> there, 0.0002 now."),
        ("seed", "x\n" * 1000, "seed: x x x x"),
    ],
)
def test_settings_that_are_none(half_run, monkeypatch, capsys, name, value, message):
    """A setting by a number is passed over."""
    flags, exp_dir = half_run
    contents = last_checkpoint(exp_dir)
    contents["distillation"]["settings"] |= {1: 2, name: value}
    torch.save(contents, exp_dir / "ckpts" / "last.ckpt")
    assert run_to_exit(monkeypatch, "distill", *flags, "--resume_checkpoint", "auto") == 1
    error = error_line(capsys)
    assert message in error and len(error) < 800


@pytest.mark.parametrize("choice", ["auto", "ckpts/last.ckpt"])
def test_a_run_with_settings_that_are_gone_is_not_continued(half_run, monkeypatch, capsys, choice):
    """A run of the older version that did not use them is continued; the first group's name was another."""
    flags, exp_dir = half_run
    contents = last_checkpoint(exp_dir)
    settings = contents["distillation"]["settings"]
    contents["distillation"] |= {"settings": settings | {"ema": 0.99}, "round_to": None}
    torch.save(contents, exp_dir / "ckpts" / "last.ckpt")
    flags = [*flags, "--resume_checkpoint", choice if choice == "auto" else exp_dir / choice]
    assert run_to_exit(monkeypatch, "distill", *flags) == 1
    assert "made with --ema 0.99, which this version does not have" in error_line(capsys)
    for name in ("sparsity_control", "save_at_sparsity", "student_dropout", "distill_weight", "target_macs"):
        del settings[name]
    contents["distillation"]["settings"] = settings
    contents["callbacks"]["UpdateGuard"] = {"skipped": 0, "bad_files": {}}
    contents["optimizer_states"][0]["param_groups"][0]["name"] = "main"
    torch.save(contents, exp_dir / "ckpts" / "last.ckpt")
    run_script(monkeypatch, "distill", *flags)
    assert "warning" not in capsys.readouterr().err and last_checkpoint(exp_dir)["global_step"] == 6
    rates = {name for row in logged(exp_dir) for name in row if name.startswith("lr-")}
    assert rates == {"lr-AdamW/main_params", "lr-AdamW/log_alpha", "lr-AdamW/lambda"}


def test_auto_passes_over_a_damaged_checkpoint(half_run, monkeypatch, capsys, tmp_path):
    flags, exp_dir = half_run
    last, previous = (exp_dir / "ckpts" / name for name in ("last.ckpt", "last.ckpt.previous"))
    assert list(last.parent.glob("*.ckpt")) == [last] and previous.is_file()  # prune.py is given ckpts/*.ckpt
    shutil.copytree(exp_dir, tmp_path / "whole")
    run_script(monkeypatch, "distill", *changed(flags, exp_dir=tmp_path / "whole"), "--resume_checkpoint", "auto")
    contents = last.read_bytes()
    last.write_bytes(contents[: len(contents) // 2])
    run_script(monkeypatch, "distill", *flags, "--resume_checkpoint", "auto")
    printed = capsys.readouterr()
    assert f"passed over: {last}: " in printed.err and f"continuing {previous} after update 2" in printed.out
    assert_same_run(tmp_path / "whole", exp_dir)


def test_a_damaged_checkpoint_does_not_replace_the_one_before(half_run, monkeypatch):
    """Killed again before the first new checkpoint is written: the only whole one must still be there."""
    flags, exp_dir = half_run
    last, previous = (exp_dir / "ckpts" / name for name in ("last.ckpt", "last.ckpt.previous"))
    last.write_bytes(b"no")
    whole = previous.read_bytes()

    def fail(path: Path, contents: dict[str, Any]) -> None:
        assert previous.read_bytes() == whole
        raise KeyboardInterrupt  # where a kill would strike

    with monkeypatch.context() as context:
        context.setattr(saving.ckpt, "save", fail)
        assert run_to_exit(context, "distill", *flags, "--resume_checkpoint", "auto") != 0
    assert previous.read_bytes() == whole
    run_script(monkeypatch, "distill", *flags, "--resume_checkpoint", "auto")
    assert last_checkpoint(exp_dir)["global_step"] == 6


def test_a_published_checkpoint_is_not_continued(half_run, tmp_path, monkeypatch, capsys):
    """The published program records Lightning's entries alone."""
    flags, exp_dir = half_run
    contents = last_checkpoint(exp_dir)
    del contents["distillation"]
    path = tmp_path / "published.ckpt"
    torch.save(contents, path)
    flags = changed(flags, exp_dir=tmp_path / "other")
    assert run_to_exit(monkeypatch, "distill", *flags, "--resume_checkpoint", path) == 1
    message = error_line(capsys)
    assert message.startswith(f"--resume_checkpoint {path}: a checkpoint of the published program")
    assert "cannot be continued; prune.py and save_final_ckpt.py take it" in message


def test_auto_does_not_start_over_where_all_are_damaged(half_run, monkeypatch, capsys):
    flags, exp_dir = half_run
    for name in ("last.ckpt", "last.ckpt.previous"):
        (exp_dir / "ckpts" / name).write_bytes(b"no")
    assert run_to_exit(monkeypatch, "distill", *flags, "--resume_checkpoint", "auto") == 1
    message = error_line(capsys)
    assert "can be read" in message and "move them away to start afresh" in message


def test_a_checkpoint_of_the_other_stage(half_run, manifests, small_teacher, tmp_path, monkeypatch, capsys):
    _, exp_dir = half_run
    last = exp_dir / "ckpts" / "last.ckpt"
    run_script(monkeypatch, "prune", "--distilled_ckpt", last, "--original_ckpt", small_teacher)
    final = small_run(manifests, small_teacher, student_ckpt=exp_dir / "ckpts" / "pruned_hubert_base.pth")
    capsys.readouterr()
    arguments = (*final, "--exp_dir", tmp_path / "final", "--resume_checkpoint", last)
    assert run_to_exit(monkeypatch, "final_distill", *arguments) == 1
    message = error_line(capsys)
    assert str(last) in message and "--student_ckpt" in message


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("distillation",), [1], "distillation: expected dict, found [1]"),
        (("global_step",), None, "global_step: expected int, found None"),
        (("state_dict", "distill_linear_projs.0.bias"), "x", "distill_linear_projs.0.bias' is not a tensor of finite"),
        (("global_step",), -1, "global_step: expected 0 to"),
        (("global_step",), ENDLESS, "claim more than 64 levels"),
        (("distillation", "target_sparsity"), "x", "target_sparsity: expected 0 to 1, found 'x'"),
        (("distillation", "target_macs"), math.nan, "target_macs: expected 0 to 1, found nan"),
        (("distillation", "original_num_params"), 10**400, "a number of over 150 digits"),
        (("distillation", "original_num_params"), math.inf, "original_num_params: expected 1 to"),
    ],
)
def test_entries_that_prune_would_use(half_run, small_teacher, monkeypatch, capsys, place, value, message):
    _, exp_dir = half_run
    contents = last_checkpoint(exp_dir)
    put(value, contents, *place)
    path = exp_dir / "ckpts" / "odd.ckpt"
    torch.save(contents, path)
    capsys.readouterr()
    assert run_to_exit(monkeypatch, "prune", "--distilled_ckpt", path, "--original_ckpt", small_teacher) == 1
    error = error_line(capsys)
    assert message in error and error.startswith(f"{path}: ")


LOOPS = ("loops", "fit_loop")
BATCHES = (*LOOPS, "epoch_loop.batch_progress")
MOMENTS = ("optimizer_states", 0, "state", 0)
GROUPS = ("optimizer_states", 0, "param_groups")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((*MOMENTS, "exp_avg"), torch.ones(3), "state: 0: exp_avg: expected [10] of torch.float32, found [3] of"),
        ((*MOMENTS, "exp_avg_sq"), torch.ones(10).double(), "[10] of torch.float32, found [10] of torch.float64"),
        ((*MOMENTS, "exp_avg"), torch.full((10,), math.nan), "exp_avg: expected finite numbers, found NaN"),
        ((*MOMENTS, "exp_avg_sq"), -torch.ones(10), "expected squares and steps, found negative numbers"),
        ((*MOMENTS, "step"), 4, "step: expected Tensor, found 4"),
        (MOMENTS, {"step": torch.ones(())}, "state: 0: expected all that this run saves, found 2 missing (exp_avg"),
        (("optimizer_states",), [], "optimizer_states: expected 1 entries, found 0"),
        (GROUPS, ENDLESS, "claim more than 64 levels"),
        ((*GROUPS, 2, "params"), [0, 1], "param_groups: expected [{'params':"),
        ((*GROUPS, 2, "params", 0), torch.ones(2), "params: expected int, found <Tensor>"),
        (("loops",), None, "loops: expected dict, found None"),
        (("loops",), {}, "loops: expected all that this run saves, found 1 missing (fit_loop)"),
        ((*BATCHES, "total", "ready"), "4", "total: ready: expected int, found '4'"),
        ((*BATCHES, "current", "completed"), 10**400, "a number of over 150 digits"),
        ((*BATCHES, "is_last_batch"), "x", "is_last_batch: expected bool, found 'x'"),
        (("global_step",), 3, "loops: expected the counts of 3 updates, found 4"),
        (("callbacks",), "x", "callbacks: expected dict, found 'x'"),
        (("callbacks", "UpdateGuard", "skipped"), "x", "skipped: expected int, found 'x'"),
        (("callbacks", "UpdateGuard", "bad_files"), {"a": 2}, "bad_files: expected texts by name, found {'a': 2}"),
        (("state_dict", "evil.weight"), torch.ones(3), "weights do not fit the model: 0 missing, 1 left over (evil.w"),
        (("state_dict", "lambda1"), torch.ones(3), "weights do not fit the model: lambda1 has shape [3], expected []"),
    ],
)
def test_what_does_not_belong_to_the_run(half_run, tmp_path, monkeypatch, capsys, place, value, message):
    """Nothing is computed with it: an optimiser would write behind the memory of moments that are too short."""
    flags, exp_dir = half_run
    contents = last_checkpoint(exp_dir)
    put(value, contents, *place)
    path = tmp_path / "odd.ckpt"
    torch.save(contents, path)
    flags = changed(flags, exp_dir=tmp_path / "other")
    assert run_to_exit(monkeypatch, "distill", *flags, "--resume_checkpoint", path) == 1
    error = error_line(capsys)
    assert error.startswith(f"{path}: ") and message in error
    is_damaged = "weights" in message or "claim more" in message or "digits" in message
    assert is_damaged or error.endswith("or start afresh with another --exp_dir")


def test_what_a_run_knows_by_itself_is_not_read(half_run, tmp_path, monkeypatch):
    """The optimiser's settings, the schedule, Lightning's version, and all that it would restore beside them."""
    flags, exp_dir = half_run
    shutil.copytree(exp_dir, tmp_path / "whole")
    run_script(monkeypatch, "distill", *changed(flags, exp_dir=tmp_path / "whole"), "--resume_checkpoint", "auto")
    contents = last_checkpoint(exp_dir)
    contents["optimizer_states"][0]["param_groups"][0] |= {"betas": "x", "capturable": True, "lr": ENDLESS}
    contents["optimizer_states"][0]["state"] |= {500: ENDLESS, "x": 1}
    contents |= {"lr_schedulers": [{"step": "x"}], "pytorch-lightning_version": "garbage", "SpeechDataModule": 1}
    contents |= {"native_amp_scaling_state": "x", "MixedPrecision": "x", "callbacks": {**contents["callbacks"], "x": 1}}
    contents["loops"]["fit_loop"] |= {"epoch_loop.max_steps": 1}
    for name in ("total", "current"):
        contents["loops"]["fit_loop"]["epoch_loop.batch_progress"][name] |= {"started": 10**6, "processed": 0}
    for moments in contents["optimizer_states"][0]["state"].values():
        if isinstance(moments, dict):  # in memory of another order
            moments["exp_avg"] = (
                moments["exp_avg"].T.contiguous().T if moments["exp_avg"].ndim == 2 else moments["exp_avg"]
            )
    torch.save(contents, exp_dir / "ckpts" / "last.ckpt")
    run_script(monkeypatch, "distill", *flags, "--resume_checkpoint", "auto")
    assert_same_run(tmp_path / "whole", exp_dir)


def test_a_run_with_other_parameters(half_run, tmp_path, monkeypatch, capsys):
    """The exact control of the size has no multipliers."""
    flags, exp_dir = half_run
    path = exp_dir / "ckpts" / "last.ckpt"
    flags = [*changed(flags, exp_dir=tmp_path / "other", sparsity_control="exact"), "--resume_checkpoint", path]
    assert run_to_exit(monkeypatch, "distill", *flags) == 1
    assert f"{path}: weights do not fit the model: 0 missing, 2 left over (lambda1, lambda2)" in capsys.readouterr().err


def test_two_runs_in_one_exp_dir(half_run, monkeypatch, capsys):
    """The lock is the process's own, so the other run must be another process."""
    flags, exp_dir = half_run
    holder = (
        "import sys, pathlib\nfrom training import checkpoints\n"
        "with checkpoints.exclusive(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    command = [sys.executable, "-c", holder, str(exp_dir)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert run_to_exit(monkeypatch, "distill", *flags, "--resume_checkpoint", "auto") == 1
        message = error_line(capsys)
        assert f"another run is writing to it (process {process.pid} on " in message
        process.kill()
    run_script(monkeypatch, "distill", *flags, "--resume_checkpoint", "auto")  # the lock went with its process


# --- signals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_ends(manifests, small_teacher, tmp_path, monkeypatch, disturb, capsys, signum):
    """SIGUSR1 requeues the SLURM job that this is, the others do not."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/requeued\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    disturb.at[2] = send(signum)
    flags = (*small_run(manifests, small_teacher), "--exp_dir", tmp_path / "exp")
    assert run_to_exit(monkeypatch, "distill", *flags) == 128 + signum
    name = signal.Signals(signum).name
    printed = capsys.readouterr().err
    last = tmp_path / "exp" / "ckpts" / "last.ckpt"
    assert f"{name}: saved update 2 in {last}" in printed and "Traceback" not in printed
    assert last_checkpoint(tmp_path / "exp")["global_step"] == 2
    requeued = (tmp_path / "requeued").read_text() if (tmp_path / "requeued").exists() else ""
    assert requeued == ("requeue 17\n" if signum == signal.SIGUSR1 else "")
    assert signal.getsignal(signum) is not None


def test_ctrl_c_in_a_terminal(manifests, small_teacher, tmp_path):
    """A real Ctrl-C reaches the whole process group, loader processes too."""
    flags = small_run(manifests, small_teacher, max_updates=4000, num_workers=1)
    rows = tmp_path / "exp" / "csv" / "version_0" / "metrics.csv"
    process = start_script("distill", *flags, "--exp_dir", tmp_path / "exp", output=tmp_path / "output")
    while process.is_alive() and not rows.is_file():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    process.join(120)
    errors = (tmp_path / "output").read_text()
    assert process.exitcode == 130
    assert "SIGINT: saved update" in errors and "Traceback" not in errors
    assert last_checkpoint(tmp_path / "exp")["global_step"] > 0


# --- a full disk -----------------------------------------------------------------------------------


def limit_file_size(num_bytes: int) -> Callable[[], None]:
    """As on a full disk, writing more than this to one file fails."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def restore_file_size() -> Any:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk(manifests, small_teacher, tmp_path, monkeypatch, disturb, capsys, restore_file_size):
    """A checkpoint that finds no room costs that checkpoint only; the last one of a run must be there."""
    flags = [*small_run(manifests, small_teacher, max_updates=6, save_interval=2), *PRUNING]
    run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "whole")
    last = tmp_path / "exp" / "ckpts" / "last.ckpt"
    steps = []
    disturb.at |= {
        3: limit_file_size(50_000),
        5: lambda: steps.append(last_checkpoint(tmp_path / "exp")["global_step"]),
        6: restore_file_size,
    }
    capsys.readouterr()
    run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "exp")
    printed = capsys.readouterr().err
    assert steps == [2] and f"warning: {last}: could not be written ([Errno 27] File too large); make room" in printed
    assert "update 4 is not saved, that of update 2 stays; training goes on" in printed
    assert_same_run(tmp_path / "whole", tmp_path / "exp")
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]

    disturb.at[6] = limit_file_size(50_000)
    assert run_to_exit(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "late") == 1
    restore_file_size()
    message = error_line(capsys)
    assert "make room; update 6 is not saved, that of update 4 stays; then continue with" in message
    assert last_checkpoint(tmp_path / "late")["global_step"] == 4
    assert not [path for path in (tmp_path / "late" / "ckpts").iterdir() if path.name.startswith(".")]
    run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "late", "--resume_checkpoint", "auto")
    assert_same_run(tmp_path / "whole", tmp_path / "late")


def test_a_first_checkpoint_that_cannot_be_saved(manifests, small_teacher, tmp_path, monkeypatch, disturb, capsys):
    """Nothing would be left of the run: it ends there. What can be known is known before the first update."""
    flags = [*small_run(manifests, small_teacher, max_updates=6, save_interval=2), *PRUNING]
    ckpts, done = tmp_path / "exp" / "ckpts", []
    disturb.at |= {1: ckpts.touch, 3: lambda: done.append(3)}
    capsys.readouterr()
    assert run_to_exit(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "exp") == 1
    message = error_line(capsys)
    assert message.startswith(f"{ckpts / 'last.ckpt'}: could not be written ([Errno 17] File exists: '{ckpts}'); mend")
    assert "update 2 is not saved, there is none before it; then continue with" in message
    disturb.at = {1: lambda: done.append(1)}
    assert run_to_exit(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "exp") == 1
    assert error_line(capsys).startswith(f"{ckpts / 'last.ckpt'}: could not be written ([Errno 17]")
    assert not done
