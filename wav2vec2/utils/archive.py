"""Reads files that ``torch.save`` wrote, without running code from them.

The reading is torch's own ``weights_only`` unpickler. It interprets a small set of pickle operations itself and calls
nothing but an allow-list of names. Checked here before it starts is what it does not look at: the checksums of the
records, whether they are what the file has room for, and nesting that would never end; and that the file is no
TorchScript or tar archive, which PyTorch before 2.6 reads by other means.
"""

import pickletools
import re
import tarfile
import warnings
import zipfile
from collections.abc import Sequence
from io import BufferedReader
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..compat import unpickling_also
from ..errors import UserError, single_line

_CHUNK = 2**20  # bytes
_ZIP = b"PK\x03\x04"
_OLDER_FORMAT_PICKLES = 5  # magic number, version, system, contents, names of the tensors' memory
_LARGEST_TUPLE = 20_000
_MARK = object()


class _Name(str):
    """A name that a pickle asks for, with a dot."""


class _Made(str):
    """What a call of this name gives."""


class UnreadableFileError(Exception):
    """A file that was not read; the message is the reason.

    Attributes:
        forbidden_name: the name outside the allow-list that the file asked for, or None.
    """

    def __init__(self, reason: str, forbidden_name: str | None = None) -> None:
        super().__init__(reason)
        self.forbidden_name = forbidden_name


def read_archive(path: str | PathLike, more_names: Sequence[tuple[Any, str]] = ()) -> Any:
    """Read a file written by ``torch.save`` (zip or the older format); tensors are put on the CPU.

    Args:
        path: the file.
        more_names: (object, dotted name) pairs that the file may ask for beyond torch's own list.

    Raises:
        UserError: there is no such file.
        UnreadableFileError: the file is damaged, not torch's, or asks for a name outside the allow-list.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of a checkpoint")
    with_more_names = unpickling_also(more_names)
    try:
        with path.open("rb") as file:
            if file.read(len(_ZIP)) == _ZIP:  # how torch tells its two formats apart
                _check_records(file, path.stat().st_size)
            else:
                file.seek(0)
                _check_older_format(file)
                if tarfile.is_tarfile(path):  # begins with pickles all the same
                    raise ValueError("a tar archive, which torch.save has not written since 2017")
        with with_more_names, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the file decides which operation fails, and so which of many exceptions is raised
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name:
            forbidden = single_line(name[1], 80)
            raise UnreadableFileError(f"it asks for {forbidden}", forbidden) from error
        described = re.search(r"WeightsUnpickler error: (.+)", str(error)) or re.search(r"(.+)", str(error))
        raise UnreadableFileError(single_line(described[1]) if described else type(error).__name__) from error


def _check_records(file: BinaryIO, size: int) -> None:
    """Compare every record of a zip archive with its checksum, which torch does not, and all of them with the file.

    Raises:
        ValueError, zipfile.BadZipFile: a record is damaged, or claims more than the file holds.
    """
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(record.filename.split("/", 1)[-1] == "constants.pkl" for record in records):
            raise ValueError("a TorchScript archive")
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("its records are compressed, which torch.save never does")
        if sum(record.file_size for record in records) > size:
            raise ValueError("its records claim to be larger than the file")
        for record in records:
            with archive.open(record) as contents:
                if record.CRC == 0:  # of an empty record, or torch was told to write no checksums
                    contents._expected_crc = None
                if record.filename.endswith("data.pkl"):
                    _check_pickle(contents)
                while contents.read(_CHUNK):
                    pass


def _check_older_format(file: BufferedReader) -> None:
    """Check the pickles that a file in torch's older format begins with; the bytes of its tensors follow them."""
    for _ in range(_OLDER_FORMAT_PICKLES):
        if not file.peek(1):  # torch will say what is missing
            return
        _check_pickle(file)


def _check_pickle(file: BinaryIO) -> None:
    """Follow a pickle's operations as far as they make tuples and calls, without making anything.

    A tuple that holds another twice, and so on, takes a few bytes a level, but its hash takes twice the time each
    level, and the hash of a very deep one overflows the stack. What torch says of a call of something that is no
    name, it says with the text of that thing, which may be as long.

    Raises:
        ValueError: such a tuple or call, or the pickle is damaged.
    """
    stack: list[Any] = []  # the size of each value with all that is in it, or what stands for a name or a mark
    memo: dict[int, Any] = {}

    def pop_to_mark() -> list[Any]:
        items = []
        while (item := stack.pop()) is not _MARK:
            items.append(item)
        return items

    for operation, argument, _ in pickletools.genops(file):
        match operation.name:
            case "MARK":
                stack.append(_MARK)
            case "GLOBAL":
                if argument.partition(" ")[2] == "bytearray":  # of any length, made of a number
                    raise ValueError("GLOBAL builtins.bytearray has no place in a checkpoint")
                stack.append(_Name(argument.replace(" ", ".")))
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = operation.name[5:]
                items = [stack.pop() for _ in range(int(count))] if count else pop_to_mark()
                stack.append(1 + sum(item if isinstance(item, int) else 1 for item in items))
                if stack[-1] > _LARGEST_TUPLE:
                    raise ValueError(f"a tuple in it is nested to more than {_LARGEST_TUPLE} entries")
            case "REDUCE" | "NEWOBJ":
                stack.pop()
                called = stack.pop()
                if isinstance(called, _Made):  # nothing that is allowed makes something to call
                    raise ValueError(f"it calls what GLOBAL {called} made")
                if not isinstance(called, _Name):
                    raise ValueError("it calls something that is not a name")
                stack.append(_Made(called))
            case "BUILD" | "APPEND":
                stack.pop()
            case "SETITEM":
                del stack[-2:]
            case "APPENDS" | "SETITEMS" | "ADDITEMS":
                pop_to_mark()
            case "BINPERSID":
                stack[-1] = 1
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "PROTO" | "STOP":
                pass
            case _:  # a plain value, or an operation that torch refuses when it comes to it
                stack.append(1)
