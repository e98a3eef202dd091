"""fairseq-format files: stage by stage against stored outputs, every layout that is published, refusals."""

import argparse
import collections
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    FIXTURES,
    check_same_model,
    check_stages,
    check_written_model,
    error_line,
    load_expected,
    pad,
    run_script,
    run_to_exit,
    to_omegaconf,
)
from safetensors.torch import load_file

from wav2vec2.files.errors import UserError
from wav2vec2.files.unpickling import read_torch_file
from wav2vec2.utils.import_fairseq import compare_with_fairseq, import_fairseq_model, parse_conv_layers
from wav2vec2.utils.import_huggingface import import_huggingface_model
from wav2vec2.utils.importing import write_model

CHECKPOINTS = {
    path.parent.relative_to(FIXTURES).as_posix(): path for path in sorted(FIXTURES.glob("*/*/checkpoint.pt"))
}
HUBERT = CHECKPOINTS["fairseq/hubert_base"]
WAV2VEC2_LARGE = CHECKPOINTS["fairseq/wav2vec2_large"]
WAVLM = CHECKPOINTS["wavlm/wavlm_base"]


def read(path: Path) -> dict[str, Any]:
    """Return a fixture's contents without what only training needs."""
    contents = read_torch_file(path)
    return {key: value for key, value in contents.items() if key in ("args", "cfg", "model")}


def save(path: Path, contents: Any, **options: Any) -> Path:
    torch.save(contents, path, **options)
    return path


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_stages(name: str) -> None:
    expected = load_expected(CHECKPOINTS[name].parent)
    imported = import_fairseq_model(CHECKPOINTS[name])
    assert imported.config["normalize_waveform"] == bool(expected["normalize"])
    waveforms, lengths = pad([expected["wav_0"], expected["wav_1"]])
    stages = [expected["proj"], *(expected[f"layer_{k}"] for k in (1, 2, 3))]
    check_stages(imported.model, waveforms, lengths, stages, expected["final"], expected["frame_lengths"])
    stages = [expected["single1_proj"], *(expected[f"single1_layer_{k}"] for k in (1, 2, 3))]
    check_stages(imported.model, expected["wav_1"][None], None, stages, expected["single1_final"])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_weights(name: str) -> None:
    """Also where outputs show nothing, as in k_proj.bias, which softmax cancels."""
    weights = read(CHECKPOINTS[name])["model"]
    state_dict = import_fairseq_model(CHECKPOINTS[name]).model.state_dict()
    for layer in range(3):
        ours, theirs = f"encoder.transformer.layers.{layer}", f"encoder.layers.{layer}"
        for part in ("k_proj.bias", "q_proj.weight", "out_proj.bias"):
            assert torch.equal(state_dict[f"{ours}.attention.{part}"], weights[f"{theirs}.self_attn.{part}"].float())
        output_bias = state_dict[f"{ours}.feed_forward.output_dense.bias"]
        assert torch.equal(output_bias, weights[f"{theirs}.fc2.bias"].float())
    pos_conv = "encoder.transformer.pos_conv_embed.conv.weight_g"
    assert torch.equal(state_dict[pos_conv], weights["encoder.pos_conv.0.weight_g"].float())


def test_config() -> None:
    config = import_fairseq_model(WAV2VEC2_LARGE).config
    assert config["extractor_mode"] == "layer_norm"
    assert config["extractor_conv_layer_config"] == [[32, 10, 5]] + [[32, 3, 2]] * 4 + [[32, 2, 2]] * 2
    assert (config["extractor_conv_bias"], config["encoder_layer_norm_first"]) == (True, True)
    assert (config["encoder_num_heads"], config["encoder_head_dim"]) == ([4, 4, 4], 16)
    assert config["encoder_attention_dropout"] == 0.1  # 0.0 in the source
    config = import_fairseq_model(WAVLM).config
    assert config["encoder_remaining_heads"] == [[0, 1, 2, 3]] * 3
    assert (config["encoder_num_buckets"], config["encoder_max_distance"]) == (320, 800)
    assert import_fairseq_model(WAVLM, normalize_waveform=True).config["normalize_waveform"] is True


def test_families() -> None:
    assert import_fairseq_model(HUBERT).family == "HuBERT"
    assert import_fairseq_model(WAV2VEC2_LARGE).family == "wav2vec 2.0"
    assert import_fairseq_model(WAVLM).family == "WavLM"


def fairseq_name(name: str) -> str:
    """fairseq's name of a transformers parameter of a Large model."""
    for pattern, replacement in (
        (r"parametrizations\.weight\.original0", "weight_g"),
        (r"parametrizations\.weight\.original1", "weight_v"),
        (r"^(feature_extractor\.conv_layers\.\d+)\.conv\.", r"\1.0."),
        (r"^(feature_extractor\.conv_layers\.\d+)\.layer_norm\.", r"\1.2.1."),
        (r"^feature_projection\.layer_norm", "layer_norm"),
        (r"^feature_projection\.projection", "post_extract_proj"),
        (r"pos_conv_embed\.conv", "pos_conv.0"),
        (r"(layers\.\d+)\.layer_norm", r"\1.self_attn_layer_norm"),
        (r"\.attention\.", ".self_attn."),
        (r"gru_rel_pos_const", "grep_a"),
        (r"gru_rel_pos_linear", "grep_linear"),
        (r"rel_attn_embed", "relative_attention_bias"),
        (r"feed_forward\.intermediate_dense", "fc1"),
        (r"feed_forward\.output_dense", "fc2"),
        (r"^masked_spec_embed", "mask_emb"),
    ):
        name = re.sub(pattern, replacement, name)
    return name


LARGE_SETTINGS = {
    "extractor_mode": "layer_norm",
    "layer_norm_first": True,
    "conv_bias": True,
    "conv_feature_layers": "[(32, 10, 5)] + [(32, 3, 2)] * 4 + [(32, 2, 2)] * 2",
    "encoder_embed_dim": 64,
    "encoder_ffn_embed_dim": 128,
    "encoder_attention_heads": 4,
    "encoder_layers": 3,
    "conv_pos": 32,
    "conv_pos_groups": 4,
}


def test_hubert_large_and_wavlm_large(tmp_path: Path) -> None:
    """The transformers fixtures' weights under fairseq's names are the same models."""
    wavlm_settings = {"relative_position_embedding": True, "gru_rel_pos": True, "num_buckets": 320, "max_distance": 800}
    for fixture, cfg in (
        ("hubert_large", {"model": LARGE_SETTINGS | {"_name": "hubert"}, "task": {"normalize": True}}),
        ("wavlm_large", LARGE_SETTINGS | wavlm_settings | {"normalize": True}),
    ):
        directory = FIXTURES / "hf" / fixture
        weights = {fairseq_name(name): tensor for name, tensor in load_file(directory / "model.safetensors").items()}
        path = save(tmp_path / f"{fixture}.pt", {"cfg": cfg, "model": weights})
        check_same_model(import_fairseq_model(path), import_huggingface_model(directory))


@pytest.mark.parametrize("path", [HUBERT, WAV2VEC2_LARGE])
def test_s3prls_layout(path: Path, tmp_path: Path) -> None:
    contents = read(path)
    theirs = {"model_weight": contents["model"], "dictionaries_symbols": [["0", "1"]]}
    theirs |= {f"{name}_cfg": contents["cfg"][name] for name in ("model", "task")}
    check_same_model(import_fairseq_model(save(tmp_path / "checkpoint.pt", theirs)), import_fairseq_model(path))
    del theirs["task_cfg"]
    without = import_fairseq_model(save(tmp_path / "checkpoint.pt", theirs), None, path == WAV2VEC2_LARGE)
    check_same_model(without, import_fairseq_model(path))


@pytest.mark.parametrize("flag", [None, True])
@pytest.mark.parametrize("layout", ["cfg", "flat", "fine-tuned"])
def test_sample_rate(layout: str, flag: bool | None, tmp_path: Path) -> None:
    """Checked whatever flags are given."""
    contents = read(WAVLM if layout == "flat" else HUBERT)
    contents["cfg"].get("task", contents["cfg"])["sample_rate"] = 8000
    if layout == "fine-tuned":
        contents["model"] = {f"w2v_encoder.w2v_model.{name}": tensor for name, tensor in contents["model"].items()}
        contents["cfg"] = {"model": {"w2v_args": contents["cfg"]}, "task": {"normalize": False}}
    with pytest.raises(UserError, match="sample_rate is 8000, expected 16000"):
        import_fairseq_model(save(tmp_path / "checkpoint.pt", contents), None, flag)


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model.encoder.", "w2v_model."])
def test_wrapped_names(prefix: str, tmp_path: Path) -> None:
    """Also with another program's targets and a head beside the wrapper; what is unknown inside is still refused."""
    contents = read(HUBERT)
    wrapped = {prefix + name: tensor for name, tensor in contents["model"].items()}
    wrapped |= {"lm_head.weight": torch.zeros(3, 48), f"{prefix}project_hid.bias": torch.zeros(2)}
    path = save(tmp_path / "checkpoint.pt", contents | {"model": wrapped})
    imported = import_fairseq_model(path)
    check_same_model(imported, import_fairseq_model(HUBERT))
    assert {f"{prefix}label_embs_concat", f"{prefix}project_hid", "lm_head"} <= imported.dropped.keys()
    wrapped |= {"layer_norm.weight": torch.zeros(32)}  # outside, under a name that the backbone has inside
    imported = import_fairseq_model(save(path, contents | {"model": wrapped}))
    check_same_model(imported, import_fairseq_model(HUBERT))
    assert imported.dropped["layer_norm"] == f"outside of the model, {prefix}*"
    wrapped |= {f"{prefix}layer_norm.extra": torch.zeros(32)}
    with pytest.raises(UserError, match=rf"1 left over \({prefix}layer_norm.extra\)"):
        import_fairseq_model(save(path, contents | {"model": wrapped}))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"model._orig_mod.module.{name}",
        lambda name: name.replace("layers.", "layers._orig_mod."),
        lambda name: re.sub(r"(layers\.\d+)\.", r"\1._checkpoint_wrapped_module.", name),
        lambda name: re.sub(r"(layers\.\d+)\.", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module.", name),
        lambda name: "_fsdp_wrapped_module._fpw_module." + name.replace("encoder.", "encoder._fsdp_wrapped_module."),
        lambda name: name.replace("encoder.", "encoder.module."),
        lambda name: name.replace("weight", "_orig_mod.weight"),
    ],
)
@pytest.mark.parametrize("path", [HUBERT, WAVLM])
def test_wrappers_inside_names(path: Path, wrap: Callable[[str], str], tmp_path: Path) -> None:
    """As torch.compile, activation checkpointing, FSDP and DDP leave them, around the model or around its parts."""
    contents = read(path)
    weights = {wrap(name): tensor for name, tensor in contents["model"].items()}
    check_same_model(
        import_fairseq_model(save(tmp_path / "checkpoint.pt", contents | {"model": weights})),
        import_fairseq_model(path),
    )


@pytest.mark.parametrize("prefixes", [("student.", "teacher."), ("", "ema."), ("model.", "_orig_mod.model.")])
def test_two_models_in_one_file(prefixes: tuple[str, str], tmp_path: Path) -> None:
    """Neither is taken for the wanted one, and both are named."""
    contents = read(HUBERT)
    weights = {prefix + name: tensor for prefix in prefixes for name, tensor in contents["model"].items()}
    first, second = (rf"{prefix}feature_extractor\.conv_layers\.0\.0\.weight" for prefix in prefixes)
    with pytest.raises(UserError, match=rf"checkpoint\.pt: 2 models \({first}, {second}\), expected one"):
        import_fairseq_model(save(tmp_path / "checkpoint.pt", contents | {"model": weights}))


@pytest.mark.parametrize("path", [HUBERT, WAVLM, WAV2VEC2_LARGE])
def test_weight_norm_removed(path: Path, tmp_path: Path) -> None:
    contents = read(path)
    weights = dict(contents["model"])
    pair = [weights.pop(f"encoder.pos_conv.0.weight_{part}") for part in "vg"]
    weights["encoder.pos_conv.0.weight"] = torch._weight_norm(*(part.float() for part in pair), 2)
    imported = import_fairseq_model(save(tmp_path / "checkpoint.pt", contents | {"model": weights}))
    conv = imported.model.encoder.transformer.pos_conv_embed.conv
    torch.testing.assert_close(conv.weight, weights["encoder.pos_conv.0.weight"], rtol=1e-6, atol=0)


def test_conv_bias_false_in_layer_norm_mode(tmp_path: Path) -> None:
    """fairseq's HuBERT Large and WavLM Large have no bias in this mode."""
    contents = read(WAV2VEC2_LARGE)
    contents["cfg"]["model"]["conv_bias"] = False
    for layer in range(7):
        del contents["model"][f"feature_extractor.conv_layers.{layer}.0.bias"]
    imported = import_fairseq_model(save(tmp_path / "checkpoint.pt", contents))
    assert imported.config["extractor_conv_bias"] is False
    assert not any(name.endswith("conv.bias") for name in imported.model.feature_extractor.state_dict())


@pytest.mark.parametrize("zip_format", [True, False])
def test_namespace(zip_format: bool, tmp_path: Path) -> None:
    """The layout of 2020: args instead of cfg, settings that kept their default left out, half precision."""
    contents = read(HUBERT)
    defaults = {"layer_norm_first", "conv_bias", "activation_fn", "extractor_mode", "_name", "layer_type"}
    settings = {key: value for key, value in contents["cfg"]["model"].items() if key not in defaults}
    weights = {name: tensor.half() for name, tensor in contents["model"].items() if name != "label_embs_concat"}
    old = {
        "args": argparse.Namespace(arch="wav2vec2", task="audio_pretraining", **settings),
        "model": collections.OrderedDict(weights),
        "optimizer_history": [{"criterion_name": "Wav2vecCriterion", "lr_scheduler_state": {"best": None}}],
    }
    path = save(tmp_path / "checkpoint.pt", old, _use_new_zipfile_serialization=zip_format)
    imported = import_fairseq_model(path)
    assert imported.family == "wav2vec 2.0"
    assert imported.config["normalize_waveform"] is False and imported.remarks == []
    check_same_model(imported, import_fairseq_model(CHECKPOINTS["fairseq/hubert_base_fp16_oldcfg"]))

    old["args"] = argparse.Namespace(arch="wav2vec2", normalize=True, **settings)
    path = save(tmp_path / "checkpoint.pt", old, _use_new_zipfile_serialization=zip_format)
    imported = import_fairseq_model(path)  # of waveforms as they are, as group_norm extractors were trained
    assert imported.config["normalize_waveform"] is False
    assert len(imported.remarks) == 1 and "--normalize_waveform true" in imported.remarks[0]


def test_defaults_of_the_published_base(tmp_path: Path) -> None:
    """Shapes that a Namespace lacks are fairseq's defaults, those of the Base model; nothing is guessed from files."""
    contents = read(HUBERT)
    old = {"args": argparse.Namespace(arch="wav2vec2", encoder_layers=3), "model": contents["model"]}
    with pytest.raises(UserError, match=r"has shape \[32, 1, 10\], expected \[512, 1, 10\]"):
        import_fairseq_model(save(tmp_path / "checkpoint.pt", old))


@pytest.mark.parametrize("zip_format", [True, False])
def test_dictconfig(zip_format: bool, tmp_path: Path, omegaconf_classes: dict[str, type]) -> None:
    contents = read(WAV2VEC2_LARGE)
    contents["cfg"] = to_omegaconf(contents["cfg"], omegaconf_classes)
    path = save(tmp_path / "checkpoint.pt", contents, _use_new_zipfile_serialization=zip_format)
    for module in [name for name in sys.modules if name.split(".")[0] == "omegaconf"]:
        del sys.modules[module]
    check_same_model(import_fairseq_model(path), import_fairseq_model(WAV2VEC2_LARGE))
    assert "omegaconf" not in sys.modules


@pytest.mark.parametrize("core", ["numpy._core", "numpy.core"])
@pytest.mark.parametrize("zip_format", [True, False])
def test_numpy_in_the_training_state(core: str, zip_format: bool, tmp_path: Path) -> None:
    """Numbers and arrays that are never looked at, under the module names of numpy 2 and of numpy 1."""
    state = {"best": np.float32(3.5), "epoch": np.int64(3), "shuffle": np.arange(4), "type": np.dtype("f8")}
    contents = read(HUBERT) | {"extra_state": state, "optimizer_history": [{"lr_scheduler_state": np.float64(1)}]}
    path = save(tmp_path / "checkpoint.pt", contents, _use_new_zipfile_serialization=zip_format)
    if zip_format:
        with zipfile.ZipFile(path) as archive:
            records = {record.filename: archive.read(record) for record in archive.infolist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in records.items():
                archive.writestr(name, re.sub(rb"cnumpy\._?core\.", f"c{core}.".encode(), data))
    else:
        path.write_bytes(re.sub(rb"cnumpy\._?core\.", f"c{core}.".encode(), path.read_bytes()))
    check_same_model(import_fairseq_model(path), import_fairseq_model(HUBERT))


DECODER = ["decoder.embed_tokens.weight", "decoder.layers.0.fc1.bias", "decoder.layer_norm.weight"]


@pytest.mark.parametrize("w2v_args", ["cfg", "namespace", None])
@pytest.mark.parametrize(
    ("kind", "prefix", "others"),
    [
        ("wav2vec_ctc", "w2v_encoder.w2v_model.", {"w2v_encoder.proj": ["w2v_encoder.proj.bias"]}),
        ("wav2vec_seq2seq", "encoder.w2v_model.", {"encoder.proj": ["encoder.proj.bias"], "decoder": DECODER}),
        ("hubert_ctc", "w2v_encoder.w2v_model.", {"decoder": DECODER, "criterion_state": ["criterion_state"]}),
        ("hubert_seq2seq", "module.encoder.w2v_model.", {"module.decoder": [f"module.{name}" for name in DECODER]}),
        (
            "xm_transformer",
            "encoder.w2v_encoder.w2v_model.",
            {"encoder.adaptor": ["encoder.adaptor.layers.0.0.weight"], "decoder": DECODER},
        ),
    ],
)
def test_fine_tuned(
    kind: str,
    prefix: str,
    others: dict[str, list[str]],
    w2v_args: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With CTC, with a decoder, of speech translation: the encoder is taken, the rest listed."""
    contents = read(WAV2VEC2_LARGE)
    pretraining_only = ("quantizer.", "project_q.", "final_proj.")
    weights = {
        prefix + name: tensor for name, tensor in contents["model"].items() if not name.startswith(pretraining_only)
    }
    weights |= {name: torch.zeros(32, 64) for names in others.values() for name in names}
    backbone = contents["cfg"]
    if w2v_args == "namespace":
        settings = {key: value for key, value in backbone["model"].items() if key != "_name"}
        backbone = argparse.Namespace(arch="wav2vec2", **settings)
    model_settings = {"_name": kind, "w2v_path": "/nowhere", "w2v_args": backbone if w2v_args else None}
    task = {"_name": "audio_finetuning", "normalize": True}
    cfg = {"cfg": {"model": model_settings, "task": task}}
    if w2v_args == "namespace":  # the layout of 2020
        cfg = {"args": argparse.Namespace(arch=kind, normalize=True, w2v_args=backbone)}
    path = save(tmp_path / "checkpoint.pt", cfg | {"model": weights})
    if w2v_args is None:
        with pytest.raises(UserError, match="w2v_args"):
            import_fairseq_model(path)
        return
    imported = import_fairseq_model(path)
    check_same_model(imported, import_fairseq_model(WAV2VEC2_LARGE))
    outside = {name for name, reason in imported.dropped.items() if reason == f"outside of the model, {prefix}*"}
    assert outside == others.keys()
    write_model(imported, tmp_path / "model.pth")
    assert f"left out: {', '.join(others)} (outside of the model, {prefix}*)\n" in capsys.readouterr().out
    del weights[f"{prefix}encoder.layers.1.fc1.bias"]
    weights[f"{prefix}extra"] = torch.zeros(1)
    inside = rf"1 missing \({prefix}encoder.layers.1.fc1.bias\), 1 left over \({prefix}extra\)"
    with pytest.raises(UserError, match=inside):
        import_fairseq_model(save(path, cfg | {"model": weights}))


@pytest.mark.parametrize(
    ("fixture", "settings", "message"),
    [
        (HUBERT, {"_name": "data2vec_audio"}, "kind 'data2vec_audio'"),
        (HUBERT, {"_name": "wav2vec_seq2seq"}, "kind 'wav2vec_seq2seq'"),
        (HUBERT, {"layer_type": "conformer"}, "layer_type 'conformer'"),
        (HUBERT, {"activation_fn": "relu"}, "activation_fn 'relu'"),
        (HUBERT, {"conv_pos_batch_norm": True}, "conv_pos_batch_norm True"),
        (HUBERT, {"attn_type": "espnet"}, "attn_type 'espnet'"),
        (HUBERT, {"extractor_mode": "batch_norm"}, "extractor_mode 'batch_norm'"),
        (HUBERT, {"encoder_layers": 4}, r"missing \(encoder.layers.3.self_attn"),
        (HUBERT, {"encoder_layers": 2}, r"left over \(encoder.layers.2.self_attn"),
        (HUBERT, {"encoder_layers": "three"}, "encoder_num_layers: expected a whole number .* found 'three'"),
        (HUBERT, {"encoder_attention_heads": 5}, "encoder_num_heads: expected a divisor of .* 48, found 5"),
        (HUBERT, {"conv_feature_layers": "__import__('os')"}, "conv_feature_layers"),
        (HUBERT, {"conv_feature_layers": 7}, "conv_feature_layers"),
        (HUBERT, {"conv_feature_layers": "7"}, "extractor_conv_layer_config: expected .* found 7"),
        (HUBERT, {"conv_feature_layers": "[]"}, "extractor_conv_layer_config"),
        (HUBERT, {"conv_feature_layers": "[(512, 10)]"}, "extractor_conv_layer_config"),
        (HUBERT, {"conv_feature_layers": "[(512, 10, 0)]"}, "extractor_conv_layer_config"),
        (HUBERT, {"conv_feature_layers": "+".join(["[(1, 1, 1)]"] * 100)}, "extractor_conv_layer_config"),
        (WAV2VEC2_LARGE, {"pos_conv_depth": 5}, "pos_conv_depth 5"),
        (WAV2VEC2_LARGE, {"quantize_input": True}, "quantize_input True"),
        (WAV2VEC2_LARGE, {"conv_bias": False}, "left over .*conv_layers.0.0.bias"),
        (WAVLM, {"gru_rel_pos": False}, "WavLM with gru_rel_pos False, expected True"),
        (WAVLM, {"expand_attention_head_size": 32}, "expand_attention_head_size 32"),
        (WAVLM, {"normalize": "yes"}, "normalize is 'yes'"),
    ],
)
def test_refused_settings(fixture: Path, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    contents = read(fixture)
    contents["cfg"].get("model", contents["cfg"]).update(settings)
    with pytest.raises(UserError, match=message) as error:
        import_fairseq_model(save(tmp_path / "checkpoint.pt", contents))
    assert str(tmp_path / "checkpoint.pt") in str(error.value)


def test_refused_contents(tmp_path: Path) -> None:
    def refuse(contents: Any, message: str) -> None:
        with pytest.raises(UserError, match=message):
            import_fairseq_model(save(tmp_path / "checkpoint.pt", contents))

    contents = read(HUBERT)
    refuse([1, 2], "found list")
    refuse({"weights": {}}, r"found keys \['weights'\]")
    refuse({"state_dict": {}, "config": {}}, "found a model file")
    refuse(contents["model"], "found bare weights .* python convert_hubert_from_hf.py --model")
    refuse({"state_dict": {}, "optimizer_states": []}, "found a training checkpoint")
    refuse({"model": contents["model"]}, "under 'cfg' or 'args'")
    refuse({"model": contents["model"], "cfg": {"model": contents["cfg"]["model"]}}, "--normalize_waveform")
    s3prls = {"model_weight": contents["model"], "model_cfg": contents["cfg"]["model"]}
    refuse(s3prls, "task_cfg.*--normalize_waveform")
    refuse(s3prls | {"model_cfg": None}, "expected a dict of settings")
    refuse({"model": contents["model"], "cfg": {"model": None}}, "expected a dict of settings")
    refuse(contents | {"model": contents["model"] | {"extra.weight": torch.zeros(1)}}, r"1 left over \(extra.weight\)")
    weights = {name: tensor for name, tensor in contents["model"].items() if name != "encoder.layers.1.fc1.bias"}
    refuse(contents | {"model": weights}, r"1 missing \(encoder.layers.1.fc1.bias\)")
    endless: dict[str, Any] = {}
    endless["model"] = endless
    refuse(contents | {"cfg": endless}, "its lists and tensors claim more than 64 levels")
    with pytest.raises(UserError, match="no such file"):
        import_fairseq_model(tmp_path / "nowhere.pt")


def test_conv_layers() -> None:
    base = [[512, 10, 5]] + [[512, 3, 2]] * 4 + [[512, 2, 2]] * 2
    assert parse_conv_layers("[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2") == base
    assert parse_conv_layers("[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]") == base
    assert parse_conv_layers(" [[8, 2, 1], (4, 2, 2)]") == [[8, 2, 1], [4, 2, 2]]
    for expression in (
        "",
        "[(512, 10, True)]",
        "[(512, 10, 5.0)]",
        "[(512, 10, 5)] * 1000000000000",
        "([(512, 10, 5)] * 64) * 64",
        "[(512, 10, 5)] - []",
        "[(512, 10, 5)].copy()",
        "[x for x in [(1, 1, 1)]]",
        "print(1)",
        "(" * 500 + ")" * 500,
        "[(1, 1, 1)" + "\x00",
    ):
        with pytest.raises(UserError, match="conv_feature_layers"):
            parse_conv_layers(expression)


def test_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    ckpt = shutil.copy(WAVLM, tmp_path / "WavLM-tiny.pt")
    run_script(monkeypatch, "convert_wavlm_from_fairseq", "--ckpt", ckpt, "--layer_drop", "0.2")
    printed = capsys.readouterr()
    assert printed.err == ""
    for part in ("WavLM", "86,308 parameters", "pretrained/WavLM-tiny.pth", "mask_emb"):
        assert part in printed.out
    model = check_written_model(tmp_path / "pretrained" / "WavLM-tiny.pth")
    assert model.config["encoder_layer_drop"] == 0.2
    expected = load_expected(WAVLM.parent)
    waveforms, lengths = pad([expected["wav_0"], expected["wav_1"]])
    stages = [expected["proj"], *(expected[f"layer_{k}"] for k in (1, 2, 3))]
    check_stages(model, waveforms, lengths, stages, expected["final"], expected["frame_lengths"])


def test_a_fairseq_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, and the model is converted as without it."""
    broken = tmp_path / "fairseq" / "__init__.py"
    broken.parent.mkdir()
    broken.write_text("raise ValueError('mutable default')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "fairseq"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    imported = import_fairseq_model(HUBERT)
    assert compare_with_fairseq(imported, HUBERT) is None
    assert imported.remarks[-1] == "not compared with fairseq, which cannot be imported here (mutable default)"


def test_script_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is written if the file cannot be read."""
    ckpt = tmp_path / "truncated.pt"
    ckpt.write_bytes(WAVLM.read_bytes()[:200_000])
    options = ("--ckpt", ckpt, "--out", tmp_path / "out" / "model.pth")
    assert run_to_exit(monkeypatch, "convert_wavlm_from_fairseq", *options) == 1
    assert f"{ckpt}: damaged" in error_line(capsys)
    assert not (tmp_path / "out").exists()
