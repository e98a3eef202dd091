"""Bad audio, manifests and flags as users meet them: each with its message."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers import REPOSITORY

import prepare_data
from dataset.batches import BatchSampler, Crop
from dataset.manifest import Manifest, parse_max_bad_files, read_manifest
from dataset.speech import AudioError, Batch, SpeechDataset, check_files, load_audio
from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.errors import UserError

LENGTH = 20_000
ACTIONS = ("run prepare_data.py", "mend the", "take ", "give ", "write ")

Damage = Callable[[Path], Path]
"""Makes a file bad; returns its path, for some need another suffix."""


def noise(num_samples: int = LENGTH, num_channels: int = 1) -> np.ndarray:
    """Faint noise (num_samples, num_channels)."""
    return 0.1 * np.random.default_rng(num_samples).standard_normal((num_samples, num_channels))


def write_wav(path: Path, samples: np.ndarray, sample_rate: int = SAMPLE_RATE) -> Path:
    """A WAV file of floats, which can hold what is not a number."""
    path = path.with_suffix(".wav")
    soundfile.write(path, samples, sample_rate, subtype="FLOAT")
    return path


def halve(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def write_bytes(path: Path, contents: bytes) -> Path:
    path.write_bytes(contents)
    return path


def with_value(value: float) -> np.ndarray:
    """Noise with some samples of that value, the last among them."""
    samples = noise()
    samples[-100:] = value
    return samples


DAMAGES: dict[str, Damage] = {
    "truncated FLAC": halve,
    "truncated WAV": lambda path: halve(write_wav(path, noise())),
    "empty file": lambda path: write_bytes(path, b""),
    "text file called .wav": lambda path: write_bytes(path.with_suffix(".wav"), b"I am no audio"),
    "WAV header without samples": lambda path: write_wav(path, noise(0)),
    "NaN samples": lambda path: write_wav(path, with_value(np.nan)),
    "infinite samples": lambda path: write_wav(path, with_value(-np.inf)),
    "file of zeros": lambda path: write_wav(path, np.zeros(LENGTH)),
}


def one_bad_file(folder: Path, damage: Damage | None) -> tuple[Manifest, str]:
    """A manifest of three good files and the one that became bad after it was written, and the path of that."""
    good = folder / "good"
    good.mkdir()
    for number in range(3):
        soundfile.write(good / f"{number}.flac", noise(LENGTH + 1 + number), SAMPLE_RATE)
    bad = folder / "bad.flac"
    soundfile.write(bad, noise(), SAMPLE_RATE)
    bad = damage(bad) if damage else bad
    rows = [(f"good/{number}.flac", LENGTH + 1 + number) for number in range(3)] + [(bad.name, LENGTH)]
    path = folder / "train.tsv"
    path.write_text(f"{folder}\n" + "".join(f"{name}\t{length}\n" for name, length in rows))
    return read_manifest(path), str(bad)


def read_all(manifest: Manifest) -> Batch:
    """The four utterances as one batch, as validation reads it."""
    (crop,) = BatchSampler(manifest.lengths, [[3, 0, 1, 2]], 1, 0, shuffle=False, seed=0, drop_last=True)
    return SpeechDataset(manifest)[crop]


def assert_helpful(message: str, *words: str) -> None:
    """One line that says these words and what to do."""
    assert "\n" not in message
    assert all(word in message for word in words)
    assert any(action in message for action in ACTIONS)


def prepare(corpus: Path) -> dict[str, str]:
    """List ``corpus/audio`` in ``corpus/all.tsv``; the files that were left out, name to reason."""
    arguments = ["--data", str(corpus), "--out", str(corpus), "--splits", "all=audio", "--num_workers", "1"]
    prepare_data.main(prepare_data.parse_args(arguments))
    rejected = corpus / "rejected.tsv"
    lines = rejected.read_text(encoding="utf-8").splitlines() if rejected.is_file() else []
    return dict(line.split("\t") for line in lines)


# ---------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("truncated FLAC", "cannot be decoded"),
        ("truncated WAV", "expected the manifest's 20000"),
        ("empty file", "is empty (0 bytes)"),
        ("text file called .wav", "cannot be decoded"),
        ("WAV header without samples", "is 0 samples long"),
        ("NaN samples", "100 of samples 0 to 20000 (at 16 kHz) are NaN or infinite"),
        ("infinite samples", "100 of samples 0 to 20000 (at 16 kHz) are NaN or infinite"),
        ("file of zeros", "all of its samples are zero, expected sound"),
    ],
)
def test_bad_file_during_training(tmp_path, case, words):
    manifest, bad = one_bad_file(tmp_path, DAMAGES[case])
    batch = read_all(manifest)
    assert batch.waveforms.shape == (4, LENGTH)
    assert batch.waveforms.isfinite().all()
    assert batch.waveforms.any(dim=1).all()
    assert batch.paths == [str(tmp_path / f"good/{number}.flac") for number in (0, 0, 1, 2)]
    ((path, message),) = batch.bad_files.items()
    assert path == bad
    assert_helpful(message, f"{bad}: ", words)


def test_silence_at_the_start_is_no_fault(tmp_path):
    """A crop may fall into a pause; what counts is whether the file has any sound."""
    manifest, _ = one_bad_file(tmp_path, None)
    samples, rate = soundfile.read(tmp_path / manifest.paths[3])
    samples[: LENGTH // 2] = 0
    soundfile.write(tmp_path / manifest.paths[3], samples, rate)
    batch = SpeechDataset(manifest)[Crop((3,), (0,), LENGTH // 2, seed=0, tops_up=False)]
    assert not batch.bad_files and not batch.waveforms.any()


def test_missing_file_during_training(tmp_path):
    manifest, bad = one_bad_file(tmp_path, None)
    Path(bad).unlink()
    message = read_all(manifest).bad_files[bad]
    assert_helpful(message, f"{bad}: no such file, though the manifest lists it")


@pytest.mark.parametrize(("case", "length"), [("longer than the file", LENGTH + 1), ("shorter than the file", 19_000)])
def test_length_in_the_manifest_is_wrong(tmp_path, case, length):
    manifest, bad = one_bad_file(tmp_path, None)
    manifest.lengths[3] = length
    crop = Crop((3,), (0,), 10_000, seed=0, tops_up=False)
    message = SpeechDataset(manifest)[crop].bad_files[bad]
    assert_helpful(message, f"{bad}: is 20000 samples long (at 16 kHz), expected the manifest's {length}")


def test_every_file_is_lost_during_training(tmp_path):
    manifest, bad = one_bad_file(tmp_path, None)
    for name in manifest.paths:
        (tmp_path / name).unlink()
    with pytest.raises(AudioError) as error:
        read_all(manifest)
    message = str(error.value)
    assert_helpful(message, f"{bad}: no such file", "the 3 files tried in its place fail too")


@pytest.mark.parametrize(
    ("case", "sample_rate", "num_channels"), [("8 kHz", 8000, 1), ("48 kHz stereo", 48_000, 2), ("44.1 kHz", 44_100, 1)]
)
def test_other_rates_and_channels_are_accepted(tmp_path, case, sample_rate, num_channels):
    (tmp_path / "audio").mkdir()
    audio = write_wav(tmp_path / "audio" / "a.wav", noise(sample_rate, num_channels), sample_rate)
    assert prepare(tmp_path) == {}
    manifest = read_manifest(tmp_path / "all.tsv")
    assert check_files(manifest, max_bad=0) == {}
    assert manifest.lengths.tolist() == [SAMPLE_RATE]
    batch = SpeechDataset(manifest)[Crop((0,), (5000,), 3000, seed=0, tops_up=False)]
    assert batch.bad_files == {}
    assert batch.waveforms[0].tolist() == load_audio(audio)[5000:8000].tolist()


# ---------------------------------------------------------------------------------------------- before training


def test_root_folder_is_gone(tmp_path):
    manifest, _ = one_bad_file(tmp_path, None)
    (tmp_path / "train.tsv").write_text((tmp_path / "train.tsv").read_text().replace(str(tmp_path), "/old/corpus", 1))
    with pytest.raises(UserError) as error:
        check_files(read_manifest(manifest.path), max_bad=1)
    assert_helpful(str(error.value), "train.tsv", "/old/corpus does not exist")


def test_corpus_has_moved(tmp_path):
    manifest, _ = one_bad_file(tmp_path, None)
    (tmp_path / "good").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError) as error:
        check_files(manifest, max_bad=1000)
    assert_helpful(str(error.value), "train.tsv", "moved or changed: 3 of 4 files", "good/0.flac", "good/2.flac")


def test_more_bad_headers_than_allowed(tmp_path):
    manifest, bad = one_bad_file(tmp_path, DAMAGES["empty file"])
    assert list(check_files(manifest, max_bad=1)) == [bad]
    with pytest.raises(UserError) as error:
        check_files(manifest, max_bad=0)
    assert_helpful(str(error.value), "train.tsv", "1 of 4 files", bad, "at most 0 (--max_bad_files)")


@pytest.mark.parametrize("text", ["-1", "101%", "many", "1.5"])
def test_number_of_bad_files_allowed(text):
    with pytest.raises(UserError) as error:
        parse_max_bad_files(text, 1000)
    message = str(error.value)
    assert message.startswith(f"--max_bad_files {text}: expected a number of files")
    assert "\n" not in message


# ---------------------------------------------------------------------------------------------- manifests


@pytest.mark.parametrize(
    ("case", "contents", "words"),
    [
        ("line without a tab", b"/root\na.flac\t5\nb.flac 5\n", ["line 3", "'b.flac 5'", "a tab"]),
        ("negative length", b"/root\na.flac\t-5\n", ["line 2", "positive number"]),
        ("length of 30 digits", b"/root\na.flac\t" + b"9" * 30 + b"\n", ["line 2"]),
        ("empty manifest", b"", ["line 1 is ''", "folder"]),
        ("manifest without its first line", b"a.flac\t5\n", ["line 1 is 'a.flac\\t5'", "folder"]),
        ("manifest without utterances", b"/root\n\n", ["no utterance"]),
        ("path listed twice", b"/root\na.flac\t5\n\nb.flac\t5\na.flac\t5\n", ["line 5", "a.flac", "line 2"]),
        ("binary file as manifest", bytes(range(256)) * 1000, ["line 1"]),
        ("UTF-16 manifest", "/root\na.flac\t5\n".encode("utf-16"), ["line 1"]),
    ],
)
def test_bad_manifest(tmp_path, case, contents, words):
    path = tmp_path / "train.tsv"
    path.write_bytes(contents)
    with pytest.raises(UserError) as error:
        read_manifest(path)
    assert_helpful(str(error.value), f"{path}: ", *words)
    assert len(str(error.value)) < len(str(path)) + 300


def test_manifest_that_is_no_file(tmp_path):
    (tmp_path / "train100.tsv").touch()
    (tmp_path / "data").mkdir()
    for _case, path, words in [
        ("missing manifest", tmp_path / "train.tsv", ["no such manifest", "train100"]),
        ("folder as manifest", tmp_path / "data", ["is a folder"]),
    ]:
        with pytest.raises(UserError) as error:
            read_manifest(path)
        assert_helpful(str(error.value), f"{path}: ", *words)


@pytest.mark.parametrize(
    ("case", "contents"),
    [
        ("blank lines in a manifest", "{root}\n\n{name}\t20000\n  \n\n"),
        ("Windows line ends in a manifest", "{root}\r\n{name}\t20000\r\n"),
        ("byte order mark in a manifest", "\ufeff{root}\n{name}\t20000\n"),
        ("no line end at a manifest's end", "{root}\n{name}\t20000"),
    ],
)
def test_unusual_manifest_is_accepted(tmp_path, case, contents):
    name = "mit Leerzeichen/žluťoučký 馬 \u2028 .flac"
    (tmp_path / name).parent.mkdir()
    soundfile.write(tmp_path / name, noise(), SAMPLE_RATE)
    (tmp_path / "train.tsv").write_bytes(contents.format(root=tmp_path, name=name).encode())
    manifest = read_manifest(tmp_path / "train.tsv")
    assert (manifest.root, manifest.paths, manifest.lengths.tolist()) == (tmp_path, [name], [LENGTH])
    assert check_files(manifest, max_bad=0) == {}
    assert SpeechDataset(manifest)[Crop((0,), (0,), LENGTH, seed=0, tops_up=False)].bad_files == {}


MEASURE = """
import json, resource, sys, time, tracemalloc
from dataset.manifest import read_manifest

def resident_mb(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before, start = resident_mb(), time.perf_counter()
num_paths = len(read_manifest(sys.argv[1]).paths)
seconds, grown_mb = time.perf_counter() - start, resident_mb() - before
tracemalloc.start()
manifest = read_manifest(sys.argv[1])
print(json.dumps([num_paths, seconds, grown_mb, tracemalloc.get_traced_memory()[1] / 2**20]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count memory in other units")
def test_long_manifest_is_quick_and_small(tmp_path):
    path = tmp_path / "train.tsv"
    names = (f"train-clean-360/{n % 2000}/{n % 300}/{n % 2000}-{n % 300}-{n:06d}.flac" for n in range(300_000))
    path.write_text("/root\n" + "".join(f"{name}\t{number + 1}\n" for number, name in enumerate(names)))
    command = [sys.executable, "-c", MEASURE, path]
    root = REPOSITORY
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    num_paths, seconds, grown_mb, traced_mb = json.loads(result.stdout)
    assert num_paths == 300_000
    assert seconds < 2
    assert grown_mb < 100
    assert traced_mb < 100


# ---------------------------------------------------------------------------------------------- prepare_data.py


def stream(path: Path) -> Path:
    """A FLAC header without the number of samples, as an encoder leaves it that writes to a pipe."""
    contents = bytearray(path.read_bytes())
    contents[21] &= 0xF0
    contents[22:26] = bytes(4)
    return write_bytes(path, contents)


def link_to_nothing(path: Path) -> Path:
    path.unlink()
    path.symlink_to("nothing.flac")
    return path


@pytest.mark.parametrize(
    ("case", "damage", "reason"),
    [
        ("truncated FLAC", None, "cut short: its header promises 20000 samples, the last cannot be read"),
        ("empty file", None, "empty (0 bytes)"),
        ("text file called .wav", None, "cannot be decoded (Format not recognised; 13 bytes)"),
        ("WAV header without samples", None, "no samples"),
        ("NaN samples", None, "NaN or infinite samples"),
        ("infinite samples", None, "NaN or infinite samples"),
        ("FLAC without its length", stream, "its header does not state its length; encode it again"),
        ("link to nothing", link_to_nothing, "not a file, or a link to nothing"),
        ("line break in a name", lambda path: path.rename(path.with_name("a\nb.flac")), "a line break in its path"),
        (
            "carriage return in a name",
            lambda path: path.rename(path.with_name("a\rb.flac")),
            "a line break in its path",
        ),
    ],
)
def test_prepare_data_leaves_bad_files_out(tmp_path, case, damage, reason):
    (tmp_path / "audio").mkdir()
    for name in ("good", "bad"):
        soundfile.write(tmp_path / "audio" / f"{name}.flac", noise(), SAMPLE_RATE)
    bad = (damage or DAMAGES[case])(tmp_path / "audio" / "bad.flac")
    if bad.suffix == ".wav":
        (tmp_path / "audio" / "bad.flac").unlink()
    rejected = prepare(tmp_path)
    assert read_manifest(tmp_path / "all.tsv").paths == ["audio/good.flac"]
    name = f"audio/{bad.name}".replace("\n", "?").replace("\r", "?")
    assert list(rejected) == [name]
    assert rejected[name].startswith(reason)


@pytest.mark.parametrize(
    ("case", "damage", "length", "outcome"),
    [
        ("truncated WAV", None, 9990, "accepted: the samples that are there are counted"),
        ("file of zeros", None, LENGTH, "accepted: it reads headers only; training replaces the file"),
        (
            "spaces and letters beyond ASCII in names",
            lambda path: path.rename(path.with_name("a žluť 馬.flac")),
            LENGTH,
            "accepted",
        ),
        ("tab in a name", lambda path: path.rename(path.with_name("a\tb.flac")), LENGTH, "accepted"),
        ("suffix in capitals", lambda path: path.rename(path.with_name("A.FLAC")), LENGTH, "accepted"),
    ],
)
def test_prepare_data_accepts(tmp_path, case, damage, length, outcome):
    (tmp_path / "audio").mkdir()
    path = tmp_path / "audio" / "bad.flac"
    soundfile.write(path, noise(), SAMPLE_RATE)
    path = (damage or DAMAGES[case])(path)
    (tmp_path / "audio" / "bad.flac").unlink(missing_ok=True)
    assert prepare(tmp_path) == {}
    manifest = read_manifest(tmp_path / "all.tsv")
    assert manifest.paths == [f"audio/{path.name}"]
    assert manifest.lengths.tolist() == [length] == [len(load_audio(path))]
