"""Profiles of machines."""

import json
from pathlib import Path
from typing import Any

from .errors import UserError
from .storage import read_json


def read_profile(path: Path) -> dict[str, Any]:
    """Read a profile."""
    return read_json(path, "a profile of benchmarks.profile")


def parse_profile(text: str, source: str) -> dict[str, Any]:
    """Read the contents of a profile that a checkpoint records."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
