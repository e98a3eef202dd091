"""Students of another shape: what they keep of their source, what starts fresh, what cannot be."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    REPOSITORY,
    SMALL_LIGHT_LAYERS,
    error_line,
    last_checkpoint,
    load_as_others_do,
    random_model,
    random_waveforms,
    run_script,
    run_to_exit,
    save_small_model,
    small_config,
    small_run,
)
from torch import Tensor

from s3prl_upstream.expert import UpstreamExpert
from training.settings import StudentSettings
from training.student import student_of
from wav2vec2 import extract, load
from wav2vec2.files import checkpoint
from wav2vec2.files.errors import UserError
from wav2vec2.model import Wav2Vec2Model, hubert_base, wav2vec2_model

FAMILIES = [("hubert", "base"), ("hubert", "large"), ("wavlm", "base"), ("wavlm", "large")]
LAYERS = "encoder.transformer.layers."


def write(folder: Path, changes: Any) -> Path:
    path = folder / "student.json"
    path.write_text(json.dumps(changes))
    return path


def make_student(
    source: Wav2Vec2Model, folder: Path, changes: dict[str, Any], init_layers: str | None = None
) -> Wav2Vec2Model:
    settings = StudentSettings(student_config=write(folder, changes), init_layers=init_layers)
    contents = student_of({"config": source.config, "state_dict": source.state_dict()}, settings, "source.pth")
    student = wav2vec2_model(**contents["config"]).eval()
    student.load_state_dict(contents["state_dict"], strict=True)
    return student


def assert_weights(model: torch.nn.Module, expected: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("family", "size"), FAMILIES)
def test_without_a_change_it_is_a_copy(family, size, tmp_path):
    source = random_model(small_config(family, size))
    for changes in ({}, source.config):  # a whole config is a change of every key
        student = make_student(source, tmp_path, changes)
        assert student.config == source.config
        assert_weights(student, source.state_dict())


@pytest.mark.parametrize(("family", "size"), FAMILIES)
def test_layers_in_another_order(family, size, tmp_path):
    source = random_model(small_config(family, size))
    student = make_student(source, tmp_path, {"encoder_num_layers": 4}, "3,2,2,1")
    expected = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith(LAYERS)}
    for number, start in enumerate((3, 2, 2, 1)):
        for name, tensor in source.encoder.transformer.layers[start - 1].state_dict().items():
            if "rel_attn_embed" not in name:
                expected[f"{LAYERS}{number}.{name}"] = tensor
    if family == "wavlm":  # the first layer has the table for all
        table = source.encoder.transformer.bucket_table.weight
        expected[f"{LAYERS}0.attention.rel_attn_embed.weight"] = table
    assert_weights(student, expected)


@pytest.mark.parametrize(
    ("num_layers", "expected"), [(1, [3]), (2, [2, 3]), (3, [1, 2, 3]), (5, [1, 2, 2, 3, 3]), (6, [1, 1, 2, 2, 3, 3])]
)
def test_layers_are_spread_evenly(num_layers, expected, tmp_path, capsys):
    """The last one takes after the last; and so does its shape, where nothing else is said."""
    source = random_model(small_config("hubert", encoder_ff_interm_features=[5, 6, 7]))
    student = make_student(source, tmp_path, {"encoder_num_layers": num_layers})
    assert student.config["encoder_ff_interm_features"] == [(5, 6, 7)[start - 1] for start in expected]
    assert f"layers {', '.join(map(str, expected))};" in capsys.readouterr().out


@pytest.mark.parametrize(("family", "size"), FAMILIES)
def test_every_width_is_a_slice(family, size, tmp_path):
    """Held against plain indexing: the first units of each kind, and of frames the first of each of the four groups."""
    heads = {"encoder_num_heads": [2, 3, 4]} if family == "hubert" else {"encoder_remaining_heads": [[0, 2], [1], [3]]}
    changes = {
        "extractor_conv_layer_config": [[5, 10, 5], [6, 3, 2], [8, 3, 2], [7, 2, 2]],
        "encoder_embed_dim": 8,
        "encoder_pos_conv_kernel": 4,
        "encoder_ff_interm_features": 12,
        **heads,
    }
    source = random_model(small_config(family, size, aux_num_out=3))
    student = make_student(source, tmp_path, changes)
    assert student.config["encoder_head_dim"] == 4  # of the heads before, as in a pruned model
    found, before = student.state_dict(), source.state_dict()
    frames = [0, 1, 4, 5, 8, 9, 12, 13]
    for number, (channels, inputs) in enumerate(((5, 1), (6, 5), (8, 6), (7, 8))):
        name = f"feature_extractor.conv_layers.{number}.conv.weight"
        assert torch.equal(found[name], before[name][:channels, :inputs])
    projection = "encoder.feature_projection."
    assert torch.equal(found[f"{projection}layer_norm.weight"], before[f"{projection}layer_norm.weight"][:7])
    assert torch.equal(found[f"{projection}projection.weight"], before[f"{projection}projection.weight"][frames, :7])
    ours, theirs = (model.encoder.transformer.pos_conv_embed.conv for model in (student, source))
    torch.testing.assert_close(ours.weight, theirs.weight[frames][:, :2, 2:6])
    assert torch.equal(ours.bias, theirs.bias[frames])
    assert torch.equal(found["aux.weight"], before["aux.weight"][:, frames])
    kept = [[0, 1], [0, 1, 2], [0, 1, 2, 3]] if family == "hubert" else [[0, 2], [1], [3]]
    for number, heads_of_layer in enumerate(kept):
        rows = [4 * head + row for head in heads_of_layer for row in range(4)]
        layer = f"{LAYERS}{number}."
        for name in ("k_proj", "v_proj", "q_proj"):
            name = f"{layer}attention.{name}.weight"
            assert torch.equal(found[name], before[name][rows][:, frames])
        name = f"{layer}attention.out_proj."
        assert torch.equal(found[f"{name}weight"], before[f"{name}weight"][frames][:, rows])
        assert torch.equal(found[f"{name}bias"], before[f"{name}bias"][frames])
        name = f"{layer}feed_forward."
        assert torch.equal(found[f"{name}intermediate_dense.bias"], before[f"{name}intermediate_dense.bias"][:12])
        assert torch.equal(found[f"{name}output_dense.weight"], before[f"{name}output_dense.weight"][frames, :12])
        assert torch.equal(found[f"{layer}final_layer_norm.weight"], before[f"{layer}final_layer_norm.weight"][frames])
        if family == "wavlm":
            gate = f"{layer}attention.gru_rel_pos_linear.weight"
            assert torch.equal(found[gate], before[gate][:, :2])


@pytest.mark.parametrize("family", ["hubert", "wavlm"])
def test_blocks_go(family, tmp_path):
    """A layer without attention computes what the source's does when its attention is switched off."""
    source = random_model(small_config(family))
    changes = {"encoder_use_attention": [False, True, True], "encoder_use_feed_forward": [True, False, True]}
    student = make_student(source, tmp_path, changes)
    table = source.encoder.transformer.bucket_table
    source.encoder.transformer.layers[1].feed_forward = None
    if table is not None:
        source.encoder.transformer.layers[1].attention.rel_attn_embed = table
    source.encoder.transformer.layers[0].attention = None
    waveforms, lengths = random_waveforms(900, 600)
    with torch.no_grad():
        for ours, theirs in zip(*(m.extract_features(waveforms, lengths)[0] for m in (student, source)), strict=True):
            torch.testing.assert_close(ours, theirs)


WITHOUT_NORM = {"encoder_feature_projection_layer_norm": False}
WIDE = {"encoder_embed_dim": 32}
FEWER_LAYERS = {"extractor_conv_layer_config": SMALL_LIGHT_LAYERS}


@pytest.mark.parametrize(
    ("changes", "init_layers", "fresh"),
    [
        ({}, "random", ["layers (--init_layers random)"]),
        (FEWER_LAYERS, None, ["extractor (extractor_conv_layer_config)"]),
        (
            {"extractor_conv_layer_config": [[9, 20, 10], [7, 5, 4]]},
            None,
            ["extractor (extractor_conv_layer_config)", "projection (extractor_conv_layer_config)"],
        ),
        ({"encoder_pos_conv_kernel": 7}, None, ["positional convolution (encoder_pos_conv_kernel)"]),
        (WITHOUT_NORM, None, ["projection (encoder_feature_projection_layer_norm)"]),
        ({"aux_num_out": 5}, None, ["output layer (aux_num_out)"]),
        (
            WIDE,
            "random",
            [
                *("projection (encoder_embed_dim)", "positional convolution (encoder_embed_dim)"),
                *("encoder norm (encoder_embed_dim)", "layers (--init_layers random)"),
            ],
        ),
        (
            {"encoder_num_layers": 5, "encoder_ff_interm_features": 99, "encoder_num_heads": 9, "encoder_head_dim": 2},
            "random",
            ["layers (--init_layers random)"],
        ),
    ],
)
def test_what_does_not_fit_starts_fresh(changes, init_layers, fresh, tmp_path, capsys):
    """And a line names it, with the key; all else is the source's, to the last bit."""
    source = random_model(small_config("hubert"))
    student = make_student(source, tmp_path, changes, init_layers)
    printed = capsys.readouterr().out.strip()
    assert printed.startswith(f"student of {tmp_path / 'student.json'}: from --student_ckpt ")
    assert printed.endswith(f"; fresh {', '.join(fresh)}")
    parts = {
        **{"feature_extractor": "extractor", "encoder.feature_projection": "projection"},
        **{"encoder.transformer.pos_conv_embed": "positional convolution", "aux": "output layer"},
        **{"encoder.transformer.layer_norm": "encoder norm", "encoder.transformer.layers": "layers"},
    }
    before = source.state_dict()
    for name, tensor in student.state_dict().items():
        (part,) = [part for prefix, part in parts.items() if name.startswith(f"{prefix}.")]
        is_same = name in before and torch.equal(tensor, before[name])
        is_fresh = any(words.startswith(part) for words in fresh)
        assert is_same != is_fresh or "dummy_weight" in name, name


def test_another_family_starts_fresh(tmp_path, capsys):
    source = random_model(small_config("hubert"))
    student = make_student(source, tmp_path, small_config("wavlm"), "random")
    assert "encoder_remaining_heads" in student.config
    assert "fresh layers (--init_layers random)" in capsys.readouterr().out
    assert torch.equal(
        student.feature_extractor.conv_layers[0].conv.weight, source.feature_extractor.conv_layers[0].conv.weight
    )


@pytest.mark.parametrize(
    ("family", "changes", "init_layers", "message"),
    [
        ("hubert", WIDE, None, "encoder_embed_dim: expected a multiple of 4, at most 16, found 32; .* random"),
        ("hubert", {"encoder_pos_conv_groups": 2}, None, "encoder_pos_conv_groups: expected 4, as there, found 2"),
        ("hubert", {"encoder_head_dim": 2}, None, "encoder_head_dim: expected 4, as there, found 2"),
        ("hubert", {"encoder_num_heads": [4, 5, 4]}, None, "heads of layer 2, from layer 2 .* at most 4, found 5"),
        (
            *("hubert", {"encoder_num_layers": 2, "encoder_ff_interm_features": [20, 30]}, "3,1"),
            "encoder_ff_interm_features of layer 2, from layer 1 there: expected at most 20, found 30",
        ),
        ("hubert", {"encoder_layer_norm_first": True}, None, "layer_norm_first: expected False, as there, found True"),
        ("hubert", small_config("wavlm"), None, "kind of model: expected Hubert, found 'WavLM'"),
        ("wavlm", {"encoder_num_buckets": 8}, None, "encoder_num_buckets: expected 16, as there, found 8"),
        ("wavlm", {"encoder_total_num_heads": 2, "encoder_remaining_heads": [[0]] * 3}, None, "heads.* 4, as there, f"),
        ("hubert", {"encoder_num_layers": 2}, "1", "--init_layers 1: expected 2 layers, one for each of .*, found 1"),
        ("hubert", {"encoder_num_layers": 2}, "1,4", "--init_layers 1,4: layer 4 does not exist; .* layers 1 to 3"),
        ("hubert", {"encoder_num_layers": 10**9}, None, "encoder_num_layers: expected a whole number from 1 to 256"),
        ("hubert", {"encoder_num_layers": "2"}, "1", "encoder_num_layers: expected a whole number from 1 to 256"),
        ("hubert", {"encoder_embed_dim": 10}, None, "encoder_pos_conv_groups: expected a divisor"),
        ("hubert", {"encoder_num_heads": [4]}, None, "encoder_num_heads: expected 3 entries"),
        ("hubert", {"num_hidden_layers": 2}, None, "unknown key num_hidden_layers"),
        ("hubert", {"encoder_prune_attention_heads": True}, None, "expected False, found True; --pruning_units"),
    ],
)
def test_what_cannot_be(family, changes, init_layers, message, tmp_path):
    source = random_model(small_config(family))
    with pytest.raises(UserError, match=message) as error:
        make_student(source, tmp_path, changes, init_layers)
    assert "\n" not in str(error.value)


def test_a_layer_that_lacks_a_block(tmp_path):
    source = random_model(small_config("hubert", encoder_use_attention=[True, False, True]))
    message = "encoder_use_attention of layer 1, from layer 2 there: expected False, as there, found True"
    with pytest.raises(UserError, match=message):
        make_student(source, tmp_path, {"encoder_num_layers": 1, "encoder_use_attention": True}, "2")
    assert make_student(source, tmp_path, {"encoder_num_layers": 1}, "2").config["encoder_use_attention"] == [False]


@pytest.mark.parametrize("init_layers", ["", "0", "1,,2", "first", "1;2", "-1", "1.2", "٣", "1, 2"])
def test_init_layers_that_are_none(init_layers, tmp_path):
    with pytest.raises(UserError, match="--init_layers: expected random, or layers from 1 such as 1,2, found"):
        StudentSettings(student_config=write(tmp_path, {}), init_layers=init_layers)


def test_files_that_are_none(tmp_path):
    path = tmp_path / "student.json"
    for contents, message in ((None, "no such file"), ("{", "not readable as JSON"), ("[2]", "expected a JSON object")):
        if contents is not None:
            path.write_text(contents)
        with pytest.raises(UserError, match=f"{path}: {message}"):
            StudentSettings(student_config=path)
    with pytest.raises(UserError, match="--init_layers 1,2: of a --student_config, which is not given"):
        StudentSettings(init_layers="1,2")


def test_what_is_recorded(tmp_path):
    """The content, in whatever file and order; nothing without it, as of older runs."""
    assert StudentSettings().recorded() == {}
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    one.write_text('{"encoder_num_layers": 2, "encoder_embed_dim": 8}')
    other.write_text('{\n"encoder_embed_dim": 8, "encoder_num_layers": 2}\n')
    recorded = [StudentSettings(student_config=path).recorded() for path in (one, other)]
    assert recorded[0] == recorded[1] != StudentSettings(student_config=one, init_layers="1,2").recorded()
    other.write_text("{}")
    assert StudentSettings(student_config=other).recorded() != recorded[0]


STUDENT = {"encoder_num_layers": 2, "encoder_embed_dim": 8, "encoder_ff_interm_features": 150}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "size"), [("hubert", "base"), ("wavlm", "large")])
def test_every_stage(manifests, tmp_path, monkeypatch, capsys, family, size):
    """With masks on it, and without pruning: each file loads strictly and has the shape that was asked for."""
    teacher = save_small_model(tmp_path / "teacher.pth", family, size, encoder_ff_interm_features=[200] * 3)
    shape = {"distill_mode": "predlayer", "distill_layers": "1,3"}
    student = {**shape, "student_config": write(tmp_path, STUDENT), "init_layers": "1,3"}
    masked, final, alone = (tmp_path / name / "ckpts/last.ckpt" for name in ("exp", "exp/final", "alone/final"))
    flags = (*small_run(manifests, teacher, **student), "--pruning_units", "conv,head,interm", "--target_sparsity", 0.8)
    run_script(monkeypatch, "distill", *flags, "--exp_dir", tmp_path / "exp")
    run_script(monkeypatch, "prune", "--distilled_ckpt", masked, "--original_ckpt", teacher)
    pruned = load_as_others_do(masked.with_name("pruned_hubert_base.pth"))
    assert abs(1 - pruned.get_num_params() / load_as_others_do(teacher).get_num_params() - 0.8) < 0.005
    assert pruned.config["encoder_embed_dim"] == 8 and pruned.config["encoder_num_layers"] == 2
    flags = small_run(manifests, teacher, student_ckpt=masked.with_name("pruned_hubert_base.pth"), **shape)
    run_script(monkeypatch, "final_distill", *flags, "--exp_dir", tmp_path / "exp/final")
    flags = small_run(manifests, teacher, **student)
    run_script(monkeypatch, "final_distill", *flags, "--exp_dir", tmp_path / "alone/final")
    for last, config in ((final, pruned.config), (alone, None)):
        run_script(monkeypatch, "save_final_ckpt", "--ckpt_after_final_distill", last)
        saved = last.with_name("pruned_hubert_base.pth")
        model = load_as_others_do(saved)
        assert model.config == (config or model.config) and model.config["encoder_num_layers"] == 2
        trained = last_checkpoint(last.parent.parent)["state_dict"]
        assert_weights(model, {name: trained[f"student_model.{name}"] for name in model.state_dict()})
        assert checkpoint.read_model_file(saved)["distill_linear_projs"]["0.0.weight"].shape == (16, 8)
    capsys.readouterr()
    run_script(monkeypatch, "save_final_ckpt", "--ckpt_after_final_distill", alone)
    assert "made already, from the same files" in capsys.readouterr().out
    assert run_to_exit(monkeypatch, "save_final_ckpt", "--ckpt_after_final_distill", masked) == 1
    assert "left over" in error_line(capsys)  # masks
    contents = last_checkpoint(alone.parent.parent)
    checkpoint.save(tmp_path / "published.ckpt", {"state_dict": contents["state_dict"], "global_step": 1})
    flags = ("--ckpt_after_final_distill", tmp_path / "published.ckpt")
    assert run_to_exit(monkeypatch, "save_final_ckpt", *flags) == 1
    assert "found None); give the model that prune.py wrote with --config_path" in error_line(capsys)


@pytest.mark.slow
def test_whatever_takes_models_takes_it(manifests, tmp_path, monkeypatch, capsys):
    """Of other depth and width and without the projection's norm: report, evaluation, exports, extraction, s3prl."""
    source = random_model(small_config("hubert"))
    source.feature_extractor.dummy_weight.data.fill_(1)  # transformers' models have none
    teacher, saved = tmp_path / "teacher.pth", tmp_path / "exp/final/ckpts/pruned_hubert_base.pth"
    checkpoint.save(teacher, {"state_dict": source.state_dict(), "config": source.config})
    changes = {"encoder_num_layers": 2, "encoder_embed_dim": 8, "encoder_num_heads": 2, **WITHOUT_NORM}
    student = {"student_config": write(tmp_path, changes), "distill_mode": "predlayer", "distill_layers": "1,3"}
    run_script(
        monkeypatch, "final_distill", *small_run(manifests, teacher, **student), "--exp_dir", tmp_path / "exp/final"
    )
    run_script(monkeypatch, "save_final_ckpt", "--ckpt_after_final_distill", saved.with_name("last.ckpt"))
    run_script(monkeypatch, "report.__main__", tmp_path / "exp")
    assert (tmp_path / "exp/report.html").is_file()
    flags = ("--teacher", teacher, "--models", saved, "--tsv", manifests / "valid.tsv", "--distill_layers", "1,3")
    once = ("--speed_seconds", 0.1, "--repetitions", 1, "--device", "cpu", "--out", tmp_path / "evaluation.json")
    run_script(monkeypatch, "evaluate", *flags, *once)
    found = json.loads((tmp_path / "evaluation.json").read_text())["models"][1]
    model = load_as_others_do(saved)
    assert found["cost"]["num_params"] == model.get_num_params()
    assert [layer["layer"] for layer in found["fidelity"]["layers"]] == [1, 3]
    run_script(monkeypatch, "export", "--model", saved, "--formats", "hub,huggingface", "--out", tmp_path)
    run_script(
        monkeypatch, "convert_hubert_from_hf", "--model", tmp_path / "huggingface", "--out", tmp_path / "back.pth"
    )
    waveforms, _ = random_waveforms(2000)
    with torch.no_grad():
        states = torch.stack(model.extract_features(waveforms)[0])
        upstream = torch.stack(UpstreamExpert(str(saved)).eval()([waveforms[0]])["hidden_states"])
    torch.testing.assert_close(upstream, states)
    for path in (saved, tmp_path / "hub", tmp_path / "back.pth"):
        torch.testing.assert_close(extract(load(path), [waveforms[0]])[0], states[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("script", "target", "message"),
    [
        (
            "distill",
            0.3,
            r"--target_sparsity 0.3: the student starts without 0\.\d{4} of the teacher's .*; raise",
        ),
        ("distill", 0.99, "--target_sparsity 0.99: pruning .* removes at most"),
        (
            "final_distill",
            None,
            "no distill_linear_projs in it; .* or --student_config for a student",
        ),
    ],
)
def test_bad_input_ends_before_training(
    manifests, small_teacher, tmp_path, monkeypatch, capsys, script, target, message
):
    student = {"student_config": write(tmp_path, {"encoder_num_layers": 1}), "distill_mode": "predlayer"}
    flags = small_run(manifests, small_teacher, **(student if target else {}))
    flags += ["--pruning_units", "conv,head", "--target_sparsity", target] if target else []
    assert run_to_exit(monkeypatch, script, *flags, "--exp_dir", tmp_path / "exp") == 1
    assert re.search(message, error_line(capsys))
    assert not (tmp_path / "exp").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "init_layers", "num_params"),
    [
        ("distilhubert", "1,2", 23_492_736),  # DPHuBERT's table has 23.49 M
        ("three_layers", None, 30_580_608),  # 30.58 M
        ("half_width", None, 26_873_472),  # 26.87 M
        ("fithubert", "random", 20_739_328),
    ],
)
def test_shipped_students(name, init_layers, num_params, tmp_path):
    source = hubert_base()
    student = make_student(
        source, tmp_path, json.loads((REPOSITORY / f"conf/students/{name}.json").read_text()), init_layers
    )
    assert student.get_num_params() == num_params
    extractors = [model.feature_extractor for model in (student, source)]
    assert extractors[0].stride == extractors[1].stride
    assert extractors[0].receptive_field == extractors[1].receptive_field
