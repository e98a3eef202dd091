"""The processes of a run: what starts them, which one this is, and what they tell each other."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from torch import distributed

from cli import AllProcessesError, Interrupted
from training.settings import MachineSettings
from training.signals import end_loader_processes, end_started
from wav2vec2.files.errors import UserError

# In the environment of the processes that Lightning starts: the number of the one that it was started by.
_STARTED_BY = "DPHUBERT_STARTED_BY"


def cluster_environment(processes_per_node: int, num_nodes: int) -> ClusterEnvironment | None:
    """Say what starts the processes of a run: torchrun, ``srun`` in a SLURM job, or else Lightning.

    One process needs no srun in a SLURM job, nor do several in a job of one task: Lightning starts the others.
    None leaves several nodes to Lightning, which may know what starts processes there.

    Raises:
        UserError: srun is missing, or there are other processes than ``--gpus`` and ``--num_nodes`` say. Each process
            raises it: they may be runs of their own. Or the processes could not meet.
    """
    port = os.environ.get("MASTER_PORT", "1")
    if processes_per_node * num_nodes > 1 and not (port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"MASTER_PORT={port!r}: expected a port for the processes to meet at, 1 to 65535; or unset it")
    wanted = f"{processes_per_node}(x{num_nodes})" if num_nodes > 1 else f"{processes_per_node}"
    options = f"--gpus {processes_per_node} --num_nodes {num_nodes}"
    if TorchElasticEnvironment.detect():
        environment = TorchElasticEnvironment()
        if environment.world_size() != processes_per_node * num_nodes:
            raise UserError(
                f"{options}: torchrun has started {environment.world_size()} processes; start it with --nnodes "
                f"{num_nodes} --nproc_per_node {processes_per_node}"
            )
        return environment
    if not SLURMEnvironment.detect():
        return _lightning_environment(processes_per_node) if num_nodes == 1 else None
    # In the job's script SLURM_NTASKS is that of the whole job. srun sets SLURM_STEP_TASKS_PER_NODE in the processes
    # that it starts: "4(x2)" means 4 on each of 2 nodes. A shell in a job may be a step of one task.
    started = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
    if started == "1" and num_nodes == 1 and "1" in (wanted, os.environ["SLURM_NTASKS"]):
        return _lightning_environment(processes_per_node)
    if started != wanted:
        raise UserError(
            f"{options}: this SLURM job has started {started} of these processes per node; put srun "
            f"--nodes={num_nodes} --ntasks-per-node={processes_per_node} in front of the command, or change --gpus and "
            "--num_nodes; where each is a run of its own, put env -u SLURM_NTASKS in front of the command"
        )
    os.environ["SLURM_NTASKS_PER_NODE"] = started.partition("(")[0]  # Lightning wants it, and srun -n does not set it
    return SLURMEnvironment(auto_requeue=False)  # RunCheckpoints requeues at the end of an update


def _lightning_environment(num_processes: int) -> ClusterEnvironment:
    """Lightning as what starts the processes of one machine, whatever ranks others have given this process.

    They are in the environment where another launcher has started runs of their own, such as the pods of a cluster. So
    is an address, but the processes of one machine meet on it.
    """
    others = ["RANK", "SLURM_PROCID", "SLURM_LOCALID", "NODE_RANK", "GROUP_RANK"]
    if num_processes == 1 or os.environ.get(_STARTED_BY) != str(os.getppid()):
        others += ["LOCAL_RANK", "MASTER_ADDR"]
        os.environ[_STARTED_BY] = str(os.getpid())
    for name in others:
        os.environ.pop(name, None)
    environment = LightningEnvironment()
    environment.set_global_rank(environment.local_rank())  # Lightning's loggers have read the environment already
    return environment


@contextmanager
def ending_together(trainer: pl.Trainer) -> Iterator[None]:
    """End all processes of a run with this one.

    Where all stop, the first speaks, and the others end quietly: launchers kill the others when one ends with an error.
    Where this one fails, it ends those that it has started.
    """
    try:
        yield
    except BaseException as error:
        end_loader_processes()
        if not isinstance(error, (Interrupted, AllProcessesError)):
            end_started(trainer.strategy.launcher)
        elif not trainer.is_global_zero:
            sys.exit(0)
        raise
    finally:
        if os.environ.get(_STARTED_BY) == str(os.getpid()):  # what this process starts later is a run of its own
            del os.environ[_STARTED_BY]


def own_device(machine: MachineSettings) -> torch.device:
    """The device that this process trains on."""
    return torch.device("cpu" if machine.devices[0] == "cpu" else "cuda")


def gather(value: Any) -> list[Any]:
    """The value of every process, in order of rank."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
