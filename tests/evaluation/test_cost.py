"""Costs of models, and tables of kept units, are what they claim to be."""

import pytest
import torch
from helpers import hubert_base_flops, random_model, save_small_model, small_config

from evaluation import cost
from evaluation.tables import architecture_tables, unit_counts
from wav2vec2.files import checkpoint
from wav2vec2.model import hubert_base


def test_architecture():
    wavlm = small_config("wavlm", encoder_use_attention=[True, False, True])
    assert unit_counts(wavlm)["heads"] == [4, 0, 4]
    config = small_config("hubert", encoder_num_heads=[1, 2, 3], encoder_use_feed_forward=[True, True, False])
    counts = {"conv channels": [10, 12, 8, 9], "heads": [1, 2, 3], "FFN dimensions": [20, 20, 0]}
    assert unit_counts(config) == counts
    layers, extractor = architecture_tables(wavlm, config)
    assert layers.rows[1:] == [["2", "2/0", "20/20"], ["3", "3/4", "0/20"]]
    assert str(extractor).splitlines()[1:3] == ["conv layer  channels", "0              10/10"]
    narrow = {**config, "encoder_embed_dim": 12, "encoder_pos_conv_kernel": 4}
    *_, shared = architecture_tables(config, narrow)
    assert shared.rows == [["dimensions of a frame", "12/16"], ["taps of the positional convolution", "4/8"]]


def test_macs_of_hubert_base():
    with torch.device("meta"):
        config = hubert_base().config
    macs = cost.macs_per_second(config)
    num_samples = round(cost.UTTERANCE_SECONDS * 16_000)
    assert macs["total"] == pytest.approx(hubert_base_flops(num_samples) / 2 / cost.UTTERANCE_SECONDS, rel=2e-3)
    # By hand: 3200, 1600, 800, 400, 200, 100 and 50 outputs a second.
    conv = 512 * (3200 * 10 + 512 * (3 * (1600 + 800 + 400 + 200) + 2 * (100 + 50)))
    assert macs["conv"] == pytest.approx(conv, rel=5e-3)
    # What no mask prunes: the projection, and a positional convolution of 128 frames in 16 groups (and its padding).
    assert macs["projection"] == pytest.approx(50 * (512 * 768 + 768 * 768 // 16 * 128), rel=1e-2)
    assert macs["attention"] == pytest.approx(
        50 * 12 * (4 * 768 * 768 + 2 * 768 * 50 * cost.UTTERANCE_SECONDS), rel=1e-2
    )
    assert macs["feed_forward"] == pytest.approx(50 * 12 * 2 * 768 * 3072, rel=1e-2)
    assert sum(value for part, value in macs.items() if part != "total") == macs["total"]
    assert cost.superb_seconds() * macs["total"] == pytest.approx(1.669e12)


def test_cost_of_a_file_and_speed(tmp_path):
    path = save_small_model(tmp_path / "model.pth", "hubert", "base")
    model = checkpoint.load_model(path).eval()
    found = cost.cost(model, path.stat().st_size)
    assert found["num_params"] == model.get_num_params() and found["num_bytes"] == path.stat().st_size
    (entries,) = cost.measure_speed([model.extract_features], [0.1, 0.2], torch.device("cpu"))
    assert [(entry["seconds"], entry["batch"]) for entry in entries] == [(0.1, 1), (0.2, 1)]
    assert all(entry["real_time_factor"] > 0 and entry["threads"] == 1 for entry in entries)


def test_turns():
    """Medians, and ratios to the first that a slow turn does not move."""
    clock = {"first": iter([2.0, 20.0, 4.0]), "second": iter([1.0, 10.0, 2.0])}
    order = []

    def work(name):
        order.append(name)
        return next(clock[name])

    found = cost.take_turns({name: lambda name=name: work(name) for name in clock}, 3)
    assert found == {"first": (4.0, 1.0), "second": (2.0, 2.0)}
    assert order == ["first", "second", "second", "first", "first", "second"]


def test_real_time_factor_is_work_per_second_of_audio(monkeypatch):
    model = random_model(small_config("hubert"))
    monkeypatch.setattr(cost, "take_turns", lambda work, repetitions: {name: (3.0, 1.0) for name in work})
    (entries,) = cost.measure_speed([model.extract_features], [0.5], torch.device("cpu"))
    assert entries[0]["real_time_factor"] == 6
