"""Files that claim much more than they hold, or other than what is checked: one line, at once; real files load."""

import _codecs
import argparse
import collections
import io
import json
import pickle
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_model, small_config

from wav2vec2.files import checkpoint
from wav2vec2.files.errors import UserError
from wav2vec2.files.storage import read_json
from wav2vec2.files.unpickling import read_torch_file, to_plain

SLOWEST = 30.0  # seconds of processor time; each would take memory or time without end


def refuse(path: Path, part: str, read: Callable[[Path], Any] = read_torch_file) -> None:
    """One line that names the file and says ``part``, at once."""
    start = time.process_time()
    with pytest.raises(UserError) as error:
        read(path)
    assert time.process_time() - start < SLOWEST
    message = str(error.value)
    assert message.startswith(f"{path}: ") and part in message and "\n" not in message, message


def model_contents() -> dict[str, Any]:
    model = random_model(small_config("hubert"))
    return {"state_dict": model.state_dict(), "config": model.config}


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments, state) if state else (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


# --- what a pickle makes -----------------------------------------------------------------------------

MANY = list(range(10_000))
NAMED = {f"name{i}": i for i in MANY}
UNKNOWN, COPIES = "not among the names", "would make more than it holds"
CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "bytearray": (lambda: Call(bytearray, 2**33), UNKNOWN),
    "set": (lambda: Call(set, MANY), UNKNOWN),
    "a tensor without numbers": (lambda: Call(torch.FloatTensor, 2**33), UNKNOWN),
    "a storage": (lambda: Call(torch.UntypedStorage, 2**33), UNKNOWN),
    "a codec": (lambda: Call(_codecs.encode, "a" * 10_000, "utf-32"), "it encodes a text"),
    "bytes": (lambda: [Call(_codecs.encode, text, "latin1") for text in ["a" * 10_000] * 100], COPIES),
    "list": (lambda: [Call(list, many) for many in [MANY] * 1000], COPIES),
    "OrderedDict": (lambda: [Call(collections.OrderedDict, named) for named in [NAMED] * 1000], COPIES),
    "Counter": (lambda: [Call(collections.Counter, named) for named in [NAMED] * 1000], COPIES),
    "torch.Size": (lambda: [Call(torch.Size, many) for many in [MANY] * 1000], COPIES),
    "attributes": (lambda: [Call(collections.OrderedDict, state=named) for named in [NAMED] * 1000], COPIES),
}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "older format"])
@pytest.mark.parametrize("case", CALLS)
def test_calls_that_make_memory_of_nothing(case: str, is_zip: bool, tmp_path: Path) -> None:
    make, part = CALLS[case]
    torch.save({**model_contents(), "x": make()}, tmp_path / "model.pth", _use_new_zipfile_serialization=is_zip)
    refuse(tmp_path / "model.pth", part)


def write_pickle(path: Path, pickled: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickled)
        archive.writestr("model/version", "3\n")


def test_pickles_that_no_pickler_writes(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    shared = b"X\x02\x00\x00\x00ha\x85q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
    write_pickle(path, b"\x80\x02}(" + shared + b"Nu.")  # nested tuples as a key: 2^60 hashes
    refuse(path, "a tuple as a key")
    write_pickle(path, b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x05sb.")
    refuse(path, "a dict with attributes ['items']")
    write_pickle(path, b"\x80\x02](" + b"N" * 2**20 + b"e.")
    refuse(path, COPIES)


def test_what_real_files_hold(tmp_path: Path) -> None:
    """NumPy's numbers and arrays, settings, tied weights, views, parameters, numbers as keys."""
    path, weight = tmp_path / "last.ckpt", torch.randn(100, 100)
    contents = {
        "numpy": [np.float64(0.5), np.bool_(True), np.arange(1000), *[np.uint8(1)] * 20],
        "weights": {"a": weight, "b": weight, "c": weight[3:7, ::2], "d": weight.t(), "e": torch.nn.Parameter(weight)},
        "milestones": collections.Counter([1, 1, 2]),
        "args": argparse.Namespace(device=torch.device("cpu"), size=torch.Size([1, 2]), betas=(0.9, 0.98)),
        "state": {0: {"step": torch.tensor(1.0)}, 1: collections.OrderedDict(a=1)},
        "dtype": torch.float16,
        "history": [0.5] * 100_000,
    }
    for is_zip in (True, False):
        torch.save(contents, path, _use_new_zipfile_serialization=is_zip)
        found = read_torch_file(path)
        assert found.keys() == contents.keys() and found["state"] == contents["state"]
        assert all(torch.equal(found["weights"][name], value) for name, value in contents["weights"].items())
        assert to_plain(found["args"], "args")["betas"] == [0.9, 0.98] and found["milestones"] == {1: 2, 2: 1}


# --- zips with more than one reading -------------------------------------------------------------------


def rewritten(whole: bytes, *others: tuple[str, bytes], **options: Any) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive, zipfile.ZipFile(buffer, "w", **options) as copy:
        for name, data in [*((name, archive.read(name)) for name in archive.namelist()), *others]:
            copy.writestr(name, data)
    return buffer.getvalue()


PLACE = "its directory is not where its end says"
ZIPS: dict[str, tuple[Callable[[bytes], bytes], str | None]] = {
    "as torch writes it": (lambda whole: whole, None),
    "without the end for large files": (lambda whole: whole[:-98] + whole[-22:], None),
    "as zipfile writes it": (rewritten, None),
    "deflated": (lambda whole: rewritten(whole, compression=zipfile.ZIP_DEFLATED), "its records are compressed"),
    "a name twice": (lambda whole: rewritten(whole, ("model/data.pkl", b"N.")), "two of its records have one name"),
    "something before": (lambda whole: b"PK\3\4" + whole, PLACE),
    "a zip before": (lambda whole: rewritten(whole) + whole, PLACE),
    "something behind": (lambda whole: whole + b"PK", PLACE),
    "a comment": (lambda whole: rewritten(whole)[:-2] + b"\2\0PK", PLACE),
    "a large end elsewhere": (lambda whole: whole[:-34] + struct.pack("<Q", 5) + whole[-26:], PLACE),
    "no large end": (lambda whole: whole[:-98] + bytes(4) + whole[-94:], "damaged, or not a checkpoint"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", ZIPS)
def test_zips_that_two_programs_read_differently(case: str, tmp_path: Path) -> None:
    path, (edit, part) = tmp_path / "model.pth", ZIPS[case]
    torch.save(model_contents(), path)
    path.write_bytes(edit(path.read_bytes()))
    if part is None:
        checkpoint.load_model(path)
    else:
        refuse(path, part)


# --- contents ------------------------------------------------------------------------------------------


def shared_lists() -> list[Any]:
    value: list[Any] = ["ha"]
    for _ in range(40):
        value = [value, value]
    return value


def shared_dicts() -> dict[str, Any]:
    value: dict[str, Any] = {"a": 1}
    for _ in range(40):
        value = {"a": value, "b": value}
    return value


def cyclic() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


CLAIM = "its lists and tensors claim more than"
CONTENTS: dict[str, tuple[Callable[[], Any], str]] = {
    "shared lists": (shared_lists, CLAIM),
    "shared dicts": (shared_dicts, CLAIM),
    "shared lists in settings": (lambda: argparse.Namespace(model=shared_lists()), CLAIM),
    "a list in itself": (cyclic, CLAIM),
    "one list, 256 times": (lambda: [MANY] * 256, CLAIM),
    "one tensor, many times": (lambda: [torch.zeros(1000)] * 1000, CLAIM),
    "strides of 0": (lambda: torch.ones(1).expand(2**40), "x has shape [1099511627776], more than the numbers stored"),
    "windows": (lambda: torch.ones(100).as_strided((50, 50), (1, 1)), "x has shape [50, 50], more than"),
    "many dimensions": (lambda: torch.ones([1] * 70), "x has 70 dimensions"),
    "a huge number": (lambda: 10**400, "'x' is <a number of over 150 digits>"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_contents_that_claim_more_than_the_file_holds(case: str, tmp_path: Path) -> None:
    make, part = CONTENTS[case]
    torch.save({**model_contents(), "x": make()}, tmp_path / "model.pth")
    refuse(tmp_path / "model.pth", part)


def test_storages_without_numbers(tmp_path: Path) -> None:
    """The older format takes memory for the size that the pickle claims, and may have nothing to fill it with."""
    path, count = tmp_path / "model.pth", b"\x8a\x08" + struct.pack("<q", 2**31)
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + count + b"NtQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + count + b"\x85K\x01\x85\x89}tR"
    head = b"".join(pickle.dumps(x, protocol=2) for x in (0x1950A86A20F9469CFC6C, 1001, {}))
    path.write_bytes(head + b"\x80\x02}X\x01\x00\x00\x00a" + tensor + b"s." + pickle.dumps([], protocol=2))
    refuse(path, CLAIM)


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for contents, part in (
        ('{"a": ' + "[" * 70 + "]" * 70 + "}", CLAIM),
        ('{"a": 1' + "0" * 400 + "}", "'a' is <a number"),
        (json.dumps({"a": [0] * (2**20 + 1)}), CLAIM),
    ):
        path.write_text(contents)
        refuse(path, part, lambda path: read_json(path, "results"))


def test_heads_in_a_config(tmp_path: Path) -> None:
    """A list of heads is refused by its length, before its numbers are looked at and copied."""
    contents = model_contents()
    contents["config"] = small_config("wavlm") | {"encoder_remaining_heads": [list(range(2**18))] * 3}
    torch.save(contents, tmp_path / "model.pth")
    refuse(tmp_path / "model.pth", "ascending indices of at most 1024 heads", checkpoint.load_model)
