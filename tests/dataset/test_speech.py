"""From a crop to waveforms: what is read, and what happens to files that have gone bad."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader
from torchaudio.functional import resample

from dataset.batches import BatchSampler, Crop, make_batches
from dataset.manifest import Manifest, read_manifest
from dataset.speech import MAX_REPLACEMENTS, SpeechDataset, check_files
from wav2vec2.audio import SAMPLE_RATE, AudioError, checked_audio, num_samples_at_16k, read_audio
from wav2vec2.files.errors import UserError


def noise(num_samples: int, seed: int = 0, num_channels: int = 1) -> np.ndarray:
    """Faint noise (num_samples, num_channels) float32, another for each seed."""
    return (0.1 * np.random.default_rng(seed).standard_normal((num_samples, num_channels))).astype(np.float32)


def write_corpus(folder: Path, lengths: list[int], suffix: str = "flac") -> Manifest:
    """Files 0.flac, 1.flac, ... of the given lengths and their manifest."""
    for number, length in enumerate(lengths):
        soundfile.write(folder / f"{number}.{suffix}", noise(length, number), SAMPLE_RATE)
    path = folder / "train.tsv"
    path.write_text(f"{folder}\n" + "".join(f"{n}.{suffix}\t{length}\n" for n, length in enumerate(lengths)))
    return read_manifest(path)


def read_one(manifest: Manifest, index: int = 0, offset: int = 0, num_samples: int = 800):
    return SpeechDataset(manifest)[Crop((index,), (offset,), num_samples, seed=0, tops_up=False)]


# ---------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(("sample_rate", "num_channels"), [(8000, 1), (48_000, 2), (44_100, 1)])
def test_other_rates_and_channels_become_16_khz_mono(tmp_path, sample_rate, num_channels):
    path = tmp_path / "a.wav"
    audio = noise(sample_rate + 7, num_channels=num_channels)
    soundfile.write(path, audio, sample_rate, subtype="FLOAT")
    expected = resample(torch.from_numpy(audio.mean(axis=1)), sample_rate, SAMPLE_RATE)
    whole = read_audio(path)
    length = num_samples_at_16k(len(audio), sample_rate)
    assert whole.shape == (length,)
    torch.testing.assert_close(whole, expected)
    manifest = Manifest(tmp_path / "a.tsv", tmp_path, np.array(["a.wav"]), np.array([length]))
    assert check_files(manifest) == {}
    batch = read_one(manifest, offset=5000, num_samples=3000)
    assert batch.bad_files == {} and torch.equal(batch.waveforms[0], whole[5000:8000])


def test_dataset_reads_the_crops(tmp_path):
    manifest = write_corpus(tmp_path, [900, 1000])
    batch = SpeechDataset(manifest)[Crop((1, 0), (30, 0), 800, seed=7, tops_up=False)]
    waveforms, lengths = batch[:2]
    assert waveforms.shape == (2, 800)
    assert waveforms.dtype == torch.float32
    assert lengths is None
    assert torch.equal(waveforms[0], read_audio(tmp_path / "1.flac")[30:830])
    assert torch.equal(waveforms[1], read_audio(tmp_path / "0.flac")[:800])
    assert batch[2:] == ([str(tmp_path / "1.flac"), str(tmp_path / "0.flac")], 7, 2, {})
    assert SpeechDataset(manifest)[Crop((1, 0), (0, 0), 800, 7, tops_up=True)].weight == 0


def test_only_the_crop_is_decoded(tmp_path, monkeypatch):
    manifest = write_corpus(tmp_path, [50_000])
    read, counts = soundfile.SoundFile.read, []
    monkeypatch.setattr(
        soundfile.SoundFile,
        "read",
        lambda file, frames, **options: counts.append(frames) or read(file, frames, **options),
    )
    read_one(manifest, offset=40_000, num_samples=300)
    assert counts == [300]


def test_batches_do_not_depend_on_the_number_of_workers(tmp_path):
    """Replacements neither."""
    manifest = write_corpus(tmp_path, list(range(800, 1000, 17)))
    (tmp_path / "5.flac").unlink()
    batches = make_batches(manifest.lengths, batch_size=3)

    def load(num_workers: int) -> list[tuple]:
        sampler = BatchSampler(manifest.lengths, batches, 1, 0, shuffle=True, seed=5)
        loader = DataLoader(SpeechDataset(manifest), sampler=sampler, batch_size=None, num_workers=num_workers)
        return [(batch.waveforms.tolist(), *batch[2:]) for batch in loader]

    alone = load(0)
    assert alone == load(2)
    assert len(alone) == len(batches) + 1
    assert [list(batch[-1]) for batch in alone if batch[-1]][:1] == [[str(tmp_path / "5.flac")]]
    assert [batch[-2] for batch in alone] == [3, 3, 3, 3, 0]


# ---------------------------------------------------------------------------------------------- bad files


def write_wav(path: Path, samples: np.ndarray) -> None:
    """Floats, which can hold what is not a number."""
    soundfile.write(path, samples, SAMPLE_RATE, subtype="FLOAT", format="WAV")


def with_value(value: float) -> np.ndarray:
    """Noise whose last hundred samples have that value."""
    samples = noise(20_000)
    samples[-100:] = value
    return samples


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "no such file, expected audio"),
        (halve, "cannot be decoded"),
        (lambda path: (write_wav(path, noise(20_000)), halve(path)), "expected 20000 as it was listed"),
        (lambda path: path.write_bytes(b""), "cannot be decoded (Format not recognised; 0 bytes)"),
        (lambda path: path.write_text("I am no audio"), "cannot be decoded (Format not recognised; 13 bytes)"),
        (lambda path: write_wav(path, noise(0)), "is 0 samples long"),
        (lambda path: write_wav(path, noise(21_000)), "is 21000 samples long (at 16 kHz), expected 20000 as it was"),
        (lambda path: write_wav(path, with_value(np.nan)), "100 of samples 0 to 20000 (at 16 kHz) are NaN or infinite"),
        (lambda path: write_wav(path, with_value(-np.inf)), "100 of samples 0 to 20000 (at 16 kHz) are NaN"),
        (lambda path: write_wav(path, np.zeros(20_000)), "all of its samples are zero, expected sound"),
    ],
    ids=["missing", "FLAC cut", "WAV cut", "empty", "text", "no samples", "longer", "NaN", "infinite", "silent"],
)
def test_bad_file_is_replaced_and_named(tmp_path, damage: Callable[[Path], object], words):
    manifest = write_corpus(tmp_path, [20_001, 20_000, 20_002])
    bad = tmp_path / "1.flac"
    damage(bad)
    batch = SpeechDataset(manifest)[Crop((1, 0, 2), (0, 0, 0), 20_000, seed=0, tops_up=False)]
    assert batch.waveforms.isfinite().all() and batch.waveforms.any(dim=1).all()
    assert torch.equal(batch.waveforms[0], batch.waveforms[1])
    assert batch.paths == [str(tmp_path / f"{number}.flac") for number in (0, 0, 2)]
    ((path, message),) = batch.bad_files.items()
    assert path == str(bad) and message.startswith(f"{bad}: ") and words in message
    assert "\n" not in message


def test_silence_at_the_start_is_no_fault(tmp_path):
    manifest = write_corpus(tmp_path, [20_000], suffix="wav")
    write_wav(tmp_path / "0.wav", np.concatenate([np.zeros((10_000, 1)), noise(10_000)]))
    batch = read_one(manifest, num_samples=10_000)
    assert not batch.bad_files and not batch.waveforms.any()


def test_file_shorter_than_asked(tmp_path):
    write_corpus(tmp_path, [900])
    with pytest.raises(AudioError, match=r"is cut short at sample 900 \(at 16 kHz\), expected 1000"):
        read_audio(tmp_path / "0.flac", 200, 800)


@pytest.mark.parametrize(
    ("index", "bad", "read"),
    [
        (2, [], 2),
        (2, [2], 0),  # the next longer one
        (4, [4], 5),  # of equals the later one
        (2, [2, 0, 4], 5),
        (3, [3], 2),  # from the longest to the shortest that suffices, not to utterance 1
        (0, [0, 3, 4, 5], 2),
    ],
)
def test_replacements_go_from_short_to_long(tmp_path, index, bad, read):
    manifest = write_corpus(tmp_path, [1000, 700, 900, 2000, 1100, 1100])
    for number in bad:
        (tmp_path / f"{number}.flac").unlink()
    offset = int(manifest.lengths[index]) - 800
    batch = read_one(manifest, index, offset)
    start = min(offset, int(manifest.lengths[read]) - 800)
    assert torch.equal(batch.waveforms[0], read_audio(tmp_path / f"{read}.flac")[start : start + 800])
    assert batch.paths == [str(tmp_path / f"{read}.flac")]
    assert set(batch.bad_files) == {str(tmp_path / f"{number}.flac") for number in bad}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_replacing_ends_with_one_line_also_from_a_worker(tmp_path, num_workers):
    manifest = write_corpus(tmp_path, list(range(900, 930)))
    for path in tmp_path.glob("*.flac"):
        path.unlink()
    crops = [Crop((7,), (0,), 800, 0, False)]
    loader = DataLoader(SpeechDataset(manifest), sampler=crops, batch_size=None, num_workers=num_workers)
    with pytest.raises(AudioError) as error:
        list(loader)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / '7.flac'}: no such file, expected audio") and "\n" not in message
    assert message.endswith(f"(the {MAX_REPLACEMENTS} files tried in its place fail too)")


def test_mp3_may_promise_more_than_it_holds(tmp_path):
    path = tmp_path / "a.mp3"
    soundfile.write(path, noise(80_000), SAMPLE_RATE)
    halve(path)
    length = len(read_audio(path))
    assert length != soundfile.info(path).frames
    manifest = Manifest(tmp_path / "a.tsv", tmp_path, np.array([path.name]), np.array([length]))
    assert check_files(manifest) == {}
    assert read_one(manifest, offset=5000, num_samples=length - 5000).bad_files == {}


@pytest.mark.parametrize("suffix", ["flac", "ogg", "mp3", "wav"])
def test_whatever_happens_to_a_file_it_is_read_or_replaced(tmp_path, suffix):
    rng = np.random.default_rng(0)
    manifest = write_corpus(tmp_path, [20_000, 20_000], suffix)
    bad = tmp_path / f"0.{suffix}"
    contents = bad.read_bytes()
    num_replaced = 0
    for trial in range(24):
        damaged = bytearray(contents[: rng.integers(len(contents))] if trial % 2 else contents)
        for place in rng.integers(0, max(len(damaged), 1), 0 if trial % 2 else 3):
            damaged[place] = rng.integers(256)
        bad.write_bytes(damaged)
        batch = read_one(manifest, offset=int(rng.integers(12_000)), num_samples=8000)
        assert batch.waveforms.isfinite().all()
        num_replaced += bool(batch.bad_files)
    assert num_replaced > 5


# ---------------------------------------------------------------------------------------------- check of files


def test_checked_files_are_spread_evenly(tmp_path):
    manifest = write_corpus(tmp_path, [10] * 50)
    for number in (0, 20, 21, 49):
        (tmp_path / f"{number}.flac").unlink()

    def found(sample: int) -> list[str]:
        return [Path(path).stem for path in check_files(manifest, sample)]

    assert found(256) == ["0", "20", "21", "49"]
    assert found(50) == ["0", "20", "21", "49"]
    assert found(8) == ["0", "21", "49"]  # 0, 7, 14, 21, 28, 35, 42, 49


def test_a_corpus_that_has_moved_or_changed(tmp_path):
    manifest = write_corpus(tmp_path, [10] * 6)
    (tmp_path / "0.flac").unlink()
    (tmp_path / "4.flac").write_bytes(b"")
    soundfile.write(tmp_path / "5.flac", noise(11), SAMPLE_RATE)
    assert len(check_files(manifest)) == 3
    (tmp_path / "1.flac").unlink()
    with pytest.raises(UserError, match=r"train\.tsv: 4 of 6 .*0\.flac: no such.* has moved or changed, run") as error:
        check_files(manifest)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("suffix", "rate"), [("flac", 44_100), ("mp3", 8_000), ("wav", 48_000)])
def test_a_manifest_that_counts_at_the_files_own_rate(tmp_path, suffix, rate):
    """Other programs' manifests have the same form; the files have not changed."""
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.{suffix}", noise(20_000), rate)
    counts = [soundfile.info(tmp_path / f"{number}.{suffix}").frames for number in range(3)]
    rows = "".join(f"{number}.{suffix}\t{count}\n" for number, count in enumerate(counts))
    (tmp_path / "train.tsv").write_text(f"{tmp_path}\n{rows}")
    with pytest.raises(
        UserError, match=rf"train\.tsv: 3 of 3 .*own rate of {rate} Hz, expected .*prepare_data"
    ) as error:
        check_files(read_manifest(tmp_path / "train.tsv"))
    assert "changed" not in str(error.value)
    # Of one sample, both counts are the same.
    soundfile.write(tmp_path / "one.flac", noise(1), 44_100)
    with checked_audio(tmp_path / "one.flac", 1):
        pass


def test_root_that_has_moved(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("/no/such/root\na.flac\t5\n")
    with pytest.raises(UserError, match=r"train\.tsv.*/no/such/root \(line 1\) does not exist"):
        check_files(read_manifest(path))
