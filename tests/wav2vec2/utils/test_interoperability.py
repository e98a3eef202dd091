"""Models of other libraries come in and go out: transformers' format written, torchaudio's weights recognised."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchaudio
import transformers
from helpers import (
    REPOSITORY,
    assert_same_frames,
    make_pair,
    random_model,
    random_waveforms,
    run_script,
    small_config,
    transformers_stages,
)
from safetensors.torch import load_file
from torch import Tensor

from exporters.huggingface import export_huggingface
from wav2vec2.files import checkpoint
from wav2vec2.files.errors import UserError
from wav2vec2.files.heads import contents_of
from wav2vec2.model import Wav2Vec2Model, normalize_waveforms, wav2vec2_model
from wav2vec2.utils.import_huggingface import FAMILIES, import_huggingface_model
from wav2vec2.utils.import_torchaudio import import_torchaudio, is_torchaudio_state, our_names, recognize
from wav2vec2.utils.importing import Dropouts

NO_DROPOUT = Dropouts(0.0, 0.0, 0.0, 0.0, 0.0)


def unpruned_model(family: str, size: str, **changes: Any) -> Wav2Vec2Model:
    """Return a random model whose extractor has no output scale, like every model that was never pruned."""
    model = random_model(small_config(family, size, **changes))
    model.feature_extractor.dummy_weight.data.fill_(1)
    return model


def load_with_transformers(folder: Path) -> torch.nn.Module:
    """transformers' model of a folder, loaded without a key that is missing, left over or of another shape."""
    family = FAMILIES[json.loads((folder / "config.json").read_text())["model_type"]]
    model, report = getattr(transformers, family.model_class).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # within transformers' WavLM
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("model_type", ["hubert", "wav2vec2", "wavlm"])
@torch.inference_mode()
def test_huggingface_hidden_states(model_type: str, size: str, padded: bool, tmp_path: Path) -> None:
    model = unpruned_model("wavlm" if model_type == "wavlm" else "hubert", size, normalize_waveform=False)
    written = export_huggingface(contents_of(model), tmp_path, model_type)
    assert written == model_type
    theirs = load_with_transformers(tmp_path)
    waveforms, lengths = random_waveforms(2900, 2100)
    lengths = lengths if padded else None
    stages = transformers_stages(theirs, waveforms, lengths)
    frames = None if lengths is None else model.feature_extractor.num_frames(lengths)
    ours = [*model.extract_features(waveforms, lengths)[0], model(waveforms, lengths)[0]]
    assert_same_frames(ours, stages, frames, tolerance=1e-5)


@pytest.mark.parametrize("size", ["base", "large"])
@torch.inference_mode()
def test_huggingface_light_extractor(size: str, tmp_path: Path) -> None:
    """conv_dim, conv_kernel and conv_stride say any layers."""
    layers = {"extractor_conv_layer_config": [[10, 40, 40], [12, 6, 4], [9, 2, 2]]}
    model = unpruned_model("hubert", size, normalize_waveform=False, **layers)
    export_huggingface(contents_of(model), tmp_path)
    waveforms = random_waveforms(5000, 5000)[0]
    stages = transformers_stages(load_with_transformers(tmp_path), waveforms, None)
    ours = [*model.extract_features(waveforms)[0], model(waveforms)[0]]
    assert_same_frames(ours, stages, None, tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("family", ["hubert", "wavlm"])
def test_huggingface_back_to_ours(family: str, size: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Ours, theirs, ours: config and weights are the same, and so is the normalisation."""
    model = unpruned_model(family, size).to(dtype)
    export_huggingface(contents_of(model), tmp_path)
    imported = import_huggingface_model(tmp_path, NO_DROPOUT)
    assert imported.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(imported.model.state_dict()[name], tensor.float()), name
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("model_type", ["hubert", "wav2vec2", "wavlm"])
def test_huggingface_there_and_back(model_type: str, size: str, tmp_path: Path) -> None:
    """Theirs, ours, theirs: the files hold the same tensors under the same names, and mean the same model."""
    make_pair(model_type, size, tmp_path / "theirs")
    said = json.loads((tmp_path / "theirs" / "preprocessor_config.json").read_text())["do_normalize"]
    ours = import_huggingface_model(tmp_path / "theirs", NO_DROPOUT, said)
    export_huggingface(contents_of(ours.model), tmp_path / "back", model_type)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    before.pop("masked_spec_embed", None)  # acts in transformers' own training only
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    settings = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "back")]
    changed = {name for name in settings[0].keys() & settings[1].keys() if settings[0][name] != settings[1][name]}
    assert changed <= {
        "mask_time_prob", "activation_dropout", "attention_dropout", "feat_proj_dropout", "hidden_dropout", "layerdrop",
    }  # fmt: skip
    settings = [json.loads((tmp_path / name / "preprocessor_config.json").read_text()) for name in ("theirs", "back")]
    assert settings[0]["do_normalize"] == settings[1]["do_normalize"]


def test_huggingface_without_the_projections_norm(tmp_path: Path) -> None:
    """There and back as with it; only transformers' HuBERT can be without."""
    theirs, ours = make_pair("hubert", "base", tmp_path / "theirs", feat_proj_layer_norm=False)
    contents = contents_of(ours)
    assert export_huggingface(contents, tmp_path / "back") == "hubert"
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == theirs.state_dict().keys() - {
        "masked_spec_embed"
    }
    back = load_with_transformers(tmp_path / "back")
    waveforms, _ = random_waveforms(3000, 3000)
    with torch.inference_mode():
        assert_same_frames(transformers_stages(back, waveforms, None), transformers_stages(theirs, waveforms, None))
    with pytest.raises(UserError, match=r"LayerNorm before .* leave out --model_type"):
        export_huggingface(contents, tmp_path / "back", "wav2vec2")


def test_huggingface_feature_extractor(tmp_path: Path) -> None:
    model = unpruned_model("hubert", "large")
    export_huggingface(contents_of(model), tmp_path)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    assert extractor.do_normalize and extractor.return_attention_mask and extractor.sampling_rate == 16_000
    waveform = random_waveforms(3000)[0]
    prepared = extractor(waveform[0].numpy(), sampling_rate=16_000, return_tensors="pt").input_values
    torch.testing.assert_close(prepared, normalize_waveforms(waveform), atol=1e-3, rtol=0)


def test_mini_hubert_there_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's real teacher, by the scripts; its published file is in half precision, a model file in single."""
    source = REPOSITORY / "demo" / "mini-hubert"
    run_script(monkeypatch, "convert_hubert_from_hf", "--model", source, "--out", tmp_path / "teacher.pth")
    run_script(
        monkeypatch, "export", "--model", tmp_path / "teacher.pth", "--out", tmp_path, "--formats", "huggingface"
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "huggingface"))
    before.pop("masked_spec_embed")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].float(), after[name]) for name in before)
    load_with_transformers(tmp_path / "huggingface")
    card = (tmp_path / "huggingface" / "README.md").read_text()
    assert "HubertModel.from_pretrained" in card and "| parameters | 3,043,712 |" in card


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("hubert", {"encoder_ff_interm_features": [20, 20, 19]}, "does not hold this model"),
        ("hubert", {"encoder_ff_interm_features": [0, 0, 0]}, "does not hold this model"),
        ("hubert", {"encoder_num_heads": [4, 3, 4]}, "does not hold this model"),
        ("hubert", {"encoder_num_heads": [2, 2, 2]}, "does not hold this model"),
        ("hubert", {"encoder_head_dim": 5}, "does not hold this model"),
        ("wavlm", {"encoder_remaining_heads": [[0, 1, 2, 3], [0, 1, 3], [1]]}, "does not hold this model"),
        ("wavlm", {"encoder_embed_dim": 8, "encoder_head_dim": 4}, "does not hold this model"),
        ("wavlm", {"encoder_use_attention": [True, True, False]}, "does not hold this model"),
        ("hubert", {"encoder_use_feed_forward": [False, True, True]}, "does not hold this model"),
        ("hubert", {"aux_num_out": 7}, "has an output layer .aux_num_out 7."),
    ],
)
def test_huggingface_refuses_shapes(family: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """transformers' own classes have no such shapes."""
    model = unpruned_model(family, "base", **changes)
    with pytest.raises(UserError, match=message):
        export_huggingface(contents_of(model), tmp_path / "out", family)
    assert not (tmp_path / "out").exists()


def test_huggingface_refuses_an_output_scale(tmp_path: Path) -> None:
    model = unpruned_model("hubert", "base")
    model.feature_extractor.dummy_weight.data[5] = 0.5
    with pytest.raises(UserError, match="no output scale"):
        export_huggingface(contents_of(model), tmp_path, "hubert")


def test_huggingface_conv_channels_may_differ(tmp_path: Path) -> None:
    """Only the encoder's layers must be alike: transformers has a width for every conv layer."""
    layers = [[7, 10, 5], [12, 3, 2], [5, 3, 2], [9, 2, 2]]
    model = unpruned_model("hubert", "base", extractor_conv_layer_config=layers)
    export_huggingface(contents_of(model), tmp_path)
    theirs, waveforms = load_with_transformers(tmp_path), random_waveforms(2000)[0]
    with torch.inference_mode():
        torch.testing.assert_close(theirs(waveforms).last_hidden_state, model(waveforms)[0], atol=1e-5, rtol=0)


def test_huggingface_model_type(tmp_path: Path) -> None:
    model = unpruned_model("wavlm", "base")
    with pytest.raises(UserError, match="model_type: expected wavlm, by the model's config, found hubert"):
        export_huggingface(contents_of(model), tmp_path, "hubert")


# torchaudio

NAMED = {
    "hubert_base": ("HuBERT Base / wav2vec 2.0 Base", False),
    "hubert_large": ("HuBERT Large", True),
    "hubert_xlarge": ("HuBERT XLarge", True),
    "wav2vec2_base": ("HuBERT Base / wav2vec 2.0 Base", False),
    "wav2vec2_large": ("wav2vec 2.0 Large", False),
    "wav2vec2_large_lv60k": ("wav2vec 2.0 Large LV-60k / XLSR-53 / XLS-R 300M / MMS", True),
    "wav2vec2_xlsr_300m": ("wav2vec 2.0 Large LV-60k / XLSR-53 / XLS-R 300M / MMS", True),
    "wav2vec2_xlsr_1b": ("XLS-R 1B", True),
    "wav2vec2_xlsr_2b": ("XLS-R 2B", True),
    "wavlm_base": ("WavLM Base / Base+", False),
    "wavlm_large": ("WavLM Large", True),
}


@pytest.mark.parametrize("name", NAMED)
def test_torchaudio_networks_are_recognized(name: str) -> None:
    """Every published network, by shapes alone: no memory is taken for its weights."""
    with torch.device("meta"):
        state_dict = getattr(torchaudio.models, name)().state_dict()
    assert is_torchaudio_state(state_dict)
    weights = our_names(state_dict)
    found, config = recognize(weights, name)
    assert (found, config["normalize_waveform"]) == NAMED[name]
    expected = checkpoint.expected_state(config)
    del expected["feature_extractor.dummy_weight"]
    assert {key: tensor.shape for key, tensor in weights.items()} == {key: t.shape for key, t in expected.items()}


@pytest.mark.parametrize("bundle", ["HUBERT_BASE", "HUBERT_LARGE", "WAV2VEC2_LARGE_LV60K", "WAVLM_BASE", "WAVLM_LARGE"])
def test_normalization_is_that_of_torchaudios_bundle(bundle: str) -> None:
    bundle = getattr(torchaudio.pipelines, bundle)
    factory = torchaudio.models.wavlm_model if bundle._model_type == "WavLM" else torchaudio.models.wav2vec2_model
    with torch.device("meta"):
        weights = our_names(factory(**bundle._params).state_dict())
    assert recognize(weights, "bundle")[1]["normalize_waveform"] == bundle._normalize_waveform


def torchaudio_model(name: str, num_layers: int, **changes: Any) -> torch.nn.Module:
    """torchaudio's own model of a published network, random, with its first layers only; in eval mode."""
    bundle = getattr(torchaudio.pipelines, name)
    factory = torchaudio.models.wavlm_model if bundle._model_type == "WavLM" else torchaudio.models.wav2vec2_model
    model = factory(**bundle._params | {"encoder_num_layers": num_layers, **changes})
    randomize_gently(model)
    return model.eval()


@torch.no_grad()
def randomize_gently(model: torch.nn.Module) -> None:
    """Every parameter away from its start, as far as wide layers bear."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)


def ours_of(state_dict: dict[str, Tensor], **options: Any) -> Wav2Vec2Model:
    config, weights = import_torchaudio(state_dict, **options)
    model = wav2vec2_model(**config)
    model.load_state_dict(weights)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "padded"),
    [
        ("HUBERT_BASE", False),
        ("HUBERT_BASE", True),
        ("WAV2VEC2_LARGE_LV60K", False),
        ("WAV2VEC2_LARGE_LV60K", True),
        ("WAVLM_BASE", False),  # torchaudio's WavLM takes no padding
    ],
)
@torch.inference_mode()
def test_torchaudio_hidden_states(name: str, padded: bool) -> None:
    """The published widths, in two layers: what torchaudio's model computes, ours computes."""
    theirs = torchaudio_model(name, num_layers=2)
    ours = ours_of(theirs.state_dict(), normalize_waveform=False)  # it is outside of torchaudio's model
    waveforms, lengths = random_waveforms(9000, 6100)
    lengths = lengths if padded else None
    wanted, frames = theirs.extract_features(waveforms, lengths)
    found, found_frames = ours.extract_features(waveforms, lengths)
    assert padded is False or torch.equal(frames, found_frames)
    assert_same_frames(found[1:], wanted, frames, tolerance=1e-5)
    assert_same_frames([ours(waveforms, lengths)[0]], [theirs(waveforms, lengths)[0]], frames, tolerance=1e-5)


@torch.inference_mode()
def test_torchaudio_bundle_normalizes(tmp_path: Path) -> None:
    """By default a model equals its bundle on one waveform, including normalisation and output layer."""
    model = torchaudio_model("WAV2VEC2_LARGE_LV60K", num_layers=1, aux_num_out=29)
    bundle = torchaudio.pipelines._wav2vec2.utils._extend_model(model, normalize_waveform=True)
    torch.save(model.half().state_dict(), tmp_path / "wav2vec2_fairseq_large.pth")  # bare, and small
    model.float()
    ours = ours_of(checkpoint.read(tmp_path / "wav2vec2_fairseq_large.pth"))
    assert ours.config["aux_num_out"] == 29
    waveform = 3 * random_waveforms(8000)[0] + 0.5
    torch.testing.assert_close(ours(waveform)[0], bundle(waveform)[0], atol=1e-5, rtol=0)


def edited(edit: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    """The shapes of torchaudio's HuBERT Base, changed."""
    with torch.device("meta"):
        state_dict = torchaudio.models.hubert_base().state_dict()
    edit(state_dict)
    return state_dict


LAYER_NORM = "encoder.transformer.layer_norm.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.clear(), "expected tensors under torchaudio's names"),
        (lambda s: s.update(config={}), "expected tensors under torchaudio's names"),
        (lambda s: s.update({LAYER_NORM: torch.ones(640)}), "of 640 dimensions, .*: none of the published networks"),
        (lambda s: s.update({LAYER_NORM: torch.ones(2, 2)}), r"has shape \[2, 2\], expected one dimension"),
        (lambda s: s.update({"encoder.transformer.layers.12.x": torch.ones(1)}), "found 13 layers, expected the 12 of"),
        (lambda s: s.update({"aux.weight": torch.ones(3)}), r"aux.weight has shape \[3\]"),
        (lambda s: s.pop("encoder.transformer.layers.3.layer_norm.bias"), "HuBERT Base .* 1 missing"),
        (lambda s: s.update(extra=torch.ones(1)), r"1 left over \(extra\)"),
    ],
)
def test_torchaudio_refusals(edit: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"^weights\.pth.*{message}"):
        import_torchaudio(edited(edit), source="weights.pth")


def test_torchaudio_names_in_other_forms() -> None:
    """Wrapped, beside pre-training targets, weight norm removed; the normalisation is the mode's."""
    wanted = torchaudio_model("HUBERT_BASE", 1).state_dict()
    weights = {f"module.wav2vec2.{name}": tensor for name, tensor in wanted.items()}
    conv = "module.wav2vec2.encoder.transformer.pos_conv_embed.conv."
    parts = [key for key in weights if key.startswith(conv) and not key.endswith("bias")]
    scale, direction = sorted((weights.pop(key) for key in parts), key=torch.numel)
    weights[f"{conv}weight"] = torch._weight_norm(direction, scale, 2)
    weights["module.logit_generator.label_embeddings"] = torch.zeros(3)
    assert is_torchaudio_state(weights)
    config, found = import_torchaudio(weights)
    assert config["normalize_waveform"] is False
    model, reference = wav2vec2_model(**config), ours_of(wanted)
    model.load_state_dict(found)
    waveform = random_waveforms(4000)[0]
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(waveform)[0], reference.eval()(waveform)[0], atol=1e-5, rtol=0)
    weights["encoder.transformer.layer_norm.weight"] = torch.zeros(768)  # outside, so not this model's
    assert all(torch.equal(tensor, found[name]) for name, tensor in import_torchaudio(weights)[1].items())
    compiled = {name.replace("layers.", "layers._orig_mod."): tensor for name, tensor in weights.items()}
    assert is_torchaudio_state(compiled)
    assert all(torch.equal(tensor, found[name]) for name, tensor in import_torchaudio(compiled)[1].items())
    weights |= {name.replace("wav2vec2", "teacher"): tensor for name, tensor in weights.items()}
    with pytest.raises(UserError, match=r"weights: 2 models \(module\.wav2vec2\..*, module\.teacher\..*\)"):
        import_torchaudio(weights)


def test_what_is_no_torchaudio_state() -> None:
    model = random_model(small_config("hubert"))
    assert is_torchaudio_state(model.state_dict())  # of whatever shapes
    for other in (None, [], {}, {"state_dict": model.state_dict(), "config": model.config}, {"x": torch.ones(1)}):
        assert not is_torchaudio_state(other)
    with pytest.raises(UserError, match=r"of 16 dimensions, .*: none of the published networks"):
        import_torchaudio(model.state_dict())
