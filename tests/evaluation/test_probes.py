"""Probes find what features know, and nothing else; quality lies between the control and the teacher."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import random_model, small_config

from evaluation import features, probes
from evaluation.measure import figure_of_merit
from labels import lists
from labels.scores import Scored, Share
from wav2vec2.audio import read_audio
from wav2vec2.files.errors import UserError


def synthetic_probe(num_train: int = 60, num_test: int = 60) -> tuple[lists.Probe, torch.Tensor, torch.Tensor]:
    """Three classes that only layer 2 of four can tell apart, and its features are the smallest."""
    generator = torch.Generator().manual_seed(0)
    clips, features = {}, {}
    for split, count in (("train", num_train), ("test", num_test)):
        classes = torch.arange(count) % 3
        values = 100 * torch.randn(count, 4, 8, generator=generator)
        values[:, 2] = 0.01 * (
            torch.nn.functional.one_hot(classes, 8) + 0.2 * torch.randn(count, 8, generator=generator)
        )
        clips[split] = tuple(lists.Clip(Path(f"{split}{n}"), label, n) for n, label in enumerate(classes.tolist()))
        features[split] = values
    probe = lists.Probe("three", Path("three.tsv"), "clips", ("a", "b", "c"), clips["train"], clips["test"])
    return probe, features["train"], features["test"]


def test_a_probe_finds_the_layer_that_knows():
    probe, train, test = synthetic_probe()
    found = probes.run_pooled(train, test, probe, seed=0)
    assert found.score.value() > 95
    assert sum(found.layer_weights) == pytest.approx(1) and np.argmax(found.layer_weights) == 2
    assert found.layer_weights[2] > 0.5
    again = probes.run_pooled(train, test, probe, seed=0)
    assert (found.score.value(), found.layer_weights) == (again.score.value(), again.layer_weights)


def test_a_probe_of_noise_is_near_chance():
    probe, train, test = synthetic_probe(num_test=600)
    found = probes.run_pooled(torch.randn_like(train), torch.randn_like(test), probe, seed=0)
    assert abs(found.score.value() - 100 / 3) < 8
    sizes = {"num_classes": 3, "num_train": 60, "num_test": 600}
    about = {"kind": "clips", "metric": "accuracy", "chance": pytest.approx(100 / 3)}
    assert probes.summary(probe) == {**sizes, **about}


def test_neither_test_clips_nor_constants_choose_anything():
    probe, train, test = synthetic_probe()
    found, other = (probes.run_pooled(train, features, probe, seed=1) for features in (test, torch.randn_like(test)))
    assert found.score.value() != other.score.value() and found.layer_weights == other.layer_weights
    train, test = (torch.cat([part, torch.full_like(part, 7.0)], dim=2) for part in (train, test))
    test[..., 8:] = -1e6  # in training these features never vary
    assert probes.run_pooled(train, test, probe, seed=0).score.value() > 95


def test_held_out_clips():
    classes = torch.tensor([0] * 20 + [1] * 2 + [2] * 10)
    out = probes.held_out(classes, torch.Generator().manual_seed(0))
    assert [int(out[classes == label].sum()) for label in range(3)] == [4, 1, 2]
    assert not torch.equal(out, probes.held_out(classes, torch.Generator().manual_seed(1)))


def test_features_of_clips(corpus):
    probe = lists.read_probe(corpus / "pitch.tsv")
    assert (probe.name, probe.kind, probe.labels) == ("pitch", "clips", ("high", "low"))
    assert (len(probe.train), len(probe.test)) == (20, 8)
    model = random_model(small_config("wavlm"))
    pooled = features.pooled_features(features.ModelFeatures(model, "model"), probe, probe.test)
    with torch.inference_mode():
        expected, _ = model.extract_features(read_audio(probe.test[5].path)[None])
    torch.testing.assert_close(pooled[5], torch.stack([state[0].mean(0) for state in expected]))
    assert pooled.shape == (8, 4, 16)
    assert features.pooled_features(features.LogMel(), probe, probe.test).shape == (8, 1, 160)


def test_random_weights_differ_by_seed_and_leave_the_generator_alone(corpus):
    probe = lists.read_probe(corpus / "pitch.tsv")
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    config, device = small_config("hubert"), torch.device("cpu")
    found = probes.probe_random_models(config, probe, [3, 4], device)
    assert torch.equal(torch.rand(1), expected)
    (single,) = probes.probe_random_models(config, probe, [4], device)
    assert (found[1].score.value(), found[1].layer_weights) == (single.score.value(), single.layer_weights)
    assert found[0].layer_weights != single.layer_weights


def test_clips_that_cannot_be_read(corpus):
    (corpus / "text.wav").write_text("not audio")
    soundfile.write(corpus / "nan.wav", np.full(4000, np.nan), 16_000, subtype="FLOAT")
    soundfile.write(corpus / "short.wav", np.zeros(50), 16_000)
    model = features.ModelFeatures(random_model(small_config("hubert")), "m")
    for name, message in (("text", "cannot be decoded"), ("nan", "NaN or infinite"), ("short", "has 50 samples")):
        path = corpus / "bad.tsv"
        lines = ["train 0.wav a", "train 1.wav a", "train 2.wav b", "train 3.wav b", f"test {name}.wav a"]
        path.write_text("\n".join(["split path label", *lines]).replace(" ", "\t"))
        probe = lists.read_probe(path)
        for source in (model, features.LogMel()):
            with pytest.raises(UserError, match=rf"bad\.tsv: line 6.*{message}") as error:
                features.pooled_features(source, probe, probe.test)
            assert "prepare_data" not in str(error.value)


def log_mel_score(path: Path) -> float:
    """The score of log-mel features on a list."""
    (run,) = probes.run_probe(features.LogMel(), lists.read_probe(path), [0])
    return run.score.value()


def test_segments(tones):
    """Frames of known pitch are told apart; of permuted labels nothing is learnt."""
    assert log_mel_score(tones / "segments.tsv") > 85
    permuted = tones / "permuted.tsv"
    assert abs(log_mel_score(permuted) - probes.summary(lists.read_probe(permuted))["chance"]) < 12


@pytest.mark.slow
def test_text(tones):
    """CTC finds the pitches in their order."""
    assert len(lists.read_probe(tones / "text.tsv").labels) == 3
    assert log_mel_score(tones / "text.tsv") < 20


def test_verification(tones):
    """Two clips of one unknown speaker are told from two of others better than by chance."""
    probe = lists.read_probe(tones / "speakers.tsv")
    assert (probe.kind, probes.summary(probe)["chance"]) == ("verification", 50.0)
    assert {clip.target for clip in probe.test} == {8, 9, 10}
    assert log_mel_score(probe.path) < 40


@pytest.mark.parametrize("name", ["text", "segments"])
def test_frames_on_disk_are_those_in_memory(tones, name):
    """All hidden states in half precision, of segments the labelled frames; mean and deviation are theirs."""
    probe = lists.read_probe(tones / f"{name}.tsv")
    model = features.ModelFeatures(random_model(small_config("hubert", "large")), "model")
    clips = probe.test[:3]
    with features.frames_on_disk(model, probe, clips) as frames:
        kept = []
        for clip in clips:
            states = model.frames(read_audio(clip.path), "here").transpose(0, 1)
            times = (torch.arange(len(states)) * model.times.hop + model.times.window / 2) / 16_000
            if name == "segments":
                states = states[[any(start <= time < end for start, end, _ in clip.target) for time in times]]
            kept.append(states)
        expected = torch.cat(kept)
        rows = frames.rows(torch.arange(len(expected)))
        largest = expected.abs().amax((0, 2), keepdim=True)
        assert ((rows - expected).abs() <= 2e-3 * largest).all()
        assert frames.counts == [len(part) for part in kept]
        assert [len(part) for part in frames.targets] == (frames.counts if name == "segments" else [5, 5, 5])
        mean, deviation = frames.moments
        torch.testing.assert_close(mean, rows.mean(0), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(deviation, rows.std(0, correction=0), atol=1e-3, rtol=1e-3)


def test_figure_of_merit():
    """0 is the control, 100 the teacher, whatever the direction; a probe where it is not better is left out."""
    draw = np.random.default_rng(0)

    def scored(share: float) -> Scored:
        return Scored([Share((draw.uniform(size=500) < share).astype(float), np.ones(500))], 500)

    same = scored(0.5)
    of = {
        "teacher": {"accuracy": scored(0.9), "errors": scored(0.1), "same": same, "worse": scored(0.2)},
        "half": {"accuracy": scored(0.6), "errors": scored(0.4), "same": same, "worse": scored(0.3)},
        "control": {"accuracy": scored(0.3), "errors": scored(0.7), "same": same, "worse": scored(0.8)},
    }
    more_is_better = {"accuracy": True, "errors": False, "same": True, "worse": True}
    found, left_out = figure_of_merit(of, more_is_better, "teacher", "control")
    assert left_out.keys() == {"same", "worse"} and "not better than control" in left_out["same"]
    assert found["teacher"]["mean"] == 100 and found["control"]["mean"] == 0
    assert found["teacher"]["interval"] == [100, 100]
    assert found["half"]["mean"] == pytest.approx(50, abs=6)
    low, high = found["half"]["interval"]
    assert low < found["half"]["mean"] < high and high - low < 15
    assert found["half"]["probes"].keys() == {"accuracy", "errors"}
