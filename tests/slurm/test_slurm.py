"""run.sh on a one-node SLURM cluster (cluster.sh): preempted, warned of its time limit, killed, submitted again.

Every disturbed job must end with the very weights of an undisturbed one.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import REPOSITORY, run_command

CLUSTER = Path(__file__).with_name("cluster.sh")
MISSING = [command for command in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(command) is None]

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed: apt-get install slurm-wlm munge"),
    pytest.mark.skipif(os.geteuid() != 0, reason="a SLURM cluster must be started by root"),
]

# conf/demo.conf, shorter.
SETTINGS = {
    "seconds_per_batch": 4,
    "max_crop_seconds": 1,
    "max_updates": 90,
    "warmup_updates": 10,
    "sparsity_warmup_updates": 20,
    "final_max_updates": 40,
    "final_warmup_updates": 5,
    "save_interval": 15,
    "log_interval": 5,
}
JOINT, FINAL = "ckpts/last.ckpt", "final/ckpts/last.ckpt"
COMPRESSED = "final/ckpts/pruned_hubert_base.pth"
GRACE_SECONDS = 20  # of partition batch, see cluster.sh
START_SECONDS = 60  # for a training stage to start and save, a job to be requeued
JOB_SECONDS = 240
AGAIN_SECONDS = 90  # for four stages to see that there is nothing to do


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[None]:
    """A running cluster, which sbatch and the others find through SLURM_CONF."""
    folder = tmp_path_factory.mktemp("cluster")
    started = subprocess.run(["bash", CLUSTER, "start", folder], capture_output=True, text=True)
    assert started.returncode == 0, started.stderr
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield
        subprocess.run(["bash", CLUSTER, "stop", folder], check=True)


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory) -> dict[str, Path]:
    """Settings of run.sh: manifests of a little synthetic speech, and the demo's teacher."""
    folder = tmp_path_factory.mktemp("demo")
    for arguments in (
        ("-m", "demo.synthesize_speech", "--out", folder / "speech", "--minutes", 3),
        ("prepare_data.py", "--data", folder / "speech", "--out", folder / "data"),
        ("convert_hubert_from_hf.py", "--model", "demo/mini-hubert", "--out", folder / "mini-hubert.pth"),
    ):
        result = run_command(sys.executable, *arguments)
        assert result.returncode == 0, result.stderr
    return {"tsv_dir": folder / "data", "teacher_ckpt": folder / "mini-hubert.pth"}


def slurm(*command: object) -> str:
    """The output of a SLURM command."""
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=REPOSITORY)
    assert result.returncode == 0, f"{command}: {result.stderr}"
    return result.stdout.strip()


class Job:
    """run.sh as a job.

    Args:
        exp_dir: its experiment.
        data: the settings of ``demo_data``.
        num_processes: of each training stage.
    """

    def __init__(self, exp_dir: Path, data: dict[str, Path], num_processes: int) -> None:
        self.exp_dir = exp_dir
        self.output = exp_dir.with_name(f"{exp_dir.name}.out")
        settings = {**SETTINGS, **data, "exp_dir": exp_dir, "python": sys.executable, "gpus": num_processes}
        with pytest.MonkeyPatch.context() as environment:
            for name, value in settings.items():
                environment.setenv(name, str(value))
            self.number = slurm(
                *("sbatch", "--parsable", f"--ntasks-per-node={num_processes}", "--cpus-per-task=1"),
                *("--gpus-per-node=0", f"--output={self.output}", "run.sh", "conf/demo.conf"),
            )

    def field(self, name: str) -> str:
        """A field of ``scontrol show job``."""
        fields = slurm("scontrol", "show", "job", self.number).split()
        return next(field.partition("=")[2] for field in fields if field.startswith(f"{name}="))

    @property
    def restarts(self) -> int:
        return int(self.field("Restarts"))

    def wait_until(self, what: str, is_so: Callable[[], bool], seconds: float) -> None:
        """Wait for something that this job makes so; show the job's output if it does not come in time."""
        end = time.monotonic() + seconds
        while not is_so():
            state = self.field("JobState")
            ended = state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT") and not is_so()
            if ended or time.monotonic() > end:
                output = self.output.read_text()[-5000:] if self.output.exists() else "nothing"
                pytest.fail(f"job {self.number} ({state}): not {what}; it said:\n{output}")
            time.sleep(0.2)

    def wait_for_update(self, name: str, update: int) -> None:
        """Wait until a checkpoint of this update or a later one is there."""
        path = self.exp_dir / name
        self.wait_until(
            f"at update {update} of {name}", lambda: path.exists() and self.update(name) >= update, JOB_SECONDS
        )

    def wait_for_requeue(self, restarts: int) -> None:
        self.wait_until(
            f"requeued {restarts} times",
            lambda: self.restarts == restarts and self.field("JobState") == "PENDING",
            START_SECONDS,
        )

    def wait_for_state(self, state: str) -> None:
        self.wait_until(state, lambda: self.field("JobState") == state, JOB_SECONDS)

    def process(self, rank: int) -> int:
        """Process number of one rank of the training stage that runs."""
        rows = [line.split() for line in slurm("scontrol", "listpids", self.number).splitlines()[1:]]
        return next(int(pid) for pid, _, step, local, _ in rows if step.isdecimal() and local == str(rank))

    def update(self, name: str) -> int:
        """The update that a checkpoint was saved after."""
        return torch.load(self.exp_dir / name, weights_only=True)["global_step"]


def preempt(job: Job, name: str, update: int) -> int:
    """Preempt a job after an update; the one that it saved for that."""
    job.wait_for_update(name, update)
    restarts = job.restarts + 1
    urgent = slurm(
        *("sbatch", "--parsable", "--partition=urgent", "--ntasks=2", "--output=/dev/null", "--wrap", "sleep 600")
    )
    job.wait_for_requeue(restarts)
    update = job.update(name)
    slurm("scancel", urgent)
    return update


def warn(job: Job, name: str, update: int) -> int:
    """Send the warning that SLURM sends before the time limit, after an update; the one that the job saved for it."""
    job.wait_for_update(name, update)
    restarts = job.restarts + 1
    slurm("scancel", "--signal=USR1", job.number)
    job.wait_for_requeue(restarts)
    return job.update(name)


def assert_same(a: Any, b: Any, where: str) -> None:
    """Equal bit for bit, tensors within anything."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key, value in a.items():
            assert_same(value, b[key], f"{where}, {key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, value in enumerate(a):
            assert_same(value, b[index], f"{where}, {index}")
    else:
        assert a == b, where


def assert_same_results(exp_dir: Path, reference: Path) -> None:
    """The compressed model, and weights and optimiser of both training stages."""
    for name in (COMPRESSED, JOINT, FINAL):
        one, other = (torch.load(folder / name, weights_only=True) for folder in (exp_dir, reference))
        for key in ("config", "state_dict", "distill_linear_projs", "global_step", "optimizer_states", "lr_schedulers"):
            assert (key in one) == (key in other), f"{name}, {key}"
            if key in one:
                assert_same(one[key], other[key], f"{name}, {key}")


def files(exp_dir: Path) -> dict[Path, tuple[int, int]]:
    """Every file but what the stages printed, with its size and time of change."""
    found = (path for path in exp_dir.rglob("*") if path.is_file() and path.suffix != ".log")
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def run_undisturbed(exp_dir: Path, data: dict[str, Path], num_processes: int) -> Path:
    """The experiment of a job that nothing disturbs."""
    job = Job(exp_dir, data, num_processes)
    job.wait_for_state("COMPLETED")
    assert job.restarts == 0
    return exp_dir


@pytest.fixture(scope="session")
def undisturbed(cluster, demo_data, tmp_path_factory) -> Path:
    return run_undisturbed(tmp_path_factory.mktemp("undisturbed") / "exp", demo_data, num_processes=1)


def test_a_job_that_is_preempted_and_warned_ends_as_an_undisturbed_one(undisturbed, demo_data, tmp_path):
    job = Job(tmp_path / "exp", demo_data, num_processes=1)
    at = preempt(job, JOINT, update=15)
    assert 15 < at < SETTINGS["max_updates"]
    assert at < warn(job, JOINT, update=at + 1) < SETTINGS["max_updates"]
    assert 15 < preempt(job, FINAL, update=15) < SETTINGS["final_max_updates"]
    job.wait_for_state("COMPLETED")
    assert job.restarts == 3
    assert_same_results(job.exp_dir, undisturbed)


def test_two_processes_are_preempted_and_one_is_killed(cluster, demo_data, tmp_path):
    """Without a grace time SLURM requeues the job itself; a killed process ends its job, which is submitted again."""
    reference = run_undisturbed(tmp_path / "undisturbed", demo_data, num_processes=2)
    slurm("scontrol", "update", "PartitionName=batch", "GraceTime=0")
    try:
        job = Job(tmp_path / "exp", demo_data, num_processes=2)
        assert 15 < preempt(job, JOINT, update=15) < SETTINGS["max_updates"]
    finally:
        slurm("scontrol", "update", "PartitionName=batch", f"GraceTime={GRACE_SECONDS}")
    job.wait_for_update(FINAL, update=15)
    os.kill(job.process(rank=1), signal.SIGKILL)
    job.wait_for_state("FAILED")
    assert job.restarts == 1

    again = Job(job.exp_dir, demo_data, num_processes=2)
    again.wait_for_state("COMPLETED")
    assert_same_results(job.exp_dir, reference)


def test_a_cancelled_job_saves_and_stays_cancelled(cluster, demo_data, tmp_path):
    job = Job(tmp_path / "exp", demo_data, num_processes=1)
    job.wait_for_update(JOINT, update=15)
    slurm("scancel", job.number)
    job.wait_for_state("CANCELLED")
    assert job.restarts == 0
    assert f"SIGTERM: saved update {job.update(JOINT)} " in job.output.read_text()


def test_a_finished_job_submitted_again_changes_nothing(undisturbed, demo_data):
    before = files(undisturbed)
    start = time.monotonic()
    Job(undisturbed, demo_data, num_processes=1).wait_for_state("COMPLETED")
    assert time.monotonic() - start < AGAIN_SECONDS
    assert files(undisturbed) == before
