"""Writes files whole or not at all; reads JSON and safetensors of others and reports defects as UserError."""

import errno
import json
import os
import re
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError, one_line
from .judge import judged

if TYPE_CHECKING:
    from torch import Tensor

# Far above any settings file of a model.
_MAX_JSON_BYTES = 2**26
# Where numbers of processes are unique: this machine, or this container.
_PROCESSES = "/proc/self/ns/pid"
_MACHINE = zlib.crc32(f"{os.uname().nodename} {os.path.exists(_PROCESSES) and os.readlink(_PROCESSES)}".encode())


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary name that becomes ``path`` if the block makes a file or a folder there and succeeds.

    Any earlier file stays until then; if the block fails, nothing is left. A device or a pipe is not replaced: it is
    written to.

    Raises:
        UserError: ``path`` cannot be written.
    """
    path = Path(path)
    stream = _stream(path)
    with _one_line(path), _beside(path if stream is None else Path(tempfile.gettempdir(), path.name)) as temporary:
        yield temporary
        if stream is not None:
            print(end="", flush=True)  # what was printed before comes first
            with temporary.open("rb") as file, open(stream, "ab", closefd=isinstance(stream, Path)) as out:
                shutil.copyfileobj(file, out)
            return
        if temporary.is_file():
            # The name must not reach the disk before the contents do, or a crash of the machine leaves an empty file.
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)


def check_writable(path: Path) -> None:
    """Try the place of a file before the work for it: write, rename and remove a small one there.

    Raises:
        UserError: it cannot be written.
    """
    stream = _stream(path)
    if isinstance(stream, int) or (stream is not None and os.access(stream, os.W_OK)):
        return
    first = path  # what does not exist yet: folders are not made before there is something to keep in them
    while not os.path.lexists(first.parent):
        first = first.parent
    with _one_line(path), _beside(first) as temporary:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        temporary.write_bytes(b"tried")
        temporary.replace(renamed := temporary.parent.with_suffix(".tried"))
        renamed.unlink()


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yield the name of ``path`` in a temporary folder beside it; those that killed processes left are removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    start = f".{path.name[:50]}."
    for old in _left_in(path.parent.absolute()):
        if old.name.startswith(start) and _is_abandoned(old):
            shutil.rmtree(old, ignore_errors=True)
    start += f"{_MACHINE}-{os.getpid()}-"
    with tempfile.TemporaryDirectory(".tmp", start, path.parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder, path.name)


@cache
def _left_in(folder: Path) -> list[Path]:
    """List temporary folders; once, as a folder of results may have very many files."""
    return list(folder.glob(".*.tmp"))


def _is_abandoned(folder: Path) -> bool:
    """Return True if the process that made a temporary folder is gone; of another machine, if a day has passed."""
    # No lock tells: some file systems have none, and on others a lock keeps even its own process from writing.
    found = re.search(r"\.(\d+)-(\d+)-\w{8}\.tmp$", folder.name)
    try:
        if found and int(found[1]) == _MACHINE:
            os.kill(int(found[2]), 0)
            return False
        return found is not None and time.time() - folder.stat().st_mtime > 24 * 3600
    except OSError as error:
        return isinstance(error, ProcessLookupError)


def _stream(path: Path) -> int | Path | None:
    """Return a device or a pipe, the descriptor of this process's own output, or None for all else."""
    with suppress(OSError):
        found = path.stat()
        for descriptor in (1, 2, *([int(path.name)] if path.name.isdecimal() else [])):  # /dev/fd/3
            if os.path.samestat(found, os.fstat(descriptor)):
                return descriptor
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            return path
    return None


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turn an error of the disk, which torch's and safetensors' writers wrap in others, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: Any = error
        while cause is not None and not isinstance(cause, OSError) and "(os error " not in str(cause):
            cause = cause.__context__
        if cause is None:
            raise
        reason = one_line(cause)
        is_full = re.search(r"No space|quota exceeded|too large|requested and", reason)  # the last is numpy's
        advice = "make room" if is_full else "mend that, or give another place"
        raise UserError(f"{path}: could not be written ({reason}); {advice}") from error


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
        contents = json.loads(path.read_text(encoding="utf-8-sig"))
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
