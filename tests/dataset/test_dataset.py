"""From a manifest to a batch: parsing, the published bucketing, dealing to ranks, crops, reading audio."""

import itertools
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchaudio.functional import resample

import dataset
from dataset.batches import BatchSampler, Crop, TrainingSampler, make_batches
from dataset.manifest import Manifest, Names, parse_max_bad_files, read_manifest
from dataset.speech import MAX_REPLACEMENTS, AudioError, Batch, SpeechDataset, check_files, load_audio
from wav2vec2.audio import SAMPLE_RATE, num_samples_at_16k, resample_to_16k
from wav2vec2.errors import UserError

REFERENCE = json.loads((REPOSITORY / "tests" / "data" / "reference" / "batches.json").read_text())
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


@pytest.mark.parametrize("name", ["/elsewhere/a.flac", "../a.flac", "with space/ä ö.flac", " .flac"])
def test_manifest_takes_paths_as_they_are(tmp_path, name):
    path = tmp_path / "train.tsv"
    path.write_text(f"/root\n{name}\t5\n")
    manifest = read_manifest(path)
    assert manifest.paths == [name]
    assert manifest.full_path(0) == (name if name.startswith("/") else f"/root/{name}")


def test_manifest_that_lists_a_path_twice(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("/root\na.flac\t5\n\nb.flac\t5\na.flac\t6\nb.flac\t6\n")
    with pytest.raises(UserError, match=r"train\.tsv: line 5 lists 'a\.flac', which line 2 does"):
        read_manifest(path)


def test_manifest_survives_names_that_share_a_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "hash", lambda name: 7, raising=False)
    path = tmp_path / "train.tsv"
    path.write_text("/root\na.flac\t5\nb.flac\t6\n")
    assert read_manifest(path).paths == ["a.flac", "b.flac"]
    path.write_text("/root\na.flac\t5\na.flac\t6\n")
    with pytest.raises(UserError, match="line 3 lists"):
        read_manifest(path)


@given(st.lists(st.text(st.characters(codec="utf-8")) | st.just("\udce9.wav")))
def test_names_are_a_list_of_str(names):
    ours = Names(iter(names))
    assert len(ours) == len(names)
    assert ours == names and names == list(ours) and "\0".join(ours) == "\0".join(names)
    assert [ours[index] for index in range(-len(names), len(names))] == names + names
    assert pickle.loads(pickle.dumps(ours)) == ours
    assert ours != [*names, "one more"]
    for index in (len(names), -len(names) - 1):
        with pytest.raises(IndexError):
            ours[index]


# What two processes that look at every name copy for themselves, one forked and one spawned, in MB; and for
# comparison what a forked one copies of a list of str.
MEASURE = """
import io, sys
from multiprocessing.reduction import ForkingPickler
import torch.multiprocessing as mp
from dataset.manifest import read_manifest

def own_mb():
    lines = open("/proc/self/smaps_rollup").readlines()[1:]
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024

def look_at_all(names, answer):
    before = own_mb()
    for index in range(len(names)):
        names[index]
    answer.send(own_mb() - before)

if __name__ == "__main__":
    names = read_manifest(sys.argv[1]).paths
    for kind, given in (("fork", names), ("spawn", names), ("fork", list(names))):
        context = mp.get_context(kind)
        ours, theirs = context.Pipe()
        process = context.Process(target=look_at_all, args=(given, theirs))
        process.start()
        print(ours.recv())
        process.join()
    print(len(ForkingPickler.dumps(names)) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count memory in other units")
def test_processes_share_the_names_of_a_long_manifest(tmp_path):
    path = tmp_path / "train.tsv"
    names = (f"train-clean-360/{n % 2000}/{n % 300}/{n % 2000}-{n % 300}-{n:06d}.flac" for n in range(300_000))
    path.write_text("/root\n" + "".join(f"{name}\t5\n" for name in names))
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run([sys.executable, script, path], env=environment, capture_output=True, text=True, check=True)
    forked, spawned, list_forked, sent = (float(line) for line in result.stdout.split())
    assert forked < 3
    assert spawned < 3
    assert list_forked > 20
    assert sent < 0.01  # the text itself goes through shared memory


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


def test_noise_seeds_are_a_stream_of_their_own():
    batches = [[index] for index in range(40)]
    seeds = {}
    for seed, epoch in itertools.product([0, 1, 2], [0, 1, 2]):
        sampler = BatchSampler([5] * 40, batches, 1, 0, True, seed)
        for index in range(len(sampler)):
            crop = sampler.crop(epoch, index)
            assert 0 <= crop.seed < 2**32
            seeds[seed, epoch, index] = crop.seed
            assert crop.seed != np.random.SeedSequence([seed, epoch, index]).generate_state(1)[0]
    assert len(set(seeds.values())) == len(seeds) == 9 * 41


@settings(deadline=None, max_examples=50)
@given(
    num_batches=st.integers(1, 30),
    num_replicas=st.integers(1, 3),
    accum_grad=st.integers(1, 5),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
)
def test_accumulating_is_as_good_as_more_processes(num_batches, num_replicas, accum_grad, drop_last, shuffle):
    lengths = np.random.default_rng(0).integers(50, 100, 2 * num_batches)
    batches = make_batches(lengths, batch_size=2)

    def updates(num_replicas: int, accum_grad: int, epoch: int) -> list[set[Crop]]:
        samplers = [
            BatchSampler(lengths, batches, num_replicas, rank, shuffle, 3, drop_last, accum_grad=accum_grad)
            for rank in range(num_replicas)
        ]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        ranks = [list(sampler) for sampler in samplers]
        assert {len(crops) for crops in ranks} == {len(samplers[0])}
        assert len(samplers[0]) % accum_grad == 0
        return [
            {crop for crops in ranks for crop in crops[start : start + accum_grad]}
            for start in range(0, len(samplers[0]), accum_grad)
        ]

    if drop_last and num_batches < num_replicas * accum_grad:
        with pytest.raises(UserError, match=f"{num_batches} batches do not give each of {num_replicas} processes"):
            updates(num_replicas, accum_grad, 0)
        return
    for epoch in range(3):
        accumulated = updates(num_replicas, accum_grad, epoch)
        assert (
            accumulated == updates(num_replicas * accum_grad, 1, epoch) == updates(1, num_replicas * accum_grad, epoch)
        )
        crops = set().union(*accumulated)
        once = [crop for crop in crops if not crop.tops_up]
        assert len(crops) == len(accumulated) * num_replicas * accum_grad
        assert len(once) == min(num_batches, len(crops))
        assert len({crop.indices for crop in once}) == len(once)


def test_epochs_string_together_and_can_be_entered_anywhere():
    lengths = np.random.default_rng(0).integers(50, 100, 22)
    batches = make_batches(lengths, batch_size=2)
    sampler = BatchSampler(lengths, batches, 2, 1, True, seed=4, accum_grad=2)
    expected = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        expected += list(sampler)
    assert len(sampler) == 6
    for start in range(18):
        training = TrainingSampler(sampler, end=17, start=start)
        assert list(training) == expected[start:17]
        assert len(training) == 17


def test_crops_in_any_order():
    sampler = BatchSampler([50, 60, 70, 80], [[0], [1], [2], [3]], 1, 0, True, seed=4)
    wanted = [(epoch, index) for epoch in range(4) for index in range(5)]
    crops = {key: sampler.crop(*key) for key in wanted}
    for epoch in range(4):
        order = torch.randperm(4, generator=torch.Generator().manual_seed(4 + epoch)).tolist()
        assert [crops[epoch, index].indices[0] for index in range(5)] == [*order, order[0]]
    for epoch, index in np.random.default_rng(0).permutation(wanted).tolist():
        assert sampler.crop(epoch, index) == crops[epoch, index]
    for index in (-1, 5):
        with pytest.raises(IndexError):
            sampler.crop(0, index)


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
    assert first.seed != again.seed
    assert (first.tops_up, again.tops_up) == (False, True)


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
    batch = SpeechDataset(manifest)[Crop((1, 0), (30, 0), 800, seed=7, tops_up=False)]
    waveforms, lengths = batch[:2]
    assert waveforms.shape == (2, 800)
    assert waveforms.dtype == torch.float32
    assert lengths.tolist() == [800, 800]
    assert lengths.dtype == torch.int64
    assert torch.equal(waveforms[0], load_audio(tmp_path / "1.flac")[30:830])
    assert torch.equal(waveforms[1], load_audio(tmp_path / "0.flac")[:800])
    assert batch[2:] == ([str(tmp_path / "1.flac"), str(tmp_path / "0.flac")], 7, 2, {})
    assert SpeechDataset(manifest)[Crop((1, 0), (0, 0), 800, 7, tops_up=True)].weight == 0


def test_only_the_crop_is_decoded(tmp_path, monkeypatch):
    manifest = read_manifest(write_corpus(tmp_path, [50_000]))
    read, counts = soundfile.SoundFile.read, []
    monkeypatch.setattr(
        soundfile.SoundFile,
        "read",
        lambda file, frames, **options: counts.append(frames) or read(file, frames, **options),
    )
    SpeechDataset(manifest)[Crop((0,), (40_000,), 300, 0, False)]
    assert counts == [300]


def test_batches_do_not_depend_on_the_number_of_workers(tmp_path):
    manifest = read_manifest(write_corpus(tmp_path, list(range(800, 1000, 17))))
    batches = make_batches(manifest.lengths, batch_size=3)

    def load(num_workers: int) -> list[torch.Tensor]:
        sampler = BatchSampler(manifest.lengths, batches, 1, 0, shuffle=True, seed=5)
        sampler.set_epoch(1)
        loader = DataLoader(SpeechDataset(manifest), sampler=sampler, batch_size=None, num_workers=num_workers)
        return [batch.waveforms for batch in loader]

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


@pytest.mark.parametrize(
    ("damage", "words", "num_workers"),
    [
        (remove, "no such file", 0),
        (remove, "no such file", 1),
        (write_text, "cannot be decoded", 0),
        (shorten, "is 900 samples long (at 16 kHz), expected the manifest's 1000", 0),
        (cut, "0.flac", 0),
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
    assert message.endswith("run prepare_data.py again (the 0 files tried in its place fail too)")
    assert "\n" not in message


def test_file_shorter_than_asked(tmp_path):
    write_corpus(tmp_path, [900])
    with pytest.raises(AudioError, match=r"ends at sample 900 \(at 16 kHz\), expected 1000"):
        load_audio(tmp_path / "0.flac", 200, 800)
    with pytest.raises(AudioError, match="is 900 samples long"):
        load_audio(tmp_path / "0.flac", 0, 100, length=901)


# ---------------------------------------------------------------------------------------------- replacement


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
    manifest = read_manifest(write_corpus(tmp_path, [1000, 700, 900, 2000, 1100, 1100]))
    for number in bad:
        (tmp_path / f"{number}.flac").unlink()
    offset = int(manifest.lengths[index]) - 800
    batch = SpeechDataset(manifest)[Crop((index,), (offset,), 800, 0, False)]
    start = min(offset, int(manifest.lengths[read]) - 800)
    assert torch.equal(batch.waveforms[0], load_audio(tmp_path / f"{read}.flac")[start : start + 800])
    assert batch.paths == [str(tmp_path / f"{read}.flac")]
    assert set(batch.bad_files) == {str(tmp_path / f"{number}.flac") for number in bad}
    for path, reason in batch.bad_files.items():
        assert reason.startswith(f"{path}: no such file")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_replacements_do_not_depend_on_the_workers(tmp_path, num_workers):
    manifest = read_manifest(write_corpus(tmp_path, [1000, 900, 1100]))
    (tmp_path / "1.flac").unlink()
    sampler = BatchSampler(manifest.lengths, [[1, 2], [0]], 1, 0, shuffle=False, seed=0)
    loader = DataLoader(SpeechDataset(manifest), sampler=sampler, batch_size=None, num_workers=num_workers)
    first, second, again = loader
    assert isinstance(first, Batch)
    assert first.paths == [str(tmp_path / "0.flac"), str(tmp_path / "2.flac")]
    assert list(first.bad_files) == [str(tmp_path / "1.flac")]
    assert second.bad_files == {}
    assert (first.weight, second.weight, again.weight) == (2, 1, 0)
    assert isinstance(first.seed, int)
    assert torch.equal(first.waveforms, again.waveforms)
    assert torch.equal(first.waveforms[0], load_audio(tmp_path / "0.flac")[:900])


def test_mp3_may_promise_more_than_it_holds(tmp_path):
    path = tmp_path / "a.mp3"
    soundfile.write(path, noise(80_000), SAMPLE_RATE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    length = len(load_audio(path))
    assert length != soundfile.info(path).frames
    manifest = Manifest(tmp_path / "a.tsv", tmp_path, [path.name], np.array([length]))
    assert check_files(manifest, max_bad=0) == {}
    assert SpeechDataset(manifest)[Crop((0,), (5000,), length - 5000, 0, False)].bad_files == {}


def test_replacing_ends(tmp_path):
    manifest = read_manifest(write_corpus(tmp_path, list(range(900, 930))))
    for path in tmp_path.glob("*.flac"):
        path.unlink()
    with pytest.raises(AudioError, match=rf"7\.flac: no such file.*the {MAX_REPLACEMENTS} files tried") as error:
        SpeechDataset(manifest)[Crop((7,), (0,), 800, 0, False)]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["flac", "ogg", "mp3", "wav"])
def test_whatever_happens_to_a_file_it_is_read_or_replaced(tmp_path, suffix):
    rng = np.random.default_rng(0)
    good, bad = tmp_path / f"good.{suffix}", tmp_path / f"bad.{suffix}"
    soundfile.write(good, noise(20_000), SAMPLE_RATE)
    contents = good.read_bytes()
    manifest = Manifest(tmp_path / "a.tsv", tmp_path, [bad.name, good.name], np.array([20_000, 20_000]))
    num_replaced = 0
    for trial in range(40):
        damaged = bytearray(contents[: rng.integers(len(contents))] if trial % 2 else contents)
        for place in rng.integers(0, max(len(damaged), 1), 0 if trial % 2 else 3):
            damaged[place] = rng.integers(256)
        bad.write_bytes(damaged)
        batch = SpeechDataset(manifest)[Crop((0,), (int(rng.integers(12_000)),), 8000, 0, False)]
        assert batch.waveforms.isfinite().all()
        num_replaced += bool(batch.bad_files)
    assert num_replaced > 5


# ---------------------------------------------------------------------------------------------- check of files


def test_checked_files_are_spread_evenly(tmp_path):
    manifest = read_manifest(write_corpus(tmp_path, [10] * 50))
    for number in (0, 20, 21, 49):
        (tmp_path / f"{number}.flac").unlink()

    def found(sample: int) -> list[str]:
        return [Path(path).stem for path in check_files(manifest, max_bad=4, sample=sample)]

    assert found(256) == ["0", "20", "21", "49"]
    assert found(50) == ["0", "20", "21", "49"]
    assert found(8) == ["0", "21", "49"]  # 0, 7, 14, 21, 28, 35, 42, 49


def test_too_many_bad_files(tmp_path):
    manifest = read_manifest(write_corpus(tmp_path, [10] * 6))
    (tmp_path / "0.flac").unlink()
    (tmp_path / "4.flac").write_bytes(b"")
    soundfile.write(tmp_path / "5.flac", noise(11), SAMPLE_RATE)
    assert len(check_files(manifest, max_bad=3)) == 3
    with pytest.raises(UserError, match=r"train\.tsv: 3 of 6 files.*0\.flac.*5\.flac.*--max_bad_files") as error:
        check_files(manifest, max_bad=2)
    assert "\n" not in str(error.value)
    (tmp_path / "1.flac").unlink()
    with pytest.raises(UserError, match=r"train\.tsv: the corpus has moved or changed: 4 of 6.*4\.flac, \.\.\."):
        check_files(manifest, max_bad=6)


def test_root_that_has_moved(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("/no/such/root\na.flac\t5\n")
    with pytest.raises(UserError, match=r"train\.tsv.*/no/such/root does not exist.*prepare_data\.py"):
        check_files(read_manifest(path), max_bad=1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("5", 5), ("2000", 2000), ("0%", 0), ("1%", 9), ("0.7%", 6), ("33.34%", 333), ("100%", 999)],
)
def test_max_bad_files(text, expected):
    assert parse_max_bad_files(text, 999) == expected


def test_shares_are_exact():
    assert parse_max_bad_files("0.7%", 1000) == 7
    assert parse_max_bad_files("0.57%", 10_000) == 57


@pytest.mark.parametrize("text", ["", "-1", "1.5", "many", "101%", "-1%", "%", "5 %", "nan%", "1e3", "1/2%", "٣"])
def test_max_bad_files_errors(text):
    with pytest.raises(UserError, match=r"^--max_bad_files .*expected a number of files such as 5"):
        parse_max_bad_files(text, 100)
