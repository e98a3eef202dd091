"""Scores of labelled clips against the same by hand."""

import numpy as np
import pytest
import torch

from labels.scores import EqualErrorRate, Scored, Share, clip_results, score_of


def test_equal_error_rate():
    """0 where all pairs are told apart, 50 by chance; each drawn clip counts as often as it is drawn."""
    classes = np.repeat([0, 1, 2], 4)
    apart = EqualErrorRate(np.eye(3)[classes] + 0.01, classes)
    assert apart.value() == pytest.approx(0, abs=1e-9)
    draw = np.random.default_rng(0)
    many = np.arange(400) % 20
    assert EqualErrorRate(draw.standard_normal((400, 8)), many).value() == pytest.approx(50, abs=2)
    # By hand: same pairs score 1 and 0.6, others 0.8 and 0: at a threshold between 0.6 and 0.8 half of each is wrong.
    angles = np.arccos([1, 1, 0.8])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1)
    assert EqualErrorRate(vectors, np.array([0, 0, 1])).value() == pytest.approx(0, abs=1e-9)
    noisy = np.eye(3)[classes] + 0.7 * draw.standard_normal((12, 3))
    weights = draw.integers(0, 3, 12)
    repeated = np.repeat(np.arange(12), weights)
    whole = EqualErrorRate(noisy[repeated], classes[repeated])
    # A clip is not compared with its own copies.
    own = EqualErrorRate(noisy, classes).value(weights)
    assert own >= whole.value() - 1e-9


def test_shares_and_their_intervals():
    share = Share(np.array([1.0, 0, 2]), np.array([1.0, 1, 2]))
    assert share.value() == 75
    assert share.value(np.array([0, 2, 1])) == 50
    draw = np.random.default_rng(0)
    right = (draw.uniform(size=400) < 0.7).astype(float)
    found = Scored([Share(right, np.ones(400))] * 2, 400).summary()
    low, high = found["interval"]
    deviation = 100 * (0.7 * 0.3 / 400) ** 0.5
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.15)
    assert found["std"] == 0 and found["values"] == [found["mean"]] * 2


def test_scores():
    logits = torch.eye(4)[torch.tensor([[1, 1, 0, 1, 2], [3, 0, 0, 0, 0]])]
    lengths = torch.tensor([5, 1])
    # "0 0 1" is found where "0 2" is wanted; behind one frame nothing counts.
    results = clip_results("text", logits, lengths, torch.tensor([[0, 2], [2, -1]]))
    assert results == [[2.0, 2.0], [0.0, 1.0]] and score_of("text", results, ()).value() == pytest.approx(200 / 3)
    frames = torch.tensor([[1, -1, 1, 1, 2], [3, -1, -1, -1, -1]])
    assert clip_results("segments", logits, lengths, frames) == [[3.0, 4.0], [1.0, 1.0]]
    assert clip_results("clips", logits[:, 0], lengths, torch.tensor([[1], [2]])) == [[1.0, 1.0], [0.0, 1.0]]
