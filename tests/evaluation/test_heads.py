"""Scores of fine-tuned models' own heads, against the same computed by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import run_script, save_small_model, task_contents
from torchaudio.functional import edit_distance

from evaluation.heads import head_summary, head_tasks
from evaluation.tables import evaluation_tables
from labels.lists import read_probe
from wav2vec2.audio import read_audio
from wav2vec2.files import checkpoint
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


def scores(model: TaskModel, path: Path) -> dict:
    tasks = head_tasks(model, [read_probe(path)])
    return head_summary(model, tasks, "model")["scores"][path.stem]


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
    found = scores(model, lists / "clips.tsv")
    assert found["mean"] == pytest.approx(100 * np.mean(correct)) and found["metric"] == "accuracy"
    assert len(correct) == 8 and found["interval"][0] <= found["mean"] <= found["interval"][1]


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
    found = scores(model, lists / "segments.tsv")
    assert found["mean"] == pytest.approx(100 * right / count) and found["metric"] == "frame accuracy"


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
        found = scores(model, lists / "text.tsv")
        assert found["mean"] == pytest.approx(100 * errors / count) and found["metric"] == f"{units[:-1]} error rate"


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
    found = scores(model, lists / "voices.tsv")
    assert found["metric"] == "equal error rate" and 100 * low - 1e-6 <= found["mean"] <= 100 * high + 1e-6


def test_lists_of_another_kind_or_with_other_labels_are_left_out(lists):
    probes = [read_probe(lists / f"{name}.tsv") for name in ("clips", "voices", "segments", "text")]
    tasks = head_tasks(make("clips", ("low", "mid")), probes)
    assert not tasks.probes
    assert tasks.left_out == {
        "clips": "its head does not know the label 'high'",
        "voices": "its head does not know the label 'high'",
        "segments": "its head is one of clips, the list one of segments",
        "text": "its head is one of clips, the list one of text",
    }


def test_logits_that_are_not_finite(lists):
    model = make("clips")
    model.head.linear.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"^model: its head gives NaN .* line 14"):
        scores(model, lists / "clips.tsv")


@pytest.mark.slow
def test_evaluate_scores_own_heads_beside_the_probes(lists, tmp_path, monkeypatch, capsys):
    paths = [tmp_path / name for name in ("plain.pth", "clips.pth", "text.pth")]
    save_small_model(paths[0], "hubert", "base")
    for kind, path in zip(("clips", "text"), paths[1:], strict=True):
        settings = {"units": "words"} if kind == "text" else {"pooling": "attentive"}
        checkpoint.save(path, task_contents(Head(kind, LABELS, **settings)))
    lists_flags = ("--probes", lists / "clips.tsv", lists / "text.tsv", "--seeds", 0, "--no_controls")
    flags = ("--models", *paths, *lists_flags, "--speed_seconds", "--device", "cpu", "--out", tmp_path / "results.json")
    run_script(monkeypatch, "evaluate", *flags)
    results = json.loads((tmp_path / "results.json").read_text())
    plain, clips, text = results["models"]
    assert plain["head"] is None and clips["head"]["kind"] == "clips" and clips["head"]["labels"] == list(LABELS)
    wanted = scores(task_model_of(checkpoint.read_model_file(paths[1]), "").eval(), lists / "clips.tsv")
    assert clips["head"]["scores"] == {"clips": wanted} and text["head"]["scores"].keys() == {"text"}
    assert all(model["probes"].keys() == {"clips", "text"} for model in results["models"])
    printed = capsys.readouterr().out
    assert "Own heads:" in printed and f"{wanted['mean']:.1f} [" in printed
    assert "clips is not scored on text: its head is one of clips, the list one of text" in printed
    for model in results["models"]:
        del model["head"]  # as older results are
    assert "Own heads" not in [table.title for table in evaluation_tables(results)]
