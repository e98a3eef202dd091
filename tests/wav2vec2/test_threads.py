"""The choice of how threads wait, made before torch is loaded unless the user has made it."""

import os
import sys
from pathlib import Path

import pytest
from helpers import run_command

from wav2vec2 import threads

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.parametrize(
    ("running", "usable", "given", "expected"),
    [
        (1, 4, {}, {"GOMP_SPINCOUNT": "1000"}),  # this process alone
        (2, 4, {}, {"OMP_WAIT_POLICY": "passive"}),
        (3, 2, {}, {"GOMP_SPINCOUNT": "1000"}),  # a share of the machine, and others elsewhere
        (4, 2, {}, {"OMP_WAIT_POLICY": "passive"}),
        (9, 4, {"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
        (9, 4, {"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
    ],
)
def test_choice(running, usable, given, expected, monkeypatch, tmp_path):
    load = tmp_path / "loadavg"
    load.write_text(f"0.00 0.01 0.05 {running}/500 1234\n")
    monkeypatch.setattr(threads, "_LOAD", load)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(usable)))
    monkeypatch.setattr(os, "environ", dict(given))
    threads.choose_waiting()
    assert os.environ == expected
    monkeypatch.setattr(threads, "_LOAD", Path("/nowhere"))
    monkeypatch.setattr(os, "environ", {})
    threads.choose_waiting()
    assert not os.environ


def test_every_script_chooses_before_torch():
    names = "{'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT'}"
    code = f"import sys, os, cli; print(len({names} & os.environ.keys()), 'torch' in sys.modules)"
    assert run_command(sys.executable, "-c", code).stdout == "1 False\n"
