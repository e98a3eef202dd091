"""run.sh: its settings, the commands it makes of them, and what it does with signals and with SLURM."""

import importlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import REPOSITORY, run_command


@pytest.mark.parametrize("config", sorted(path.name for path in (REPOSITORY / "conf").glob("*.conf")))
def test_every_shipped_config_gives_commands_that_parse(config, monkeypatch):
    result = run_command("bash", "run.sh", "--print", f"conf/{config}")
    assert result.returncode == 0, result.stderr
    commands = [shlex.split(line)[1:] for line in result.stdout.splitlines()]
    scripts = [next(word for word in command if word.endswith(".py")) for command in commands]
    assert scripts == ["distill.py", "prune.py", "final_distill.py", "save_final_ckpt.py"]
    for script, command in zip(scripts, commands, strict=True):
        monkeypatch.setattr(sys, "argv", command[command.index(script) :])
        importlib.import_module(script.removesuffix(".py")).parse_args()


def test_defaults_are_the_published_experiment(monkeypatch):
    result = run_command("bash", "run.sh", "--print")
    distill, _, final, _ = (shlex.split(line) for line in result.stdout.splitlines())
    for command, expected in (
        (distill, {"learning_rate": "2e-4", "warmup_updates": "15000", "max_updates": "50000", "gpus": "4"}),
        (distill, {"target_sparsity": "0.75", "reg_learning_rate": "0.02", "sparsity_warmup_updates": "5000"}),
        (distill, {"seconds_per_batch": "160", "num_workers": "12", "precision": "16", "train_subset": "train960"}),
        (distill, {"pruning_units": "conv,head,interm", "distill_layers": "0.4,8,12"}),
        (final, {"learning_rate": "1e-4", "warmup_updates": "5000", "max_updates": "25000"}),
    ):
        for name, value in expected.items():
            assert command[command.index(f"--{name}") + 1] == value, name


def test_switches_and_optional_settings():
    plain, chosen = (
        run_command("bash", "run.sh", "--print", **settings).stdout.splitlines()
        for settings in ({}, {"compile": "true", "checkpoint_activations": "true", "crop_lengths": 8, "round_to": 16})
    )
    for stage, words in ((0, "--round_to 16"), (0, "--crop_lengths 8"), (2, "--compile"), (2, "--crop_lengths 8")):
        assert words in chosen[stage].replace("'", "") and words.split()[0] not in plain[stage], (stage, words)
    assert all("--checkpoint_activations" in chosen[stage] for stage in (0, 2)) and "--round_to" not in chosen[2]
    result = run_command("bash", "run.sh", "--print", compile="yes")
    assert result.returncode == 1 and "compile: expected true or false, found: yes" in result.stderr


def test_run_sh_stops_at_the_first_failure(tmp_path):
    result = run_command(
        "bash",
        "run.sh",
        exp_dir=tmp_path / "exp",
        tsv_dir=tmp_path / "nowhere",
        gpus=1,
        precision=32,
        accelerator="cpu",
    )
    assert result.returncode == 1
    assert "error: " in result.stdout and str(tmp_path / "nowhere") in result.stdout
    assert "prune.py" not in result.stdout
    assert not (tmp_path / "exp" / "prune.log").exists()


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("max_updats=5\n", "unknown setting max_updats"),
        ("max_updates 5\n", "expected NAME=VALUE"),
        (None, "no such config"),
    ],
)
def test_run_sh_refuses_bad_configs(tmp_path, contents, message):
    config = tmp_path / "bad.conf"
    if contents is not None:
        config.write_text(contents)
    result = run_command("bash", "run.sh", "--print", config)
    assert result.returncode == 1 and message in result.stderr and str(config) in result.stderr


STAGE = """#!{python}
# Stands for Python in run.sh: distill.py trains until a signal makes it save; the other scripts end at once.
import signal, sys, time

def save(number, frame):
    time.sleep(0.3)
    print("saved", flush=True)
    sys.exit(128 + number)

for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
    signal.signal(getattr(signal, name), save)
print("training" if sys.argv[1] == "distill.py" else "nothing to wait for", flush=True)
if sys.argv[1] == "distill.py":
    time.sleep(30)
"""


def write_command(path: Path, contents: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(contents)
    path.chmod(0o755)
    return path


def start_run_sh(tmp_path: Path, **environment: object) -> subprocess.Popen:
    """run.sh, in a session of its own as a terminal would start it, once its first stage trains."""
    settings = {"python": write_command(tmp_path / "bin" / "stage", STAGE.format(python=sys.executable))}
    settings |= {"exp_dir": tmp_path / "exp", "gpus": 1, **environment}
    process = subprocess.Popen(
        ["bash", "run.sh"],
        cwd=REPOSITORY,
        env=os.environ | {name: str(value) for name, value in settings.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if line == "training\n":
            return process
    raise AssertionError("run.sh ended before its first stage trained")


@pytest.mark.parametrize(
    ("name", "send", "status"),
    [
        ("SIGTERM", os.kill, 143),
        ("SIGUSR1", os.kill, 138),
        ("SIGINT", os.killpg, 130),  # Ctrl-C: the terminal tells the whole group
        ("SIGTERM", os.killpg, 143),
    ],
)
def test_run_sh_lets_the_stage_save(tmp_path, name, send, status):
    """A signal to run.sh reaches the stage; run.sh shows what the stage still says and ends with its status."""
    process = start_run_sh(tmp_path)
    send(process.pid, getattr(signal, name))
    output, _ = process.communicate(timeout=20)
    assert process.returncode == status
    assert output == "saved\n"
    assert (tmp_path / "exp" / "distill.log").read_text() == "training\nsaved\n"
    assert not (tmp_path / "exp" / "prune.log").exists()


def test_run_sh_starts_training_with_srun_in_a_slurm_job():
    result = run_command("bash", "run.sh", "--print", gpus=2, num_nodes=3, SLURM_JOB_ID=7, SLURM_CPUS_PER_TASK=12)
    distill, prune, final, save = (shlex.split(line)[1:] for line in result.stdout.splitlines())
    for command in (distill, final):
        srun = command[: command.index(sys.executable)]
        assert srun[0] == "srun"
        assert {"--nodes=3", "--ntasks=6", "--ntasks-per-node=2", "--cpus-per-task=12", "--kill-on-bad-exit=1"} == set(
            srun[1:]
        )
    assert prune[0] == save[0] == sys.executable


@pytest.mark.parametrize(
    ("name", "script_too", "state", "array", "requeued"),
    [
        ("SIGTERM", False, "PreemptTime=None", {}, ""),  # scancel --signal=TERM
        ("SIGTERM", False, "PreemptTime=2026-11-23T17:20:25", {}, "7\n"),
        ("SIGTERM", False, "PreemptTime=2026-11-23T17:20:25", {"JOB_ID": 5, "TASK_ID": 3}, "5_3\n"),
        ("SIGTERM", True, "PreemptTime=2026-11-23T17:20:25", {}, ""),  # SLURM requeues it itself
        ("SIGTERM", True, "PreemptTime=None", {}, ""),  # scancel
        ("SIGTERM", True, "Reason=TimeLimit", {}, "7\n"),
        ("SIGUSR1", False, "PreemptTime=None", {}, "7\n"),
    ],
)
def test_run_sh_requeues_what_slurm_stopped(tmp_path, name, script_too, state, array, requeued):
    """A job that SLURM stops and would not requeue goes back to the queue; one that the user stops does not."""
    log = tmp_path / "requeued"
    log.touch()
    write_command(tmp_path / "bin" / "srun", '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
    answer = f'#!/bin/bash\n[[ $1 == show ]] && echo "   {state}" || echo "$2" >>{log}\n'
    write_command(tmp_path / "bin" / "scontrol", answer)
    slurm = {"SLURM_JOB_ID": 7, "SLURM_SUBMIT_DIR": REPOSITORY, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    process = start_run_sh(tmp_path, **slurm, **{f"SLURM_ARRAY_{key}": value for key, value in array.items()})
    _, stage = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()  # tee is the first
    if script_too:
        process.send_signal(getattr(signal, name))
        time.sleep(0.2)
        assert process.poll() is None
    os.kill(int(stage), getattr(signal, name))
    process.communicate(timeout=20)
    assert process.returncode == 128 + getattr(signal, name)
    assert log.read_text() == requeued
