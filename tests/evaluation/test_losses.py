"""What exported files lose: nothing if they are the model, all if they say nothing."""

import pytest
import torch
from helpers import random_model, small_config, task_contents

from evaluation import losses
from evaluation.features import LogMel
from evaluation.probes import Probed
from exporters.traced import Outputs
from labels.lists import read_probe
from wav2vec2.files.errors import UserError
from wav2vec2.files.heads import Head, task_model_of


class Silence(LogMel):
    """Features that say nothing."""

    def frames(self, waveform, place):
        return 0 * super().frames(waveform, place)


def nothing(run):
    """Zeros in the place of what ``run`` gives."""
    return lambda *batch: (torch.zeros_like(run(*batch)[0]), run(*batch)[1])


@pytest.mark.parametrize("outputs", ["last", "all"])
def test_quality(labelled, monkeypatch, outputs):
    model = random_model(small_config("hubert"))
    run, probes = Outputs(model, outputs), [read_probe(labelled / "segments.tsv")]
    with monkeypatch.context() as patch:
        patch.setattr(losses, "LogMel", Silence)
        patch.setattr(losses, "_SEEDS", (0,))
        found = losses.losses(model, outputs, {"same": run, "none": nothing(run)}, probes)
    assert found["same"].points == 0 and found["none"].points > 50
    assert "quality 100.0, the model's 100.0 (log-mel features: 0); segments frame accuracy" in found["same"].reached
    monkeypatch.setattr(losses, "run_probe", lambda *_: Probed(None, []))
    monkeypatch.setattr(losses, "figure_of_merit", lambda *_: ({}, {"segments": "the model is not better"}))
    with pytest.raises(UserError, match="no list tells what is lost: the model is not better; give longer ones"):
        losses.losses(model, outputs, {}, probes)


def test_own_head(labelled):
    model = task_model_of(
        task_contents(Head("clips", ("a", "b", "c", "d"), layers="last", pooling="mean")), "model.pth"
    ).eval()
    probes = [read_probe(labelled / f"{name}.tsv") for name in ("clips", "segments")]
    wrong = lambda *batch: (torch.tensor([[0.0, 0.0, 0.0, 1.0]]), torch.tensor([1]))  # noqa: E731
    found = losses.losses(model, "last", {"same": model, "wrong": wrong}, probes)
    assert found["same"].points == 0 and found["wrong"].points > 0
    assert "own head: clips accuracy 0.0 (model: " in found["wrong"].reached
    with pytest.raises(UserError, match="no list is of the model's head: its head is one of clips"):
        losses.losses(model, "last", {}, probes[1:])
