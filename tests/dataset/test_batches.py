"""From lengths to crops: the published bucketing and dealing, and what crops and seeds depend on."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import REFERENCE
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.batches import BatchSampler, Crop, TrainingSampler, make_batches
from wav2vec2.files.errors import UserError

PUBLISHED = json.loads((REFERENCE / "batches.json").read_text())
CASES = [
    ({("max_tokens" if name == "max_token_count" else name): value for name, value in case["args"].items()}, case)
    for case in PUBLISHED["cases"]
]
SPLITS = [(case["batches"], split) for _, case in CASES for split in case["distributed"]]
LENGTHS = st.lists(st.integers(1, 300_000), min_size=1, max_size=60)


# ---------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(("args", "case"), CASES)
def test_batches_are_the_published_ones(args, case):
    assert make_batches(PUBLISHED["lengths"], **args) == case["batches"]


@pytest.mark.parametrize(("batches", "split"), SPLITS)
def test_ranks_get_the_published_batches(batches, split):
    samplers = [
        BatchSampler(PUBLISHED["lengths"], batches, split["world_size"], rank, False, 0, split["drop_last"])
        for rank in range(split["world_size"])
    ]
    dealt = [[list(crop.indices) for crop in sampler] for sampler in samplers]
    assert [len(batches) for batches in dealt] == split["batches_per_rank"] == [len(sampler) for sampler in samplers]
    assert split["ranks"] is None or dealt == split["ranks"]


@settings(deadline=None)
@given(lengths=LENGTHS, num_buckets=st.integers(1, 50), slack=st.integers(0, 900_000), seed=st.none() | st.just(3))
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


def test_limits_are_inclusive_and_of_whole_utterances():
    assert make_batches([9, 10, 20, 21], batch_size=4, min_len=10, max_len=20) == [[1, 2]]
    assert make_batches([40, 50, 60, 70], max_tokens=100) == [[0, 1], [2], [3]]
    # A crop counts what is read of it.
    assert make_batches([40, 50, 60, 70], max_tokens=100, max_crop=25) == [[0, 1, 2, 3]]
    assert make_batches([40, 50, 60, 70], max_tokens=100, max_len=60, max_crop=25) == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("lengths", "budget", "message"),
    [
        ([8000, 16_000], 1e6, r"none of 2 utterances lasts 2\.000 s to 15\.625 s.*0\.500 s to 1\.000 s"),
        ([], 1e6, "none of 0 utterances"),
        ([32_000, 240_001, 900_000], 80_000, r"longest utterance lasts 15\.001 s, a batch holds 5\.000 s"),
    ],
)
def test_no_batches(lengths, budget, message):
    with pytest.raises(UserError, match=message):
        make_batches(lengths, max_tokens=budget, min_len=32_000, max_len=250_000)


# ---------------------------------------------------------------------------------------------- sampler


def crops_of(sampler: BatchSampler, epoch: int = 0) -> list[Crop]:
    return [sampler.crop(epoch, index) for index in range(len(sampler))]


@settings(deadline=None)
@given(num_batches=st.integers(1, 30), num_replicas=st.integers(1, 12), shuffle=st.booleans(), epoch=st.integers(0, 3))
def test_every_rank_gets_as_many_and_every_batch_is_used(num_batches, num_replicas, shuffle, epoch):
    batches = [[index] for index in range(num_batches)]
    dealt = [
        [
            crop.indices[0]
            for crop in crops_of(BatchSampler([5] * num_batches, batches, num_replicas, rank, shuffle, 1), epoch)
        ]
        for rank in range(num_replicas)
    ]
    assert len({len(indices) for indices in dealt}) == 1
    times = Counter(index for indices in dealt for index in indices)
    assert sorted(times) == list(range(num_batches))
    assert max(times.values()) - min(times.values()) <= 1


def test_crops_and_seeds_are_those_of_earlier_versions():
    """A run of an earlier version is continued with the batches that it would have had."""
    sampler = BatchSampler([500, 400, 450, 300, 700, 600], [[0, 1], [2, 3], [4, 5]], 2, 1, True, seed=2022)
    assert [(c.indices, c.offsets, c.num_samples, c.seed, c.tops_up) for c in crops_of(sampler, epoch=3)] == [
        ((0, 1), (86, 0), 400, 2066559997, False),
        ((2, 3), (32, 0), 300, 2448059073, True),
    ]


def test_crops_depend_on_seed_epoch_and_position_only():
    lengths = np.random.default_rng(0).integers(50, 100, 64)
    batches = make_batches(lengths, batch_size=4)

    def in_order(num_replicas: int, epoch: int = 2, seed: int = 7) -> list[Crop]:
        ranks = []
        for rank in range(num_replicas):
            torch.rand(rank + 1)  # the global generators stand elsewhere on each rank
            np.random.rand(rank + 1)
            ranks.append(crops_of(BatchSampler(lengths, batches, num_replicas, rank, True, seed), epoch))
        return [crop for step in zip(*ranks, strict=True) for crop in step][: len(batches)]

    assert in_order(1) == in_order(1) == in_order(3) == in_order(16)
    assert in_order(1) != in_order(1, epoch=3)
    assert in_order(1) != in_order(1, seed=8)


def test_noise_seeds_are_a_stream_of_their_own():
    seeds = {}
    for seed, epoch in itertools.product([0, 1, 2], [0, 1, 2]):
        for index, crop in enumerate(
            crops_of(BatchSampler([5] * 40, [[n] for n in range(40)], 1, 0, True, seed), epoch)
        ):
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
        ranks = [
            crops_of(BatchSampler(lengths, batches, num_replicas, rank, shuffle, 3, drop_last, None, accum_grad), epoch)
            for rank in range(num_replicas)
        ]
        assert {len(crops) % accum_grad for crops in ranks} == {0}
        return [
            {crop for crops in ranks for crop in crops[start : start + accum_grad]}
            for start in range(0, len(ranks[0]), accum_grad)
        ]

    for epoch in range(3):
        accumulated = updates(num_replicas, accum_grad, epoch)
        shared, alone = (
            updates(*way, epoch) for way in ((num_replicas * accum_grad, 1), (1, num_replicas * accum_grad))
        )
        assert accumulated == shared == alone
        crops = set().union(*accumulated)
        once = [crop for crop in crops if not crop.tops_up]
        assert len(crops) == len(accumulated) * num_replicas * accum_grad
        assert len(once) == len({crop.indices for crop in once}) == min(num_batches, len(crops))


def test_a_resumed_run_goes_on_anywhere():
    lengths = np.random.default_rng(0).integers(50, 100, 22)
    sampler = BatchSampler(lengths, make_batches(lengths, batch_size=2), 2, 1, True, seed=4, accum_grad=2)
    expected = [crop for epoch in range(3) for crop in crops_of(sampler, epoch)]
    assert len(sampler) == 6 and list(sampler) == expected[:6]
    for start in range(18):
        training = TrainingSampler(sampler, end=17, start=start)
        assert list(training) == expected[start:17]
        assert len(training) == 17


def test_crops_in_any_order():
    sampler = BatchSampler([50, 60, 70, 80], [[0], [1], [2], [3]], 1, 0, True, seed=4)
    crops = {(epoch, index): crop for epoch in range(4) for index, crop in enumerate(crops_of(sampler, epoch))}
    for epoch in range(4):
        order = torch.randperm(4, generator=torch.Generator().manual_seed(4 + epoch)).tolist()
        assert [crops[epoch, index].indices[0] for index in range(5)] == [*order, order[0]]
    for epoch, index in np.random.default_rng(0).permutation(list(crops)).tolist():
        assert sampler.crop(epoch, index) == crops[epoch, index]


@settings(deadline=None)
@given(lengths=LENGTHS, max_crop=st.none() | st.integers(1, 300_000), shuffle=st.booleans())
def test_crops_stay_inside_and_share_the_shortest(lengths, max_crop, shuffle):
    batches = make_batches(np.minimum(lengths, max_crop or max(lengths)), batch_size=5)
    for crop in BatchSampler(lengths, batches, 1, 0, shuffle, seed=0, max_crop=max_crop):
        taken = [lengths[index] for index in crop.indices]
        assert crop.num_samples == min([*taken, max_crop or max(lengths)])
        assert all(0 <= offset <= n - crop.num_samples for offset, n in zip(crop.offsets, taken, strict=True))
        assert shuffle or not any(crop.offsets)


def test_offsets_reach_both_ends():
    sampler = BatchSampler([10, 13], [[0, 1]], 1, 0, shuffle=True, seed=0)
    offsets = Counter(sampler.crop(epoch, 0).offsets[1] for epoch in range(200))
    assert set(offsets) == {0, 1, 2, 3}
    assert min(offsets.values()) > 25


def test_a_batch_that_tops_up_is_cropped_anew():
    first, again = BatchSampler([10, 10_000], [[0, 1]], 1, 0, shuffle=True, seed=0)
    assert first.indices == again.indices
    assert first.offsets != again.offsets
    assert first.seed != again.seed
    assert (first.tops_up, again.tops_up) == (False, True)
