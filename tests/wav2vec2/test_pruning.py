"""Pruning: masked equals pruned and counts are exact, for random architectures, units and masks, and at the edges."""

import copy
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    CERTAIN,
    PROPERTY,
    assert_same_frames,
    blocks_of,
    check_pruning,
    configs,
    decide,
    edge_model,
    log_alphas,
    masked_models,
    masks_of,
    num_elements,
    outputs,
    random_model,
    random_waveforms,
    randomize,
    scattered,
    small_config,
    with_norms_over_kept_channels,
)
from hypothesis import given
from torch import nn

from wav2vec2 import checkpoint
from wav2vec2.model import PRUNING_UNITS, Wav2Vec2Model, wav2vec2_model, with_masks
from wav2vec2.sparsity import fit_masks, pruned_num_params, smallest_num_params

# --- random architectures and masks


# --- masked against pruned


@PROPERTY
@given(masked_models())
def test_pruned_equals_masked(masked: Wav2Vec2Model) -> None:
    """Outputs, exact counts, and the config that rebuilds the pruned model."""
    check_pruning(masked)


@PROPERTY
@given(masked_models())
def test_extractor_keeps_what_its_masks_keep(masked: Wav2Vec2Model) -> None:
    """The pruned extractor gives the masked one's kept channels, scaled alike; the others are zero there."""
    reference, pruned = with_norms_over_kept_channels(masked.double()), copy.deepcopy(masked)
    pruned.prune()
    waveforms, _ = random_waveforms(400, 400)
    with torch.no_grad():
        expected = reference.feature_extractor(waveforms.double(), None)[0]
        found = pruned.feature_extractor(waveforms.double(), None)[0]
    last = masked.feature_extractor.conv_layers[-1].hard_concrete
    kept = torch.ones(expected.size(-1), dtype=torch.bool) if last is None else last() != 0
    assert not expected[..., ~kept].any()
    torch.testing.assert_close(found, expected[..., kept], rtol=1e-6, atol=1e-6)


@PROPERTY
@given(masked_models())
def test_pruning_a_pruned_model_again(masked: Wav2Vec2Model) -> None:
    """A pruned architecture takes fresh masks on every unit it has left, and is pruned further."""
    masked.prune()
    again = wav2vec2_model(**with_masks(masked.config, PRUNING_UNITS))
    missing, unexpected = again.load_state_dict(masked.state_dict(), strict=False)
    assert not unexpected
    assert all(key.endswith("log_alpha") for key in missing)
    for number, mask in enumerate(masks_of(again).values()):
        mask.log_alpha.data.copy_(scattered(mask.n_in, torch.Generator().manual_seed(number)))
    check_pruning(again.eval())


@PROPERTY
@given(configs())
def test_config_round_trip(config: dict[str, Any]) -> None:
    """A config of lists comes back equal, survives JSON and a file, and names plain values only."""
    model = wav2vec2_model(**config)
    assert model.config == config
    assert wav2vec2_model(**json.loads(json.dumps(config))).config == config
    file = BytesIO()
    torch.save(model.config, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == config


@PROPERTY
@given(configs())
def test_unmasked_count_is_exact(config: dict[str, Any]) -> None:
    """Without masks there is nothing to expect: a plain int, and pruning changes nothing."""
    model = random_model(config)
    assert model.get_num_params() == num_elements(model)
    state_dict = copy.deepcopy(model.state_dict())
    assert model.prune() == config
    assert list(model.state_dict()) == list(state_dict)
    assert all(torch.equal(tensor, state_dict[key]) for key, tensor in model.state_dict().items())


# --- the expected count


@PROPERTY
@given(masked_models(kinds=("all kept", "one left", "some certainly gone")))
def test_expected_count_of_certain_masks(masked: Wav2Vec2Model) -> None:
    """Equals the size after pruning; biases and gates of a block whose units all go are the one difference."""
    expected, blocks = masked.get_num_params().item(), blocks_of(masked)
    decided = pruned_num_params(masked)
    masked.prune()
    channels = [channels for channels, _, _ in masked.config["extractor_conv_layer_config"]]
    if blocks_of(masked) == blocks and 1 not in channels:  # one channel left may be the one that must stay
        assert expected == pytest.approx(num_elements(masked), rel=1e-6)
    if blocks_of(masked) == blocks:
        assert decided == pytest.approx(num_elements(masked), rel=1e-6)
    assert decided >= num_elements(masked) * (1 - 1e-6)


@PROPERTY
@given(masked_models(kinds=("undecided",)))
def test_every_unit_lowers_the_expected_count(masked: Wav2Vec2Model) -> None:
    """The count is differentiable, and grows with every single ``log_alpha``."""
    masked.train().get_num_params().backward()
    for name, mask in masks_of(masked).items():
        assert (mask.log_alpha.grad > 0).all(), name
    assert masked.get_num_params().item() < num_elements(masked)


def test_expected_count_by_hand() -> None:
    """HuBERT with all units at one undecided value each: the formula written out."""
    model = random_model(with_masks(small_config("hubert", "large"), PRUNING_UNITS))
    for mask in masks_of(model).values():
        nn.init.zeros_(mask.log_alpha)
    share = torch.tensor(1.1 / 0.1).pow(2 / 3).log().sigmoid().item()  # P(mask > 0) at log_alpha 0
    channels = [share * n for n, _, _ in model.config["extractor_conv_layer_config"]]
    kernels = [kernel for _, kernel, _ in model.config["extractor_conv_layer_config"]]
    extractor = sum(
        inputs * n * kernel + 3 * n for inputs, n, kernel in zip([1, *channels], channels, kernels, strict=False)
    )
    projection = 2 * channels[-1] + (channels[-1] + 1) * 16
    attention = 3 * (16 + 1) * 16 * share + (16 * share + 1) * 16
    feed_forward = (16 + 1) * 20 * share + (20 * share + 1) * 16
    layers = 3 * (share * attention + share * feed_forward + 4 * 16)
    pos_conv_and_norm = 8 + 16 * 4 * 8 + 16 + 2 * 16
    expected = extractor + channels[-1] + projection + pos_conv_and_norm + layers
    assert model.get_num_params().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("family", ["hubert", "wavlm"])
@pytest.mark.parametrize("size", ["base", "large"])
def test_masks_are_trained(family: str, size: str) -> None:
    """The outputs in training give every mask a gradient, as they give every other trained parameter."""
    model = wav2vec2_model(**with_masks(small_config(family, size), PRUNING_UNITS)).train()
    randomize(model)
    for mask in masks_of(model).values():
        nn.init.zeros_(mask.log_alpha)
    waveforms, lengths = random_waveforms(600, 400)
    torch.manual_seed(0)
    for _ in range(10):  # a single sample is often exactly 0 or 1, where it has no gradient
        hidden_states, _ = model.extract_features(waveforms, lengths)
        (torch.stack(hidden_states).square().mean() + model(waveforms, lengths)[0].square().mean()).backward()
    for name, parameter in model.named_parameters():
        if name == "feature_extractor.dummy_weight":
            assert not parameter.requires_grad
        else:
            assert parameter.grad.any(), name
            assert parameter.grad.isfinite().all(), name


# --- the edges


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("unit", ["head", "attlayer"])
@pytest.mark.parametrize("first_remaining", [1, 2])
def test_wavlm_table_moves_to_the_first_remaining_attention(size: str, unit: str, first_remaining: int) -> None:
    """With the first attentions gone, by heads or whole, the later ones still share the table."""
    model = edge_model("wavlm", size, [unit])
    table = model.encoder.transformer.layers[0].attention.rel_attn_embed.weight.detach().clone()
    mask = {"head": "hard_concrete_for_heads", "attlayer": "hard_concrete_for_layer"}[unit]
    for layer in range(first_remaining):
        decide(model, f"layers.{layer}.attention.{mask}")
    pruned = check_pruning(model)
    assert pruned.config["encoder_use_attention"] == [layer >= first_remaining for layer in range(3)]
    tables = {key: tensor for key, tensor in pruned.state_dict().items() if "rel_attn_embed" in key}
    assert list(tables) == [f"encoder.transformer.layers.{first_remaining}.attention.rel_attn_embed.weight"]
    assert torch.equal(*tables.values(), table.double())


@pytest.mark.parametrize("family", ["hubert", "wavlm"])
@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("unit", ["head", "attlayer", "interm", "ffnlayer"])
def test_every_block_of_a_kind_gone(family: str, size: str, unit: str) -> None:
    """Nothing of the blocks is left but the LayerNorms, and WavLM's table goes with its last attention."""
    model = edge_model(family, size, [unit])
    block = "attention" if unit in ("head", "attlayer") else "feed_forward"
    for name in masks_of(model):
        decide(model, name)
    pruned = check_pruning(model)
    assert not any(f".{block}." in key for key in pruned.state_dict())
    assert pruned.config[f"encoder_use_{block}"] == [False] * 3
    other = {"attention": "feed_forward", "feed_forward": "attention"}[block]
    assert pruned.config[f"encoder_use_{other}"] == [True] * 3


@pytest.mark.parametrize("family", ["hubert", "wavlm"])
@pytest.mark.parametrize("size", ["base", "large"])
def test_only_the_layer_norms_of_a_layer_left(family: str, size: str) -> None:
    model = edge_model(family, size, ["attlayer", "ffnlayer"])
    decide(model, "layers.1.attention.hard_concrete_for_layer")
    decide(model, "layers.1.feed_forward.hard_concrete_for_layer")
    keys = [key for key in check_pruning(model).state_dict() if key.startswith("encoder.transformer.layers.1.")]
    assert sorted(key.removeprefix("encoder.transformer.layers.1.") for key in keys) == [
        "final_layer_norm.bias",
        "final_layer_norm.weight",
        "layer_norm.bias",
        "layer_norm.weight",
    ]


@pytest.mark.parametrize("family", ["hubert", "wavlm"])
@pytest.mark.parametrize("size", ["base", "large"])
def test_single_units_left(family: str, size: str) -> None:
    """One head (not the first), one intermediate dimension and one conv channel each: the right ones stay."""
    model = edge_model(family, size, ["conv", "head", "interm"])
    for name in masks_of(model):
        decide(model, name, 2)
    rows = {
        "attention.q_proj.weight": slice(2 * 4, 3 * 4),
        "attention.k_proj.bias": slice(2 * 4, 3 * 4),
        "attention.v_proj.weight": slice(2 * 4, 3 * 4),
        "feed_forward.intermediate_dense.weight": slice(2, 3),
    }
    before = {name: model.encoder.transformer.layers[1].get_parameter(name)[kept] for name, kept in rows.items()}
    pruned = check_pruning(model)
    for name, parameter in before.items():
        assert torch.equal(pruned.encoder.transformer.layers[1].get_parameter(name).float(), parameter), name
    assert [channels for channels, _, _ in pruned.config["extractor_conv_layer_config"]] == [1] * 4
    assert pruned.config["encoder_ff_interm_features"] == [1] * 3
    if family == "wavlm":
        assert pruned.config["encoder_remaining_heads"] == [[2]] * 3
    else:
        assert pruned.config["encoder_num_heads"] == [1] * 3


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_conv_layer_keeps_its_strongest_channel(size: str, layer: int) -> None:
    """A conv layer whose channels would all go."""
    model = edge_model("hubert", size, ["conv"])
    conv = model.feature_extractor.conv_layers[layer]
    conv.hard_concrete.log_alpha.data.fill_(-12.0)
    conv.hard_concrete.log_alpha.data[5] = -11.0
    weight = conv.conv.weight[5:6]
    if layer > 0:
        weight = weight * model.feature_extractor.conv_layers[layer - 1].hard_concrete()[:, None]
    pruned = check_pruning(model)
    assert pruned.config["extractor_conv_layer_config"][layer][0] == 1
    torch.testing.assert_close(pruned.feature_extractor.conv_layers[layer].conv.weight.float(), weight)


def test_all_gone_at_once() -> None:
    """Every unit of every kind: what is left still runs and counts right."""
    for family in ("hubert", "wavlm"):
        model = edge_model(family, "base", list(PRUNING_UNITS))
        for name in masks_of(model):
            decide(model, name)
        pruned = check_pruning(model)
        assert pruned.config["encoder_use_attention"] == pruned.config["encoder_use_feed_forward"] == [False] * 3


def test_soft_masks_move_into_the_consuming_weights() -> None:
    """Layer masks scale weight and bias; the last conv's mask lands in ``dummy_weight`` and nowhere else."""
    model = edge_model("hubert", "base", ["conv", "attlayer"])
    attention = model.encoder.transformer.layers[0].attention
    layer_mask, last_mask = attention.hard_concrete_for_layer(), model.feature_extractor.conv_layers[3].hard_concrete()
    out_weight, out_bias = attention.out_proj.weight.clone(), attention.out_proj.bias.clone()
    dummy_weight, projection = model.feature_extractor.dummy_weight.clone(), model.encoder.feature_projection
    projection_weight = projection.projection.weight.clone()
    model.prune()
    assert 0 < layer_mask < 1
    torch.testing.assert_close(attention.out_proj.weight, out_weight * layer_mask)
    torch.testing.assert_close(attention.out_proj.bias, out_bias * layer_mask)
    torch.testing.assert_close(model.feature_extractor.dummy_weight, (dummy_weight * last_mask)[last_mask != 0])
    assert torch.equal(projection.projection.weight, projection_weight[:, last_mask != 0])
    assert not model.training


def test_pruned_model_in_a_file(tmp_path: Path) -> None:
    """Saved as users get it, opened with ``weights_only=True``, rebuilt, loaded strictly and run."""
    model = edge_model("wavlm", "base", ["conv", "head", "interm"])
    decide(model, "layers.0.attention.hard_concrete_for_heads")
    config = model.prune()
    checkpoint.save(tmp_path / "pruned.pth", {"state_dict": model.state_dict(), "config": config})
    contents = torch.load(tmp_path / "pruned.pth", weights_only=True)
    rebuilt = wav2vec2_model(**contents["config"]).eval()
    rebuilt.load_state_dict(contents["state_dict"], strict=True)
    waveforms, lengths = random_waveforms(400, 300)
    assert_same_frames(outputs(rebuilt, lengths, waveforms)[0], outputs(model, lengths, waveforms)[0], tolerance=0)


# --- meeting a target size


def trained_masks(family: str, units: list[str], seed: int = 0) -> Wav2Vec2Model:
    """A model as it comes out of training: some units certain, others undecided."""
    model = random_model(with_masks(small_config(family), units), seed)
    generator = torch.Generator().manual_seed(seed)
    for mask in masks_of(model).values():
        mask.log_alpha.data.copy_(scattered(mask.n_in, generator))
    return model


def largest_unit(model: Wav2Vec2Model) -> float:
    """Parameters of the largest single unit, when all others are there."""
    model = copy.deepcopy(model)
    masks = masks_of(model).values()
    for mask in masks:
        mask.log_alpha.data.fill_(CERTAIN)
    dense, sizes = model.get_num_params().item(), []
    for mask in masks:
        mask.log_alpha.data[0] = -CERTAIN
        sizes.append(dense - model.get_num_params().item())
        mask.log_alpha.data[0] = CERTAIN
    return max(sizes)


@pytest.mark.parametrize("family", ["hubert", "wavlm"])
@pytest.mark.parametrize("units", [["conv", "head", "interm"], ["interm"], ["head", "ffnlayer"]])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_fit_masks_meets_the_target(family: str, units: list[str], share: float) -> None:
    """Within half the largest unit, by one constant for all masks; what is pruned then has that size."""
    model = trained_masks(family, units)
    originals, smallest = log_alphas(model), smallest_num_params(model)
    target = smallest + share * (num_elements(model) - smallest)
    shift = fit_masks(model, target, tolerance=0)
    for value, original in zip(log_alphas(model), originals, strict=True):
        assert torch.equal(value, original + shift)
    size = pruned_num_params(model)
    assert abs(size - target) <= largest_unit(model) / 2 + 1
    blocks = blocks_of(model)
    model.prune()
    if blocks_of(model) == blocks:
        assert num_elements(model) == pytest.approx(size, rel=1e-6)


def test_fit_masks_leaves_a_met_target_alone() -> None:
    """Up to the tolerance, on either side; the model comes back in eval mode."""
    model = trained_masks("hubert", ["conv", "head", "interm"]).train()
    originals, size = log_alphas(model), pruned_num_params(copy.deepcopy(model).eval())
    for target in (size - 50, size, size + 50):
        assert fit_masks(model, target, tolerance=50) == 0.0
        assert not model.training
        assert all(map(torch.equal, log_alphas(model), originals))
    assert fit_masks(model, size + 500, tolerance=50) > 0.0
    model = trained_masks("hubert", ["conv", "head", "interm"])
    assert fit_masks(model, size - 500, tolerance=50) < 0.0


def test_fit_masks_is_monotone() -> None:
    """A larger target never makes a smaller model, and every unit of the smaller one stays."""
    sizes, kept = [], []
    for target in range(2500, 9500, 500):
        model = trained_masks("wavlm", ["conv", "head", "interm"])
        fit_masks(model, target, tolerance=0)
        sizes.append(pruned_num_params(model))
        kept.append(torch.cat([mask() != 0 for mask in masks_of(model).values()]))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 10
    for fewer, more in zip(kept, kept[1:], strict=False):
        assert (more | ~fewer).all()


@pytest.mark.parametrize(("target", "bound"), [(0, "smallest"), (10**9, "dense")])
def test_fit_masks_out_of_reach(target: int, bound: str) -> None:
    """The nearest size there is."""
    model = trained_masks("hubert", ["interm"])
    nearest = {"smallest": smallest_num_params(model), "dense": num_elements(model)}[bound]
    fit_masks(model, target, tolerance=0)
    assert pruned_num_params(model) == pytest.approx(nearest, rel=1e-6)


@PROPERTY
@given(masked_models())
def test_sizes_leave_the_masks_alone(masked: Wav2Vec2Model) -> None:
    """Asking for a size changes nothing; no pruned size is below the smallest."""
    before = log_alphas(masked)
    smallest, decided = smallest_num_params(masked), pruned_num_params(masked)
    assert all(map(torch.equal, log_alphas(masked), before))
    assert smallest <= decided * (1 + 1e-6)
    assert decided <= num_elements(masked) * (1 + 1e-6)


def test_smallest_num_params() -> None:
    """With only intermediate dimensions to lose, all else is left."""
    model = trained_masks("hubert", ["interm"])
    lost = sum((16 + 1) * features + features * 16 for features in model.config["encoder_ff_interm_features"])
    assert smallest_num_params(model) == pytest.approx(num_elements(model) - lost, rel=1e-6)
