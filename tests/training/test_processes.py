"""Several processes train as one with the same total batch does, however they are started."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import PRUNING, REPOSITORY, logged, run_script, save_small_model, small_run

pytestmark = pytest.mark.slow


def values_by_step(exp_dir: Path) -> dict[tuple[int, str], float]:
    """The last value of every column at every step: losses, sparsity, multipliers, gradient norm, learning rates."""
    return {
        (int(row["step"]), name): float(value)
        for row in logged(exp_dir)
        for name, value in row.items()
        if value and name != "step"
    }


def weights(exp_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(exp_dir / "ckpts" / "last.ckpt", weights_only=True)["state_dict"]


def compare(one: Path, other: Path) -> None:
    """Hold two runs together.

    Losses are held to rounding. Adam makes full steps of gradients that are nothing but rounding, so single weights
    drift further, and with them the gradient's norm.
    """
    ones, others = values_by_step(one), values_by_step(other)
    assert ones.keys() == others.keys()
    assert {"train_loss", "valid_loss", "grad_norm", "epoch"} <= {name for _, name in ones}
    apart = {key: abs(value - others[key]) / max(1.0, abs(value)) for key, value in ones.items()}
    in_losses = max(value for (_, name), value in apart.items() if "_loss" in name)
    in_log = max(apart.values())
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    in_weights = max(float((value - theirs[key]).abs().max()) for key, value in mine.items())
    assert in_losses < 5e-6 and in_log < 1e-4 and in_weights < 2e-4


def run_processes(*command: object, timeout: int = 300) -> None:
    result = subprocess.run(
        [str(word) for word in command], cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]


@pytest.mark.parametrize(
    ("family", "size", "seconds_per_batch", "accum_grad"),
    [
        ("hubert", "base", 0.6, 1),  # 6 batches: the last update of an epoch is topped up with two
        ("wavlm", "large", 0.4, 3),  # 8 batches for 2 x 3
    ],
)
def test_two_processes_train_as_one(manifests, tmp_path, monkeypatch, family, size, seconds_per_batch, accum_grad):
    """With dropout and sampled masks: noise belongs to the batch, not to the process."""
    teacher = save_small_model(tmp_path / "teacher.pth", family, size)

    def flags(name: str, **changes: object) -> list[object]:
        run = {"max_updates": 9, "seconds_per_batch": seconds_per_batch, "valid_interval": None, **changes}
        return [*small_run(manifests, teacher, **run), *PRUNING, "--exp_dir", tmp_path / name]

    run_script(monkeypatch, "distill", *flags("one", accum_grad=2 * accum_grad))
    run_processes(sys.executable, "distill.py", *flags("two", gpus=2, accum_grad=accum_grad))
    compare(tmp_path / "one", tmp_path / "two")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_torchrun_on_one_and_two_nodes(manifests, tmp_path, monkeypatch):
    teacher = save_small_model(tmp_path / "teacher.pth", "hubert", "base")

    def flags(name: str, **changes: object) -> list[str]:
        words = [*small_run(manifests, teacher, seconds_per_batch=0.6, **changes), "--exp_dir", tmp_path / name]
        return [str(word) for word in words]

    run_script(monkeypatch, "distill", *flags("one", accum_grad=2))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]
    address = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    run_processes(*torchrun, "2", *address, "distill.py", *flags("local", gpus=2))
    two_nodes = flags("nodes", gpus=1, num_nodes=2)
    nodes = [
        subprocess.Popen(
            [*torchrun, "1", "--nnodes", "2", "--node_rank", rank, *address, "distill.py", *two_nodes], cwd=REPOSITORY
        )
        for rank in "01"
    ]
    assert [node.wait(timeout=300) for node in nodes] == [0, 0]
    for name in ("local", "nodes"):
        compare(tmp_path / "one", tmp_path / name)


def start_two(manifests: Path, teacher: Path, exp_dir: Path, **changes: object) -> subprocess.Popen:
    """A long run of two processes that has made a few updates."""
    flags = small_run(manifests, teacher, seconds_per_batch=0.6, gpus=2, max_updates=5000, log_interval=5, **changes)
    process = subprocess.Popen(
        [sys.executable, "distill.py", *map(str, flags), "--exp_dir", str(exp_dir)],
        cwd=REPOSITORY,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    rows = exp_dir / "csv" / "version_0" / "metrics.csv"
    while process.poll() is None and not rows.is_file():
        time.sleep(0.05)
    return process


def second_process(pid: int) -> int:
    """The other training process, which Lightning starts as a child of the first, as are loader processes."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    (other,) = [int(child) for child in children if b"LOCAL_RANK=1" in Path(f"/proc/{child}/environ").read_bytes()]
    return other


def test_a_signal_to_one_process_stops_both(manifests, small_teacher, tmp_path):
    exp_dir = tmp_path / "exp"
    with start_two(manifests, small_teacher, exp_dir) as process:
        os.kill(second_process(process.pid), signal.SIGTERM)  # not the one that saves
        errors = process.communicate(timeout=120)[1]
    assert process.returncode == 143
    assert errors.count("SIGTERM: saved update") == 1 and "Traceback" not in errors
    saved = torch.load(exp_dir / "ckpts" / "last.ckpt", weights_only=True)["global_step"]
    assert saved > 0


def test_a_lost_process_ends_the_run(manifests, small_teacher, tmp_path):
    """The other does not wait for it, and the run goes on from its last checkpoint."""
    exp_dir = tmp_path / "exp"
    with start_two(manifests, small_teacher, exp_dir, save_interval=2) as process:
        os.kill(second_process(process.pid), signal.SIGKILL)
        before = time.monotonic()
        errors = process.communicate(timeout=120)[1]
    assert process.returncode != 0 and time.monotonic() - before < 60
    assert "Connection closed by peer" in errors or "Child process with PID" in errors or "reset by peer" in errors
    assert torch.load(exp_dir / "ckpts" / "last.ckpt", weights_only=True)["global_step"] > 0
