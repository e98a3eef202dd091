"""The packed copy of a corpus: the same samples as the files, and never anything but what was packed."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import prepare_data
from dataset import packed
from dataset.batches import BatchSampler, Crop, make_batches
from dataset.manifest import Manifest, read_manifest
from dataset.packed import BLOCK_SAMPLES, attach, lay_out
from dataset.speech import SpeechDataset, check_files, load_audio
from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.errors import UserError

LENGTHS = [1, 900, BLOCK_SAMPLES - 1, BLOCK_SAMPLES, BLOCK_SAMPLES + 1, 50_000]


def noise(num_samples: int, num_channels: int = 1) -> np.ndarray:
    """Noise (num_samples, num_channels), no sample of which is zero for long."""
    return 0.2 * np.random.default_rng(num_samples).standard_normal((num_samples, num_channels)) + 0.1


def write_corpus(folder: Path, lengths: list[int] = LENGTHS) -> Path:
    """FLAC files of these lengths in ``folder/audio``, with names that need care; returns ``folder``."""
    (folder / "audio" / "mit Leerzeichen").mkdir(parents=True)
    for length in lengths:
        soundfile.write(folder / "audio" / "mit Leerzeichen" / f"žluťoučký {length}.flac", noise(length), SAMPLE_RATE)
    return folder


def prepare(corpus: Path, *options: str, num_workers: int = 1) -> Manifest:
    """List ``corpus/audio`` in ``corpus/all.tsv``."""
    arguments = ["--data", str(corpus), "--out", str(corpus), "--splits", "all=audio"]
    prepare_data.main(prepare_data.parse_args([*arguments, "--num_workers", str(num_workers), *options]))
    return read_manifest(corpus / "all.tsv")


def pack(corpus: Path, num_workers: int = 1) -> Manifest:
    """The same with a pack."""
    return attach(prepare(corpus, "--pack", num_workers=num_workers))


def pcm_files(corpus: Path) -> list[Path]:
    return sorted((corpus / "packed").glob("*.pcm"))


def read_all(manifest: Manifest) -> list[torch.Tensor]:
    """Every utterance as a whole."""
    dataset = SpeechDataset(manifest)
    crops = [Crop((index,), (0,), int(length), 0, False) for index, length in enumerate(manifest.lengths)]
    batches = [dataset[crop] for crop in crops]
    assert not any(batch.bad_files for batch in batches)
    return [batch.waveforms[0] for batch in batches]


def all_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def assert_helpful(message: str, *words: str) -> None:
    """One line that says these words and what to do."""
    assert "\n" not in message
    assert all(word in message for word in [*words, "prepare_data.py --pack", "--no_pack"])


# ---------------------------------------------------------------------------------------------- what is read


def test_crops_are_those_of_the_files(tmp_path, capsys):
    packed_manifest = pack(write_corpus(tmp_path), num_workers=2)
    assert "rounded" not in (output := capsys.readouterr().out) and "clipped" not in output
    manifest = read_manifest(tmp_path / "all.tsv")
    assert (manifest.pack, packed_manifest.paths) == (None, manifest.paths)
    assert all_equal(read_all(packed_manifest), read_all(manifest))
    rng = np.random.default_rng(0)
    for index, length in enumerate(manifest.lengths.tolist()):
        crops = [(0, 1), (length - 1, 1), (0, length), (min(BLOCK_SAMPLES, length - 1), 1)]
        for offset in rng.integers(0, length, 20).tolist():
            crops.append((offset, int(rng.integers(1, length - offset, endpoint=True))))
        for offset, num_samples in crops:
            crop = Crop((index,), (offset,), num_samples, seed=3, tops_up=False)
            ours, theirs = SpeechDataset(packed_manifest)[crop], SpeechDataset(manifest)[crop]
            assert torch.equal(ours.waveforms, theirs.waveforms) and ours.waveforms.dtype == torch.float32
            assert ours[2:] == theirs[2:]


def test_the_files_are_not_needed_then(tmp_path):
    manifest = pack(write_corpus(tmp_path / "here"))
    expected = read_all(read_manifest(tmp_path / "here" / "all.tsv"))
    shutil.rmtree(tmp_path / "here" / "audio")
    (tmp_path / "here").rename(tmp_path / "elsewhere")
    manifest = attach(read_manifest(tmp_path / "elsewhere" / "all.tsv"))
    assert check_files(manifest, max_bad=0) == {}
    assert all_equal(read_all(manifest), expected)


@pytest.mark.parametrize("context", [None, "fork", "spawn"])
def test_batches_do_not_depend_on_the_loader(tmp_path, context):
    manifest = pack(write_corpus(tmp_path))
    batches = make_batches(manifest.lengths, batch_size=2)

    def load(manifest: Manifest, context: str | None) -> list[torch.Tensor]:
        sampler = BatchSampler(manifest.lengths, batches, 1, 0, shuffle=True, seed=5)
        workers = {"num_workers": 2, "multiprocessing_context": context} if context else {}
        loader = DataLoader(SpeechDataset(manifest), sampler=sampler, batch_size=None, **workers)
        return [batch.waveforms.clone() for batch in loader]

    assert all_equal(load(manifest, context), load(read_manifest(manifest.path), None))


def test_other_sources_are_rounded_and_counted(tmp_path, capsys):
    folder = tmp_path / "audio"
    folder.mkdir()
    for name, rate, num_channels, subtype in [
        ("stereo", SAMPLE_RATE, 2, "PCM_16"),
        ("resampled", 44_100, 2, "PCM_16"),
        ("float", SAMPLE_RATE, 1, "FLOAT"),
        ("24 bits", SAMPLE_RATE, 1, "PCM_24"),
        ("exact", SAMPLE_RATE, 1, "PCM_16"),
    ]:
        soundfile.write(folder / f"{name}.wav", noise(20_000, num_channels).clip(-0.9, 0.9), rate, subtype=subtype)
    loud = noise(20_000)
    loud[:4, 0] = [1.0, 1.5, -1.0, -7]
    soundfile.write(folder / "loud.wav", loud.clip(-7, 7), SAMPLE_RATE, subtype="FLOAT")
    manifest = pack(tmp_path)
    output = capsys.readouterr().out
    assert "5 of 6 files are not 16-bit mono at 16 kHz: rounded to 16 bits" in output
    plain = dict(zip(manifest.paths, read_all(read_manifest(manifest.path)), strict=True))
    for name, samples in zip(manifest.paths, read_all(manifest), strict=True):
        expected = plain[name].clip(-1, 1 - 2**-15)
        assert (samples - expected).abs().max() <= 2**-16
        assert torch.equal(samples, expected) == (name == "audio/exact.wav")
    num_clipped = int((plain["audio/loud.wav"].mul(32_768).round().add(0.5).abs() > 32_768).sum())
    assert num_clipped >= 3
    assert f"{num_clipped} samples in 1 files are louder than 16 bits can hold: clipped" in output


def test_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "FILE_SAMPLES", 20_000)
    manifest = pack(write_corpus(tmp_path))
    sizes = [path.stat().st_size // 2 for path in pcm_files(tmp_path)]
    assert sum(sizes) == sum(LENGTHS) and len(sizes) == 5
    assert all_equal(read_all(manifest), read_all(read_manifest(manifest.path)))


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=40), file_samples=st.integers(1, 150))
def test_utterances_lie_one_after_the_other(lengths, file_samples):
    files, offsets = lay_out(np.array(lengths), file_samples)
    file, end = 0, 0
    for length, place in zip(lengths, zip(files.tolist(), offsets.tolist(), strict=True), strict=True):
        if place != (file, end):
            assert place == (file + 1, 0) and end + length > file_samples
        file, end = place[0], place[1] + length
        assert end <= file_samples or place[1] == 0


def test_splits_share_the_pack(tmp_path):
    for folder in ("train-clean-100", "train-clean-360", "dev-clean"):
        (tmp_path / folder).mkdir()
        soundfile.write(tmp_path / folder / "a.flac", noise(1000), SAMPLE_RATE)
    prepare_data.main(
        prepare_data.parse_args(["--data", str(tmp_path), "--out", str(tmp_path), "--pack", "--num_workers", "1"])
    )
    assert [path.stat().st_size for path in pcm_files(tmp_path)] == [6000]
    for name, num_utterances in (("train100", 1), ("train960", 2), ("valid", 1)):
        manifest = attach(read_manifest(tmp_path / f"{name}.tsv"))
        assert len(manifest.paths) == num_utterances == len(manifest.pack._places)
        assert all_equal(read_all(manifest), read_all(read_manifest(manifest.path)))


def test_part_of_a_manifest_in_another_order(tmp_path):
    pack(write_corpus(tmp_path))
    path = tmp_path / "all.tsv"
    root, *lines = path.read_text().splitlines()
    path.write_text("\n".join([root, *lines[4:1:-1]]))
    manifest = attach(read_manifest(path))
    assert len(manifest.paths) == 3
    assert all_equal(read_all(manifest), read_all(read_manifest(path)))


def test_without_a_pack(tmp_path):
    manifest = prepare(write_corpus(tmp_path))
    assert attach(manifest) is manifest
    (tmp_path / "packed").mkdir()
    assert attach(manifest) is manifest


# ---------------------------------------------------------------------------------------------- damage


def cut_samples(folder: Path) -> None:
    (path,) = folder.glob("*.pcm")
    os.truncate(path, path.stat().st_size - 2)


def flip_index(folder: Path) -> None:
    contents = bytearray((folder / "index.bin").read_bytes())
    contents[len(contents) // 2] ^= 1
    (folder / "index.bin").write_bytes(contents)


def rename_in_manifest(folder: Path) -> None:
    path = folder.parent / "all.tsv"
    path.write_text(path.read_text().replace("50000.flac", "x.flac"))


def lengthen_in_manifest(folder: Path) -> None:
    path = folder.parent / "all.tsv"
    path.write_text(path.read_text().replace("\t900\n", "\t901\n"))


@pytest.mark.parametrize(
    ("case", "damage", "words"),
    [
        ("file of a pack cut short", cut_samples, [".pcm: is ", "bytes long, expected"]),
        ("file of a pack is gone", lambda f: next(f.glob("*.pcm")).unlink(), [".pcm: no such file"]),
        ("index of a pack is damaged", flip_index, ["index.bin: damaged"]),
        ("index of a pack is empty", lambda f: (f / "index.bin").write_bytes(b""), ["index.bin: damaged"]),
        ("index of a pack is gone", lambda f: (f / "index.bin").unlink(), ["no index.bin: packing did not finish"]),
        ("pack of another corpus", rename_in_manifest, ["1 of 6 utterances are not in it (the first: 'audio/mit"]),
        ("pack of other lengths", lengthen_in_manifest, ["1 of 6 utterances have another length", "900.flac"]),
    ],
)
def test_pack_that_does_not_fit(tmp_path, case, damage, words):
    pack(write_corpus(tmp_path))
    damage(tmp_path / "packed")
    with pytest.raises(UserError) as error:
        attach(read_manifest(tmp_path / "all.tsv"))
    assert_helpful(str(error.value), str(tmp_path / "packed"), *words)


def pcm_name(message: str) -> str:
    """The name of a pack's file in a message, which is another in each run; or what is in no message."""
    return next((word.rpartition("/")[2].strip(":") for word in message.split() if word.endswith(".pcm:")), "\0")


def test_pack_of_another_format(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "FORMAT", 2)
    prepare(write_corpus(tmp_path), "--pack")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"index\.bin: is of format 2, expected 1; write the pack again"):
        attach(read_manifest(tmp_path / "all.tsv"))


def test_whatever_happens_to_the_index_it_is_noticed(tmp_path):
    pack(write_corpus(tmp_path))
    path = tmp_path / "packed" / "index.bin"
    contents = path.read_bytes()
    rng = np.random.default_rng(0)
    for trial in range(200):
        damaged = bytearray(contents)
        if trial % 2:
            damaged = damaged[: rng.integers(len(contents))]
        else:
            damaged[rng.integers(len(contents))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"index\.bin: damaged"):
            packed.read_index(path.parent)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damaged_samples_are_not_trained_on(tmp_path, num_workers):
    manifest = pack(write_corpus(tmp_path, [40_000, 50_000]))
    whole = read_all(manifest)
    index = manifest.paths.index("audio/mit Leerzeichen/žluťoučký 40000.flac")
    (path,) = pcm_files(tmp_path)
    with path.open("r+b") as file:
        file.seek(2 * BLOCK_SAMPLES + 6)  # the second block of the shorter one, which comes first
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))
    crops = [
        Crop((index,), (0,), BLOCK_SAMPLES, 0, False),
        Crop((index,), (2 * BLOCK_SAMPLES,), 500, 0, False),
        Crop((index,), (BLOCK_SAMPLES + 1000,), 500, 0, False),
    ]
    batches = list(DataLoader(SpeechDataset(manifest), sampler=crops, batch_size=None, num_workers=num_workers))
    for crop, batch in zip(crops[:2], batches, strict=False):
        assert batch.bad_files == {}
        assert torch.equal(batch.waveforms[0], whole[index][crop.offsets[0] :][: crop.num_samples])
    assert torch.equal(batches[2].waveforms[0], whole[1 - index][BLOCK_SAMPLES + 1000 :][:500])
    ((name, message),) = batches[2].bad_files.items()
    assert name == manifest.full_path(index)
    begin = 2 * BLOCK_SAMPLES
    assert_helpful(message, f"{path}: damaged between bytes {begin} and {2 * begin}", "the samples that were packed")


def test_pack_is_lost_during_training(tmp_path):
    manifest = pack(write_corpus(tmp_path, [40_000, 50_000]))
    (path,) = pcm_files(tmp_path)
    path.unlink()
    with pytest.raises(UserError) as error:
        read_all(manifest)
    assert_helpful(str(error.value), f"{path}: reading it fails (No such file or directory)")


# ---------------------------------------------------------------------------------------------- packing


def test_bad_audio_is_rejected(tmp_path):
    """What the headers do not show: each is listed like the files whose headers do."""
    write_corpus(tmp_path, [900])
    spoilt = noise(20_000)
    spoilt[7000] = np.nan
    soundfile.write(tmp_path / "audio" / "nan.wav", spoilt, SAMPLE_RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "audio" / "silent.wav", np.zeros(9000), SAMPLE_RATE)
    damaged = tmp_path / "audio" / "damaged.flac"
    soundfile.write(damaged, noise(100_000), SAMPLE_RATE)
    contents = bytearray(damaged.read_bytes())
    contents[len(contents) // 2 : len(contents) // 2 + 20_000] = bytes(20_000)
    damaged.write_bytes(contents)
    (tmp_path / "audio" / "empty.wav").touch()
    manifest = pack(tmp_path)
    assert manifest.paths == ["audio/mit Leerzeichen/žluťoučký 900.flac"]
    assert len(read_all(manifest)) == 1
    lines = (tmp_path / "rejected.tsv").read_text(encoding="utf-8").splitlines()
    reasons = dict(line.split("\t") for line in lines)
    assert reasons.keys() == {f"audio/{name}" for name in ("nan.wav", "silent.wav", "damaged.flac", "empty.wav")}
    assert reasons["audio/nan.wav"] == "NaN or infinite samples"
    assert reasons["audio/silent.wav"] == "all of its samples are zero in 16 bits, expected sound"
    assert reasons["audio/empty.wav"] == "empty (0 bytes)"
    assert str(tmp_path) not in "".join(lines) and "prepare_data" not in "".join(lines)
    for name, _case in (("nan", "NaN samples"), ("silent", "file of zeros"), ("damaged", "damage amid a FLAC")):
        next(reason for path, reason in reasons.items() if name in path)


def test_nothing_can_be_packed(tmp_path):
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / "silent.wav", np.zeros(9000), SAMPLE_RATE)
    with pytest.raises(UserError, match=r"all\.tsv would be empty"):
        pack(tmp_path)
    assert not (tmp_path / "packed").exists() and not (tmp_path / "all.tsv").exists()
    (tmp_path / "audio" / "silent.wav").write_text("no audio")
    with pytest.raises(UserError, match=r"all\.tsv would be empty"):
        pack(tmp_path)
    assert not (tmp_path / "packed").exists()


def test_packing_again_replaces_the_pack(tmp_path, capsys):
    pack(write_corpus(tmp_path))
    (first,) = pcm_files(tmp_path)
    soundfile.write(tmp_path / "audio" / "new.flac", noise(7000), SAMPLE_RATE)
    capsys.readouterr()
    prepare(tmp_path)
    assert f"{tmp_path}/packed is of an earlier run" in capsys.readouterr().out
    manifest = pack(tmp_path)
    assert "earlier run" not in capsys.readouterr().out
    (second,) = pcm_files(tmp_path)
    assert first != second
    assert all_equal(read_all(manifest), read_all(read_manifest(manifest.path)))


STOPS = {
    "Ctrl-C": "raise KeyboardInterrupt",
    "full disk": "raise OSError(28, 'No space left on device')",
    "kill -9": "os.kill(os.getpid(), 9)",
}
INTERRUPTED_RUN = """
import os, sys, cli, packed, prepare_data
def stop(*_): {stop}
packed.{step} = stop
cli.run(prepare_data.main, prepare_data.parse_args(sys.argv[1:]))
"""


@pytest.mark.parametrize("step", ["Writer.commit", "atomic_path"])
@pytest.mark.parametrize("case", STOPS)
def test_packing_breaks_off(tmp_path, case, step):
    """In the end, where all samples are written and the most could be left behind."""

    def break_off(corpus: Path) -> subprocess.CompletedProcess:
        script = INTERRUPTED_RUN.format(stop=STOPS[case], step=step)
        arguments = ["--data", corpus, "--out", corpus, "--splits", "all=audio", "--num_workers", "1", "--pack"]
        return subprocess.run(
            [sys.executable, "-c", script, *arguments], cwd=REPOSITORY, capture_output=True, text=True
        )

    corpus = write_corpus(tmp_path)
    result = break_off(corpus)
    assert result.returncode == {"Ctrl-C": 130, "full disk": 1, "kill -9": -signal.SIGKILL}[case], result.stderr
    assert not (corpus / "all.tsv").exists()
    if case == "kill -9":
        with pytest.raises(UserError, match="packing did not finish"):
            attach(prepare(corpus))
    else:
        assert not (corpus / "packed").exists()

    manifest = pack(corpus)
    files, expected = pcm_files(corpus), read_all(manifest)
    assert len(files) == 1
    soundfile.write(corpus / "audio" / "new.flac", noise(7000), SAMPLE_RATE)
    break_off(corpus)
    assert all_equal(read_all(attach(read_manifest(corpus / "all.tsv"))), expected)
    assert (pcm_files(corpus) == files) == (case != "kill -9")
    assert len(pack(corpus).paths) == len(LENGTHS) + 1
    assert len(pcm_files(corpus)) == 1


def test_packing_needs_room(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda _: usage._replace(free=2 * sum(LENGTHS) - 1))
    with pytest.raises(UserError, match=r"packed: packing needs 0\.0 GB, the disk has 0\.0 GB left; make room"):
        pack(write_corpus(tmp_path))
    assert not (tmp_path / "packed").exists()
    monkeypatch.undo()
    pack(tmp_path)
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda _: usage._replace(free=0))
    with pytest.raises(UserError, match=r"\(the pack that is there stays until the new one is complete\)"):
        pack(tmp_path)
    assert len(read_all(attach(read_manifest(tmp_path / "all.tsv")))) == len(LENGTHS)


def test_two_at_the_same_time(tmp_path):
    write_corpus(tmp_path, [900])
    hold = "import sys, pathlib, packed\nwith packed.writing(pathlib.Path(sys.argv[1])): print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, tmp_path / "packed"], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match=r"packed: another prepare_data\.py is packing there; wait"):
            pack(tmp_path)
        other.communicate(b"\n")
    assert len(read_all(pack(tmp_path))) == 1


def test_only_its_own_files_are_removed(tmp_path):
    write_corpus(tmp_path, [900])
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "mine.pcm").touch()
    pack(tmp_path)
    pack(tmp_path)
    assert (tmp_path / "packed" / "mine.pcm").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse names that are not UTF-8")
def test_names_that_are_not_utf8(tmp_path):
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "a.wav", noise(900), SAMPLE_RATE)
    os.rename(tmp_path / "a.wav", os.fsencode(tmp_path) + b"/audio/\xe9.wav")
    manifest = pack(tmp_path)
    assert torch.equal(read_all(manifest)[0], load_audio(manifest.full_path(0)))
