"""Profiles of machines: files of benchmarks.profile, read and checked."""

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from .errors import UserError, short_repr
from .storage import read_json

FORMAT = 1
_ADVICE = "make it again: python -m benchmarks.profile --model TEACHER.pth --out FILE"


def read_profile(path: Path) -> dict[str, Any]:
    """Read a profile; returns the contents that :class:`wav2vec2.profiles.Profile` takes.

    Raises:
        UserError: the file is missing, damaged, of another kind or of a newer format.
    """
    return _checked(read_json(path, "a profile of a machine, made by python -m benchmarks.profile", _ADVICE), str(path))


def parse_profile(text: str, source: str) -> dict[str, Any]:
    """Read the contents of a profile that a checkpoint records; ``source`` names the place in errors.

    Raises:
        UserError: they are no profile's, or of a newer format.
    """
    try:
        contents = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: expected the contents of a profile, found {short_repr(text)}") from error
    return _checked(contents, source)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_price(value: Any) -> bool:
    """Return whether a value has ascending sizes for rows and columns of times."""
    if not isinstance(value, dict):
        return False
    sizes, rows = value.get("sizes"), value.get("microseconds")
    if not (isinstance(sizes, list) and len(sizes) == 2 and isinstance(rows, list)):
        return False
    for grid in sizes:
        if not (isinstance(grid, list) and grid and all(map(_is_count, grid))):
            return False
        if not all(low < high for low, high in pairwise(grid)):
            return False
    if len(rows) != len(sizes[0]) or not all(isinstance(row, list) and len(row) == len(sizes[1]) for row in rows):
        return False
    return all(_is_number(time) and time >= 0 for row in rows for time in row)


_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "made_by": (
        "an object that names the device",
        lambda value: isinstance(value, dict) and isinstance(value.get("device"), str),
    ),
    "backend": ("torch or onnx", lambda value: value in ("torch", "onnx")),
    "device": ("cpu or cuda", lambda value: value in ("cpu", "cuda")),
    "precision": ("32, 16 or bf16", lambda value: value in ("32", "16", "bf16")),
    "threads": ("a whole number from 1", _is_count),
    "batch": ("a whole number from 1", _is_count),
    "seconds": ("a number above 0", lambda value: _is_number(value) and value > 0),
    "multiple": ("a whole number from 1, or no entry", lambda value: value is None or _is_count(value)),
    "prices": ("an object with an entry for each operation", lambda value: isinstance(value, dict) and bool(value)),
}


def _checked(contents: Any, source: str) -> dict[str, Any]:
    found = contents.get("format") if isinstance(contents, dict) else None
    if found is None:
        shown = short_repr(sorted(contents) if isinstance(contents, dict) else contents)
        raise UserError(f"{source}: not a profile of a machine: expected an entry 'format', found {shown}; {_ADVICE}")
    if found != FORMAT or type(found) is not int:
        raise UserError(
            f"{source}: a profile of format {short_repr(found)}, expected {FORMAT}; update this program if a newer "
            f"one wrote it, or {_ADVICE}"
        )

    def check(name: str, value: Any, expected: str, is_right: Callable[[Any], bool]) -> None:
        if not is_right(value):
            raise UserError(f"{source}: {name}: expected {expected}, found {short_repr(value)}; {_ADVICE}")

    for name, (expected, is_right) in _RULES.items():
        check(name, contents.get(name), expected, is_right)
    for key, price in contents["prices"].items():
        wanted = "two lists of rising sizes, and a row of microseconds for each of the first"
        check(f"prices of {short_repr(key)}", price, wanted, _is_price)
    return contents
