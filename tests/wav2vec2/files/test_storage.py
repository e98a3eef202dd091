"""Files that are written whole or not at all, in places of all kinds."""

import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import REPOSITORY
from safetensors.torch import save_file

from wav2vec2.files import checkpoint
from wav2vec2.files.errors import UserError
from wav2vec2.files.storage import atomic_path, check_writable


def write(path: Path, text: str = "new") -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def start(path: Path, then: str) -> subprocess.Popen:
    """Start a process that writes half of a file, says so, and goes on with ``then``."""
    code = (
        "import os, sys\nfrom wav2vec2.files.storage import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        f"    temporary.write_text('half')\n    print('half', flush=True)\n    {then}\n"
    )
    command = [sys.executable, "-c", code, path]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY)
    assert process.stdout is not None and process.stdout.readline() == b"half\n"
    return process


def test_interrupted_block_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_bytes(b"half")
        assert not path.exists()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_permissions_are_those_of_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared checkpoint can be read by others, as the umask says; file systems may refuse to change that."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Operation not permitted")

    for name in ("chmod", "fchmod", "lchmod"):
        monkeypatch.setattr(os, name, refuse, raising=False)
    before = os.umask(0o027)
    try:
        checkpoint.save(tmp_path / "model.pth", {})
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.pth").stat().st_mode) == 0o640


# --- no room

_NUMBERS = torch.zeros(100_000)
WRITERS: dict[str, Callable[[Path], object]] = {
    "torch": lambda path: torch.save({"a": _NUMBERS}, path.open("wb")),
    "safetensors": lambda path: save_file({"a": _NUMBERS}, path),
    "numpy": lambda path: np.save(path.open("wb"), _NUMBERS.numpy()),
    "text": lambda path: path.write_text("a" * 400_000),
}


@pytest.fixture
def small_disk() -> Iterator[None]:
    """As on a full disk, writing more than this to one file fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("writer", WRITERS)
def test_no_room(tmp_path: Path, small_disk: None, writer: str) -> None:
    """Whoever writes, the error names the file and the reason in one line, and nothing changes."""
    path = tmp_path / "result"
    write(path, "old")
    with pytest.raises(UserError) as caught, atomic_path(path) as temporary:
        WRITERS[writer](temporary)
    message = str(caught.value)
    assert message.startswith(f"{path}: could not be written (") and message.endswith("; make room")
    assert "\n" not in message and path.read_text() == "old" and os.listdir(tmp_path) == ["result"]


def test_a_defect_is_not_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "result"):
        raise ZeroDivisionError


# --- places


@pytest.mark.parametrize("place", ["file/x.json", "file/below/x.json", "folder", "link/x.json", "/proc/x.json"])
def test_a_place_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    """It is known before the work, and said so."""
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    for attempt in (check_writable, write):
        with pytest.raises(UserError) as caught:
            attempt(tmp_path / place)
        assert str(caught.value).startswith(f"{tmp_path / place}: ") and "give another place" in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("place", ["é" * 127, "new/folder/x.json"])
def test_a_place_that_can_be_written(tmp_path: Path, place: str) -> None:
    """Trying it changes nothing; the longest name is one, too."""
    path = tmp_path / place
    check_writable(path)
    assert not os.listdir(tmp_path)
    for _ in range(2):
        write(path)
        check_writable(path)
        assert path.read_text() == "new" and os.listdir(path.parent) == [path.name]


def test_a_folder_takes_the_place_of_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "export"
    path.mkdir()
    with atomic_path(path) as folder:
        folder.mkdir()
        (folder / "file").touch()
    assert os.listdir(tmp_path) == ["export"] and os.listdir(path) == ["file"]
    with (
        pytest.raises(UserError, match=r"could not be written .*not empty.* or give another place"),
        atomic_path(path) as folder,
    ):
        folder.mkdir()
    assert os.listdir(tmp_path) == ["export"] and os.listdir(path) == ["file"]


def test_a_device_and_a_pipe_are_written_to(tmp_path: Path) -> None:
    """They stay what they are, and so does a file that is this process's output."""
    pipe, null = tmp_path / "pipe", Path("/dev/null")
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) as reader:
        for path in (pipe, null):
            check_writable(path)
            write(path)
        assert reader.communicate()[0] == b"new"
    assert pipe.is_fifo() and null.is_char_device()
    code = (
        "import sys\nfrom pathlib import Path\nfrom wav2vec2.files.storage import atomic_path, check_writable\n"
        "print('before')\ncheck_writable(Path(sys.argv[1]))\n"
        "with atomic_path(sys.argv[1]) as temporary:\n    temporary.write_text('result\\n')\nprint('behind')\n"
    )
    for name in ("/dev/stdout", "/dev/fd/1", "/dev/fd/3"):
        command = ["bash", "-c", 'exec "$@" 3>&1', "", sys.executable, "-c", code, name]
        with (tmp_path / "output").open("w") as output:
            subprocess.run(command, stdout=output, cwd=REPOSITORY, check=True)
        assert (tmp_path / "output").read_text() == "before\nresult\nbehind\n"
    with pytest.raises(UserError, match=r"/dev/full: could not be written \(.*No space left.*make room"):
        write(Path("/dev/full"))


# --- what killed processes leave


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """When its file is written again, and that of a living process stays."""
    path, other = tmp_path / "last.ckpt", tmp_path / "other"
    write(other)
    living = start(path, "sys.stdin.read()")
    for signum in (signal.SIGKILL, signal.SIGTERM):
        killed = start(path, f"os.kill(os.getpid(), {int(signum)})")
        assert killed.wait() == -signum
        assert len(os.listdir(tmp_path)) == 3  # the one that was left before is gone
    code = "import sys\nfrom wav2vec2.files.storage import check_writable\nfrom pathlib import Path\n"
    for name, left in (("unlike", 3), ("last.ckpt", 2)):
        command = [sys.executable, "-c", f"{code}check_writable(Path(sys.argv[1]))", tmp_path / name]
        subprocess.run(command, cwd=REPOSITORY, check=True)
        assert len(os.listdir(tmp_path)) == left
    living.communicate()
    assert living.returncode == 0 and path.read_text() == "half"
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "other"]


def test_what_another_machine_left(tmp_path: Path) -> None:
    """It cannot be asked whether its process lives: what has been still for a day is removed."""
    old, new = (tmp_path / f".last.ckpt.1234567-{number}-abcdefgh.tmp" for number in (1, 2))
    for folder in (old, new):
        folder.mkdir()
        (folder / "last.ckpt").write_text("half")
    os.utime(old, (0, 0))
    write(tmp_path / "last.ckpt")
    assert sorted(os.listdir(tmp_path)) == [new.name, "last.ckpt"]
