import sys

import numpy as np
import pytest
import soundfile
import torch
from helpers import TASK_HEADS, head_id, random_model, random_waveforms, save_small_model, small_config, task_contents

import wav2vec2
from wav2vec2 import prediction
from wav2vec2.audio import SAMPLE_RATE
from wav2vec2.files import checkpoint
from wav2vec2.files.errors import UserError
from wav2vec2.files.heads import Head, task_model_of
from wav2vec2.prediction import Labelled, Stretch


def task_model(head: Head, size: str = "large"):
    return task_model_of(task_contents(head, "hubert", size), "model.pth").eval()


@pytest.mark.parametrize("head", TASK_HEADS, ids=head_id)
def test_prediction_is_what_forward_says(head):
    model = task_model(head).requires_grad_(False)
    waveforms = [random_waveforms(n, seed=n)[0][0] for n in (3000, 700, 1600, 60)]
    for waveform, found in zip(waveforms, wav2vec2.predict(model, waveforms), strict=True):
        (logits,), _ = model(waveform[None])
        if head.kind == "clips":
            probability, best = logits.softmax(-1).max(-1)
            assert found.label == head.labels[best] and found.probability == pytest.approx(float(probability), abs=1e-5)
            continue
        best = logits.argmax(-1).tolist()
        if head.kind == "text":
            kept = [unit for unit, before in zip(best, [0, *best], strict=False) if unit and unit != before]
            separator = " " if head.units == "words" else ""
            assert found == separator.join(head.labels[unit - 1] for unit in kept)
            continue
        hop, window = model.feature_extractor.stride, model.feature_extractor.receptive_field
        middles = (np.arange(len(best)) * hop + window / 2) / SAMPLE_RATE
        labels = [[x.label for x in found if x.start <= middle < x.end] for middle in middles]
        assert labels == [[head.labels[label]] for label in best]
        assert found[0].start == 0 and found[-1].end == pytest.approx(((len(best) - 1) * hop + window) / SAMPLE_RATE)
        assert all(x.end == y.start and x.label != y.label for x, y in zip(found, found[1:], strict=False))


@pytest.mark.parametrize("head", TASK_HEADS, ids=head_id)
def test_long_audio_is_one_result(head):
    """Chunks that see all that matters to them give the result of the whole."""
    model = task_model(head).requires_grad_(False)
    for layer in model.encoder.transformer.layers:
        layer.attention.out_proj.weight.zero_()  # what is left looks no further than the positional convolution
    waveform = random_waveforms(9000)[0][0]
    whole = wav2vec2.predict(model, waveform, max_seconds=None)
    cut = wav2vec2.predict(model, waveform, max_seconds=0.2, context_seconds=0.05)
    assert cut == whole if head.kind != "clips" else cut[0] == whole[0] and cut[1] == pytest.approx(whole[1], abs=1e-5)


def test_model_without_a_head_predicts_nothing():
    with pytest.raises(UserError, match="model: has no task head"):
        wav2vec2.predict(random_model(small_config("hubert")), torch.zeros(900))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["prediction", *map(str, arguments), "--device", "cpu"])
    return prediction.main()


@pytest.mark.parametrize("head", [TASK_HEADS[0], TASK_HEADS[-1]], ids=head_id)
def test_command(tmp_path, monkeypatch, capsys, head):
    checkpoint.save(tmp_path / "model.pth", task_contents(head, "hubert", "large"))
    paths = [tmp_path / name for name in ("a.wav", "b.flac")]
    for seed, path in enumerate(paths):
        soundfile.write(path, random_waveforms(900 + 500 * seed, seed=seed)[0][0].numpy(), SAMPLE_RATE)
    (tmp_path / "bad.wav").write_text("no audio")
    model = wav2vec2.load(tmp_path / "model.pth")
    wanted = []
    for path, found in zip(paths, wav2vec2.predict(model, paths), strict=True):
        rows = found if isinstance(found, list) else [found]
        for row in rows:
            match row:
                case Labelled(label, probability):
                    wanted.append(f"{path}\t{label}\t{probability:.4f}")
                case Stretch(start, end, label):
                    wanted.append(f"{path}\t{start:.3f}\t{end:.3f}\t{label}")
                case text:
                    wanted.append(f"{path}\t{text.strip()}")
    capsys.readouterr()
    path = tmp_path / "model.pth"
    assert run(monkeypatch, path, paths[0], tmp_path / "bad.wav", tmp_path / "none.wav", paths[1]) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines() == wanted
    errors = printed.err.splitlines()
    assert len(errors) == 2 and "bad.wav" in errors[0] and "none.wav" in errors[1]
    assert run(monkeypatch, path, *paths) == 0


def test_command_shows_labels_and_paths_as_text(tmp_path, monkeypatch, capsys):
    """A label or a file name of a stranger's does not steer the terminal, or make fields and lines of its own."""
    label = "\x1b[2J\tz\r\n\u202eo聲\udcff"
    head = Head("clips", (label, label + "2"), layers="last", pooling="mean")
    checkpoint.save(tmp_path / "model.pth", task_contents(head, "hubert", "large"))
    path = tmp_path / "\x1b[2J\t\n  \u202e.wav"
    soundfile.write(path, random_waveforms(900)[0][0].numpy(), SAMPLE_RATE)
    (bad := tmp_path / "\x1b.wav").write_text("no audio")
    assert run(monkeypatch, tmp_path / "model.pth", bad, path) == 1
    printed = capsys.readouterr()
    name, shown, _ = printed.out.split("\t")
    assert name == rf"{tmp_path}/\x1b[2J\t\n  \u202e.wav"
    assert shown.removesuffix("2") == r"\x1b[2J z \u202eo聲\udcff" and printed.out.count("\n") == 1
    assert r"/\x1b.wav: cannot be decoded" in printed.err and "\x1b" not in printed.err


def test_command_names_a_model_without_a_head(tmp_path, monkeypatch, capsys):
    path = save_small_model(tmp_path / "model.pth", "hubert", "base")
    assert run(monkeypatch, path, tmp_path / "a.wav") == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "has no task head" in printed.err
