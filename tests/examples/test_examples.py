"""The examples on generated audio: features on disk."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers import error_line, run_script, run_to_exit

import wav2vec2
from examples import extract_features
from wav2vec2.files.errors import UserError


@pytest.fixture
def recordings(tmp_path) -> Path:
    folder = tmp_path / "audio"
    generator = np.random.default_rng(0)
    for name, length in (("a.wav", 8000), ("sub/b.flac", 5000), ("sub/c.d.wav", 20_000)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, 0.1 * generator.standard_normal(length), 16_000)
    return folder


def arrays(out: Path) -> dict[str, np.ndarray]:
    return {path.relative_to(out).as_posix(): np.load(path) for path in sorted(out.rglob("*.npy"))}


def test_extract_folder_and_manifest(recordings, small_teacher, tmp_path, monkeypatch, capsys):
    flags = ("--model", small_teacher, "--layers", "0,3", "--max_seconds", 20)
    run_script(monkeypatch, "examples.extract_features", *flags, "--audio", recordings, "--out", tmp_path / "out")
    assert "3 files written, 0 were there" in capsys.readouterr().out
    found = arrays(tmp_path / "out")
    assert list(found) == ["a.npy", "sub/b.npy", "sub/c.d.npy"]
    model = wav2vec2.load(small_teacher)
    for name, audio in zip(found, ("a.wav", "sub/b.flac", "sub/c.d.wav"), strict=True):
        expected = wav2vec2.extract(model, recordings / audio, layers=[0, 3])
        np.testing.assert_allclose(found[name], expected.numpy(), rtol=1e-4, atol=1e-4)

    manifest = tmp_path / "some.tsv"
    manifest.write_text(f"{recordings}\nsub/b.flac\t5000\n")
    run_script(monkeypatch, "examples.extract_features", *flags, "--audio", manifest, "--out", tmp_path / "other")
    assert list(arrays(tmp_path / "other")) == ["sub/b.npy"]


@pytest.mark.parametrize(("precision", "dtype"), [("16", np.float16), ("bf16", np.float32)])
def test_extract_in_half_precision(recordings, small_teacher, tmp_path, monkeypatch, precision, dtype):
    flags = ("--model", small_teacher, "--layers=-1", "--precision", precision, "--out", tmp_path / "out")
    run_script(monkeypatch, "examples.extract_features", *flags, "--audio", recordings / "a.wav")
    (array,) = arrays(tmp_path / "out").values()
    assert array.dtype == dtype and array.ndim == 2 and np.isfinite(array).all()


def test_extract_goes_on(recordings, small_teacher, tmp_path, monkeypatch, capsys):
    """Past files that cannot be used, and after an interruption, with what is there already."""
    (recordings / "sub" / "bad.wav").write_bytes(b"no audio")
    out = tmp_path / "out"
    flags = ("--model", small_teacher, "--audio", recordings, "--out", out)
    assert run_to_exit(monkeypatch, "examples.extract_features", *flags) == 1
    printed = capsys.readouterr()
    assert "3 files written" in printed.out
    assert "1 of 4 files could not be used" in printed.err
    path, reason = (out / "failed.tsv").read_text().rstrip("\n").split("\t")
    assert path == str(recordings / "sub" / "bad.wav") and "cannot be decoded" in reason

    (out / "sub" / "b.npy").unlink()
    before = (out / "a.npy").stat().st_mtime_ns
    soundfile.write(recordings / "sub" / "bad.wav", np.zeros(3000), 16_000)
    run_script(monkeypatch, "examples.extract_features", *flags)
    assert "2 files written, 2 were there" in capsys.readouterr().out
    assert len(arrays(out)) == 4 and not (out / "failed.tsv").exists()
    assert (out / "a.npy").stat().st_mtime_ns == before

    assert run_to_exit(monkeypatch, "examples.extract_features", *flags, "--layers", "1") == 1
    assert "holds features made with" in error_line(capsys)
    assert json.loads((out / "settings.json").read_text())["layers"] == "all"


def test_extract_follows_links_and_names_what_cannot_be_read(recordings, small_teacher, tmp_path, monkeypatch, capsys):
    (recordings / "sub").rename(tmp_path / "disk")
    (recordings / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "back").symlink_to(recordings)
    soundfile.write(recordings / "._a.wav", np.zeros(3000), 16_000)
    flags = ("--model", small_teacher, "--audio", recordings, "--out", tmp_path / "out", "--layers", "1")
    run_script(monkeypatch, "examples.extract_features", *flags)
    assert list(arrays(tmp_path / "out")) == ["a.npy", "linked/b.npy", "linked/c.d.npy"]

    (recordings / "unmounted").symlink_to(tmp_path / "gone")
    assert run_to_exit(monkeypatch, "examples.extract_features", *flags) == 1
    printed = capsys.readouterr()
    assert "0 files written, 3 were there" in printed.out
    assert f"{recordings / 'unmounted'}: a link that leads nowhere, expected a folder" in printed.err
    assert "1 of 4 files could not be used" in printed.err
    assert (tmp_path / "out" / "failed.tsv").read_text() == f"{recordings / 'unmounted'}\ta link that leads nowhere\n"


def test_extract_refuses(recordings, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no file that libsndfile reads"):
        extract_features.find_jobs([tmp_path / "empty"], tmp_path / "out")
    soundfile.write(recordings / "a.flac", np.zeros(3000), 16_000)
    with pytest.raises(UserError, match="would both become"):
        extract_features.find_jobs([recordings], tmp_path / "out")
    (tmp_path / "outside.tsv").write_text(f"{recordings}\n../a.wav\t3000\n")
    with pytest.raises(UserError, match="lies outside of the corpus"):
        extract_features.find_jobs([tmp_path / "outside.tsv"], tmp_path / "out")
    with pytest.raises(UserError, match="--layers"):
        extract_features.parse_layers("first")
