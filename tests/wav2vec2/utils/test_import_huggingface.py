"""Models from transformers: stage by stage against stored outputs, other layouts of the same weights, refusals."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    FIXTURES,
    assert_same_frames,
    check_same_model,
    check_stages,
    check_written_model,
    error_line,
    load_expected,
    make_pair,
    num_elements,
    pad,
    random_waveforms,
    run_script,
    run_to_exit,
    transformers_stages,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import wav2vec2
from wav2vec2.files.errors import UserError
from wav2vec2.utils.import_huggingface import compare_with_source, fetch_huggingface_model, import_huggingface_model
from wav2vec2.utils.importing import Dropouts, write_model

HF = FIXTURES / "hf"
NAMES = sorted(path.name for path in HF.iterdir())
HEADLESS = [name for name in NAMES if not name.endswith("ctc")]


def copy_fixture(name: str, directory: Path, **settings: Any) -> Path:
    """Copy a fixture without its outputs, with some settings of its config.json changed."""
    directory.mkdir(parents=True)
    for file in ("config.json", "preprocessor_config.json", "model.safetensors"):
        shutil.copy(HF / name / file, directory)
    edit_json(directory / "config.json", **settings)
    return directory


def edit_json(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def edit_weights(directory: Path, edit: Callable[[dict[str, Tensor]], Any]) -> Path:
    weights = load_file(directory / "model.safetensors")
    edit(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def source_waveform(waveform: Tensor, normalize: bool) -> Tensor:
    """Return the inputs of the fixtures' models: transformers normalises with an epsilon of 1e-7."""
    return (waveform - waveform.mean()) / (waveform.var(unbiased=False) + 1e-7).sqrt() if normalize else waveform


@pytest.mark.parametrize("name", NAMES)
def test_stages(name: str) -> None:
    expected = load_expected(HF / name)
    imported = import_huggingface_model(HF / name)
    normalize = bool(expected["do_normalize"])
    assert imported.config["normalize_waveform"] == normalize
    model = imported.model
    model.normalize_waveform = False  # the waveforms come normalised, to keep the epsilons' difference out

    raw = [expected["wav_0"], expected["wav_1"]]
    waveforms, lengths = pad([source_waveform(waveform, normalize) for waveform in raw])
    stages = [expected["proj"], *expected["hidden_states"][1:]]
    check_stages(model, waveforms, lengths, stages, expected.get("last_hidden_state"), expected["frame_lengths"])

    num_samples = int(expected["u_len"])
    unpadded = [source_waveform(raw[0][:num_samples], normalize), source_waveform(raw[0][-num_samples:], normalize)]
    stages = [expected.get("u_proj"), *expected["u_hidden_states"][1:]]
    check_stages(model, torch.stack(unpadded), None, stages, expected.get("u_last_hidden_state"))


def test_ctc_logits() -> None:
    expected = load_expected(HF / "hubert_base_ctc")
    weights = load_file(HF / "hubert_base_ctc" / "model.safetensors")
    model = import_huggingface_model(HF / "hubert_base_ctc").model
    num_samples = int(expected["u_len"])
    with torch.inference_mode():
        output, _ = model(torch.stack([expected["wav_0"][:num_samples], expected["wav_0"][-num_samples:]]))
    logits = torch.nn.functional.linear(output, weights["lm_head.weight"], weights["lm_head.bias"])
    torch.testing.assert_close(logits, expected["u_logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_weights(name: str) -> None:
    """Also where outputs show nothing, as in k_proj.bias, which softmax cancels."""
    weights = load_file(HF / name / "model.safetensors")
    prefix = "hubert." if name.endswith("ctc") else ""
    state_dict = import_huggingface_model(HF / name).model.state_dict()
    for layer in range(3):
        for part in ("attention.k_proj.bias", "attention.q_proj.weight", "feed_forward.output_dense.bias"):
            ours = state_dict[f"encoder.transformer.layers.{layer}.{part}"]
            assert torch.equal(ours, weights[f"{prefix}encoder.layers.{layer}.{part}"]), part
    weight_v = weights[f"{prefix}encoder.pos_conv_embed.conv.parametrizations.weight.original1"]
    assert torch.equal(state_dict["encoder.transformer.pos_conv_embed.conv.weight_v"], weight_v)


def test_config() -> None:
    """Shapes come from the source, dropouts are the published training's, masks are off."""
    config = import_huggingface_model(HF / "wavlm_large").config
    assert config["extractor_mode"] == "layer_norm"
    assert config["extractor_conv_layer_config"] == [[32, 10, 5]] + [[32, 3, 2]] * 4 + [[32, 2, 2]] * 2
    assert config["extractor_conv_bias"] is True
    assert config["encoder_layer_norm_first"] is True
    assert (config["encoder_pos_conv_kernel"], config["encoder_pos_conv_groups"]) == (32, 4)
    assert config["encoder_total_num_heads"] == [4, 4, 4]
    assert config["encoder_remaining_heads"] == [[0, 1, 2, 3]] * 3
    assert (config["encoder_num_buckets"], config["encoder_max_distance"]) == (320, 800)
    assert config["encoder_projection_dropout"] == config["encoder_attention_dropout"] == 0.1
    assert (config["encoder_dropout"], config["encoder_ff_interm_dropout"]) == (0.1, 0.0)
    assert config["encoder_layer_drop"] == 0.05
    assert not any(value for key, value in config.items() if "_prune_" in key)

    config = import_huggingface_model(HF / "hubert_base", Dropouts(attention_dropout=0.2), True).config
    assert (config["encoder_num_heads"], config["encoder_head_dim"]) == ([4, 4, 4], 12)
    assert config["encoder_attention_dropout"] == 0.2
    assert config["normalize_waveform"] is True
    with pytest.raises(UserError, match=r"--layer_drop 1\.5"):
        Dropouts(layer_drop=1.5)


@pytest.mark.parametrize("name", NAMES)
def test_comparison_with_the_source_model(name: str) -> None:
    imported = import_huggingface_model(HF / name)
    assert compare_with_source(imported, HF / name) < 1e-5
    with torch.no_grad():
        imported.model.encoder.transformer.layers[1].final_layer_norm.bias[0] += 5e-3
    with pytest.raises(UserError, match="differ from the source model's"):
        compare_with_source(imported, HF / name)
    with torch.no_grad():
        imported.model.encoder.transformer.layers[1].final_layer_norm.bias[0] = torch.nan
    with pytest.raises(UserError, match="differ from the source model's"):
        compare_with_source(imported, HF / name)


@pytest.mark.parametrize("name", ["hubert_base", "hubert_base_ctc"])
def test_pytorch_bin_with_older_names(name: str, tmp_path: Path) -> None:
    directory = copy_fixture(name, tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    older = {".parametrizations.weight.original0": ".weight_g", ".parametrizations.weight.original1": ".weight_v"}
    for name_now, name_then in older.items():
        for key in [key for key in weights if key.endswith(name_now)]:
            weights[key.replace(name_now, name_then)] = weights.pop(key)
    torch.save(weights, directory / "pytorch_model.bin")
    imported = import_huggingface_model(directory)
    check_same_model(imported, import_huggingface_model(HF / name))
    assert compare_with_source(imported, directory) < 1e-5


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_shards(file: str, tmp_path: Path) -> None:
    directory = copy_fixture("wavlm_base", tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    stem, suffix = file.split(".")
    names = sorted(weights)
    shards = {f"{stem}-00001-of-00002.{suffix}": names[::2], f"{stem}-00002-of-00002.{suffix}": names[1::2]}
    for shard, keys in shards.items():
        part = {key: weights[key] for key in keys}
        if suffix == "bin":
            torch.save(part, directory / shard)
        else:
            save_file(part, directory / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    (directory / f"{file}.index.json").write_text(json.dumps(index))
    imported = import_huggingface_model(directory)
    check_same_model(imported, import_huggingface_model(HF / "wavlm_base"))
    assert compare_with_source(imported, directory) < 1e-5

    (directory / f"{stem}-00002-of-00002.{suffix}").unlink()
    with pytest.raises(UserError, match="names the shard"):
        import_huggingface_model(directory)


@pytest.mark.parametrize(
    ("fixture", "model_class"),
    [
        ("wav2vec2_base", "Wav2Vec2ForPreTraining"),
        ("wav2vec2_base", "Wav2Vec2ForXVector"),
        ("wavlm_base", "WavLMForCTC"),
        ("wavlm_large", "WavLMForXVector"),
        ("wavlm_base", "WavLMForAudioFrameClassification"),
        ("hubert_large", "HubertForSequenceClassification"),
    ],
)
def test_heads(fixture: str, model_class: str, tmp_path: Path) -> None:
    """The backbone of a model with a head, saved by transformers, is the model without."""
    import transformers

    weighted_sum = "CTC" not in model_class
    headed = getattr(transformers, model_class).from_pretrained(HF / fixture, use_weighted_layer_sum=weighted_sum)
    headed.save_pretrained(tmp_path)
    shutil.copy(HF / fixture / "preprocessor_config.json", tmp_path)
    imported = import_huggingface_model(tmp_path)
    check_same_model(imported, import_huggingface_model(HF / fixture))
    assert len(imported.dropped) >= 2
    assert compare_with_source(imported, tmp_path) < 1e-5


@pytest.mark.parametrize(
    ("family", "model_class"),
    [
        ("unispeech", "UniSpeechForPreTraining"),
        ("unispeech", "UniSpeechForCTC"),
        ("unispeech-sat", "UniSpeechSatForPreTraining"),
        ("unispeech-sat", "UniSpeechSatForXVector"),
    ],
)
def test_heads_of_unispeech(family: str, model_class: str, tmp_path: Path) -> None:
    import transformers

    _, ours = make_pair(family, "large", tmp_path / "bare")
    headed = getattr(transformers, model_class).from_pretrained(tmp_path / "bare", codevector_dim=8, vocab_size=8)
    headed.save_pretrained(tmp_path / "headed")
    imported = import_huggingface_model(tmp_path / "headed", normalize_waveform=False)
    assert imported.family.lower() == family
    assert imported.config == ours.config
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in imported.model.state_dict().items())
    assert compare_with_source(imported, tmp_path / "headed") < 1e-5


def test_model_with_a_decoder(tmp_path: Path) -> None:
    """The encoder of transformers' speech-encoder-decoder; its settings are an entry of config.json."""
    import transformers

    theirs, ours = make_pair("wav2vec2", "base", tmp_path / "bare")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    bert = transformers.BertConfig(is_decoder=True, add_cross_attention=True, vocab_size=8, **sizes)
    config = transformers.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(theirs.config, bert)
    both = transformers.SpeechEncoderDecoderModel(config=config)
    both.encoder.load_state_dict(theirs.state_dict())
    both.save_pretrained(tmp_path / "both")
    imported = import_huggingface_model(tmp_path / "both", normalize_waveform=False)
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in imported.model.state_dict().items())
    assert {"decoder", "enc_to_dec_proj"} <= imported.dropped.keys()
    assert compare_with_source(imported, tmp_path / "both") < 1e-5


def test_wav2vec2_large(tmp_path: Path) -> None:
    """The same architecture and names as HuBERT Large."""
    directory = copy_fixture("hubert_large", tmp_path / "model", model_type="wav2vec2")
    imported = import_huggingface_model(directory)
    assert imported.family == "wav2vec 2.0"
    check_same_model(imported, import_huggingface_model(HF / "hubert_large"))
    assert compare_with_source(imported, directory) < 1e-5


@pytest.mark.parametrize(("norm", "stable"), [("group", True), ("layer", False)])
def test_norms_are_read_one_by_one(norm: str, stable: bool, tmp_path: Path) -> None:
    """Published models exist with either combination, XLS-R's relatives among them."""
    from transformers import HubertConfig, HubertModel

    settings = json.loads((HF / "hubert_base" / "config.json").read_text())
    torch.manual_seed(0)
    config = HubertConfig.from_dict(settings | {"feat_extract_norm": norm, "do_stable_layer_norm": stable})
    HubertModel(config).save_pretrained(tmp_path)
    shutil.copy(HF / "hubert_base" / "preprocessor_config.json", tmp_path)
    imported = import_huggingface_model(tmp_path)
    assert imported.config["extractor_mode"] == f"{norm}_norm"
    assert imported.config["encoder_layer_norm_first"] is stable
    assert compare_with_source(imported, tmp_path) < 1e-5


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_distilhubert(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers, and no LayerNorm before the feature projection: ntu-spml/distilhubert, in small."""
    theirs, _ = make_pair("hubert", "base", tmp_path, num_hidden_layers=2, feat_proj_layer_norm=False)
    if name != "model.safetensors":
        (tmp_path / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), tmp_path / name)
    run_script(monkeypatch, "convert_hubert_from_hf", "--model", tmp_path, "--out", tmp_path / "model.pth")
    ours = check_written_model(tmp_path / "model.pth")
    assert ours.config["encoder_feature_projection_layer_norm"] is False
    assert ours.config["encoder_num_layers"] == 2
    waveforms, _ = random_waveforms(3000, 3000)
    with torch.inference_mode():
        stages = transformers_stages(theirs, waveforms, None)
        assert_same_frames([*ours.extract_features(waveforms)[0], ours(waveforms)[0]], stages)
    assert ours.get_num_params() == num_elements(theirs) + len(ours.feature_extractor.dummy_weight) - 24  # masked_spec


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    directory = copy_fixture("hubert_large", tmp_path / "model", dtype=str(dtype).removeprefix("torch."))
    edit_weights(directory, lambda weights: weights.update({k: v.to(dtype) for k, v in weights.items()}))
    imported = import_huggingface_model(directory)
    assert all(tensor.dtype == torch.float32 for tensor in imported.model.state_dict().values())
    assert compare_with_source(imported, directory) < 1e-5


def test_config_of_an_older_version(tmp_path: Path) -> None:
    """Settings that came later are missing, settings that went since are there."""
    directory = copy_fixture("hubert_base", tmp_path / "model", gradient_checkpointing=False, feat_extract_dropout=0.0)
    settings = json.loads((directory / "config.json").read_text())
    for name in ("feat_proj_layer_norm", "conv_pos_batch_norm", "dtype", "mask_time_min_masks", "architectures"):
        del settings[name]
    (directory / "config.json").write_text(json.dumps(settings))
    imported = import_huggingface_model(directory)
    check_same_model(imported, import_huggingface_model(HF / "hubert_base"))
    assert compare_with_source(imported, directory) < 1e-5


def test_do_normalize_inside_the_processors_settings(tmp_path: Path) -> None:
    directory = copy_fixture("hubert_large", tmp_path / "model")
    settings = json.loads((directory / "preprocessor_config.json").read_text())
    (directory / "preprocessor_config.json").unlink()
    (directory / "processor_config.json").write_text(json.dumps({"feature_extractor": settings}))
    assert import_huggingface_model(directory).config["normalize_waveform"] is True


@pytest.mark.parametrize(("name", "mode_says"), [("hubert_large", True), ("hubert_base", False), ("wavlm_base", False)])
def test_normalization_is_that_of_the_extractors_mode(name: str, mode_says: bool, tmp_path: Path) -> None:
    """Whatever the preprocessor says; where it disagrees, a line says so; a flag overrides both."""
    directory = copy_fixture(name, tmp_path / "model")
    for said in (mode_says, None, not mode_says):
        edit_json(directory / "preprocessor_config.json", do_normalize=said)
        imported = import_huggingface_model(directory)
        assert imported.config["normalize_waveform"] is mode_says
        assert bool(imported.remarks) == (said is not None and said != mode_says)
        assert compare_with_source(imported, directory) < 1e-5
    assert f"--normalize_waveform {str(not mode_says).lower()}" in imported.remarks[0]
    imported = import_huggingface_model(directory, normalize_waveform=not mode_says)
    assert imported.config["normalize_waveform"] is not mode_says and imported.remarks == []
    assert compare_with_source(imported, directory) < 1e-5
    (directory / "preprocessor_config.json").unlink()
    imported = import_huggingface_model(directory)
    assert imported.config["normalize_waveform"] is mode_says and imported.remarks == []


@pytest.mark.parametrize("flag", [None, True, False])
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_preprocessor_is_checked_whatever_the_flag(file: str, flag: bool | None, tmp_path: Path) -> None:
    directory = copy_fixture("hubert_base", tmp_path / "model")
    for settings, message in (({"sampling_rate": 8000}, "8000, expected 16000"), ({"do_normalize": 1}, "is 1, exp")):
        nested = settings if file.startswith("pre") else {"feature_extractor": settings}
        (directory / file).write_text(json.dumps(nested))
        with pytest.raises(UserError, match=f"{file}: .*{message}"):
            import_huggingface_model(directory, normalize_waveform=flag)


@pytest.mark.parametrize("name", ["hubert_base_ctc", "wavlm_large", "wav2vec2_base"])
def test_settings_of_heads_do_not_decide(name: str, tmp_path: Path) -> None:
    settings = {
        "vocab_size": None,
        "mask_time_length": 10.0,
        "num_negatives": None,
        "tdnn_dim": None,
        "pad_token_id": 1.5,
    }
    settings |= {"classifier_proj_size": "wide", "architectures": 7, "ctc_loss_reduction": [], "layerdrop": None}
    settings |= {"xvector_output_dim": {}, "id2label": 3, "torch_dtype": "float1", "attention_dropout": "none"}
    directory = copy_fixture(name, tmp_path / "model", **settings)
    imported = import_huggingface_model(directory)
    check_same_model(imported, import_huggingface_model(HF / name))
    assert compare_with_source(imported, directory) < 1e-5


@pytest.mark.parametrize("setting", ["hidden_size", "num_hidden_layers", "conv_dim", "num_conv_pos_embeddings"])
def test_settings_of_the_backbone_decide(setting: str, tmp_path: Path) -> None:
    directory = copy_fixture("hubert_base", tmp_path / "model", **{setting: None})
    with pytest.raises(UserError, match=rf"config\.json.*{setting}"):
        import_huggingface_model(directory)


@pytest.mark.parametrize("prefix", ["module.", "model.", "encoder.", "module.wav2vec2."])
def test_wrapped_names_and_targets(prefix: str, tmp_path: Path) -> None:
    """Names that a wrapper made longer, heads outside, pre-training targets inside beside a bare backbone."""

    def wrap(weights: dict[str, Tensor]) -> None:
        for name in list(weights):
            weights[prefix + name] = weights.pop(name)
        targets = (
            "quantizer.codevectors",
            "project_q.weight",
            "project_hid.bias",
            "label_embs_concat",
            "final_proj.bias",
        )
        weights |= {prefix + name: torch.zeros(2, 2) for name in targets}
        weights["module.lm_head.weight" if prefix.startswith("module") else "lm_head.weight"] = torch.zeros(2, 2)

    directory = edit_weights(copy_fixture("wav2vec2_base", tmp_path / "model"), wrap)
    imported = import_huggingface_model(directory)
    check_same_model(imported, import_huggingface_model(HF / "wav2vec2_base"))
    assert compare_with_source(imported, directory) < 1e-5
    edit_weights(directory, lambda weights: weights.update({f"{prefix}feature_extractor.extra": torch.zeros(1)}))
    with pytest.raises(UserError, match=rf"1 left over \({prefix}feature_extractor.extra\)"):
        import_huggingface_model(directory)


@pytest.mark.parametrize("name", ["hubert_base_ctc", "wavlm_large"])
def test_weight_norm_removed(name: str, tmp_path: Path) -> None:
    def remove(weights: dict[str, Tensor]) -> None:
        conv = next(key.partition("parametrizations")[0] for key in weights if ".pos_conv_embed.conv.param" in key)
        scale, direction = (weights.pop(f"{conv}parametrizations.weight.original{part}") for part in "01")
        weights[f"{conv}weight"] = torch._weight_norm(direction, scale, 2)
        weights[f"{conv}weight"][..., 3] = 0

    directory = edit_weights(copy_fixture(name, tmp_path / "model"), remove)
    imported = import_huggingface_model(directory)
    conv = imported.model.encoder.transformer.pos_conv_embed.conv
    weights = load_file(directory / "model.safetensors")
    plain = next(tensor for key, tensor in weights.items() if key.endswith("pos_conv_embed.conv.weight"))
    torch.testing.assert_close(conv.weight, plain, rtol=1e-6, atol=0)
    assert compare_with_source(imported, directory) < 1e-5


def test_file_where_its_folder_is_wanted(tmp_path: Path) -> None:
    directory = copy_fixture("hubert_base", tmp_path / "model")
    for name in ("model.safetensors", "config.json"):
        with pytest.raises(UserError, match=rf"give --model {directory}$"):
            fetch_huggingface_model(str(directory / name))
    torch.save({"cfg": {}, "model": {}}, tmp_path / "checkpoint.pt")
    torch.save({"config": {}, "state_dict": {}}, tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"convert_wavlm_from_fairseq\.py --ckpt"):
        fetch_huggingface_model(str(tmp_path / "checkpoint.pt"))
    with pytest.raises(UserError, match=r"model file .* needs no conversion"):
        fetch_huggingface_model(str(tmp_path / "model.pth"))


@pytest.mark.parametrize(
    ("fixture", "settings", "message"),
    [
        ("hubert_base", {"model_type": "data2vec-audio"}, "model_type 'data2vec-audio', .* positional convolutions"),
        ("hubert_base", {"model_type": "wav2vec2-conformer"}, "model_type 'wav2vec2-conformer', .*Conformer"),
        ("hubert_base", {"model_type": "wav2vec2-bert"}, "model_type 'wav2vec2-bert', .*Conformer .* filter banks"),
        ("hubert_base", {"encoder": {"model_type": "whisper"}}, "model_type 'whisper'.* another architecture"),
        ("hubert_base", {"model_type": ["hubert"]}, "model_type"),
        ("hubert_base", {"encoder_embed_dim": 48}, "this project, which needs no conversion"),
        ("wav2vec2_base", {"add_adapter": True}, "add_adapter is True"),
        ("wav2vec2_base", {"adapter_attn_dim": 16}, "adapter_attn_dim is 16"),
        ("hubert_base", {"conv_pos_batch_norm": True}, "conv_pos_batch_norm is True"),
        ("hubert_base", {"feat_proj_layer_norm": False}, r"left over \(feature_projection.layer_norm.bias"),
        ("wav2vec2_base", {"feat_proj_layer_norm": False}, r"left over \(feature_projection.layer_norm.bias"),
        ("hubert_base", {"feat_proj_layer_norm": "no"}, "feat_proj_layer_norm"),
        ("hubert_base", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("hubert_base", {"feat_extract_activation": "gelu_new"}, "feat_extract_activation is 'gelu_new'"),
        ("hubert_base", {"layer_norm_eps": 1e-12}, "layer_norm_eps is 1e-12"),
        ("hubert_base", {"feat_extract_norm": "batch"}, "feat_extract_norm 'batch'"),
        ("hubert_base", {"num_attention_heads": 5}, "48"),
        ("hubert_base", {"conv_kernel": [10, 3]}, "conv_"),
        ("hubert_base", {"hidden_size": "wide"}, "config.json"),
        ("hubert_base", {"num_hidden_layers": 4}, r"missing \(encoder.layers.3.attention"),
        ("hubert_base", {"num_hidden_layers": 2}, r"left over \(encoder.layers.2.attention"),
        ("hubert_base", {"feat_extract_norm": "layer"}, "feature_extractor.conv_layers.1.layer_norm.weight"),
        ("hubert_base", {"intermediate_size": 80}, "weights do not fit"),
        ("hubert_base", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
    ],
)
def test_refused_configs(fixture: str, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        import_huggingface_model(copy_fixture(fixture, tmp_path / "model", **settings))
    assert str(tmp_path / "model") in str(error.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda weights: weights.pop("encoder.layers.1.attention.k_proj.bias"), "layers.1.attention.k_proj.bias"),
        (lambda weights: weights.update(extra=torch.zeros(2)), r"1 left over \(extra\)"),
        (lambda weights: weights.update({"lm_heads.bias": torch.zeros(2)}), r"1 left over \(lm_heads.bias\)"),
        (lambda weights: weights.update({"adapter.proj.bias": torch.zeros(2)}), r"1 left over \(adapter.proj.bias\)"),
        (lambda weights: weights["encoder.layer_norm.bias"].fill_(torch.nan), "NaN"),
        (
            lambda weights: weights.update({"encoder.layer_norm.bias": torch.zeros(48, dtype=torch.int8)}),
            "encoder.layer_norm.bias is torch.int8",
        ),
    ],
)
def test_refused_weights(edit: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        import_huggingface_model(edit_weights(copy_fixture("hubert_base", tmp_path / "model"), edit))


def test_what_lies_outside_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names that nobody foresaw, heads that are called adapters, and tensors of any type; all in one line."""

    def wrap(weights: dict[str, Tensor]) -> None:
        for name in list(weights):
            weights[f"model.hubert.{name}"] = weights.pop(name)
        others = (
            "model.head.adapter.weight",
            "model.head.bias",
            "steps",
            "ema\x1b[2J.decay",
            "encoder.layer_norm.bias",
        )
        weights |= {name: torch.zeros(2, dtype=torch.int64) for name in others}

    directory = edit_weights(copy_fixture("hubert_base", tmp_path / "model"), wrap)
    imported = import_huggingface_model(directory)
    check_same_model(imported, import_huggingface_model(HF / "hubert_base"))
    assert compare_with_source(imported, directory) < 1e-5
    write_model(imported, tmp_path / "model.pth")
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.endswith(" (outside of the model, model.hubert.*)")]
    for name in ("left out: ", "model.head", "steps", "encoder"):
        assert name in line
    assert "\x1b" not in printed


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tf_model.h5"], r"tf_model\.h5.* another framework"),
        (["flax_model.msgpack", "vocab.json"], r"flax_model\.msgpack.* another framework"),
        (["onnx/", "model.onnx"], r"model\.onnx, onnx.* another framework"),
        (["model-q4.gguf"], r"model-q4\.gguf.* another framework"),
        (["adapter_config.json", "adapter_model.safetensors"], "adapter_model.*an adapter; merge it"),
        (["adapter_model.bin"], "an adapter; merge it"),
        (["blobs/", "refs/", "snapshots/"], "a cache of the hub; give a folder in its snapshots"),
        (["checkpoint-500/", "checkpoint-1000/"], "checkpoints of a training; give one of them"),
        (["model-00001-of-00002.safetensors"], r"found \d entries \(.*model-00001-of-00002\.safetensors"),
        ([], r"found \d entr"),
    ],
)
def test_folder_without_usable_weights(names: list[str], message: str, tmp_path: Path) -> None:
    """Both say what lies there instead, with or without a config: the converter and ``load``."""
    bare, configured = tmp_path / "bare", copy_fixture("hubert_base", tmp_path / "configured")
    (configured / "model.safetensors").unlink()
    for folder in (bare, configured):
        folder.mkdir(exist_ok=True)
        for name in names:
            (folder / name).mkdir() if name.endswith("/") else (folder / name).write_bytes(b"\x89")
    with pytest.raises(UserError, match=rf"bare/config\.json: no such file.*{message}"):
        import_huggingface_model(fetch_huggingface_model(str(bare)))
    with pytest.raises(UserError, match=rf"bare/config\.json: no such file.*{message}"):
        wav2vec2.load(bare)
    if "adapter_config.json" in names:
        message = "adapter_config.json"
    with pytest.raises(UserError, match=message):
        import_huggingface_model(configured)
    (configured / "config.json").write_text("{}")  # as version 1 wrote it, our config alone
    with pytest.raises(UserError, match=r"configured/model\.safetensors: no such file; expected a folder with .*found"):
        wav2vec2.load(configured)


def test_snapshot_copied_without_its_blobs(tmp_path: Path) -> None:
    """The hub's cache holds links."""
    directory = copy_fixture("hubert_base", tmp_path / "model")
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to("../../blobs/0123")
    with pytest.raises(UserError, match=r"no weights; .*model\.safetensors \(a broken link\)"):
        import_huggingface_model(directory)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_pointer_of_git_lfs(file: str, tmp_path: Path) -> None:
    directory = copy_fixture("hubert_base", tmp_path / "model")
    (directory / "model.safetensors").unlink()
    (directory / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 377569754\n")
    with pytest.raises(UserError, match=rf"{file}: a pointer of Git LFS"):
        import_huggingface_model(directory)


def test_refused_directories(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        import_huggingface_model(tmp_path)
    directory = copy_fixture("hubert_base", tmp_path / "model")
    (directory / "config.json").write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        import_huggingface_model(directory)

    directory = copy_fixture("hubert_base", tmp_path / "truncated")
    contents = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(contents[: len(contents) // 2])
    with pytest.raises(UserError, match="not readable as safetensors"):
        import_huggingface_model(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        import_huggingface_model(directory)

    directory = copy_fixture("hubert_base", tmp_path / "peft")
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter"):
        import_huggingface_model(directory)
    directory = copy_fixture("hubert_base", tmp_path / "rate")
    edit_json(directory / "preprocessor_config.json", sampling_rate=8000)
    with pytest.raises(UserError, match="sampling_rate is 8000"):
        import_huggingface_model(directory)
    with pytest.raises(UserError, match="no such folder"):
        fetch_huggingface_model(str(tmp_path / "nowhere"))


def test_hub_without_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=r"no-such-org/no-such-model: .*the Hugging Face hub did not give it"):
        fetch_huggingface_model("no-such-org/no-such-model")


def test_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    directory = copy_fixture("wavlm_large", tmp_path / "wavlm-mine")
    run_script(monkeypatch, "convert_hubert_from_hf", "--model", directory, "--attention_dropout", 0)
    printed = capsys.readouterr()
    assert printed.err == ""
    for part in ("largest difference", "WavLM", "154,692 parameters", "pretrained/wavlm-mine.hf.pth"):
        assert part in printed.out
    model = check_written_model(tmp_path / "pretrained" / "wavlm-mine.hf.pth")
    assert model.config["encoder_attention_dropout"] == 0
    expected = load_expected(HF / "wavlm_large")
    waveforms, lengths = pad([source_waveform(expected["wav_0"], True), source_waveform(expected["wav_1"], True)])
    model.normalize_waveform = False
    stages = [expected["proj"], *expected["hidden_states"][1:]]
    check_stages(model, waveforms, lengths, stages, expected["last_hidden_state"], expected["frame_lengths"])


def test_script_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is written if the source is refused."""
    directory = copy_fixture("wav2vec2_base", tmp_path / "adapted", add_adapter=True)
    options = ("--model", directory, "--out", tmp_path / "out" / "model.pth")
    assert run_to_exit(monkeypatch, "convert_hubert_from_hf", *options) == 1
    message = error_line(capsys)
    assert "add_adapter is True" in message and str(directory) in message
    assert not (tmp_path / "out").exists()
