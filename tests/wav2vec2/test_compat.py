"""What PyTorch 2.0 does otherwise, tested with whichever version is installed."""

import io
import pickle
import tarfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from wav2vec2 import checkpoint, compat
from wav2vec2.errors import UserError
from wav2vec2.utils import archive


def tar_with_pickles_first(path: Path) -> None:
    """A tar archive whose first member's name is a row of pickles: what is looked at first passes."""
    pickles = b"".join(pickle.dumps(number, protocol=2) for number in range(5))
    with tarfile.open(path, "w") as file:
        member = tarfile.TarInfo("x" * len(pickles))
        member.size = 3
        file.addfile(member, io.BytesIO(b"abc"))
    data = bytearray(path.read_bytes())
    data[: len(pickles)] = pickles
    checksum = sum(data[:148]) + sum(data[156:512]) + 8 * ord(" ")
    data[148:156] = b"%06o\0 " % checksum
    path.write_bytes(data)
    assert tarfile.is_tarfile(path)


@pytest.fixture
def reader_of_torch(monkeypatch) -> list[str]:
    """The paths that torch.load is called with; it reads everything, as an old version may."""
    reached = []
    monkeypatch.setattr(torch, "load", lambda path, **options: reached.append(path))
    return reached


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit itself
@pytest.mark.parametrize("kind", ["tar", "TorchScript"])
def test_archives_that_older_torch_reads_by_other_means(kind, tmp_path, reader_of_torch):
    path = tmp_path / "model.pth"
    if kind == "tar":
        tar_with_pickles_first(path)
    else:
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(UserError, match=rf"model\.pth: not a checkpoint that can be read safely \(a {kind} archive"):
        checkpoint.read(path)
    assert not reader_of_torch


def test_older_format_is_no_tar(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"weight": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(checkpoint.read(path)["weight"], torch.ones(3))


def test_foreign_names_with_older_torch(tmp_path, monkeypatch):
    """Our own files need no further names; foreign ones are refused with what to do instead."""
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.ones(3)}, path)
    monkeypatch.setattr(compat, "_UNPICKLER_TAKES_NAMES", False)
    assert archive.read_archive(path).keys() == {"weight"}
    with pytest.raises(UserError, match=r"convert them with 2\.6 or newer"):
        archive.read_archive(path, [(dict, "builtins.dict")])


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        (nullcontext(), None),
        (torch.autocast("cpu", dtype=torch.bfloat16), torch.bfloat16),
        (torch.autocast("cpu", enabled=False), None),
    ],
)
def test_autocast_dtype(context, expected):
    with context:
        assert compat.autocast_dtype("cpu") == expected


def test_is_compiling():
    assert compat.is_compiling() is False
