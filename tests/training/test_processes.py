"""Several processes train as one with the same total batch does, however they are started."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from helpers import (
    PRUNING,
    REPOSITORY,
    error_line,
    finetuning_run,
    free_port,
    logged,
    run_script,
    run_to_exit,
    save_small_model,
    small_run,
    start_ranks,
    start_script,
)
from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from torch import distributed

from training.processes import cluster_environment
from training.trainer import errors_in_one_line
from wav2vec2.files.errors import UserError

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
    assert in_losses < 5e-6 and in_log < 1e-4
    compare_weights(one, other)


def compare_weights(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert max(float((value - theirs[key]).abs().max()) for key, value in mine.items()) < 2e-4


def run_two(name: str, *arguments: object, output: Path) -> None:
    processes = start_ranks(name, *arguments, output=output)
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0], output.read_text()[-3000:]


def test_two_processes_train_as_one(manifests, tmp_path, monkeypatch):
    """With dropout and sampled masks: noise belongs to the batch, not to the process.

    An epoch's 6 batches make one update of 2 x 2 and one that is topped up.
    """
    teacher = save_small_model(tmp_path / "teacher.pth", "wavlm", "large")
    run = {"seconds_per_batch": 0.6, "valid_interval": None, "target_macs": 0.35, "save_at_sparsity": 0.2}

    def flags(name: str, **changes: object) -> list[object]:
        return [*small_run(manifests, teacher, **run, **changes), *PRUNING, "--exp_dir", tmp_path / name]

    run_script(monkeypatch, "distill", *flags("one", accum_grad=4))
    run_two("distill", *flags("two", gpus=2, accum_grad=2), output=tmp_path / "output")
    compare(tmp_path / "one", tmp_path / "two")
    compare_weights(tmp_path / "one" / "sparsity_0.2", tmp_path / "two" / "sparsity_0.2")


def test_two_processes_fine_tune_as_one(labelled, tmp_path, monkeypatch):
    """While the encoder is frozen and behind that; each validation clip is scored once."""
    model = save_small_model(tmp_path / "model.pth", "hubert", "large")

    def flags(folder: str, **more: object) -> list[object]:
        run = {"seconds_per_batch": 1, "max_updates": 9, "freeze_updates": 3, **more}
        return [*finetuning_run(labelled / "text.tsv", model, **run), "--exp_dir", tmp_path / folder]

    run_script(monkeypatch, "finetune", *flags("one", accum_grad=2))
    run_two("finetune", *flags("two", gpus=2), output=tmp_path / "output")
    compare(tmp_path / "one", tmp_path / "two")
    scores = [
        {step: value for (step, column), value in values_by_step(tmp_path / folder).items() if column == "valid_score"}
        for folder in ("one", "two")
    ]
    assert len(scores[0]) > 1 and scores[0] == scores[1]
    results = [json.loads((tmp_path / folder / "finetuned.json").read_text()) for folder in ("one", "two")]
    assert results[0] == results[1]


def test_two_processes_learn_a_task_as_one(labelled, tmp_path, monkeypatch):
    """Labels beside distillation, in batches with padding."""
    teacher = save_small_model(tmp_path / "teacher.pth", "hubert", "large")
    changes = {"max_crop_seconds": None, "task_tsv": labelled / "segments.tsv", "seconds_per_batch": 1}

    def flags(name: str, **more: object) -> list[object]:
        run = small_run(tmp_path, teacher, **changes, **more)
        return [*run, *PRUNING, "--exp_dir", tmp_path / name]

    run_script(monkeypatch, "distill", *flags("one", accum_grad=2))
    run_two("distill", *flags("two", gpus=2), output=tmp_path / "output")
    compare(tmp_path / "one", tmp_path / "two")
    assert any(name == "valid_score" for _, name in values_by_step(tmp_path / "two"))


def test_torchrun_on_two_nodes(manifests, small_teacher, tmp_path, monkeypatch):
    def flags(name: str, **changes: object) -> list[str]:
        run = {"seconds_per_batch": 0.6, "max_updates": 4, **changes}
        words = [*small_run(manifests, small_teacher, **run), "--exp_dir", tmp_path / name]
        return [str(word) for word in words]

    run_script(monkeypatch, "distill", *flags("one", accum_grad=2))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]
    address = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    two_nodes = flags("nodes", gpus=1, num_nodes=2)
    nodes = [
        subprocess.Popen(
            [*torchrun, "1", "--nnodes", "2", "--node_rank", rank, *address, "distill.py", *two_nodes], cwd=REPOSITORY
        )
        for rank in "01"
    ]
    assert [node.wait(timeout=300) for node in nodes] == [0, 0]
    compare(tmp_path / "one", tmp_path / "nodes")


def started_by(pid: int) -> list[str]:
    """The processes that Lightning has started for a run, which may be gone itself."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"DPHUBERT_STARTED_BY={pid}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(process.name)
    return found


def second_process(pid: int) -> int:
    """The other training process, which Lightning starts as a child of the first, as are loader processes."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # a child has its own environment only once it runs its own program
        for child in children.read_text().split():
            with contextlib.suppress(OSError):  # another one, which has ended since
                if b"LOCAL_RANK=1" in Path(f"/proc/{child}/environ").read_bytes():
                    return int(child)
        time.sleep(0.02)
    raise AssertionError(f"process {pid} has started no other")


def long_run(manifests: Path, teacher: Path, exp_dir: Path) -> list[object]:
    changes = {"seconds_per_batch": 0.6, "max_updates": 5000, "save_interval": 2}
    return [*small_run(manifests, teacher, gpus=2, **changes), "--exp_dir", exp_dir]


def wait_for_checkpoint(exp_dir: Path, process: BaseProcess) -> None:
    while process.is_alive() and not (exp_dir / "ckpts" / "last.ckpt").is_file():
        time.sleep(0.05)


def test_a_signal_to_one_process_stops_both(manifests, small_teacher, tmp_path):
    exp_dir, output = tmp_path / "exp", tmp_path / "output"
    first, second = start_ranks("distill", *long_run(manifests, small_teacher, exp_dir), output=output)
    wait_for_checkpoint(exp_dir, first)
    os.kill(second.pid, signal.SIGTERM)  # not the one that saves
    first.join(120)
    second.join(120)
    assert (first.exitcode, second.exitcode) == (143, 0)
    errors = output.read_text()
    assert errors.count("SIGTERM: saved update") == 1 and "Traceback" not in errors


def test_a_lost_process_ends_the_run(manifests, small_teacher, tmp_path):
    """Lightning has started it. The other does not wait for it, and the run goes on from its last checkpoint."""
    exp_dir, output = tmp_path / "exp", tmp_path / "output"
    process = start_script("distill", *long_run(manifests, small_teacher, exp_dir), output=output)
    wait_for_checkpoint(exp_dir, process)
    os.kill(second_process(process.pid), signal.SIGKILL)
    process.join(60)
    assert process.exitcode not in (0, None)
    errors = output.read_text()
    assert "Connection closed by peer" in errors or "Child process with PID" in errors or "reset by peer" in errors
    assert torch.load(exp_dir / "ckpts" / "last.ckpt", weights_only=True)["global_step"] > 0


# --- who starts the processes ----------------------------------------------------------------------

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NNODES": "1", "SLURM_PROCID": "0"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}


def set_environment(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def in_job(num_tasks: int, started: str | None = None) -> dict[str, str]:
    """The variables that SLURM 22.05 sets in a job's script, or with ``started`` in a process of srun."""
    step = {} if started is None else {"SLURM_STEP_TASKS_PER_NODE": started}
    return {**JOB, "SLURM_NODEID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": str(num_tasks), **step}


@pytest.mark.parametrize(
    ("variables", "processes_per_node", "num_nodes", "kind"),
    [
        ({}, 4, 1, LightningEnvironment),
        ({}, 1, 2, None),
        (TORCHRUN, 2, 1, TorchElasticEnvironment),
        ({**in_job(8), **TORCHRUN}, 1, 2, TorchElasticEnvironment),
        (in_job(4), 1, 1, LightningEnvironment),
        (in_job(1), 4, 1, LightningEnvironment),
        (in_job(1, "1"), 4, 1, LightningEnvironment),
        (in_job(4, "4"), 4, 1, SLURMEnvironment),
        (in_job(8, "4(x2)"), 4, 2, SLURMEnvironment),
        (in_job(2, "1(x2)"), 1, 2, SLURMEnvironment),
    ],
)
def test_who_starts_the_processes(monkeypatch, variables, processes_per_node, num_nodes, kind):
    # And have what it sets restored.
    set_environment(monkeypatch, SLURM_NTASKS_PER_NODE="4", DPHUBERT_STARTED_BY=str(os.getpid()), **variables)
    found = cluster_environment(processes_per_node, num_nodes)
    assert type(found) is (kind or type(None))
    if kind is SLURMEnvironment:
        assert not found.auto_requeue and os.environ["SLURM_NTASKS_PER_NODE"] == str(processes_per_node)


@pytest.mark.parametrize(
    ("variables", "processes_per_node", "num_nodes"),
    [
        (in_job(4), 4, 1),
        (in_job(2), 1, 2),
        (in_job(4, "1"), 4, 1),
        (in_job(4, "4"), 1, 1),
        (in_job(4, "2"), 4, 1),
        (in_job(8, "4(x2)"), 8, 1),
        (in_job(3, "2,1"), 2, 2),
        (TORCHRUN, 1, 1),
    ],
)
def test_other_processes_than_the_options_say(monkeypatch, variables, processes_per_node, num_nodes):
    set_environment(monkeypatch, **variables)
    launcher = "torchrun" if variables is TORCHRUN else f"srun --nodes={num_nodes} --ntasks-per-node="
    with pytest.raises(UserError, match=rf"--gpus {processes_per_node} --num_nodes {num_nodes}: .*{launcher}"):
        cluster_environment(processes_per_node, num_nodes)


ELSEWHERE = {"RANK": "3", "LOCAL_RANK": "1", "NODE_RANK": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}


def test_ranks_of_another_launcher(monkeypatch):
    set_environment(monkeypatch, **ELSEWHERE, GROUP_RANK="1", MASTER_ADDR="elsewhere.invalid")
    monkeypatch.setenv("DPHUBERT_STARTED_BY", str(os.getpid()))
    found = cluster_environment(2, 1)
    assert not found.creates_processes_externally
    assert (found.local_rank(), found.node_rank(), found.main_address) == (0, 0, "127.0.0.1")
    # A process that Lightning has started keeps what it was given.
    monkeypatch.setenv("DPHUBERT_STARTED_BY", str(os.getppid()))
    set_environment(monkeypatch, LOCAL_RANK="1", MASTER_ADDR="127.0.0.2", RANK="3")
    found = cluster_environment(2, 1)
    assert found.creates_processes_externally
    assert (found.local_rank(), found.main_address) == (1, "127.0.0.2")


@pytest.mark.parametrize("rank", ["1", "", "gold"])
def test_a_run_with_the_rank_of_another_launcher(manifests, small_teacher, tmp_path, rank):
    """It writes its log, and says so when it is stopped."""
    exp_dir, output = tmp_path / "exp", tmp_path / "output"
    flags = small_run(manifests, small_teacher, max_updates=5000, save_interval=2)
    words = [sys.executable, "distill.py", *map(str, flags), "--exp_dir", str(exp_dir)]
    environment = {**os.environ, **ELSEWHERE, "RANK": rank, "WORLD_SIZE": "8"}
    environment.pop("DPHUBERT_STARTED_BY", None)  # of a test in this process
    with output.open("w") as file:
        process = subprocess.Popen(words, cwd=REPOSITORY, env=environment, stdout=file, stderr=file)
    deadline = time.monotonic() + 60
    while not (exp_dir / "ckpts" / "last.ckpt").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 143 and "SIGTERM: saved update" in output.read_text()
    assert values_by_step(exp_dir)


@pytest.mark.parametrize("port", ["abc", "", "0", "-1", "65536"])
def test_a_port_that_is_none(monkeypatch, port):
    monkeypatch.setenv("MASTER_PORT", port)
    assert cluster_environment(1, 1) is not None
    with pytest.raises(UserError, match=f"MASTER_PORT='{port}': expected a port"):
        cluster_environment(2, 1)


def test_one_process_in_a_job_of_several_tasks(manifests, small_teacher, tmp_path, monkeypatch):
    """One process needs no srun."""
    set_environment(monkeypatch, **in_job(4))
    flags = small_run(manifests, small_teacher, max_updates=2)
    run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "exp")
    assert (tmp_path / "exp" / "ckpts" / "last.ckpt").is_file()


def test_what_lightning_refuses_is_one_line(manifests, small_teacher, tmp_path, monkeypatch, capsys):
    """Lightning refuses the number of nodes that SLURM says; --debug shows the traceback."""
    set_environment(monkeypatch, **in_job(2, "2") | {"SLURM_NNODES": "3", "SLURM_NTASKS_PER_NODE": "2"})
    flags = [*small_run(manifests, small_teacher, gpus=2), "--exp_dir", tmp_path / "exp"]
    assert run_to_exit(monkeypatch, "distill", *flags) == 1
    message = error_line(capsys)
    assert "SLURM `--nodes=3` does not match" in message and "--num_nodes" in message


def test_processes_that_cannot_meet(manifests, small_teacher, tmp_path, monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        set_environment(monkeypatch, SLURM_NTASKS_PER_NODE="2", **in_job(2, "2"), **address)
        flags = [*small_run(manifests, small_teacher, gpus=2), "--exp_dir", tmp_path / "exp"]
        assert run_to_exit(monkeypatch, "distill", *flags) == 1
    message = error_line(capsys)
    assert message.startswith("the processes of this run do not reach each other: ") and "MASTER_PORT" in message


def test_an_interface_that_is_not_there(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib77")
    with pytest.raises(UserError, match=r"do not reach each other: .*ib77; .*GLOO_SOCKET_IFNAME"), errors_in_one_line():
        distributed.init_process_group("gloo", f"tcp://127.0.0.1:{free_port()}", world_size=1, rank=0)


def is_gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or " Z " in stat.read_text()


def test_a_first_process_that_fails_ends_the_others(manifests, small_teacher, tmp_path):
    output = tmp_path / "output"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        flags = [*small_run(manifests, small_teacher, gpus=2), "--exp_dir", tmp_path / "exp"]
        process = start_script("distill", *flags, output=output, MASTER_PORT=taken.getsockname()[1])
        process.join(60)
    assert process.exitcode == 1 and "do not reach each other" in output.read_text()
    assert not started_by(process.pid) and "Traceback" not in output.read_text()


# --- signals while processes wait for each other ---------------------------------------------------

WAITING = """
import sys
from torch import distributed
from training.signals import StopRequest

with StopRequest() as stop:
    if float(sys.argv[1]):
        stop.note_batch()
        stop.PATIENCE_SECONDS = float(sys.argv[1])
        distributed.is_initialized = lambda: True
    print("waits", flush=True)
    distributed.TCPStore("127.0.0.1", int(sys.argv[2]), world_size=2, is_master=True)  # outside Python
"""


def start_waiting(tmp_path: Path, patience: float) -> BaseProcess:
    """A process that waits for another that never comes, in training or, without any patience, before it."""
    script, output = tmp_path / "waiting.py", tmp_path / "output"
    script.write_text(WAITING)
    process = start_script(script.with_suffix(""), patience, free_port(), output=output)
    while process.is_alive() and not (output.exists() and "waits\n" in output.read_text()):
        time.sleep(0.05)
    time.sleep(0.3)
    return process


def test_before_training_a_signal_ends_a_process_that_waits(tmp_path):
    process = start_waiting(tmp_path, patience=0)
    os.kill(process.pid, signal.SIGUSR1)
    process.join(10)
    assert process.exitcode == 128 + signal.SIGUSR1
    assert (tmp_path / "output").read_text() == "waits\nSIGUSR1: ended without saving\n"


def test_in_training_a_signal_ends_a_process_that_waits_too_long(tmp_path):
    process = start_waiting(tmp_path, patience=1)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.5)
    assert process.is_alive()
    process.join(10)
    assert process.exitcode == 143
    assert "SIGTERM: no batch for 1 s: a process of this run may be gone" in (tmp_path / "output").read_text()


def test_a_second_ctrl_c_ends_a_process_at_once(tmp_path):
    process = start_waiting(tmp_path, patience=60)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1.2)  # sooner, it may be the first one again, from a launcher
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(1.5)
    assert process.exitcode == 130


def test_a_run_whose_second_process_does_not_come(manifests, small_teacher, tmp_path):
    flags = [*small_run(manifests, small_teacher, gpus=2), "--exp_dir", tmp_path / "exp"]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    output = tmp_path / "output"
    process = start_script("distill", *flags, output=output, **in_job(2, "2"), **address)
    deadline = time.monotonic() + 60
    while not (output.exists() and "MEMBER: 1/2" in output.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    assert process.exitcode == 130
    assert "Traceback" not in output.read_text() and not (tmp_path / "exp" / "ckpts").exists()


def test_a_signal_before_training_ends_the_processes_that_were_started(manifests, small_teacher, tmp_path):
    flags = [*small_run(manifests, small_teacher, gpus=2), "--exp_dir", tmp_path / "exp"]
    process = start_script("distill", *flags, output=tmp_path / "output")
    other = second_process(process.pid)
    time.sleep(0.3)  # Lightning notes a process that it has started, and waits a second or more
    os.kill(process.pid, signal.SIGTERM)
    process.join(10)
    assert process.exitcode == 143
    deadline = time.monotonic() + 10
    while not is_gone(other):
        assert time.monotonic() < deadline
        time.sleep(0.05)
