"""Writes files whole or not at all; reads JSON and safetensors of others and reports defects as UserError."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError, one_line
from .judge import judged

if TYPE_CHECKING:
    from torch import Tensor

# Far above any settings file of a model.
_MAX_JSON_BYTES = 2**26


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary name beside ``path`` that becomes ``path`` if the block succeeds.

    Any earlier file stays until then; if the block fails, the temporary file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes private files; a checkpoint is shared as any output is
        # The name must not reach the disk before the contents do, or a crash of the machine leaves an empty file.
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def placeholder(path: Path) -> str | None:
    """Describe a downloaded file that only stands for the wanted one, and what to do; None for all else."""
    with path.open("rb") as file:
        head = file.read(64).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS in the place of the file; fetch the file itself: git lfs pull, or download it"
    if head.startswith((b"<!doctype html", b"<html")):
        return "a web page in the place of the file; look at it in a browser (a login, terms to accept?), then download"
    return None


def read_json(path: Path, expected: str, advice: str = "download it again") -> dict[str, Any]:
    """Read a JSON object.

    Args:
        expected: names the wanted file in the error about a missing one.
        advice: tells the user what to do about a damaged file.

    Raises:
        UserError: the file is missing, not JSON, or not an object.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected {expected}")
    try:
        if (num_bytes := path.stat().st_size) > _MAX_JSON_BYTES:
            raise ValueError(f"{num_bytes:,} bytes, expected at most {_MAX_JSON_BYTES:,}")
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = placeholder(path) or f"not readable as JSON ({one_line(error)}); {advice}"
        raise UserError(f"{path}: {reason}") from error
    if not isinstance(contents, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(contents).__name__}; {advice}")
    return judged(contents, path)


def read_safetensors(path: Path, advice: str = "download it again") -> "dict[str, Tensor]":
    """Read all tensors of a safetensors file, on the CPU.

    Raises:
        UserError: not a safetensors file, or the safetensors package is missing.
    """
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f"{path}: reading it needs the safetensors package: pip install safetensors") from error
    try:
        contents = load_file(path)
    except Exception as error:  # the file decides which
        reason = placeholder(path) or f"not readable as safetensors ({one_line(error)}); {advice}"
        raise UserError(f"{path}: {reason}") from error
    return judged(contents, path)
