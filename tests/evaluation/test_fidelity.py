"""Fidelity is the training loss and CKA, on whole utterances, and bad input gets one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_model, small_config

from evaluation.features import hidden_states
from evaluation.fidelity import LinearCKA, Student, held_out_speech, measure_fidelity, up_to
from lightning import DistillLoss, make_projections
from wav2vec2.audio import read_audio
from wav2vec2.files import checkpoint
from wav2vec2.files.errors import UserError

LAYERS = [0, 1, 3]


def compare(teacher: Any, path: Path, corpus: Path, layers: list[int] = LAYERS, mode: str | None = None) -> Any:
    student = Student(path, checkpoint.load_model(path).eval(), teacher, layers, mode)
    (found,) = measure_fidelity(teacher, [student], held_out_speech(corpus / "valid.tsv", 1.0, 200))
    return found


def gram_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Linear CKA by its definition: with centred Gram matrices of all frames."""
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    grams = x @ x.T, y @ y.T
    products = [(grams[i] * grams[j]).sum() for i, j in ((0, 1), (0, 0), (1, 1))]
    return float(products[0] / (products[1] * products[2]).sqrt())


def streamed_cka(x: torch.Tensor, y: torch.Tensor, *parts: int) -> float | None:
    cka = LinearCKA((x.size(1), y.size(1)), x.device)
    for x_part, y_part in zip(x.split(list(parts)), y.split(list(parts)), strict=True):
        cka.update(x_part, y_part)
    return cka.compute()


def test_cka():
    torch.manual_seed(0)
    x = torch.randn(60, 6)
    y = torch.randn(60, 9) + x @ torch.randn(6, 9) + 1000  # a mean far from zero
    assert streamed_cka(x, y, 50, 1, 9) == pytest.approx(gram_cka(x, y), rel=1e-9)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6))
    assert streamed_cka(x, 3 * x @ rotation + 5, 30, 30) == pytest.approx(1, abs=1e-6)
    assert streamed_cka(torch.randn(5000, 6), torch.randn(5000, 9), 5000) < 0.01
    assert streamed_cka(x, torch.full((60, 2), 0.1), 60) is None


@pytest.mark.parametrize("mode", ["layer2layer", "predlayer"])
def test_fidelity_is_the_training_loss_and_cka(mode, corpus, save_student, tmp_path):
    """Through the file's projections, with the sources of the mode; the loss is the one that training has."""
    teacher = random_model(small_config("hubert"))
    path = save_student(tmp_path / "student.pth", mode, encoder_embed_dim=12, encoder_head_dim=3)
    contents = checkpoint.read_model_file(path)
    student = checkpoint.load_model(path).eval()
    projections = make_projections(mode, [[0], [1, 3]], 12, 16)
    projections.load_state_dict(contents["distill_linear_projs"])
    sources = LAYERS if mode == "layer2layer" else [3, 3, 3]
    loss = DistillLoss(l2_weight=0, l1_weight=1, cos_weight=1, cos_type="raw")
    parts, states = [], []
    with torch.inference_mode():
        for number in range(4):
            waveform = read_audio(corpus / f"{number}.wav")[None]
            (expected, _), (actual, _) = teacher.extract_features(waveform), student.extract_features(waveform)
            pairs = [(actual[source], expected[layer]) for source, layer in zip(sources, LAYERS, strict=True)]
            states.append([(x[0], y[0]) for x, y in pairs])
            parts.append([loss(projection(x), y)[1] for projection, (x, y) in zip(projections, pairs, strict=True)])

    found = compare(teacher, path, corpus)
    assert found["mode"] == mode and found["projections"] and found["note"] is None
    assert found["num_utterances"] == 4 and found["hours"] == pytest.approx(24_601 / 16_000 / 3600)
    assert [entry["source"] for entry in found["layers"]] == sources
    for number, entry in enumerate(found["layers"]):
        _, l1, negative_cosine = (np.mean([float(row[number][part]) for row in parts]) for part in range(3))
        x, y = (torch.cat([row[number][side] for row in states]) for side in range(2))
        assert entry["layer"] == LAYERS[number]
        assert entry["l1"] == pytest.approx(l1, rel=1e-5)
        assert entry["cosine"] == pytest.approx(-negative_cosine, rel=1e-5)
        assert entry["cka"] == pytest.approx(gram_cka(x, y), rel=1e-5)


def test_fidelity_without_projections(corpus, save_student, tmp_path):
    """The states of a copy are compared as they are; of other dimensions CKA is left."""
    path = save_student(tmp_path / "copy.pth", None)
    found = compare(checkpoint.load_model(path).eval(), path, corpus)
    for entry in found["layers"]:
        assert entry["l1"] == 0 and entry["cosine"] == pytest.approx(1, abs=1e-5) and entry["cka"] == pytest.approx(1)
    assert not found["projections"] and "raw hidden states" in found["note"]
    path = save_student(tmp_path / "narrow.pth", None, encoder_embed_dim=12, encoder_head_dim=3)
    found = compare(random_model(small_config("hubert")), path, corpus)
    for entry in found["layers"]:
        assert entry["l1"] is None and entry["cosine"] is None and 0 < entry["cka"] < 1
    assert "no L1 and cosine" in found["note"]


@pytest.mark.parametrize(
    ("num_layers", "mode", "sources"), [(2, "predlayer", [2, 2, 2]), (3, "layer2layer", [0, 1, 3])]
)
def test_a_model_of_another_program_has_its_last_layer_where_it_has_none_at_that_depth(
    corpus, save_student, tmp_path, num_layers, mode, sources
):
    changes = {"encoder_num_heads": [2] * num_layers, "encoder_ff_interm_features": 20}
    changes |= dict.fromkeys(("encoder_use_attention", "encoder_use_feed_forward"), True)
    path = save_student(tmp_path / "shallow.pth", None, encoder_num_layers=num_layers, **changes)
    found = compare(random_model(small_config("hubert")), path, corpus)
    assert found["mode"] == mode and [entry["source"] for entry in found["layers"]] == sources


def test_max_seconds_leaves_long_utterances_out(corpus):
    assert len(held_out_speech(corpus / "valid.tsv", 0.45, 200)) == 3
    with pytest.raises(UserError, match=r"valid\.tsv: none of 4 utterances lasts"):
        held_out_speech(corpus / "valid.tsv", 0.1, 200)


def test_projections_that_do_not_fit(corpus, save_student, tmp_path):
    teacher = random_model(small_config("hubert"))
    path = save_student(tmp_path / "student.pth", "layer2layer")
    for message, layers, mode in (
        ("student.pth: has 3 projections, expected one for each of the 2 distilled layers", [0, 3], None),
        ("student.pth: its projections are those of distill_mode layer2layer, expected", LAYERS, "predlayer"),
        ("layer 4 is to be distilled", [0, 1, 4], None),
    ):
        with pytest.raises(UserError, match=message):
            compare(teacher, path, corpus, layers, mode)
    contents = checkpoint.read_model_file(path)
    for bad in ([1], {0: torch.zeros(2)}):
        checkpoint.save(tmp_path / "bad.pth", {**contents, "distill_linear_projs": bad})
        with pytest.raises(UserError, match=r"bad\.pth: distill_linear_projs is .*, expected a dict"):
            compare(teacher, tmp_path / "bad.pth", corpus)
    bad = {**contents["distill_linear_projs"], "0.weight": torch.eye(16).to_sparse()}
    checkpoint.save(tmp_path / "bad.pth", {**contents, "distill_linear_projs": bad})
    with pytest.raises(UserError, match=r"bad\.pth"):
        compare(teacher, tmp_path / "bad.pth", corpus)


def test_hidden_states_that_are_not_finite():
    model = random_model(small_config("hubert"))
    waveform = torch.randn(4000)
    assert len(hidden_states(up_to(3, model), waveform, "model.pth", "a.wav")) == 4
    with torch.no_grad():
        model.encoder.transformer.layers[0].feed_forward.output_dense.weight.fill_(3e38)
    with pytest.raises(UserError, match=r"model\.pth: hidden state 1 holds NaN or infinite values for a\.wav"):
        hidden_states(up_to(3, model), waveform, "model.pth", "a.wav")
