"""Losses of heads, and scores of fine-tuned models' own heads, against the same computed by hand."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import task_contents
from torch.nn import functional as F
from torchaudio.functional import edit_distance

from labels.lists import Probe, read_probe
from labels.scores import Score
from labels.tasks import fitting_probe, score_head, task_loss
from wav2vec2.audio import read_audio
from wav2vec2.files.errors import UserError
from wav2vec2.files.heads import Head, TaskModel, task_model_of

# In another order than the lists', and with a label that they do not have.
LABELS = ("mid", "none", "low", "high")


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of noise with a list of each kind: its labels need mean nothing."""
    root, draw = tmp_path_factory.mktemp("lists"), np.random.default_rng(0)
    rows = {
        "clips": ["split\tpath\tlabel"],
        "voices": ["split\tpath\tlabel"],
        "segments": ["split\tpath\tstart\tend\tlabel"],
        "text": ["split\tpath\ttext"],
    }
    for number in range(20):
        split, path = ("train", "test")[number >= 12], f"{number}.wav"
        soundfile.write(root / path, 0.1 * draw.standard_normal(1600 + 37 * number), 16_000)
        label, other, third = draw.permutation(["low", "mid", "high"])
        spoken = (label, "mid", other) if number % 3 else (label, "unknown" if split == "test" else "low")
        rows["clips"].append(f"{split}\t{path}\t{('low', 'mid', 'high')[number % 3]}")
        rows["voices"].append(f"{split}\t{path}\t{('low', 'high')[number % 2] if split == 'train' else number % 3}")
        rows["segments"] += [f"{split}\t{path}\t0.01\t0.04\t{label}", f"{split}\t{path}\t0.05\t0.09\t{third}"]
        rows["text"].append(f"{split}\t{path}\t{' '.join(spoken)}")
    for name, lines in rows.items():
        (root / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return root


def make(kind: str, labels: tuple[str, ...] = LABELS) -> TaskModel:
    settings = {"text": {"units": "words"}, "clips": {"pooling": "mean", "layers": "weighted"}, "segments": {}}
    return task_model_of(task_contents(Head(kind, labels, **settings[kind])), "model.pth").eval()


def own_score(model: TaskModel, path: Path) -> Score:
    probe = fitting_probe(model, read_probe(path))
    assert isinstance(probe, Probe)
    return score_head(model, probe, "model")


def by_hand(model: TaskModel, path: Path, split: str = "test"):
    """The rows of a file, by its name, with the best outputs' labels, and the logits."""
    found: dict[str, list[list[str]]] = {}
    for row in path.read_text().splitlines()[1:]:
        if row.startswith(split):
            found.setdefault(row.split("\t")[1], []).append(row.split("\t")[2:])
    for name, rows in found.items():
        with torch.no_grad():
            (logits,), _ = model(read_audio(path.parent / name)[None])
        yield rows, logits


def test_clips(lists):
    model = make("clips")
    correct = [rows[0][0] == LABELS[logits.argmax()] for rows, logits in by_hand(model, lists / "clips.tsv")]
    assert len(correct) == 8
    assert own_score(model, lists / "clips.tsv").value() == pytest.approx(100 * np.mean(correct))


def test_segments(lists):
    model, right, count = make("segments"), 0, 0
    window, hop = model.feature_extractor.receptive_field, model.feature_extractor.stride
    for rows, logits in by_hand(model, lists / "segments.tsv"):
        for number, best in enumerate(logits.argmax(1)):
            time = (number * hop + window / 2) / 16_000
            for start, end, label in rows:
                if float(start) <= time < float(end):
                    count += 1
                    right += label == LABELS[best]
    assert own_score(model, lists / "segments.tsv").value() == pytest.approx(100 * right / count)


def test_text(lists):
    """In the head's units, whatever those of the probes are."""
    for units, labels in (("words", LABELS), ("characters", tuple("wzdghilmo "))):
        contents = task_contents(Head("text", labels, units=units))
        model, errors, count = task_model_of(contents, "model.pth").eval(), 0, 0
        for rows, logits in by_hand(model, lists / "text.tsv"):
            best = logits.argmax(1).unique_consecutive()
            wanted = rows[0][0].split() if units == "words" else list(rows[0][0])
            errors += edit_distance([labels[unit - 1] for unit in best if unit], wanted)
            count += len(wanted)
        assert own_score(model, lists / "text.tsv").value() == pytest.approx(100 * errors / count)


def test_verification(lists):
    """By the cosine of logits, from their mean over the training clips."""
    model = make("clips")
    mean = torch.stack([logits for _, logits in by_hand(model, lists / "voices.tsv", "train")]).mean(0)
    rows, logits = zip(*by_hand(model, lists / "voices.tsv"), strict=True)
    embeddings = torch.nn.functional.normalize(torch.stack(logits) - mean)
    pairs = [(i, j) for i in range(len(rows)) for j in range(i)]
    cosines = np.array([float(embeddings[i] @ embeddings[j]) for i, j in pairs])
    same = np.array([rows[i] == rows[j] for i, j in pairs])
    rates = [((cosines[same] <= x).mean(), (cosines[~same] > x).mean()) for x in sorted(cosines)]
    low, high = (max(min(rate) for rate in rates), min(max(rate) for rate in rates))
    assert 100 * low - 1e-6 <= own_score(model, lists / "voices.tsv").value() <= 100 * high + 1e-6


def test_lists_of_another_kind_or_with_other_labels_are_left_out(lists):
    model = make("clips", ("low", "mid"))
    reasons = {
        "clips": "its head does not know the label 'high'",
        "voices": "its head does not know the label 'high'",
        "segments": "its head is one of clips, the list one of segments",
        "text": "its head is one of clips, the list one of text",
    }
    for name, reason in reasons.items():
        assert fitting_probe(model, read_probe(lists / f"{name}.tsv")) == reason


def test_logits_that_are_not_finite(lists):
    model = make("clips")
    model.head.linear.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"^model: its head gives NaN .* line 14"):
        own_score(model, lists / "clips.tsv")


def test_losses_do_not_see_padding():
    """A batch's loss is the mean over its rows alone, whatever stands behind them."""
    torch.manual_seed(0)
    logits, lengths = torch.randn(2, 9, 4), torch.tensor([9, 6])
    texts = torch.tensor([[0, 1, 1], [2, -1, -1]])
    rows = [
        F.ctc_loss(x[:n, None].log_softmax(-1), t[None] + 1, torch.tensor([n]), torch.tensor([len(t)]))
        for x, n, t in zip(logits, (9, 6), (texts[0], texts[1, :1]), strict=True)
    ]
    torch.testing.assert_close(task_loss("text", logits, lengths, texts), torch.stack(rows).mean())
    frames = torch.tensor([[0, 0, -1, 3, 3, 3, -1, 2, 1], [1, 1, -1, -1, 0, 2, -1, -1, -1]])
    wanted = F.cross_entropy(logits[frames >= 0], frames[frames >= 0])
    torch.testing.assert_close(task_loss("segments", logits, lengths, frames), wanted)
    assert task_loss("segments", logits, lengths, torch.full((2, 9), -1)) == 0
    labels = torch.tensor([[3], [1]])
    torch.testing.assert_close(
        task_loss("clips", logits[:, 0], lengths, labels), F.cross_entropy(logits[:, 0], labels[:, 0])
    )
