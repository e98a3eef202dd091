"""Signals that ask a run to stop, and the SLURM job that asks for another turn."""

import math
import multiprocessing
import os
import select
import signal
import subprocess
import threading
import time
from contextlib import ExitStack
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from torch import distributed

from cli import print_line


def end_started(launcher: Any) -> None:
    """Kill the processes that Lightning's ``launcher`` has started here: they may wait for others, outside Python."""
    for process in getattr(launcher, "procs", []):
        process.kill()


class StopRequest:
    """Notes SIGINT, SIGTERM and SIGUSR1 until the run is where it can stop.

    SIGTERM is what SLURM sends before it takes a job's machine away, SIGUSR1 what run.sh asks it to send
    before the time limit.

    A signal ends the process at once where there is nothing to save or the run cannot come to where it may stop: before
    training; at a second Ctrl-C; and where several processes train and this one has begun no batch for
    ``PATIENCE_SECONDS``, because it waits for one that is gone. No Python handler runs while a process waits for
    others outside Python, so a thread does this; the interpreter wakes it by writing the signal to a pipe.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    PATIENCE_SECONDS = 120.0
    # Launchers pass on a Ctrl-C that the terminal has sent to all processes already.
    _ECHO_SECONDS = 1.0

    def __init__(self) -> None:
        self.signum = 0  # the last signal; 0 for none
        self.launcher: Any = None  # Lightning's, which knows the processes that this one has started
        self.is_first = True  # False if another process of the run speaks for all
        self.is_agreed = False  # True if all processes will stop after this update, once the run is saved
        self._alive_at = math.inf  # when the last batch began; training has not begun yet
        self._undo = ExitStack()

    def __enter__(self) -> "StopRequest":
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        thread = threading.Thread(target=self._watch, args=(reader,), daemon=True)
        for descriptor in (reader, writer):
            self._undo.callback(os.close, descriptor)
        self._undo.callback(thread.join)
        self._undo.callback(os.write, writer, b"\0")
        self._undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer, warn_on_full_buffer=False))
        for signum in self.SIGNALS:
            self._undo.callback(signal.signal, signum, signal.signal(signum, self._note))
        thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def note_batch(self) -> None:
        """Note that a batch begins: training has begun, and this process waits for no other."""
        self._alive_at = time.monotonic()

    def _note(self, signum: int, _: FrameType | None) -> None:
        self.signum = signum

    def _watch(self, reader: int) -> None:
        """Read signals from the pipe until a 0, and end the process where nothing else will."""
        last, noted_at = 0, 0.0
        while True:
            ready, _, _ = select.select([reader], [], [], 1.0 if last else None)
            now = time.monotonic()
            signum = os.read(reader, 1)[0] if ready else None
            if signum == 0:
                return
            if signum in self.SIGNALS:
                is_second = signum == signal.SIGINT == last and now - noted_at > self._ECHO_SECONDS
                if self._alive_at == math.inf or is_second:
                    self._end(signum, "")
                last, noted_at = signum, now
            is_late = now - max(noted_at, self._alive_at) > self.PATIENCE_SECONDS
            if last and is_late and not self.is_agreed and distributed.is_initialized():
                self._end(last, f"no batch for {self.PATIENCE_SECONDS:.0f} s: a process of this run may be gone; ")

    def _end(self, signum: int, reason: str) -> None:
        """End this process and those that it started, as the signal would without a handler."""
        try:
            end_started(self.launcher)
            if reason or self.is_first:
                print_line(f"{signal.Signals(signum).name}: {reason}ended without saving")
        finally:
            os._exit(128 + signum)


def ignore_stop_signals(_worker: int) -> None:
    """Ignore signals in a loader process, which gets them too: it ends with the process that it works for."""
    for signum in StopRequest.SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def end_loader_processes() -> None:
    """Kill the loader processes of this process: at its end Python would send them SIGTERM, and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def leave_signals_alone(trainer: pl.Trainer) -> None:
    """Keep Lightning's own handling of signals off a trainer; it has no public switch.

    Its handlers would answer SIGTERM with a collective in the middle of an update, and it would exchange after every
    batch what the exchange of :class:`training.updates.UpdateGuard` says once an update.
    """
    connector, loop = trainer._signal_connector, trainer.fit_loop.epoch_loop
    for part, name in ((connector, "register_signal_handlers"), (loop, "_broadcast_sigterm_tensor")):
        setattr(part, name, lambda: None)


def requeue_slurm_job() -> str:
    """Put this SLURM job back into the queue, and say in words what came of it."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return "not a SLURM job, so not requeued"
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        result = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        trouble = result.stderr.strip() if result.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        trouble = str(error)
    return f"job {job} requeued" if trouble is None else f"job {job} could not be requeued ({trouble}); submit it again"
