"""Chooses how torch's threads wait for each other; imported before torch."""

import os
import time
from pathlib import Path

_LOAD = Path("/proc/loadavg")
# Turns of libgomp's waiting loop before a thread sleeps; its own default is 300,000 (docs/performance.md).
_SPINS = 1_000


def choose_waiting() -> None:
    """Let waiting threads sleep at once where other processes want the same cores, else after a short spin.

    A spinning thread keeps its core from the thread that it waits for once there are more of them than cores: beside
    other work an update then takes many times as long. A setting of the user's counts; elsewhere than on Linux nothing
    is set.
    """
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys() or not _LOAD.is_file():
        return
    others = []
    for _ in range(5):
        running = _LOAD.read_text().split()[3].partition("/")[0]  # tasks that run or could, this one among them
        others.append(int(running) - 1)
        time.sleep(0.005)
    idle = (os.cpu_count() or 1) - sorted(others)[2]
    if idle < len(os.sched_getaffinity(0)):
        os.environ["OMP_WAIT_POLICY"] = "passive"
    else:
        os.environ["GOMP_SPINCOUNT"] = str(_SPINS)
