"""The corpus lister as a user calls it: splits, rejected files, other corpora, errors."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers import REPOSITORY, run_without

import cli
import prepare_data
from dataset.manifest import read_manifest
from prepare_data import parse_splits
from wav2vec2.audio import SAMPLE_RATE, read_audio
from wav2vec2.files.errors import UserError


def write_audio(path: Path, num_samples: int = 1600, sample_rate: int = SAMPLE_RATE, num_channels: int = 1) -> Path:
    """Noise of that many samples; the suffix chooses the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    audio = 0.1 * np.random.default_rng(0).standard_normal((num_samples, num_channels))
    soundfile.write(path, audio, sample_rate, format=path.suffix[1:].upper())
    return path


@dataclass
class Result:
    """The files and lines that a run of the script left behind."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def prepare(capfd: pytest.CaptureFixture) -> Callable[..., Result]:
    """Run the script's main as its last lines do, without the time that a new process takes."""

    def run(data: Path, out: Path, *options: str) -> Result:
        args = prepare_data.parse_args(["--data", str(data), "--out", str(out), *options])
        returncode = 0
        try:
            cli.run(prepare_data.main, args)
        except SystemExit as stop:
            returncode = stop.code
        return Result(returncode, *capfd.readouterr())

    return run


def rows(manifest: Path) -> dict[str, int]:
    """Path to samples of one manifest."""
    contents = read_manifest(manifest)
    return dict(zip(contents.paths, contents.lengths.tolist(), strict=True))


@pytest.fixture
def librispeech(tmp_path: Path) -> Path:
    """LibriSpeech's layout below a root whose own path names other splits."""
    root = tmp_path / "dev-clean" / "train-clean-100" / "Libri Speech é"
    for folder, num_samples in [
        ("train-clean-100/103/1240", 40_000),
        ("train-clean-360/14/208", 20_000),
        ("train-other-500/20/205", 300_000),
        ("dev-clean/84/121123", 32_000),
        ("dev-other/116/288045", 32_001),
        ("test-clean/61/70968", 50_000),
    ]:
        write_audio(root / folder / "a-0000.flac", num_samples)
    return root


def test_librispeech(librispeech, tmp_path, prepare):
    result = prepare(librispeech, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train100.tsv", "train960.tsv", "valid.tsv"}
    assert (tmp_path / "out" / "train960.tsv").read_text(encoding="utf-8") == (
        f"{librispeech}\n"
        "train-clean-100/103/1240/a-0000.flac\t40000\n"
        "train-clean-360/14/208/a-0000.flac\t20000\n"
        "train-other-500/20/205/a-0000.flac\t300000\n"
    )
    assert rows(tmp_path / "out" / "train100.tsv") == {"train-clean-100/103/1240/a-0000.flac": 40_000}
    assert sorted(rows(tmp_path / "out" / "valid.tsv").values()) == [32_000, 32_001]
    assert "1 of 6 files are in no split" in result.stdout
    assert "train960: 3 utterances, 0.01 h; 1 (0.00 h) last 2 s to 15.625 s" in result.stdout


def test_part_of_librispeech(librispeech, tmp_path, prepare):
    for folder in ("train-clean-100", "dev-clean", "dev-other"):
        (librispeech / folder).rename(librispeech / f"x{folder}")
    result = prepare(librispeech, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train960.tsv"]
    assert "(not there: train100, valid)" in result.stdout


def test_root_is_one_of_librispeechs_folders(librispeech, tmp_path, prepare):
    write_audio(librispeech / "train-clean-100/103/1240/a-0001.flac")
    result = prepare(librispeech / "train-clean-100", tmp_path / "out")
    assert "0.05 of the files" in result.stdout
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"train", "valid"}


def test_an_option_goes_before_the_layout(librispeech, tmp_path, prepare):
    assert prepare(librispeech, tmp_path / "out", "--valid_fraction", "0.5").returncode == 0
    assert len(rows(tmp_path / "out" / "valid.tsv")) == 3
    assert prepare(librispeech, tmp_path / "other", "--splits", "mine=train-*/14,test-*").returncode == 0
    assert len(rows(tmp_path / "other" / "mine.tsv")) == 2


def test_other_corpora_are_not_librispeech(tmp_path, prepare):
    """LibriMix, say: its names begin like LibriSpeech's."""
    for number, folder in enumerate(("train-100", "train-360", "dev", "test", "train-clean", "dev-mix")):
        write_audio(tmp_path / "corpus" / "wav16k" / folder / "s1" / f"{number}.wav")
    result = prepare(tmp_path / "corpus", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "0.05 of the files" in result.stdout
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"train", "valid"}


def test_other_formats_rates_and_channels(tmp_path, prepare):
    root = tmp_path / "corpus"
    write_audio(root / "tr" / "a b.WAV", 8001, 8000)
    write_audio(root / "tr" / "ü.Mp3", 22_050, 22_050)
    write_audio(root / "tr" / "deeper" / "c.ogg", 48_000, 48_000, num_channels=2)
    write_audio(root / "cv" / "d.flac", 44_100, 44_100)
    (root / "tr" / "notes.txt").write_text("no audio")
    result = prepare(root, tmp_path / "out", "--splits", "train=tr", "valid=cv,unused")
    assert result.returncode == 0, result.stderr
    counted = rows(tmp_path / "out" / "train.tsv")
    assert counted["tr/a b.WAV"] == 16_002
    assert set(counted) == {"tr/a b.WAV", "tr/ü.Mp3", "tr/deeper/c.ogg"}
    for name, num_samples in counted.items():
        assert len(read_audio(root / name)) == num_samples


def test_every_suffix_that_libsndfile_reads_is_found_and_others_are_counted(tmp_path, prepare):
    root = tmp_path / "corpus"
    formats = {
        "opus": ("OGG", "OPUS"),
        "oga": ("OGG", "VORBIS"),
        "AIF": ("AIFF", "PCM_16"),
        "aifc": ("AIFF", "ULAW"),
        "snd": ("AU", "PCM_16"),
        "au": ("AU", "G721_32"),
        "sph": ("NIST", "ULAW"),
        "w64": ("W64", "PCM_16"),
        "caf": ("CAF", "ALAC_16"),
        "rf64": ("RF64", "PCM_16"),
        "wav": ("WAV", "GSM610"),
    }
    root.mkdir()
    for suffix, (name, encoding) in formats.items():
        soundfile.write(root / f"a.{suffix}", np.zeros(1600), SAMPLE_RATE, format=name, subtype=encoding)
    for name in ("a.m4a", "b.M4A", "c.webm", "notes.txt", "a.trans.json"):
        (root / name).write_bytes(b"\0\0\0\x20ftypM4A \0\0\0\0")
    result = prepare(root, tmp_path / "out", "--valid_fraction", "0.1")
    assert result.returncode == 0, result.stderr
    found = rows(tmp_path / "out" / "train.tsv") | rows(tmp_path / "out" / "valid.tsv")
    assert set(found) == {f"a.{suffix}" for suffix in formats}
    assert {name: len(read_audio(root / name)) for name in found} == found
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("passed over")]
    assert line.startswith("passed over: 2 .m4a, 1 .webm, which") and "ffmpeg -i IN OUT.flac" in line
    assert "txt" not in result.stdout and "json" not in result.stdout

    for suffix in formats:
        (root / f"a.{suffix}").unlink()
    result = prepare(root, tmp_path / "none")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1 and "but 2 .m4a, 1 .webm; convert them: ffmpeg -i IN OUT.flac" in line


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_float(path: Path, value: float) -> None:
    """A WAV file whose last sample has that value; floats can hold what is not a number."""
    samples = np.full(1600, 0.1)
    samples[-1] = value
    soundfile.write(path, samples, SAMPLE_RATE, subtype="FLOAT", format="WAV")


def remove_length(path: Path) -> None:
    """A FLAC encoder that writes to a pipe leaves this in the header."""
    contents = bytearray(path.read_bytes())
    contents[21] &= 0xF0
    contents[22:26] = bytes(4)
    path.write_bytes(contents)


def test_files_that_cannot_be_used_are_listed(tmp_path, prepare):
    root = tmp_path / "corpus"
    damages = {
        "cut.flac": (cut, "cut short: its header promises 50000 samples, the last cannot be read"),
        "empty.flac": (lambda path: path.write_bytes(b""), "cannot be decoded (Format not recognised; 0 bytes)"),
        "text.wav": (lambda path: path.write_text("I am no audio"), "cannot be decoded (Format not recognised; 13"),
        "silent.wav": (lambda path: write_audio(path, 0), "no samples"),
        "nan.wav": (lambda path: write_float(path, np.nan), "NaN or infinite samples"),
        "infinite.wav": (lambda path: write_float(path, -np.inf), "NaN or infinite samples"),
        "dangling.ogg": (
            lambda path: (path.unlink(), path.symlink_to("gone.ogg")),
            "no such file, expected audio; check the path",
        ),
        "line\nbreak.wav": (lambda path: None, "a line break in its path"),
        "carriage\rreturn.wav": (lambda path: None, "a line break in its path"),
    }
    for name, (damage, _) in damages.items():
        damage(write_audio(root / name, 50_000))
    good = {"good.wav": 1600, "A.FLAC": 1600, "a žluť 馬.flac": 1600, "tab\tin its name.flac": 1600}
    for name in good:
        write_audio(root / name)
    write_float(root / "zeros.wav", 0)
    # What is there is counted.
    cut(write_audio(root / "cut.wav", 50_000))
    remove_length(write_audio(root / "stream.flac", 50_000))
    good |= {"zeros.wav": 1600, "cut.wav": 24_989, "stream.flac": 50_000}
    (root / "folder.wav").mkdir()

    result = prepare(root, tmp_path / "out", "--valid_fraction", "0.5")
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "out" / "rejected.tsv").read_text().splitlines()
    rejected = dict(line.split("\t") for line in lines)
    assert len(lines) == len(damages) and "9 files left out" in result.stdout
    for name, (_, reason) in damages.items():
        assert rejected[name.replace("\n", "?").replace("\r", "?")].startswith(reason)
    found = rows(tmp_path / "out" / "train.tsv") | rows(tmp_path / "out" / "valid.tsv")
    assert found == good
    assert {name: len(read_audio(root / name)) for name in good} == good

    for name in damages:
        (root / name).unlink(missing_ok=True)
    assert prepare(root, tmp_path / "out", "--valid_fraction", "0.5").returncode == 0
    assert not (tmp_path / "out" / "rejected.tsv").exists()


def test_length_of_a_cut_mp3_is_what_can_be_decoded(tmp_path, prepare):
    cut = write_audio(tmp_path / "corpus" / "cut.mp3", 80_000)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    write_audio(tmp_path / "corpus" / "b.wav")
    assert prepare(tmp_path / "corpus", tmp_path / "out", "--valid_fraction", "0.5").returncode == 0
    counted = rows(tmp_path / "out" / "train.tsv") | rows(tmp_path / "out" / "valid.tsv")
    assert counted["cut.mp3"] == len(read_audio(cut)) < 50_000


def test_folders_that_cannot_be_read_are_named(tmp_path, prepare, monkeypatch):
    root = tmp_path / "corpus"
    for name in ("a.wav", "b.wav", "locked/c.wav"):
        write_audio(root / name)
    (root / "unmounted").symlink_to(tmp_path / "gone")
    (root / "again").symlink_to(".")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("locked/"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # chmod would not stop root
    result = prepare(root, tmp_path / "out", "--valid_fraction", "0.5")
    assert result.returncode == 0, result.stderr
    assert "passed over: 1 other names of folders (again/)" in result.stdout
    line = "2 folders, links or archives (unmounted: a link that leads nowhere, locked/: Permission denied)"
    assert f"cannot be read: {line}" in result.stdout
    assert set((tmp_path / "out" / "rejected.tsv").read_text().splitlines()) == {
        "locked/\tPermission denied",
        "unmounted\ta link that leads nowhere",
    }
    for name in ("a.wav", "b.wav"):
        (root / name).unlink()
    result = prepare(root, tmp_path / "other")
    assert result.returncode == 1 and f"but {line} that cannot be read" in result.stderr


@pytest.mark.parametrize(("name", "words"), [("wav.scp", "Kaldi (wav.scp): give"), ("a.tgz", "compressed tar: unpack")])
def test_other_stores_get_a_line(tmp_path, prepare, name, words):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / name).touch()
    result = prepare(tmp_path / "corpus", tmp_path / "out")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1 and line.startswith("error: --data") and "but 1 files of " in line
    assert words in line
    result = prepare(tmp_path / "corpus" / name, tmp_path / "out")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1 and f"{name}: is a file, " in line and words in line


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse names that are not UTF-8")
def test_names_that_are_not_utf8(tmp_path, prepare):
    root = tmp_path / "corpus"
    write_audio(root / "a.wav")
    os.rename(root / "a.wav", os.fsencode(root) + b"/\xe9.wav")
    write_audio(root / "b.wav")
    result = prepare(root, tmp_path / "out", "--valid_fraction", "0.5")
    assert result.returncode == 0, result.stderr
    for name in rows(tmp_path / "out" / "train.tsv") | rows(tmp_path / "out" / "valid.tsv"):
        assert len(read_audio(root / name)) == 1600


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse names that are not UTF-8")
@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii"])
def test_any_name_can_be_printed(tmp_path, encoding):
    for number in range(2):
        write_audio(tmp_path / "corpus" / f"{number}.wav")
    (tmp_path / "corpus" / "2.wav").write_text("no audio")
    root = os.fsencode(tmp_path / "ü") + b"\xe9"
    os.rename(tmp_path / "corpus", root)
    result = subprocess.run(
        [sys.executable, REPOSITORY / "prepare_data.py", "--data", root, "--out", root + b"/out", "--num_workers", "1"],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stderr
    assert "1 files left out" in result.stdout and r"\udce9/out" in result.stdout


def test_manifests_go_where_the_published_program_writes_them():
    assert prepare_data.parse_args(["--data", "corpus"]).out == "data/librispeech"


def test_output_does_not_depend_on_the_run(tmp_path, prepare):
    for number in range(30):
        write_audio(tmp_path / "corpus" / f"{number}.wav", 1600 + number)
    outputs = []
    for run, num_workers in enumerate(["1", "2"]):
        result = prepare(tmp_path / "corpus", tmp_path / str(run), "--num_workers", num_workers)
        assert result.returncode == 0, result.stderr
        outputs.append({path.name: path.read_bytes() for path in (tmp_path / str(run)).iterdir()})
    assert outputs[0] == outputs[1]


def test_splits_option():
    assert parse_splits(["train=a,b/", "valid=c*"]) == {"train": ["a", "b"], "valid": ["c*"]}


@pytest.mark.parametrize(
    "options", [["train"], ["=a"], ["train="], ["a/b=c"], ["rejected=a"], ["a=b", "a=c"], [".a=b"]]
)
def test_splits_option_errors(options):
    with pytest.raises(UserError, match="--splits: found"):
        parse_splits(options)


@pytest.mark.parametrize(
    ("folder", "options", "words"),
    [
        ("missing", [], ["missing: no such folder"]),
        ("empty", [], ["no .flac, .wav, .ogg, .mp3, .opus, .oga or the like", "corpus folder"]),
        ("corpus", ["--splits", "train=nope"], ["train.tsv would be empty", "one, two", "--splits"]),
        ("corpus", ["--splits", "train=one", "--valid_fraction", "0.1"], ["--splits and --valid_fraction"]),
        ("corpus", ["--valid_fraction", "0"], ["--valid_fraction 0", "between 0 and 1"]),
        ("corpus", ["--valid_fraction", "nan"], ["--valid_fraction nan", "between 0 and 1"]),
        ("corpus", ["--valid_fraction", "0.99"], ["train.tsv would be empty"]),
        ("corpus", ["--splits", "train=two"], ["train.tsv would be empty: none of its 1 files can be used"]),
        ("corpus", ["--num_workers", "0"], ["--num_workers 0"]),
    ],
)
def test_errors_are_one_line_and_write_no_manifest(tmp_path, folder, options, words, prepare):
    (tmp_path / "empty").mkdir()
    write_audio(tmp_path / "corpus" / "one" / "a.wav")
    (tmp_path / "corpus" / "two").mkdir()
    (tmp_path / "corpus" / "two" / "bad.wav").write_text("no audio")
    result = prepare(tmp_path / folder, tmp_path / "out", *options)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words)
    assert not list((tmp_path / "out").glob("[!r]*.tsv"))


def test_script_as_a_command(librispeech, tmp_path):
    command = [sys.executable, REPOSITORY / "prepare_data.py", "--data", librispeech, "--out", "out"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "written to out: train100.tsv, train960.tsv, valid.tsv" in result.stdout
    result = subprocess.run(
        [*command[:3], "nowhere", *command[4:]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: --data nowhere: no such folder; give the folder of the corpus\n"


def test_reading_headers_does_without_torch(tmp_path):
    """Importing it takes seconds, longer than reading the headers of a small corpus."""
    write_audio(tmp_path / "corpus" / "train" / "a.flac", 40_000)
    arguments = ["--data", str(tmp_path / "corpus"), "--out", str(tmp_path / "out"), "--splits", "train=train"]
    run_without(("torch",), f"import prepare_data\nprepare_data.main(prepare_data.parse_args({arguments}))")
    assert rows(tmp_path / "out" / "train.tsv") == {"train/a.flac": 40_000}
