"""These tests run where they are named (``make test-slurm``), not as a part of all tests: they take minutes."""

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if any("slurm" in argument for argument in config.args) else True
