"""For all test files: one thread, which is by far quicker for tiny models, and rows of the reliability page."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reliability import Recorder

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts that tests start

RECORDER = pytest.StashKey[Recorder]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-reliability", action="store_true", help="write docs/reliability.md from the tests that run"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDER] = Recorder(config.getoption("--write-reliability"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.stash[RECORDER].finish()


@pytest.fixture
def reliability(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``reliability(section, case, result, measured=False)``: a row of docs/reliability.md, see reliability.py.

    Temporary paths become ``...`` in it, so that the row is the same in every run.
    """
    path = Path(request.node.path).relative_to(request.config.rootpath)
    test = f"{path}::{request.node.name.partition('[')[0]}"

    def record(section: str, case: str, result: str, measured: bool = False) -> None:
        temporary = re.compile(re.escape(str(request.config._tmp_path_factory.getbasetemp())) + r"/[^/\s]+")
        parts = [temporary.sub("...", text) for text in (case, result)]
        request.config.stash[RECORDER].record(test, section, *parts, measured=measured)

    return record
