"""Over ten thousand mutated files and configs: each is refused in one line or loads what is valid."""

import json
import subprocess
import sys
from pathlib import Path

from helpers import REPOSITORY

AT_LEAST = 10_000
TIMEOUT = 600  # seconds; it takes some 40 on one core


def test_mutated_inputs(tmp_path: Path) -> None:
    """In a process that may use 2 GiB more than at its start; an input that fails is kept in the test's folder."""
    result = subprocess.run(
        [sys.executable, "tests/fuzz.py", "--folder", tmp_path],
        cwd=REPOSITORY,
        env={"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert result.returncode == 0, (result.returncode, result.stderr[-3000:])
    report = json.loads(result.stdout)
    assert not report["failures"], "\n".join(report["failures"][:20])
    total = 0
    for kind, counts in report["counts"].items():
        number = counts["refused"] + counts.get("loaded", 0)
        total += number
        assert counts["refused"], f"{kind}: nothing was refused, so the mutations do nothing"
        if "stored" not in kind:
            assert counts.get("loaded"), f"{kind}: nothing loads any more, so only the first check is tested"
    assert total >= AT_LEAST
