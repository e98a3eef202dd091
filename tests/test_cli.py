"""Progress in log files and on terminals; text from files; a signal to the first process of a container."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

import cli
from wav2vec2.files.errors import UserError


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
        assert is_terminal or "\r" not in printed  # a line each, for grep and viewers of logs
        assert not printed or ("reading" in printed and "/400" in printed)
        return len(printed.replace("\r", "\n").split("\n")) if printed else 0

    if is_terminal:
        assert lines(0.5) > 100
    else:
        assert lines(0.05) == 0
        assert 4 <= lines(0.5) <= 10  # 200 s


# A title of the terminal, a line that overwrites another, a direction that is turned round, half a surrogate pair.
STEERING = "\x1b]0;PWNED\a\r\x9b2J\u202egpj.\u2066\udcff"
SHOWN = r"\x1b]0;PWNED\x07\r\x9b2J\u202egpj.\u2066\udcff"
ORDINARY = "Zoë\u00a05\u202f% 聲\u3000می\u200cخواهم 👩\u200d🔬 e\u0301 \\x1b"


def test_text_from_files_is_shown(capsys, monkeypatch):
    """Whatever a script prints goes to the terminal as text; other languages stay as they are."""
    text = ORDINARY + STEERING

    def main(args: argparse.Namespace) -> None:
        print(f"{text}\n\t{text}", flush=True)
        cli.print_line(text)
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
        list(cli.progress([1], text))
        raise UserError(f"{text}\n{text}")

    stdout = sys.stdout
    with pytest.raises(SystemExit):
        cli.run(main, argparse.Namespace(debug=False))
    assert sys.stdout is stdout
    shown, printed = ORDINARY + SHOWN, capsys.readouterr()
    assert printed.out == f"{shown}\n\t{shown}\n"
    on_one_line = " ".join(ORDINARY.split()) + SHOWN.replace(r"\r", " ")
    assert printed.err.startswith(f"{shown}\n\r{shown}:")
    assert printed.err.endswith(f"\nerror: {on_one_line} {on_one_line}\n")

    def interrupted(args: argparse.Namespace) -> None:
        raise cli.Interrupted(15, text)

    with pytest.raises(SystemExit):
        cli.run(interrupted, argparse.Namespace(debug=False))
    assert capsys.readouterr().err == f"{shown}\n"


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
