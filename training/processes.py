"""The processes of a run: what starts them, which one this is, and what they tell each other."""

import os
from typing import Any

import torch
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from torch import distributed

from cli import AllProcessesError
from training.settings import MachineSettings


def cluster_environment(processes_per_node: int, num_nodes: int) -> ClusterEnvironment | None:
    """Say what starts the processes of a run: torchrun, or ``srun`` in a SLURM job; None leaves it to Lightning.

    One process needs no srun in a SLURM job, nor do several in a job of one task: Lightning starts the others.

    Raises:
        AllProcessesError: srun is missing, or there are other processes than ``--gpus`` and ``--num_nodes`` say.
    """
    wanted = f"{processes_per_node}(x{num_nodes})" if num_nodes > 1 else f"{processes_per_node}"
    options = f"--gpus {processes_per_node} --num_nodes {num_nodes}"
    if TorchElasticEnvironment.detect():
        environment = TorchElasticEnvironment()
        if environment.world_size() != processes_per_node * num_nodes:
            raise AllProcessesError(
                f"{options}: torchrun has started {environment.world_size()} processes; start it with --nnodes "
                f"{num_nodes} --nproc_per_node {processes_per_node}"
            )
        return environment
    if not SLURMEnvironment.detect():
        return None
    # In the job's script SLURM_NTASKS is that of the whole job. srun sets SLURM_STEP_TASKS_PER_NODE in the processes
    # that it starts: "4(x2)" means 4 on each of 2 nodes. A shell in a job may be a step of one task.
    started = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
    if started == "1" and num_nodes == 1 and "1" in (wanted, os.environ["SLURM_NTASKS"]):
        return LightningEnvironment()
    if started != wanted:
        raise AllProcessesError(
            f"{options}: this SLURM job has started {started} of these processes per node; put srun "
            f"--nodes={num_nodes} --ntasks-per-node={processes_per_node} in front of the command, or change --gpus and "
            "--num_nodes"
        )
    os.environ["SLURM_NTASKS_PER_NODE"] = started.partition("(")[0]  # Lightning wants it, and srun -n does not set it
    return SLURMEnvironment(auto_requeue=False)  # RunCheckpoints requeues at the end of an update


def own_device(machine: MachineSettings) -> torch.device:
    """The device that this process will train on, before Lightning says so."""
    if machine.devices[0] == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))))


def gather(value: Any) -> list[Any]:
    """The value of every process, in order of rank."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
