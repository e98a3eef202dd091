"""The numbers of the released program: small models masked and pruned, and the layouts of the full-size ones."""

import gzip
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import REFERENCE, assert_same_frames, masks_of, num_elements

from wav2vec2.model import Wav2Vec2Model, hubert_base, hubert_large, wav2vec2_model, wavlm_base, wavlm_large

NAMES = ["hubert_base", "hubert_large", "wavlm_base", "hubert_base_all_units"]
PUBLISHED_UNITS = {
    "extractor_prune_conv_channels": True,
    "encoder_prune_attention_heads": True,
    "encoder_prune_feed_forward_intermediate": True,
}


@pytest.fixture(params=NAMES)
def reference(request: pytest.FixtureRequest) -> dict[str, Any]:
    return torch.load(REFERENCE / f"{request.param}.pt", weights_only=True)


@pytest.fixture
def masked(reference: dict[str, Any]) -> Wav2Vec2Model:
    """The reference's masked model, in eval mode."""
    model = wav2vec2_model(**reference["config"])
    model.load_state_dict(reference["state_dict"])
    return model.eval()


def check_hidden_states(model: Wav2Vec2Model, reference: dict[str, Any], prefix: str) -> None:
    """Every entry of ``extract_features``' list, without and with lengths, and the lengths in frames."""
    with torch.inference_mode():
        features, lengths = model.extract_features(reference["waveforms"])
        padded, padded_lengths = model.extract_features(reference["waveforms"], reference["lengths"])
    assert lengths is None
    assert padded_lengths.tolist() == reference["feature_lengths"].tolist()
    assert_same_frames(features, reference[f"{prefix}hidden_states"])
    assert_same_frames(padded, reference[f"{prefix}hidden_states_padded"], padded_lengths)


def test_state_dict_of_the_masked_model(reference: dict[str, Any], masked: Wav2Vec2Model) -> None:
    """Key names and order are the released program's, and the config survives the model."""
    assert list(masked.state_dict()) == list(reference["state_dict"])
    assert masked.config == reference["config"]


def test_masks(reference: dict[str, Any], masked: Wav2Vec2Model) -> None:
    masks = masks_of(masked)
    assert set(masks) == set(reference["masks"]) == set(reference["l0_norms"])
    for name, mask in masks.items():
        torch.testing.assert_close(mask(), reference["masks"][name], rtol=1e-5, atol=1e-5)
        assert mask.l0_norm().item() == pytest.approx(reference["l0_norms"][name], rel=1e-5), name


def test_masked_hidden_states(reference: dict[str, Any], masked: Wav2Vec2Model) -> None:
    check_hidden_states(masked, reference, prefix="")


def test_expected_num_params(reference: dict[str, Any], masked: Wav2Vec2Model) -> None:
    """WavLM's gates and bucket table, which the released program leaves out, are counted on top."""
    gates_and_table = sum(
        tensor.numel() for key, tensor in reference["state_dict"].items() if "gru_rel_pos" in key or "rel_attn" in key
    )
    assert (gates_and_table > 0) == ("encoder_remaining_heads" in reference["config"])
    expected = reference["expected_num_params"] + gates_and_table
    assert masked.get_num_params().item() == pytest.approx(expected, rel=1e-5)


def test_pruned_model(reference: dict[str, Any], masked: Wav2Vec2Model) -> None:
    config = masked.prune()
    assert config == reference["pruned_config"]
    assert masked.get_num_params() == num_elements(masked) == reference["pruned_num_params"]
    state_dict = masked.state_dict()
    assert list(state_dict) == list(reference["pruned_state_dict"])
    for key, tensor in reference["pruned_state_dict"].items():
        torch.testing.assert_close(state_dict[key], tensor, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: key + text)
    check_hidden_states(masked, reference, prefix="pruned_")


def test_pruned_model_from_its_config(reference: dict[str, Any], masked: Wav2Vec2Model) -> None:
    """Rebuilt from the returned config and loaded strictly, from our weights and from the released program's."""
    rebuilt = wav2vec2_model(**masked.prune()).eval()
    for state_dict in (masked.state_dict(), reference["pruned_state_dict"]):
        rebuilt.load_state_dict(state_dict, strict=True)
        check_hidden_states(rebuilt, reference, prefix="pruned_")


@pytest.mark.parametrize(
    ("name", "factory", "options"),
    [
        ("hubert_base", hubert_base, {}),
        ("hubert_large", hubert_large, {"extractor_conv_bias": True}),  # as in the published HuBERT Large
        ("wavlm_base_plus", wavlm_base, {}),
        ("wavlm_large", wavlm_large, {}),
    ],
)
def test_layout_of_full_size_models(name: str, factory: Callable[..., Wav2Vec2Model], options: dict[str, bool]) -> None:
    """Every key and shape with masks, and the exact size without."""
    layout = json.loads(gzip.decompress((REFERENCE / "state_dict_layout.json.gz").read_bytes()))[name]
    with torch.device("meta"):
        masked, dense = factory(**options, **PUBLISHED_UNITS), factory(**options)
    assert {key: list(tensor.shape) for key, tensor in masked.state_dict().items()} == layout["keys"]
    assert dense.get_num_params() == num_elements(dense) == num_elements(masked) == layout["num_params_without_masks"]


def test_published_pruned_wavlm() -> None:
    """An irregular architecture that others published: two attentions gone, one head left in a layer."""
    published = json.loads((REFERENCE / "published_wavlm_base_s80.json").read_text())
    model = wav2vec2_model(**published["config"])
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == published["keys"]
    assert model.get_num_params() == num_elements(model) == published["num_params"]
    assert model.config == published["config"]
    with torch.inference_mode():
        assert model.eval()(torch.randn(1, 4000))[0].isfinite().all()
