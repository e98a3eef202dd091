"""Reading a manifest: what is tolerated, and the error of everything else."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from dataset.manifest import read_manifest
from wav2vec2.files.errors import UserError


@pytest.mark.parametrize(
    ("contents", "root", "rows"),
    [
        (b"/root\na.flac\t5\n\nb.flac\t6\n  \n\n", "/root", {"a.flac": 5, "b.flac": 6}),
        (b"/some/root\r\na/b c.flac\t16000\r\n\r\n", "/some/root", {"a/b c.flac": 16000}),
        ("\ufeff/root\nä/ö\u2028x\ty 馬.wav\t7".encode(), "/root", {"ä/ö\u2028x\ty 馬.wav": 7}),
        (b"/root\n\xe9.wav\t5\n", "/root", {"\udce9.wav": 5}),  # not UTF-8
        (b"/root\n .flac\t5\n../a.flac\t6\n", "/root", {" .flac": 5, "../a.flac": 6}),
    ],
    ids=["blank lines", "Windows line ends", "byte order mark, no line end", "not UTF-8", "odd paths"],
)
def test_manifest_is_read(tmp_path, contents, root, rows):
    path = tmp_path / "train.tsv"
    path.write_bytes(contents)
    manifest = read_manifest(path)
    assert manifest.path == path and manifest.root == Path(root)
    assert dict(zip(manifest.paths, manifest.lengths.tolist(), strict=True)) == rows
    assert manifest.full_path(0) == f"{root}/{next(iter(rows))}"
    assert [manifest.paths[index] for index in range(len(rows))] == list(rows) and len(manifest.paths) == len(rows)
    assert manifest.paths[-1] == list(rows)[-1]
    assert manifest.lengths.dtype == np.int64


def test_a_long_path_costs_itself(tmp_path):
    """Memory is that of the paths' bytes, and of a few objects that loader processes share."""
    names = [f"train/{number}.flac" for number in range(20_000)]
    names.insert(7, "ä" * 1500 + ".flac")
    (tmp_path / "train.tsv").write_text("/root\n" + "".join(f"{name}\t5\n" for name in names), encoding="utf-8")
    manifest = read_manifest(tmp_path / "train.tsv")
    assert list(manifest.paths) == names
    assert len(pickle.dumps(manifest)) < 1_000_000
    assert list(pickle.loads(pickle.dumps(manifest)).paths) == names
    # Of a list of str, each loader process would come to hold a copy.
    assert all(isinstance(part, (bytes, np.ndarray)) for part in vars(manifest.paths).values())


def test_absolute_path_needs_no_root(tmp_path):
    (tmp_path / "train.tsv").write_text("/root\n/elsewhere/a.flac\t5\n")
    assert read_manifest(tmp_path / "train.tsv").full_path(0) == "/elsewhere/a.flac"


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b"", ["line 1 is ''", "folder"]),
        (b"\n", ["line 1"]),
        (b"a.flac\t100\n", ["line 1 is 'a.flac\\t100'", "folder"]),
        (b"/root\n\n", ["no utterance"]),
        (b"/root\na.flac\t100\nb.flac 100\n", ["line 3", "'b.flac 100", "a tab"]),
        (b"/root\n\nb.flac\tmany\n", ["line 3", "many"]),
        (b"/root\nb.flac\t0\n", ["line 2", "positive"]),
        (b"/root\nb.flac\t-5\n", ["line 2"]),
        (b"/root\nb.flac\t1.5\n", ["line 2"]),
        (b"/root\nb.flac\t" + b"9" * 30 + b"\n", ["line 2"]),
        (b"/root\n\t100\n", ["line 2"]),
        (b"/root\na.flac\t5\n\nb.flac\t5\na.flac\t6\n", ["line 5 lists 'a.flac', which line 2 does"]),
        (bytes(range(256)) * 1000, ["line 1"]),
        ("/root\na.flac\t5\n".encode("utf-16"), ["line 2"]),
    ],
)
def test_bad_manifest_is_one_line_with_file_and_line(tmp_path, contents, words):
    path = tmp_path / "train.tsv"
    path.write_bytes(contents)
    with pytest.raises(UserError) as error:
        read_manifest(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and all(word in message for word in words)
    assert "\n" not in message and len(message) < len(str(path)) + 300


def test_manifest_that_is_no_file(tmp_path):
    (tmp_path / "train100.tsv").touch()
    (tmp_path / "data").mkdir()
    for name, found in (("train.tsv", "no such file"), ("data", "is a folder")):
        with pytest.raises(UserError, match=rf"{name}: {found}, expected a manifest .*train100"):
            read_manifest(tmp_path / name)
