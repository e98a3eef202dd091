"""From a manifest to a batch: parsing, the published bucketing, dealing to ranks, crops, reading audio."""

import itertools
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchaudio.functional import resample

from dataset import (
    SAMPLE_RATE,
    AudioError,
    BatchSampler,
    Crop,
    SpeechDataset,
    load_audio,
    make_batches,
    num_samples_at_16k,
    read_manifest,
    resample_to_16k,
)
from wav2vec2.errors import UserError

REFERENCE = json.loads((Path(__file__).parent / "data" / "reference" / "batches.json").read_text())
CASES = [
    ({("max_tokens" if k == "max_token_count" else k): v for k, v in case["args"].items()}, case)
    for case in REFERENCE["cases"]
]
SPLITS = [(args, case["batches"], split) for args, case in CASES for split in case["distributed"]]


def noise(num_samples: int, seed: int = 0, num_channels: int = 1) -> np.ndarray:
    """Faint noise (num_samples, num_channels) float32, another for each seed."""
    return (0.1 * np.random.default_rng(seed).standard_normal((num_samples, num_channels))).astype(np.float32)


def write_corpus(folder: Path, lengths: list[int]) -> Path:
    """Files 0.flac, 1.flac, ... of the given lengths and their manifest."""
    for number, length in enumerate(lengths):
        soundfile.write(folder / f"{number}.flac", noise(length, number), SAMPLE_RATE)
    manifest = folder / "train.tsv"
    manifest.write_text(f"{folder}\n" + "".join(f"{n}.flac\t{length}\n" for n, length in enumerate(lengths)))
    return manifest


# ---------------------------------------------------------------------------------------------- manifest


def test_manifest_is_read(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_bytes("\ufeff/some/root\r\na/b c.flac\t16000\r\n\r\nä/ö\u2028x\ty.wav\t7\r\n".encode())
    manifest = read_manifest(path)
    assert manifest.root == Path("/some/root")
    assert manifest.paths == ["a/b c.flac", "ä/ö\u2028x\ty.wav"]
    assert manifest.lengths.tolist() == [16000, 7]


def test_manifest_keeps_names_that_are_not_utf8(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_bytes(b"/root\n\xe9.wav\t5\n")
    assert read_manifest(path).paths[0].encode(errors="surrogateescape") == b"\xe9.wav"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["line 1"]),
        ("\n", ["line 1"]),
        ("a.flac\t100\n", ["line 1", "folder"]),
        ("/root\n", ["no utterance"]),
        ("/root\na.flac\t100\nb.flac 100\n", ["line 3", "b.flac 100", "tab"]),
        ("/root\n\nb.flac\tmany\n", ["line 3", "many"]),
        ("/root\nb.flac\t0\n", ["line 2", "positive"]),
        ("/root\nb.flac\t-5\n", ["line 2"]),
        ("/root\nb.flac\t1.5\n", ["line 2"]),
        ("/root\n\t100\n", ["line 2"]),
    ],
)
def test_manifest_errors_name_file_and_line(tmp_path, content, words):
    path = tmp_path / "train.tsv"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        read_manifest(path)
    message = str(error.value)
    assert all(word in message for word in [str(path), "prepare_data.py", *words])
    assert "\n" not in message


def test_missing_manifest_names_those_that_are_there(tmp_path):
    (tmp_path / "train100.tsv").touch()
    with pytest.raises(UserError, match=r"train960\.tsv.*train100.*--train_subset"):
        read_manifest(tmp_path / "train960.tsv")


def test_manifest_of_librispeech_size_is_read_in_time(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("/root\n" + "".join(f"train-clean-360/{n}/{n}-{n}.flac\t{n + 1}\n" for n in range(300_000)))
    start = time.perf_counter()
    assert len(read_manifest(path).paths) == 300_000
    assert time.perf_counter() - start < 2


# ---------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(("args", "case"), CASES)
def test_batches_are_the_published_ones(args, case):
    assert make_batches(REFERENCE["lengths"], **args) == case["batches"]


@pytest.mark.parametrize(("args", "batches", "split"), SPLITS)
def test_ranks_get_the_published_batches(args, batches, split):
    samplers = [
        BatchSampler(REFERENCE["lengths"], batches, split["world_size"], rank, False, 0, split["drop_last"])
        for rank in range(split["world_size"])
    ]
    dealt = [[list(crop.indices) for crop in sampler] for sampler in samplers]
    assert [len(batches) for batches in dealt] == split["batches_per_rank"] == [len(sampler) for sampler in samplers]
    assert split["ranks"] is None or dealt == split["ranks"]


lengths_strategy = st.lists(st.integers(1, 300_000), min_size=1, max_size=60)


@settings(deadline=None)
@given(
    lengths=lengths_strategy, num_buckets=st.integers(1, 50), slack=st.integers(0, 900_000), seed=st.none() | st.just(3)
)
def test_batches_hold_each_utterance_once_within_budget(lengths, num_buckets, slack, seed):
    max_tokens = max(lengths) + slack
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    batches = make_batches(lengths, num_buckets, max_tokens=max_tokens, generator=generator)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in batch) <= max_tokens for batch in batches)
    for batch, following in itertools.pairwise(batches):
        assert sum(lengths[index] for index in batch) + lengths[following[0]] > max_tokens


def test_shuffling_stays_inside_buckets():
    lengths = np.random.default_rng(0).integers(0, 1000, 500)
    (plain,) = make_batches(lengths, num_buckets=10, batch_size=500, min_len=1, max_len=999)
    generator = torch.Generator().manual_seed(0)
    (shuffled,) = make_batches(lengths, num_buckets=10, batch_size=500, min_len=1, max_len=999, generator=generator)
    assert shuffled != plain
    assert sorted(shuffled) == sorted(plain)
    assert (lengths[shuffled] // 100.1).tolist() == (lengths[plain] // 100.1).tolist()


def test_length_limits_are_inclusive():
    assert make_batches([9, 10, 20, 21], batch_size=4, min_len=10, max_len=20) == [[1, 2]]


def test_crops_count_what_is_read_of_them():
    lengths = [40, 50, 60, 70]
    assert make_batches(lengths, max_tokens=100) == [[0, 1], [2], [3]]
    assert make_batches(lengths, max_tokens=100, max_crop=25) == [[0, 1, 2, 3]]
    assert make_batches(lengths, max_tokens=100, max_len=60, max_crop=25) == [[0, 1, 2]]  # limits are of the whole


def test_no_utterance_within_limits():
    with pytest.raises(UserError, match=r"left of 2: .*0\.50 s to 1\.00 s.*--min_seconds 2 and --max_seconds 15\.625"):
        make_batches([8000, 16000], max_tokens=1e6, min_len=32_000, max_len=250_000)
    with pytest.raises(UserError, match=r"prepare_data\.py"):
        make_batches([], max_tokens=1e6)


def test_budget_below_the_longest_utterance():
    with pytest.raises(UserError, match=r"--seconds_per_batch 5 .*15\.001 s; give at least 15\.001"):
        make_batches([32_000, 240_001, 900_000], max_tokens=80_000, min_len=32_000, max_len=250_000)


def test_one_budget_must_be_given():
    with pytest.raises(ValueError, match="either"):
        make_batches([1])
    with pytest.raises(ValueError, match="either"):
        make_batches([1], max_tokens=2, batch_size=2)


# ---------------------------------------------------------------------------------------------- sampler


@settings(deadline=None)
@given(
    num_batches=st.integers(1, 30),
    num_replicas=st.integers(1, 12),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_every_rank_gets_as_many_and_every_batch_is_used(num_batches, num_replicas, shuffle, epoch):
    batches = [[index] for index in range(num_batches)]
    dealt = []
    for rank in range(num_replicas):
        sampler = BatchSampler([5] * num_batches, batches, num_replicas, rank, shuffle, seed=1)
        sampler.set_epoch(epoch)
        dealt.append([crop.indices[0] for crop in sampler])
        assert len(dealt[-1]) == len(sampler)
    assert len({len(indices) for indices in dealt}) == 1
    times = Counter(index for indices in dealt for index in indices)
    assert sorted(times) == list(range(num_batches))
    assert max(times.values()) - min(times.values()) <= 1


def test_crops_depend_on_seed_epoch_and_position_only():
    lengths = np.random.default_rng(0).integers(50, 100, 64)
    batches = make_batches(lengths, batch_size=4)

    def in_order(num_replicas: int, epoch: int = 2, seed: int = 7) -> list[Crop]:
        ranks = []
        for rank in range(num_replicas):
            sampler = BatchSampler(lengths, batches, num_replicas, rank, True, seed)
            sampler.set_epoch(epoch)
            torch.rand(rank + 1)  # the global generators stand elsewhere on each rank
            np.random.rand(rank + 1)
            ranks.append(list(sampler))
        return [crop for step in zip(*ranks, strict=True) for crop in step][: len(batches)]

    assert in_order(1) == in_order(1) == in_order(3) == in_order(16)
    assert in_order(1) != in_order(1, epoch=3)
    assert in_order(1) != in_order(1, seed=8)


@settings(deadline=None)
@given(lengths=lengths_strategy, max_crop=st.none() | st.integers(1, 300_000), shuffle=st.booleans())
def test_crops_stay_inside_and_share_the_shortest(lengths, max_crop, shuffle):
    batches = make_batches(np.minimum(lengths, max_crop or max(lengths)), batch_size=5)
    for crop in BatchSampler(lengths, batches, 1, 0, shuffle, seed=0, max_crop=max_crop):
        taken = [lengths[index] for index in crop.indices]
        assert crop.num_samples == min([*taken, max_crop or max(lengths)])
        assert all(0 <= offset <= n - crop.num_samples for offset, n in zip(crop.offsets, taken, strict=True))
        assert shuffle or not any(crop.offsets)


def test_offsets_reach_both_ends():
    sampler = BatchSampler([10, 13], [[0, 1]], 1, 0, shuffle=True, seed=0)
    offsets = Counter()
    for epoch in range(200):
        sampler.set_epoch(epoch)
        offsets.update(next(iter(sampler)).offsets[1:])
    assert set(offsets) == {0, 1, 2, 3}
    assert min(offsets.values()) > 25


def test_a_batch_that_tops_up_is_cropped_anew():
    first, again = BatchSampler([10, 10_000], [[0, 1]], 1, 0, shuffle=True, seed=0)
    assert first.indices == again.indices
    assert first.offsets != again.offsets


def test_sampler_errors():
    with pytest.raises(UserError, match="--seed -1"):
        BatchSampler([5], [[0]], 1, 0, True, seed=-1)
    with pytest.raises(UserError, match=r"1 batches.*2 processes.*--seconds_per_batch"):
        BatchSampler([5], [[0]], 2, 0, True, seed=0, drop_last=True)
    with pytest.raises(ValueError, match="rank"):
        BatchSampler([5], [[0]], 2, 2, True, seed=0)


# ---------------------------------------------------------------------------------------------- audio


@pytest.mark.parametrize(
    ("suffix", "subtype", "num_channels"),
    [("flac", "PCM_16", 1), ("wav", "PCM_24", 2), ("wav", "FLOAT", 1), ("ogg", "VORBIS", 1), ("mp3", None, 1)],
)
def test_part_of_a_file_is_the_slice_of_the_whole(tmp_path, suffix, subtype, num_channels):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, noise(20_000, num_channels=num_channels), SAMPLE_RATE, subtype=subtype)
    whole = load_audio(path)
    assert whole.shape == (20_000,)
    assert whole.dtype == torch.float32
    for offset, num_samples in [(0, 20_000), (0, 1), (19_999, 1), (7001, 4567)]:
        assert torch.equal(load_audio(path, offset, num_samples), whole[offset : offset + num_samples])
    assert torch.equal(load_audio(path, 12_345), whole[12_345:])


@pytest.mark.parametrize(("sample_rate", "num_channels"), [(8000, 1), (48_000, 2), (44_100, 1)])
def test_other_rates_and_channels_become_16_khz_mono(tmp_path, sample_rate, num_channels):
    path = tmp_path / "a.wav"
    audio = noise(sample_rate + 7, num_channels=num_channels)
    soundfile.write(path, audio, sample_rate, subtype="FLOAT")
    expected = resample(torch.from_numpy(audio.mean(axis=1)), sample_rate, SAMPLE_RATE)
    whole = load_audio(path)
    assert whole.shape == (num_samples_at_16k(len(audio), sample_rate),)
    torch.testing.assert_close(whole, expected)
    assert torch.equal(load_audio(path, 5000, 3000), whole[5000:8000])


@pytest.mark.parametrize("sample_rate", [8000, 11_025, 22_050, 44_100, 48_000])
def test_resampled_length_is_the_one_in_the_manifest(sample_rate):
    # torchaudio alone loses the last sample of 500,032 at 22,050 Hz and of 500,196 at 44,100 Hz.
    for num_frames in [1, 2, 3, 441, 442, 100_001, 500_032, 500_196]:
        resampled = resample_to_16k(torch.zeros(num_frames), sample_rate)
        assert len(resampled) == num_samples_at_16k(num_frames, sample_rate)


def test_dataset_reads_the_crops(tmp_path):
    manifest = read_manifest(write_corpus(tmp_path, [900, 1000]))
    waveforms, lengths = SpeechDataset(manifest)[Crop((1, 0), (30, 0), 800)]
    assert waveforms.shape == (2, 800)
    assert waveforms.dtype == torch.float32
    assert lengths.tolist() == [800, 800]
    assert lengths.dtype == torch.int64
    assert torch.equal(waveforms[0], load_audio(tmp_path / "1.flac")[30:830])
    assert torch.equal(waveforms[1], load_audio(tmp_path / "0.flac")[:800])


def test_batches_do_not_depend_on_the_number_of_workers(tmp_path):
    manifest = read_manifest(write_corpus(tmp_path, list(range(800, 1000, 17))))
    batches = make_batches(manifest.lengths, batch_size=3)

    def load(num_workers: int) -> list[torch.Tensor]:
        sampler = BatchSampler(manifest.lengths, batches, 1, 0, shuffle=True, seed=5)
        sampler.set_epoch(1)
        loader = DataLoader(SpeechDataset(manifest), sampler=sampler, batch_size=None, num_workers=num_workers)
        return [waveforms for waveforms, _ in loader]

    alone, shared = load(0), load(2)
    assert len(alone) == len(shared) == len(batches) + 1
    assert all(torch.equal(*pair) for pair in zip(alone, shared, strict=True))


def remove(path: Path) -> None:
    path.unlink()


def write_text(path: Path) -> None:
    path.write_text("not audio")


def shorten(path: Path) -> None:
    soundfile.write(path, noise(900), SAMPLE_RATE)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-800])


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove, "no such file"),
        (write_text, "cannot be decoded"),
        (shorten, "ends at sample 900 (at 16 kHz), expected 1000"),
        (cut, "0.flac"),
    ],
)
def test_bad_file_is_one_line_also_from_a_worker(tmp_path, damage, words, num_workers):
    manifest = read_manifest(write_corpus(tmp_path, [1000]))
    damage(tmp_path / "0.flac")
    sampler = BatchSampler(manifest.lengths, [[0]], 1, 0, shuffle=False, seed=0)
    loader = DataLoader(SpeechDataset(manifest), sampler=sampler, batch_size=None, num_workers=num_workers)
    with pytest.raises(AudioError) as error:
        list(loader)
    message = str(error.value)
    assert message.startswith(str(tmp_path / "0.flac"))
    assert words in message
    assert message.endswith("run prepare_data.py again")
    assert "\n" not in message


def test_root_that_has_moved(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("/no/such/root\na.flac\t5\n")
    with pytest.raises(UserError, match=r"train\.tsv.*/no/such/root does not exist.*prepare_data\.py"):
        SpeechDataset(read_manifest(path))
