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


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _is_price(value: Any) -> bool:
    """Return whether a value has rising sizes for rows and columns of times."""
    try:
        rows, columns = value["sizes"]
        times = [time for row in value["microseconds"] for time in row]
        counts = [len(row) for row in value["microseconds"]]
        rises = all(low < high for grid in (rows, columns) for low, high in pairwise(grid))
        are_right = all(map(_is_count, (*rows, *columns))) and all(map(_is_time, times))
        return rises and are_right and bool(times) and counts == [len(columns)] * len(rows)
    except (TypeError, ValueError, KeyError):
        return False


_PRICE = "two lists of rising sizes, and microseconds for each pair", _is_price
# What is expected of each entry.
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "made_by": ("an object that names the device", lambda x: isinstance(x, dict) and isinstance(x.get("device"), str)),
    "backend": ("torch or onnx", lambda x: x in ("torch", "onnx")),
    "device": ("cpu or cuda", lambda x: x in ("cpu", "cuda")),
    "precision": ("32, 16 or bf16", lambda x: x in ("32", "16", "bf16")),
    "threads": ("a whole number above 0", _is_count),
    "batch": ("a whole number above 0", _is_count),
    "multiple": ("a whole number above 0, or no entry", lambda x: x is None or _is_count(x)),
    "seconds": ("a number above 0", lambda x: _is_time(x) and x > 0),
    "prices": ("an object with an entry for each operation", lambda x: isinstance(x, dict) and bool(x)),
}


def _checked(contents: Any, source: str) -> dict[str, Any]:
    found = contents.get("format") if isinstance(contents, dict) else None
    if type(found) is not int:
        found = short_repr(sorted(contents) if isinstance(contents, dict) else contents)
        raise UserError(f"{source}: not a profile of a machine: expected 'format' and others, found {found}; {_ADVICE}")
    if found != FORMAT:
        advice = "update this program if a newer version wrote it, or"
        raise UserError(f"{source}: a profile of format {short_repr(found)}, expected {FORMAT}; {advice} {_ADVICE}")
    entries = [(name, contents.get(name), *rule) for name, rule in _RULES.items()]
    if isinstance(contents.get("prices"), dict):
        entries += [(f"prices of {short_repr(key)}", price, *_PRICE) for key, price in contents["prices"].items()]
    for name, value, expected, is_right in entries:
        if not is_right(value):
            raise UserError(f"{source}: {name}: expected {expected}, found {short_repr(value)}; {_ADVICE}")
    return contents
