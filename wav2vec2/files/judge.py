"""Judges what strangers wrote: a file of ``torch.save`` before it is unpickled, and the contents of any file.

After that, walking, showing, comparing or copying the contents takes no more than the size of the file promises. The
sizes of storages and offsets in them are torch's to check; keys made to collide are not looked for.
"""

import pickletools
import struct
import zipfile
from collections.abc import Collection
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import IO, Any, TypeVar

from .errors import UserError, short_repr, single_line

_MOST_ITEMS = 2**20  # a shared list counts wherever it stands; training checkpoints have some thousands
_MOST_LEVELS = 64
_MOST_COPIES = 8  # bytes of tensors for a byte of the file: tied weights, and averages that are the weights themselves
# How many values these operations take from the stack; the others of their kind take all down to a mark.
_TAKEN = {"APPEND": 1, "SETITEM": 2, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "BUILD": 1, "REDUCE": 2, "NEWOBJ": 2}

T = TypeVar("T")


class Inert:
    """Stands for a foreign class or function: keeps the pickled state and ignores arguments.

    The state of ``argparse.Namespace`` is its attributes. omegaconf's DictConfig and ListConfig have a dict or list of
    nodes under ``_content``, and its value nodes have their value under ``_val``.
    """

    state: Any = None

    def __init__(self, *_arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    @property
    def settings(self) -> Any:
        """Its contents, or itself if that has no names."""
        state = self.state
        return state.get("_content", state.get("_val", state)) if isinstance(state, dict) else self


def check_torch_file(path: Path, names: Collection[str]) -> None:
    """Check a file of ``torch.save`` before torch reads it; its pickles may ask for nothing but ``names``.

    Raises:
        ValueError: it is damaged, or made to take more memory than it has bytes.
        UserError: it asks for another name.
    """
    with path.open("rb") as file:
        if file.read(4) == b"PK\3\4":  # by which torch tells a zip
            return _check_pickle(BytesIO(_checked_archive(file)), path, names)
        file.seek(0)
        for _ in range(5):  # of the older format: two numbers, the machine, the contents, the names of storages
            _check_pickle(file, path, names)


def _checked_archive(file: IO[bytes]) -> bytes:
    """Return the pickle in a zip in which all programs find the same records, each held to its checksum."""
    with zipfile.ZipFile(file) as archive:
        num_bytes = file.seek(0, 2)
        file.seek(max(num_bytes - 98, 0))
        tail = file.read().rjust(98)
        end, (size, start) = num_bytes - 22, struct.unpack("<II", tail[-10:-2])
        is_last = tail[-22:-18] == b"PK\5\6"
        if tail[-42:-38] == b"PK\6\7":  # torch adds an end record for large files, and one that says where that is
            end, (size, start) = num_bytes - 98, struct.unpack("<QQ", tail[-58:-42])
            is_last &= tail[:4] == b"PK\6\6" and tail[-34:-26] == struct.pack("<Q", end)
        if not is_last or start + size != end:
            raise ValueError("its directory is not where its end says")
        records = archive.infolist()
        if len({record.filename for record in records if record.filename == record.orig_filename}) < len(records):
            raise ValueError("two of its records have one name")
        if any(record.compress_type or record.compress_size != record.file_size for record in records):
            raise ValueError("its records are compressed, which torch.save does not do")
        if sum(record.file_size for record in records) > num_bytes:
            raise ValueError("its records claim to be larger than the file")
        damaged = archive.testzip()
        if damaged and archive.getinfo(damaged).CRC:  # 0 where torch was told to write no checksums
            raise ValueError(f"the checksum of {damaged} is wrong")
        pickle = archive.getinfo(
            records[0].filename.partition("/")[0] + "/data.pkl"
        )  # of the first folder, as in torch
        file.seek(pickle.header_offset + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), 1)  # its name and extra field
        return file.read(pickle.file_size)


def _check_pickle(file: IO[bytes], source: Path, names: Collection[str]) -> None:
    """Follow a pickle without making anything of it: what it names, and how much its calls would copy.

    Operations that are not here push a value, or torch's unpickler does not know them.
    """
    stack: list[Any] = []  # names as bytes, dicts as lists
    marked: list[list[Any]] = []
    memo: dict[Any, Any] = {}
    num_copied = 0
    argument: Any
    position: Any
    for number, (operation, argument, position) in enumerate(pickletools.genops(file)):
        name = operation.name
        taken: tuple[Any, ...] = ()
        if name in _TAKEN:
            taken = tuple(stack.pop() for _ in range(_TAKEN[name]))[::-1]
        elif name in ("APPENDS", "SETITEMS", "TUPLE"):
            taken, stack = tuple(stack), marked.pop()
        if name.endswith("PUT"):
            memo[argument] = stack[-1]
        elif name.endswith("GET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marked.append(stack)
            stack = []
        elif name.startswith(("APPEND", "SETITEM")):
            stack[-1].extend(taken)
            if name.startswith("SETITEM") and any(isinstance(key, tuple) for key in taken[::2]):
                raise ValueError("a tuple as a key, whose hash can take for ever")
        elif name.startswith(("EMPTY", "TUPLE")):
            stack.append(taken if "TUPLE" in name else [])
        elif name in ("REDUCE", "NEWOBJ", "BUILD"):
            if name != "BUILD":
                function, taken = taken
                if function == b"_codecs encode" and taken[1:] != ("latin1",):  # with which NumPy's bytes are written
                    raise ValueError("it encodes a text")
                stack.append([])
            num_copied += sum(len(x) for x in taken if isinstance(x, (str, list, tuple)))
        elif name == "GLOBAL":
            if (asked := argument.replace(" ", ".")) not in names:
                raise UserError(
                    f"{source}: the file asks for {single_line(asked, 80)}, which is not among the names that a "
                    "checkpoint needs; it was not read, and nothing in it was run; get the file from its publisher"
                )
            stack.append(argument.encode())
        elif name not in ("PROTO", "BINPERSID"):
            stack.append(argument)
        if number > _MOST_ITEMS or num_copied > position:
            raise ValueError("it would make more than it holds")


def judged(contents: T, source: str | PathLike) -> T:
    """Return the contents of the file ``source`` if they are plain and no larger than the file lets expect.

    Raises:
        UserError: they are not.
    """
    waiting: list[tuple[Any, Any, int]] = [("it", contents, 0)]
    num_items, num_bytes, most_bytes = 0, 0, _MOST_COPIES * Path(source).stat().st_size
    try:
        while waiting:
            name, value, level = waiting.pop()
            value = value.settings if isinstance(value, Inert) else value
            if isinstance(value, (dict, list, tuple)):
                if attributes := getattr(value, "__dict__", {}).keys() - {"_metadata"}:  # they would hide methods
                    raise ValueError(f"it holds a dict with attributes {short_repr([*attributes])}")
                num_items += len(value)
                items = value.items() if isinstance(value, dict) else enumerate(value)
                waiting += [(key, x, level + 1) for key, x in items if not _is_plain(x)]
            else:
                num_bytes += _num_bytes(value, name)
            if level > _MOST_LEVELS or num_items > _MOST_ITEMS or num_bytes > most_bytes:
                most = f"{_MOST_LEVELS} levels, {_MOST_ITEMS:,} entries and {_MOST_COPIES} times the file's bytes"
                raise ValueError(f"its lists and tensors claim more than {most}")
    except ValueError as error:
        raise UserError(f"{source}: {error}; damaged or made to do harm; make or download it again") from error
    return contents


def _is_plain(value: Any) -> bool:
    return type(value) in (str, bytes, bool, float, type(None)) or (type(value) is int and value.bit_length() < 1024)


def _num_bytes(value: Any, name: Any) -> int:
    """Return the bytes of a tensor, all of which are stored; 0 for what is none."""
    import torch  # here, because JSON is read without it

    if type(value) is int and not _is_plain(value):
        raise ValueError(f"{short_repr(name)} is {short_repr(value)}, expected one that can be made a float")
    if not isinstance(value, torch.Tensor):
        return 0
    if value.nbytes > value.untyped_storage().nbytes():  # strides of 0: a few bytes can claim any shape
        raise ValueError(f"{name} has shape {list(value.shape)}, more than the numbers stored for it")
    if value.ndim > 8:  # torch refuses to compute with 65
        raise ValueError(f"{name} has {value.ndim} dimensions, expected at most 8")
    return value.nbytes
