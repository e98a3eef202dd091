"""Progress in log files and on terminals, and a signal to the first process of a container."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

import cli


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_fills_no_log_file(is_terminal, monkeypatch, capsys):
    """A terminal sees the bar move; a log file gets nothing of what is soon done, and else a line now and then."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)

    def lines(seconds_each: float) -> int:
        for _ in cli.progress(range(400), "reading", unit="clip"):
            now[0] += seconds_each
        printed = capsys.readouterr().err
        assert not printed or ("reading" in printed and "/400" in printed)
        return len(printed.replace("\r", "\n").split("\n")) if printed else 0

    if is_terminal:
        assert lines(0.5) > 100
    else:
        assert lines(0.05) == 0
        assert 4 <= lines(0.5) <= 10  # 200 s


FIRST_PROCESS = """
import argparse, time, cli
cli.run(lambda args: print("runs", flush=True) or time.sleep(60), argparse.Namespace())
"""


def test_sigterm_ends_the_first_process_of_a_container():
    unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("needs a process namespace")
    words = [*unshare, sys.executable, "-c", FIRST_PROCESS]
    with subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE) as outside:
        assert outside.stdout.readline() == b"runs\n"
        (first,) = Path(f"/proc/{outside.pid}/task/{outside.pid}/children").read_text().split()
        os.kill(int(first), signal.SIGTERM)
        try:
            assert outside.wait(10) == 143
        finally:
            outside.kill()
