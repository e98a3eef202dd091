"""Data and models meet here: no crop is shorter than a frame of the models."""

import multiprocessing
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from helpers import error_line, run_to_exit, small_run, start_script

import training.data
from training.data import SpeechDataModule
from training.settings import DataSettings
from training.signals import end_loader_processes, ignore_stop_signals
from training.trainer import errors_in_one_line, explained
from wav2vec2.files.errors import UserError

SHORT, LONG = 399, 16_000


@pytest.fixture
def tsv_dir(tmp_path) -> Path:
    """Four training utterances, one of them short, and two for validation."""
    lengths = {"train": [LONG, SHORT, LONG, LONG], "valid": [LONG, LONG]}
    generator = np.random.default_rng(0)
    for subset, numbers in lengths.items():
        rows = [str(tmp_path)]
        for number, length in enumerate(numbers):
            soundfile.write(tmp_path / f"{subset}{number}.wav", 0.1 * generator.standard_normal(length), 16_000)
            rows.append(f"{subset}{number}.wav\t{length}")
        (tmp_path / f"{subset}.tsv").write_text("\n".join(rows) + "\n")
    return tmp_path


def check(tsv_dir: Path, **settings: Any) -> None:
    SpeechDataModule(DataSettings(tsv_dir=tsv_dir, train_subset="train", **settings)).check_crops(400)


def test_crops_of_less_than_a_frame(tsv_dir):
    check(tsv_dir, min_seconds=0.025)
    check(tsv_dir, min_seconds=0.5, max_crop_seconds=0.025)
    with pytest.raises(UserError, match=r"--min_seconds 0 lets in .*train1\.wav, which has 399 .* give 0\.025 or more"):
        check(tsv_dir, min_seconds=0)
    with pytest.raises(UserError, match=r"--max_crop_seconds 0\.0249: 398 samples at 16 kHz, .* give 0\.025 or more"):
        check(tsv_dir, min_seconds=0.5, max_crop_seconds=0.0249)


def test_manifests_that_make_no_batches(tsv_dir):
    with pytest.raises(UserError, match=r"train\.tsv: none of 4 utterances lasts 2.* see --seconds_per_batch"):
        check(tsv_dir)
    (tsv_dir / "valid.tsv").rename(tsv_dir / "cv.tsv")
    with pytest.raises(UserError, match=r"valid\.tsv: no such file.* beside it: cv, train\); write it with"):
        check(tsv_dir, min_seconds=0.5)


def test_bad_files_are_counted_over_both_manifests(tsv_dir):
    for name in ("train0.wav", "valid0.wav"):
        (tsv_dir / name).unlink()
    check(tsv_dir, min_seconds=0.5, max_bad_files="2")
    with pytest.raises(UserError, match=r"--max_bad_files: at most 1 .* found 2: .*train0\.wav.*valid0\.wav: no such"):
        check(tsv_dir, min_seconds=0.5, max_bad_files="1")


@pytest.mark.slow
@pytest.mark.parametrize(("option", "changes"), [("min", {}), ("max_crop", {"max_crop_seconds": 0.002})])
def test_a_run_with_such_crops_does_not_begin(tsv_dir, small_teacher, monkeypatch, capsys, option, changes):
    (tsv_dir / "train.tsv").write_text((tsv_dir / "train.tsv").read_text().replace(str(SHORT), "30"))
    soundfile.write(tsv_dir / "train1.wav", np.full(30, 0.1), 16_000)  # the small model makes a frame of 85
    flags = [*small_run(tsv_dir, small_teacher, train_subset="train", min_seconds=0, **changes)]
    assert run_to_exit(monkeypatch, "distill", *flags, "--exp_dir", tsv_dir / "exp") == 1
    assert error_line(capsys).startswith(f"--{option}_seconds 0")
    assert not (tsv_dir / "exp").exists()


# --- loader processes ------------------------------------------------------------------------------


def test_batches_that_shared_memory_has_no_room_for(tsv_dir, monkeypatch):
    """A loader process keeps two batches ready, here of two clips and of one."""
    settings = DataSettings(tsv_dir=tsv_dir, train_subset="train", min_seconds=0.5, seconds_per_batch=2, num_workers=1)
    data = SpeechDataModule(settings)
    usage = SimpleNamespace(free=4 * 3 * LONG)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    data.check_shared_memory(1)
    usage.free -= 1
    with pytest.raises(UserError, match=r"--num_workers 1: /dev/shm has 0\.2 MB free, .*--shm-size.*--num_workers"):
        data.check_shared_memory(1)
    monkeypatch.setattr(training.data, "SHARED_MEMORY", "/no/such/folder")
    data.check_shared_memory(1)


def limit_files(worker: int) -> None:
    """Let a loader process write files of 100 bytes: shared memory is one."""
    ignore_stop_signals(worker)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


def test_a_loader_process_without_room_for_its_batch(tsv_dir, monkeypatch):
    monkeypatch.setattr(training.data, "ignore_stop_signals", limit_files)
    monkeypatch.setattr(training.data, "WORKER_TIMEOUT", 30)
    data = SpeechDataModule(DataSettings(tsv_dir=tsv_dir, train_subset="train", min_seconds=0.5, num_workers=1))
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(world_size=1, global_rank=0, strategy=strategy)
    batches = iter(data.val_dataloader())
    with pytest.raises(UserError, match=r"torch_.*--shm-size"), errors_in_one_line():
        next(batches)
    batches._shutdown_workers()


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "Killed; .*--num_workers 0"),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", "unexpectedly; .*--num_workers 0"),
        ("DataLoader timed out after 600 seconds", "600 seconds; .*--num_workers 0"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is ... out of shared memory. ", "--shm-size"),
        ("Too many open files. Communication with the workers is no longer possible.", "ulimit -n"),
        (
            "Caught OSError in DataLoader worker process 0.\nOriginal Traceback\nOSError: Too many open files\n",
            "ulimit",
        ),
    ],
)
def test_errors_of_loader_processes(text, advice):
    message = explained(RuntimeError(text))
    assert "\n" not in message and "Traceback" not in message
    with pytest.raises(UserError, match=advice), errors_in_one_line():
        raise RuntimeError(text)
    with pytest.raises(UserError, match=advice), errors_in_one_line():  # as inspect does, in whose code it may come
        raise TypeError("unsupported callable") from RuntimeError(text)


def test_a_defect_in_a_loader_process_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="Original Traceback"), errors_in_one_line():
        raise RuntimeError(
            "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback\nRuntimeError: sizes"
        )


def wait_in_vain() -> None:
    ignore_stop_signals(0)
    time.sleep(60)


def test_loader_processes_end_though_they_ignore_signals():
    process = multiprocessing.get_context("fork").Process(target=wait_in_vain, daemon=True)
    process.start()
    before = signal.getsignal(signal.SIGCHLD)
    try:
        end_loader_processes()
    finally:
        signal.signal(signal.SIGCHLD, before)
    process.join(10)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_loader_process_ends_the_run(tsv_dir, small_teacher):
    exp_dir, output = tsv_dir / "exp", tsv_dir / "output"
    changes = {"min_seconds": 0.5, "num_workers": 1, "max_updates": 5000, "save_interval": 2}
    flags = small_run(tsv_dir, small_teacher, train_subset="train", **changes)
    process = start_script("distill", *flags, "--exp_dir", exp_dir, output=output)
    while process.is_alive() and not (exp_dir / "ckpts" / "last.ckpt").is_file():
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    process.join(20)
    errors = output.read_text()
    assert process.exitcode == 1 and "Traceback" not in errors
    assert "error: loader processes: DataLoader worker" in errors and "dmesg" in errors
