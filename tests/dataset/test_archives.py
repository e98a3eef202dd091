"""Audio in archives: listed, read, trained on and rejected as files are."""

import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import last_checkpoint, run_script, run_to_exit, small_run

from dataset.archives import members
from dataset.corpus import find_audio
from wav2vec2.audio import AudioError, read_audio

FILES = {"a/x.bin": b"hello" * 1000, "b.bin": bytes(range(256)) * 13, f"\xe4/{'n' * 150}.bin": b"z"}


def write_tar(path: Path, files: Path, mode: str = "w", format: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, mode, format=format) as archive:
        for file in sorted(files.rglob("*")):
            archive.add(file, str(file.relative_to(files)), recursive=False)


def write_zip(path: Path, files: Path, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(files.rglob("*")):
            archive.write(file, file.relative_to(files))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, contents in FILES.items():
        path = tmp_path / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
    return tmp_path / "files"


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("pax.tar", write_tar),
        ("gnu.tar", lambda path, files: write_tar(path, files, format=tarfile.GNU_FORMAT)),
        ("stored.ZIP", write_zip),
    ],
)
def test_members_lie_where_they_are_said_to(
    name: str, write: Callable[[Path, Path], None], files: Path, tmp_path: Path
):
    write(tmp_path / name, files)
    contents = (tmp_path / name).read_bytes()
    found = {member: contents[start : start + size] for member, start, size in members(str(tmp_path / name))}
    assert found == FILES


@pytest.mark.parametrize(
    ("name", "write", "reason"),
    [
        ("a.tar", lambda path, files: write_tar(path, files, "w:gz"), "compressed"),
        ("a.zip", lambda path, files: write_zip(path, files, zipfile.ZIP_DEFLATED), "compressed or encrypted"),
        ("a.tar", lambda path, files: path.touch(), "damaged"),
        ("a.zip", lambda path, files: path.write_bytes(b"PK\3\4" * 99), "damaged"),
        ("a.tar", lambda path, files: (write_tar(path, files), os.truncate(path, 4000)), "damaged"),
    ],
)
def test_archives_that_cannot_be_read(name, write, reason, files, tmp_path):
    write(tmp_path / name, files)
    with pytest.raises(OSError, match=reason) as error:
        list(members(str(tmp_path / name)))
    assert len(str(error.value).splitlines()) == 1


def test_what_is_read_from_an_archive(corpus, tmp_path):
    audio = corpus / "dev-clean/1/2/1-2-0000.flac"
    write_tar(tmp_path / "shard.tar", corpus)
    places = {name: f"{tmp_path}/shard.tar:{start}:{size}" for name, start, size in members(f"{tmp_path}/shard.tar")}
    place = places["dev-clean/1/2/1-2-0000.flac"]
    assert read_audio(place).equal(read_audio(audio))
    assert read_audio(place, 500, 900).equal(read_audio(audio, 500, 900))
    for wrong, reason in (
        (f"{place}000", "has changed"),  # behind its end
        (place.replace("shard", "gone"), "no such file"),
        (f"{tmp_path}/shard.tar:512:9", "expected audio"),
    ):
        with pytest.raises(AudioError, match=reason):
            read_audio(wrong)


def test_what_an_archive_holds_beside_speech(tmp_path):
    """Hidden and systems' files, names that lead out of it, and a pipe of its name, for which nobody waits."""
    names = ["./a/b.wav", "c.WAV", "._d.wav", ".git/e.wav", "__MACOSX/f.wav", "../g.wav", "h.txt"]
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    os.mkfifo(tmp_path / "pipe.tar")
    found = find_audio(str(tmp_path))
    assert found.audio == ["x.tar/a/b.wav", "x.tar/c.WAV"] and found.places.keys() == set(found.audio)
    assert all(place.startswith("x.tar:") for place in found.places.values()) and not found.unreadable


@pytest.mark.parametrize("suffix", ["tar", "zip"])
def test_archives_that_are_damaged_anywhere(suffix, files, tmp_path):
    """Whatever the damage makes the library raise, it is the archive's error."""
    path = tmp_path / f"a.{suffix}"
    {"tar": write_tar, "zip": write_zip}[suffix](path, files)
    whole, generator = path.read_bytes(), np.random.default_rng(0)
    messages = []
    for _ in range(300):
        damaged = bytearray(whole)
        for place in generator.integers(0, len(whole), 20):
            damaged[place] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            list(members(str(path)))
        except OSError as error:
            messages.append(str(error))
    assert messages and all(len(message.splitlines()) == 1 for message in messages)


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "write"), [("tar", write_tar), ("zip", write_zip)])
def test_training_from_archives_is_training_from_files(suffix, write, corpus, small_teacher, tmp_path, monkeypatch):
    """The same splits, order, crops and weights, and the same answer to a file that cannot be read."""
    shards = tmp_path / "shards"
    for split in ("train-clean-100", "dev-clean"):
        (shards / split).mkdir(parents=True)
        write(shards / split / f"0.{suffix}", corpus / split)
    (shards / "broken.zip").write_bytes(b"no archive")
    for name, data in (("files", corpus), ("archives", shards)):
        run_script(monkeypatch, "prepare_data", "--data", data, "--out", tmp_path / name, "--num_workers", 2)
        flags = small_run(tmp_path / name, small_teacher, exp_dir=tmp_path / f"exp-{name}", num_workers=1)
        run_script(monkeypatch, "distill", *flags)
    weights = [last_checkpoint(tmp_path / f"exp-{name}")["state_dict"] for name in ("files", "archives")]
    assert weights[0].keys() == weights[1].keys() and all(weights[0][key].equal(weights[1][key]) for key in weights[0])
    rows = {name: (tmp_path / name / "train100.tsv").read_text().splitlines()[1:] for name in ("files", "archives")}
    assert [row.split("\t")[1] for row in rows["files"]] == [row.split("\t")[1] for row in rows["archives"]]
    assert all(f"0.{suffix}:" in row for row in rows["archives"])
    assert "broken.zip\ta damaged archive" in (tmp_path / "archives" / "rejected.tsv").read_text()
    (shards / "train-clean-100" / f"0.{suffix}").write_bytes(b"gone")
    assert run_to_exit(monkeypatch, "distill", *small_run(tmp_path / "archives", small_teacher)) == 1


def test_several_folders_and_archives_in_one_manifest(corpus, tmp_path, monkeypatch, capsys):
    shards = tmp_path / "mine"
    shards.mkdir()
    write_tar(shards / "a.tar", corpus / "dev-clean")
    arguments = ["--out", tmp_path / "lists", "--valid_fraction", 0.2, "--num_workers", 1]
    run_script(monkeypatch, "prepare_data", "--data", shards / "a.tar", corpus / "train-clean-100", *arguments)
    lines = capsys.readouterr().out.splitlines()
    (root, *rows), valid = (
        (tmp_path / "lists" / f"{name}.tsv").read_text().splitlines() for name in ("train", "valid")
    )
    assert Path(root) == Path(os.path.commonpath([shards, corpus / "train-clean-100"]))
    assert len(rows) + len(valid) - 1 == 20 and valid[0] == root
    for row in (*rows, *valid[1:]):
        assert read_audio(f"{root}/{row.split(chr(9))[0]}").shape == (int(row.split("\t")[1]),)
    shares = [line for line in lines if "% of all" in line]
    assert [line.split(":")[0] for line in shares] == [str(shards / "a.tar"), str(corpus / "train-clean-100")]
    for data in ([corpus, corpus / "dev-clean"], [corpus, corpus]):
        assert run_to_exit(monkeypatch, "prepare_data", "--data", *data, *arguments) == 1
        assert "is given twice, or lies in another one" in capsys.readouterr().err
