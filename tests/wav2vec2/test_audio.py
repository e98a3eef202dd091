"""Audio files of every format, at any rate, whole and in part; whatever is wrong with one is an error of that file."""

import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from helpers import random_model, small_config
from torch import Tensor
from torchaudio.functional import resample

import wav2vec2
from dataset.batches import Crop
from dataset.corpus import count_samples
from dataset.manifest import Manifest
from dataset.speech import SpeechDataset, check_files
from wav2vec2 import audio
from wav2vec2.audio import SAMPLE_RATE, AudioError, num_samples_at_16k, read_audio, resample_to_16k
from wav2vec2.files.errors import UserError

# Formats without a header need to be told what they hold; the last two cannot be written.
FORMATS = [
    (name, encoding)
    for name in soundfile.available_formats()
    for encoding in soundfile.available_subtypes(name)
    if name != "RAW" and (name, encoding) not in {("AIFF", "DWVW_12"), ("WAV", "MPEG_LAYER_III")}
]


def tones(num_samples: int, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """A tone that comes and goes, (num_samples,): after it Vorbis seeks to other samples than it decodes."""
    seconds = np.arange(num_samples) / sample_rate
    return 0.3 * np.sin(2 * np.pi * 440 * seconds) * (seconds % 0.5625 < 0.28125)


# Formats


@pytest.mark.parametrize(("name", "encoding"), FORMATS)
def test_part_of_a_file_is_the_slice_of_the_whole(tmp_path, name, encoding):
    path, num_samples = tmp_path / "a", 78_880
    rate = 8000 if name == "WVE" else SAMPLE_RATE
    try:
        soundfile.write(path, tones(num_samples), rate, format=name, subtype=encoding)
    except soundfile.LibsndfileError:
        pytest.skip("this libsndfile does not write it")
    whole = read_audio(path)
    assert count_samples(str(path)) == (whole.numel(), "")
    with audio.checked_audio(path) as file:
        if file.samplerate == SAMPLE_RATE:
            file.seekable = lambda: False
            assert np.array_equal(file.read(2 * num_samples, dtype="float32"), whole)
    for offset, num_wanted in ((0, 480), (1, 1), (24_925, 8000), (55_832, 1), (70_000, 480), (78_000, whole.numel())):
        expected = whole[offset : offset + num_wanted]
        assert torch.equal(read_audio(path, offset, expected.numel(), whole.numel()), expected)
    assert torch.equal(read_audio(path, 12_345), whole[12_345:])
    manifest = Manifest(tmp_path / "a.tsv", tmp_path, np.array(["a"]), np.array([whole.numel()]))
    assert check_files(manifest) == {}


@pytest.mark.parametrize("suffix", ["mp3", "ogg"])
def test_blocks_of_a_decoder_that_does_not_seek_exactly(tmp_path, monkeypatch, suffix):
    """After each read soundfile seeks to where it is, unless it is told that it cannot."""
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tones(200_000), SAMPLE_RATE)
    whole = read_audio(path)
    monkeypatch.setattr(audio, "_READ_VALUES", 777)
    assert torch.equal(read_audio(path), whole)
    monkeypatch.setattr(audio, "_BLOCK_SECONDS", 2)
    assert torch.equal(read_audio(path, 100_000, 5000), whole[100_000:105_000])


JOINED = "holds several recordings, of which libsndfile reads the first"


@pytest.mark.parametrize("encoding", ["VORBIS", "OPUS", "MP3"])
def test_recordings_joined_in_one_file_are_refused(tmp_path, encoding):
    path, parts = tmp_path / "a", []
    for num_samples in (24_000, 40_000):
        options = {"format": "MP3"} if encoding == "MP3" else {"format": "OGG", "subtype": encoding}
        soundfile.write(path, noise(num_samples).numpy(), SAMPLE_RATE, **options)
        parts.append(path.read_bytes())
    first, second = parts
    tag, end = b"ID3\3\0\0\0\0\x02\0" + bytes(256), b"TAG" + bytes(125)
    picture = b"".join(b"\xff\xe2" + random.Random(seed).randbytes(3000) for seed in range(20))
    alone = {first: 24_000, second: 40_000, first + bytes(5000): 24_000, first + end: 24_000}
    joined = [
        first + second,
        second + first,
        first + first,
        3 * first,
        first[: len(first) * 3 // 4] + second,
        first + end + second,
    ]
    if encoding == "MP3":
        alone |= {tag + first + end: 24_000, first + b"APETAGEX" + picture: 24_000}
        joined += [tag + first + tag + second, tag + first + end + tag + second]
    for contents, num_samples in alone.items():
        path.write_bytes(contents)
        assert count_samples(str(path)) == (len(read_audio(path)), "") == (num_samples, "")
    for contents in joined:
        path.write_bytes(contents)
        assert count_samples(str(path))[1].startswith(JOINED)
        with pytest.raises(AudioError, match=JOINED):
            read_audio(path, 0, 100)


def test_a_second_recording_far_behind_in_a_long_file(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "_OGG_HEAD", 5000)
    monkeypatch.setattr(audio, "_OGG_PAGE", 5000)
    for name in "ab":
        soundfile.write(tmp_path / name, noise(80_000).numpy(), SAMPLE_RATE, format="OGG")
    assert count_samples(str(tmp_path / "a")) == (80_000, "")
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes())
    assert count_samples(str(tmp_path / "a"))[1].startswith(JOINED)


def test_streams_side_by_side_are_one_recording(tmp_path):
    """Programs put a skeleton stream beside the audio: both begin before either goes on."""
    soundfile.write(tmp_path / "a", noise(24_000).numpy(), SAMPLE_RATE, format="OGG")
    contents = (tmp_path / "a").read_bytes()
    other = bytearray(ogg_page(b"fishead\0" + bytes(56)))
    other[5:6], other[14:18] = b"\2", b"side"
    first_page = 27 + contents[26] + sum(contents[27 : 27 + contents[26]])
    (tmp_path / "b").write_bytes(contents[:first_page] + other + contents[first_page:])
    assert not audio._is_joined(tmp_path / "b", None, "OGG")


# Rates


def noise(num_samples: int) -> Tensor:
    return torch.rand(num_samples, generator=torch.Generator().manual_seed(0)) - 0.5


@pytest.mark.parametrize("sample_rate", [8000, 11_025, 12_000, 22_050, 24_000, 32_000, 44_100, 48_000, 88_200, 96_000])
def test_ordinary_rates_are_torchaudios_bit_for_bit(sample_rate):
    waveform = noise(2 * sample_rate)
    assert torch.equal(resample_to_16k(waveform, sample_rate), resample(waveform, sample_rate, SAMPLE_RATE))


@pytest.mark.parametrize("sample_rate", [8000, 11_025, 22_050, 44_100, 48_000])
def test_resampled_length_is_the_one_that_is_counted(sample_rate):
    # torchaudio alone loses the last sample of 500,032 at 22,050 Hz and of 500,196 at 44,100 Hz.
    for num_frames in [1, 2, 3, 441, 442, 100_001, 500_032, 500_196]:
        resampled = resample_to_16k(torch.zeros(num_frames), sample_rate)
        assert len(resampled) == num_samples_at_16k(num_frames, sample_rate)


@pytest.mark.parametrize("sample_rate", [8012, 22_255, 44_056])
def test_other_rates_are_torchaudios(sample_rate):
    """The filter is that of torchaudio wherever it can still tabulate its own, in float32."""
    waveform = noise(sample_rate)
    expected = resample(waveform, sample_rate, SAMPLE_RATE)
    torch.testing.assert_close(resample_to_16k(waveform, sample_rate), expected[:16_000], rtol=0, atol=5e-4)


def test_no_rate_needs_a_large_table(monkeypatch):
    tables: list[int] = []

    def record(waveform: Tensor, rate: int, other: int) -> Tensor:
        tables.append(rate * other // math.gcd(rate, other) ** 2)
        return resample(waveform, rate, other)

    monkeypatch.setattr(torchaudio.functional, "resample", record)
    rates = [*range(1000, 384_001, 5_471), 5512, 11_127, 15_999, 16_001, 44_101, 48_001, 383_999]
    for rate in rates:
        assert len(resample_to_16k(noise(100), rate)) == num_samples_at_16k(100, rate)
    assert 0 < len(tables) < len(rates) and max(tables) <= 2_000_000  # float32


@pytest.mark.parametrize("sample_rate", [1000, 1001, 15_999, 16_001, 16_010, 44_101, 192_001, 383_999, 384_000])
def test_any_rate_keeps_the_pitch(monkeypatch, sample_rate):
    """A sine of 300 Hz is one, to its last second: the ratio is exact, and blocks fit together."""
    monkeypatch.setattr(audio, "_BLOCK_SECONDS", 2)
    seconds = torch.arange(5 * sample_rate, dtype=torch.float64) / sample_rate
    found = resample_to_16k(torch.sin(600 * torch.pi * seconds).float(), sample_rate)
    assert len(found) == 5 * SAMPLE_RATE
    expected = torch.sin(600 * torch.pi * torch.arange(5 * SAMPLE_RATE, dtype=torch.float64) / SAMPLE_RATE).float()
    inner = slice(200, -200)  # the filter reaches over the ends
    assert (found - expected)[inner].abs().max() < 0.02


@pytest.mark.parametrize("sample_rate", [8000, 16_001, 44_100, 44_101])
def test_array_blocks_and_crops_are_the_same_samples(tmp_path, monkeypatch, sample_rate):
    monkeypatch.setattr(audio, "_BLOCK_SECONDS", 2)
    waveform = noise(7 * sample_rate + 11)
    soundfile.write(tmp_path / "a.wav", waveform.numpy(), sample_rate, subtype="FLOAT")
    whole = resample_to_16k(waveform, sample_rate)
    assert len(whole) == num_samples_at_16k(len(waveform), sample_rate)
    assert torch.equal(read_audio(tmp_path / "a.wav"), whole)
    for offset, num_samples in ((0, 100), (31_000, 2000), (40_000, 50_000), (111_000, 1000)):
        assert torch.equal(read_audio(tmp_path / "a.wav", offset, num_samples), whole[offset:][:num_samples])
    for num_samples in (0, 1, 2 * sample_rate, 4 * sample_rate):  # none, and whole blocks
        assert len(resample_to_16k(waveform[:num_samples], sample_rate)) == num_samples_at_16k(num_samples, sample_rate)


@pytest.mark.parametrize("sample_rate", [5, 999, 384_001, 2**31 - 1])
def test_rates_that_no_recording_has(tmp_path, sample_rate):
    path = tmp_path / "a.wav"
    soundfile.write(path, tones(40_000), sample_rate)
    message = f"states a sample rate of {sample_rate} Hz, expected 1000 Hz to 384000 Hz"
    for read in (read_audio, lambda path: wav2vec2.extract(random_model(small_config("hubert")), path)):
        with pytest.raises(UserError, match=f"a.wav: {message}"):
            read(path)
    assert count_samples(str(path))[1].startswith(message)


def test_samples_must_be_finite(tmp_path):
    """Nothing else is asked of them, not even that their sum is finite."""
    path = tmp_path / "a.wav"
    for value, is_fine in ((3e38, True), (np.nan, False), (-np.inf, False)):
        soundfile.write(path, np.full(800, value), SAMPLE_RATE, subtype="FLOAT")
        if is_fine:
            assert len(read_audio(path)) == 800
        else:
            with pytest.raises(AudioError, match=r"a\.wav: 700 of samples 50 to 750 \(at 16 kHz\) are NaN or infinite"):
                read_audio(path, 50, 700)


# Files that cannot be read


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("out\nof order"),
        MemoryError("cannot allocate 8 GiB"),
        ValueError("of numpy"),
        ZeroDivisionError(),
        OSError(5, "Input/output error"),
        torch.cuda.OutOfMemoryError("of torch"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("place", ["read", "resample"])
def test_any_exception_is_the_fault_of_the_file(tmp_path, monkeypatch, error, place):
    for name in ("good.wav", "bad.wav"):
        soundfile.write(tmp_path / name, tones(48_000), SAMPLE_RATE if name == "good.wav" else 8000)
    bad = tmp_path / "bad.wav"

    def fails_for_bad(original: Callable) -> Callable:
        def function(first: object, *args: object, **options: object) -> object:
            if isinstance(first, Tensor) or first.samplerate == 8000:
                raise error
            return original(first, *args, **options)

        return function

    where, name = (soundfile.SoundFile, "read") if place == "read" else (audio, "_resample")
    monkeypatch.setattr(where, name, fails_for_bad(getattr(where, name)))
    with pytest.raises(AudioError) as caught:
        read_audio(bad)
    message = str(caught.value)
    assert message.startswith(f"{bad}: ") and "\n" not in message
    assert (str(error).replace("\n", " ") or type(error).__name__) in message or error.strerror in message

    manifest = Manifest(tmp_path / "a.tsv", tmp_path, np.array(["bad.wav", "good.wav"]), np.array([96_000, 48_000]))
    batch = SpeechDataset(manifest)[Crop((0,), (0,), 8000, seed=0, tops_up=False)]
    assert batch.bad_files == {str(bad): message} and batch.paths == [str(tmp_path / "good.wav")]

    errors: dict[int, UserError] = {}
    model = random_model(small_config("hubert"))
    results = list(wav2vec2.extract_iter(model, [bad, tmp_path / "good.wav"], on_error=errors.__setitem__))
    assert results[0] is None and results[1] is not None and str(errors[0]) == message
    if place == "read" and not isinstance(error, RuntimeError):
        assert count_samples(str(bad)) == (0, message.removeprefix(f"{bad}: "))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ModuleNotFoundError("no torchaudio"), UserError("install it")])
def test_what_is_not_the_fault_of_the_file(tmp_path, monkeypatch, error):
    soundfile.write(tmp_path / "a.wav", tones(48_000), 8000)
    monkeypatch.setattr(audio, "_resample", lambda *args: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)) as caught:
        read_audio(tmp_path / "a.wav")
    assert caught.value is error


def ogg_page(packet: bytes) -> bytes:
    """The first page of an Ogg file; its checksum is not right."""
    return b"OggS\0\2" + bytes(20) + bytes([1, len(packet)]) + packet


@pytest.mark.parametrize(
    ("contents", "kind"),
    [
        (ogg_page(b"\x7fFLAC\1\0\0\1fLaC\0\0\0\x22" + bytes(34)), "FLAC in Ogg"),
        (ogg_page(b"Speex   1.2" + bytes(69)), "Speex in Ogg"),
        (b"\0\0\0\x20ftypM4A \0\0\0\0", "MPEG-4"),
        (b"\x1aE\xdf\xa3\x9fB\x86\x81", "Matroska or WebM"),
        (b"#!AMR-WB\n", "AMR"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, contents, kind):
    path = tmp_path / "a.wav"
    path.write_bytes(contents + bytes(1000))
    with pytest.raises(AudioError, match=rf"it is {kind}.*ffmpeg -i IN OUT\.flac"):
        read_audio(path)
    assert f"it is {kind}" in count_samples(str(path))[1]


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    path.write_text("no audio")

    def refuse(path: Path, *args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(audio, "open", refuse, raising=False)
    with pytest.raises(AudioError, match=r"reading it fails \(Permission denied\)"):
        read_audio(path)
