"""export.py on models with a task head: logits in every format, transformers' CTC, and the encoder alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import (
    TASK_HEADS,
    error_line,
    head_id,
    random_waveforms,
    run_script,
    run_to_exit,
    small_config,
    task_contents,
)
from torch.nn import functional as F

import wav2vec2
from exporters.onnx import OnnxOptions
from wav2vec2.files import checkpoint
from wav2vec2.files.heads import Head, TaskModel, greedy_units, task_model_of, without_head

CHARACTERS = Head("text", ("a", "b", " ", "'", "é"), units="characters")
WORDS = Head("text", ("yes", "no", "<s>"), units="words")


def saved(folder: Path, head: Head, *family: str) -> tuple[TaskModel, Path]:
    contents = task_contents(head, *family)
    contents["state_dict"]["feature_extractor.dummy_weight"].fill_(1)  # transformers' models have none
    checkpoint.save(folder / "model.pth", contents)
    return task_model_of(contents, "model.pth").eval(), folder / "model.pth"


def test_name_of_the_output():
    model = task_model_of(task_contents(TASK_HEADS[2]), "model.pth")
    plain = wav2vec2.model.wav2vec2_model(**model.config)
    names = [[OnnxOptions(outputs).output_of(each) for outputs in ("last", "all")] for each in (model, plain)]
    assert names == [["logits", "hidden_states"], ["last_hidden_state", "hidden_states"]]


def exported(folder: Path, monkeypatch: pytest.MonkeyPatch, head: Head, model_type: str, size: str) -> tuple[Any, ...]:
    """Our model, transformers' of the files that export.py writes, and its tokenizer."""
    model, path = saved(folder, head, "wavlm" if model_type == "wavlm" else "hubert", size)
    flags = () if model_type == "wavlm" else ("--model_type", model_type)
    run_script(monkeypatch, "export", "--model", path, "--out", folder, "--formats", "huggingface", *flags)
    settings = json.loads((folder / "huggingface" / "config.json").read_text())
    theirs, report = getattr(transformers, settings["architectures"][0]).from_pretrained(
        folder / "huggingface", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] - {f"{model_type}.masked_spec_embed"} and not report["unexpected_keys"]
    return model, theirs.eval(), transformers.AutoTokenizer.from_pretrained(folder / "huggingface")


@pytest.mark.parametrize(
    ("model_type", "size"), [("hubert", "base"), ("hubert", "large"), ("wav2vec2", "large"), ("wavlm", "base")]
)
def test_ctc_is_transformers(tmp_path, monkeypatch, model_type, size):
    """The same weights give the same logits, losses, gradients and greedy text."""
    ours, theirs, tokenizer = exported(tmp_path, monkeypatch, CHARACTERS, model_type, size)
    assert type(theirs).__name__ == {"hubert": "HubertForCTC", "wavlm": "WavLMForCTC"}.get(model_type, "Wav2Vec2ForCTC")
    # Base models take padding for audio, and theirs normalise elsewhere: whole rows, of which only ours are normalised.
    waveforms, _ = random_waveforms(1500, 1500)
    normed = wav2vec2.model.normalize_waveforms(waveforms) if size == "large" else waveforms
    units = [[0, 1, 1, 2, 3], [4, 0]]
    logits, _ = ours(waveforms)
    targets = torch.tensor([[unit + 1 for unit in units[0]], [units[1][0] + 1, units[1][1] + 1, -100, -100, -100]])
    result = theirs(normed, labels=targets)
    torch.testing.assert_close(logits, result.logits, atol=1e-5, rtol=1e-5)
    frames = torch.full((2,), logits.shape[1])
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)
    counts = torch.tensor([len(row) for row in units])
    loss = F.ctc_loss(log_probs, targets[targets >= 0], frames, counts, reduction=theirs.config.ctc_loss_reduction)
    torch.testing.assert_close(loss, result.loss, atol=1e-4, rtol=1e-5)
    loss.backward()
    result.loss.backward()
    pairs = [(ours.aux.weight, theirs.lm_head.weight), (ours.aux.bias, theirs.lm_head.bias)]
    backbone = getattr(theirs, model_type)
    for layer, other in zip(ours.encoder.transformer.layers, backbone.encoder.layers, strict=True):
        pairs.append((layer.feed_forward.intermediate_dense.weight, other.feed_forward.intermediate_dense.weight))
        pairs.append((layer.attention.v_proj.weight, other.attention.v_proj.weight))
    first = ours.feature_extractor.conv_layers[0].conv.weight
    pairs.append((first, backbone.feature_extractor.conv_layers[0].conv.weight))
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-4 * float(other.grad.abs().max()), rtol=1e-3)
    found = wav2vec2.predict(ours, list(waveforms))
    assert [text.strip() for text in found] == tokenizer.batch_decode(result.logits.argmax(-1))
    best = torch.tensor([1, 1, 0, 1, 3, 2, 0, 4, 3, 3, 5])
    said = "".join(ours.labels[unit] for unit in greedy_units(F.one_hot(best, 6)))
    assert said == "aa b' é" and tokenizer.batch_decode(best[None]) == [said]
    assert [greedy_units(row) for row in logits] == [greedy_units(row) for row in result.logits]


def test_words_are_transformers(tmp_path, monkeypatch):
    ours, theirs, tokenizer = exported(tmp_path, monkeypatch, WORDS, "wav2vec2", "base")
    waveforms, _ = random_waveforms(4000, 4000)
    best = theirs(waveforms).logits.argmax(-1)
    assert tokenizer.batch_decode(best, spaces_between_special_tokens=True) == wav2vec2.predict(ours, list(waveforms))
    assert tokenizer.convert_tokens_to_ids(["<pad>", *WORDS.labels]) == [0, 1, 2, 3]
    assert "spaces_between_special_tokens" in (tmp_path / "huggingface" / "README.md").read_text()


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (Head("text", ("a", "<pad>"), units="words"), "'<pad>' is one of the labels"),
        (Head("text", ("a", " ", "|"), units="characters"), "'|' is one of the labels"),
    ],
    ids=["blank", "space"],
)
def test_heads_that_transformers_has_not(tmp_path, monkeypatch, capsys, head, reason):
    _, path = saved(tmp_path, head)
    flags = ("--model", path, "--out", tmp_path / "out", "--formats", "huggingface,onnx")
    assert run_to_exit(monkeypatch, "export", *flags) == 1
    assert reason in error_line(capsys) and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("head", [TASK_HEADS[0], TASK_HEADS[3]], ids=head_id)
def test_drop_head_leaves_a_plain_model(tmp_path, monkeypatch, head):
    model, path = saved(tmp_path, head)
    run_script(monkeypatch, "export", "--model", path, "--out", tmp_path, "--drop_head")
    contents, wanted = checkpoint.read_model_file(tmp_path / "huggingface"), checkpoint.read_model_file(path)
    assert contents.keys() == {"config", "state_dict"} and contents["config"] == small_config("hubert")
    assert contents["state_dict"].keys() == without_head(wanted)["state_dict"].keys()
    plain = wav2vec2.load(tmp_path / "huggingface")
    waveforms, lengths = random_waveforms(900, 700)
    expected = model.extract_features(waveforms, lengths)[0]
    assert type(plain) is wav2vec2.model.Wav2Vec2Model
    assert all(map(torch.equal, plain.extract_features(waveforms, lengths)[0], expected))
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "huggingface")
    np.testing.assert_allclose(
        theirs(waveforms[:1]).last_hidden_state.detach(), plain(waveforms[:1])[0], atol=1e-4, rtol=1e-4
    )
