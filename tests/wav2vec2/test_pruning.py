"""Pruning: masked equals pruned, counts are exact, widths in multiples; random architectures, units and masks."""

import copy
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    assert_same_frames,
    masks_of,
    num_elements,
    random_model,
    random_waveforms,
    randomize,
    small_config,
    torch_counts,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hardconcrete import HardConcrete
from wav2vec2.files import checkpoint
from wav2vec2.model import PRUNING_UNITS, Wav2Vec2Model, masked_units, wav2vec2_model, with_masks
from wav2vec2.sparsity import (
    Size,
    expected_size,
    fit_masks,
    meet_expected_size,
    num_params_without_rounding,
    pruned_size,
    round_widths,
    size_of,
    smallest_size,
)

# --- random architectures and masks

CERTAIN = 40.0  # sigmoid(40) is 1 in float32


PROPERTY = settings(max_examples=25, deadline=None, derandomize=True, database=None)


UNIT_SETS = st.sets(st.sampled_from(sorted(PRUNING_UNITS)), min_size=1)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Small architectures of all families and shapes, some of them already irregular; no masks yet."""
    use_block = st.sampled_from([True, True, True, False])
    num_layers = draw(st.integers(1, 4))
    num_heads = draw(st.integers(1, 4))
    head_dim = draw(st.sampled_from([2, 3]))
    pos_conv_groups = draw(st.sampled_from([1, 2]))

    def per_layer(values: st.SearchStrategy) -> list[Any]:
        return draw(st.lists(values, min_size=num_layers, max_size=num_layers))

    changes = {
        "extractor_conv_layer_config": [
            [draw(st.integers(1, 7)), kernel, stride] for kernel, stride in [(10, 5), (3, 2), (2, 2)]
        ],
        "extractor_conv_bias": draw(st.booleans()),
        "encoder_embed_dim": 2 * num_heads * head_dim,
        "encoder_pos_conv_kernel": draw(st.sampled_from([3, 4])),
        "encoder_pos_conv_groups": pos_conv_groups,
        "encoder_num_layers": num_layers,
        "encoder_use_attention": per_layer(use_block),
        "encoder_use_feed_forward": per_layer(use_block),
        "encoder_ff_interm_features": per_layer(st.integers(1, 9)),
    }
    family = draw(st.sampled_from(["hubert", "wavlm"]))
    if family == "wavlm":
        heads = st.sets(st.integers(0, num_heads - 1), min_size=1).map(sorted)
        changes["encoder_total_num_heads"] = [num_heads] * num_layers
        changes["encoder_remaining_heads"] = per_layer(heads)
        changes["encoder_num_buckets"] = 8
    else:
        changes["encoder_num_heads"] = per_layer(st.integers(1, num_heads))
        changes["encoder_head_dim"] = head_dim
    if draw(st.sampled_from([False, False, True])):
        changes["encoder_feature_projection_layer_norm"] = False
    size = draw(st.sampled_from(["base", "large"]))
    if draw(st.sampled_from([False, False, True])):
        changes |= {
            "encoder_chunk_frames": draw(st.sampled_from([1, 3, 4])),
            "encoder_left_frames": draw(st.integers(0, 6)),
        }
    return small_config(family, size, **changes)


def scattered(size: int, generator: torch.Generator) -> Tensor:
    return 3 * torch.randn(size, generator=generator)


def one_left(size: int, generator: torch.Generator) -> Tensor:
    survivor = torch.randint(size, (), generator=generator)
    return torch.where(torch.arange(size) == survivor, CERTAIN, -CERTAIN)


# What a mask can look like; the names say what happens to its units.
LOG_ALPHAS = {
    "scattered": scattered,
    "undecided": lambda size, generator: 0.3 * torch.randn(size, generator=generator),
    "one left": one_left,
    "some certainly gone": lambda size, generator: CERTAIN * scattered(size, generator).sign(),
    "all kept": lambda size, generator: torch.full((size,), CERTAIN),
    "all gone": lambda size, generator: torch.randn(size, generator=generator) - 15,
}


@st.composite
def masked_models(draw: st.DrawFn, kinds: tuple[str, ...] = tuple(LOG_ALPHAS)) -> Wav2Vec2Model:
    """Models in eval mode with random weights, masks on any non-empty set of units, each of any of the kinds."""
    config = with_masks(draw(configs()), draw(UNIT_SETS))
    seed = draw(st.integers(0, 999))
    model, generator = random_model(config, seed), torch.Generator().manual_seed(seed)
    assume(masks_of(model))  # none where every layer lacks the block that the units belong to
    with torch.no_grad():
        for mask in masks_of(model).values():
            mask.log_alpha.copy_(LOG_ALPHAS[draw(st.sampled_from(kinds))](mask.n_in, generator))
    return model


class KeptChannelsLayerNorm(nn.Module):
    """A LayerNorm over conv channels that sees only the kept ones, and gives zero for the others.

    It is what makes a masked model comparable with its pruned self: LayerNorms over conv channels
    are the one place where a dropped channel counts although it is zero.
    """

    def __init__(self, norm: nn.LayerNorm, mask: HardConcrete, channel_dim: int) -> None:
        super().__init__()
        self.norm, self.mask, self.channel_dim = norm, mask, channel_dim

    def forward(self, x: Tensor) -> Tensor:
        kept = self.mask().nonzero().flatten()
        x = x.movedim(self.channel_dim, -1)
        normalized = torch.zeros_like(x)
        normalized[..., kept] = nn.functional.layer_norm(
            x[..., kept], (len(kept),), self.norm.weight[kept], self.norm.bias[kept], self.norm.eps
        )
        return normalized.movedim(-1, self.channel_dim)


def with_norms_over_kept_channels(model: Wav2Vec2Model) -> Wav2Vec2Model:
    """A copy of a masked model whose LayerNorms over masked conv channels see the kept ones only."""
    model = copy.deepcopy(model)
    for layer in model.feature_extractor.conv_layers:
        if layer.hard_concrete is not None and isinstance(layer.layer_norm, nn.LayerNorm):
            layer.layer_norm = KeptChannelsLayerNorm(layer.layer_norm, layer.hard_concrete, channel_dim=1)
    projection = model.encoder.feature_projection
    if layer.hard_concrete is not None and projection.layer_norm is not None:
        projection.layer_norm = KeptChannelsLayerNorm(projection.layer_norm, layer.hard_concrete, channel_dim=-1)
    return model


@torch.no_grad()
def outputs(model: Wav2Vec2Model, lengths: Tensor | None, waveforms: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """Everything ``extract_features`` and ``forward`` return, and the valid frames."""
    hidden_states, frame_lengths = model.extract_features(waveforms, lengths)
    return [*hidden_states, model(waveforms, lengths)[0]], frame_lengths


def check_pruning(masked: Wav2Vec2Model) -> Wav2Vec2Model:
    """Prune a copy of the model and check all that must hold; returns the pruned copy.

    In double precision: a LayerNorm over two or three channels can enlarge rounding errors a hundred times.
    """
    masked = copy.deepcopy(masked).double()
    reference, pruned = with_norms_over_kept_channels(masked), copy.deepcopy(masked)
    config = pruned.prune()

    assert not masks_of(pruned)
    assert masked_units(pruned.state_dict()) == []
    assert pruned.get_num_params() == num_elements(pruned)
    assert config == pruned.config

    rebuilt = wav2vec2_model(**config).double().eval()
    rebuilt.load_state_dict(pruned.state_dict(), strict=True)
    assert rebuilt.config == config
    assert rebuilt.get_num_params() == num_elements(rebuilt) == num_elements(pruned)
    trained = {name for name, parameter in pruned.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in rebuilt.named_parameters() if parameter.requires_grad}

    waveforms, lengths = random_waveforms(400, 260, 330)
    waveforms = waveforms.double()
    num_samples = pruned.feature_extractor.num_samples(12)  # whole chunks
    assert 2 * pruned.get_num_macs(num_samples) == sum(torch_counts(config, num_samples).values())
    for given_lengths in (None, lengths):
        expected, frame_lengths = outputs(reference, given_lengths, waveforms)
        if (dims := reference.encoder.kept_dims()) is not None:
            assert all(x.abs().sum((0, 1)).nonzero().flatten().tolist() == dims.tolist() for x in expected)
            expected = [x[..., dims] for x in expected]
        for model in (pruned, rebuilt):
            found, found_lengths = outputs(model, given_lengths, waveforms)
            assert_same_frames(found, expected, frame_lengths, tolerance=1e-6)
            if frame_lengths is not None:
                assert found_lengths.tolist() == frame_lengths.tolist()
    return pruned


def blocks_of(model: Wav2Vec2Model) -> list[tuple[bool, bool]]:
    return [(layer.attention is not None, layer.feed_forward is not None) for layer in model.encoder.transformer.layers]


def edge_model(family: str, size: str, units: list[str]) -> Wav2Vec2Model:
    """Three small layers whose masks are all undecided at first."""
    model = random_model(with_masks(small_config(family, size), units))
    for number, mask in enumerate(masks_of(model).values()):
        mask.log_alpha.data.copy_(scattered(mask.n_in, torch.Generator().manual_seed(number)).abs() + 3)
    return model


def decide(model: Wav2Vec2Model, name: str, *kept: int, size: float = 15.0) -> None:
    """Keep only these units of the mask whose module name ends in ``name``."""
    (mask,) = [mask for module, mask in masks_of(model).items() if module.endswith(name)]
    mask.log_alpha.data.fill_(-size)
    mask.log_alpha.data[list(kept)] = size


def log_alphas(model: Wav2Vec2Model) -> list[Tensor]:
    return [mask.log_alpha.detach().clone() for mask in masks_of(model).values()]


MULTIPLES = st.sampled_from([1, 2, 3, 4, 8, 16, 64])
WIDTH_MASKS = ("hard_concrete", "hard_concrete_for_intermediate")  # the last part of their names


def width_masks(model: Wav2Vec2Model) -> dict[str, HardConcrete]:
    return {
        name: mask
        for name, mask in masks_of(model).items()
        if name.rpartition(".")[2] in WIDTH_MASKS and "pos_conv" not in name and name != "encoder.hard_concrete"
    }


def fit_params(model: Wav2Vec2Model, target: float, tolerance: float) -> float:
    """Call ``fit_masks`` with a target for parameters alone, and a tolerance in parameters."""
    return fit_masks(model, Size(target, None), tolerance / max(target, 1))


def kept(model: Wav2Vec2Model) -> dict[str, Tensor]:
    return {name: mask() for name, mask in masks_of(model).items()}


def rounded_copy(model: Wav2Vec2Model, multiple: int) -> Wav2Vec2Model:
    model = copy.deepcopy(model)
    round_widths(model, multiple)
    return model


def widths(config: dict[str, Any]) -> list[int]:
    """Conv channels and the intermediate dimensions of the feed-forwards that are left."""
    channels = [channels for channels, _, _ in config["extractor_conv_layer_config"]]
    features = zip(config["encoder_ff_interm_features"], config["encoder_use_feed_forward"], strict=True)
    return [*channels, *(features for features, used in features if used)]


# --- masked against pruned


@PROPERTY
@given(masked_models(), MULTIPLES)
def test_pruned_equals_masked(masked: Wav2Vec2Model, multiple: int) -> None:
    """Outputs, exact counts, and the config that rebuilds the pruned model; 1 is the published rounding."""
    check_pruning(rounded_copy(masked, multiple))


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


@pytest.mark.slow
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
    decided = pruned_size(masked).params
    masked.prune()
    channels = [channels for channels, _, _ in masked.config["extractor_conv_layer_config"]]
    # What is left may be the one that must stay: a channel, a place in the groups, a ring of taps.
    is_forced = 1 in channels or masked.encoder.num_embed_units == 1 or masked.config["encoder_pos_conv_kernel"] <= 2
    if blocks_of(masked) == blocks and not is_forced:
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


@pytest.mark.parametrize("kernel", [7, 8])
@pytest.mark.parametrize("num_rings", [1, 3])
def test_taps_go_from_the_outside_in(kernel: int, num_rings: int) -> None:
    """The middle of the kernel stays, whatever the order of ``log_alpha``, under the published config key."""
    model = random_model(with_masks(small_config("hubert", encoder_pos_conv_kernel=kernel), ["posconv"]))
    conv = model.encoder.transformer.pos_conv_embed
    values = torch.full((conv.hard_concrete.n_in,), -CERTAIN)
    values[-num_rings:] = CERTAIN  # the outermost are the strongest
    conv.hard_concrete.log_alpha.data.copy_(values)
    taps = 2 * num_rings - kernel % 2
    first = (kernel - taps + 1) // 2 if kernel % 2 else (kernel - taps) // 2
    direction = conv.conv.weight_v.detach()[..., first : first + taps].clone()
    pruned = check_pruning(model)
    assert pruned.config["encoder_pos_conv_kernel"] == taps
    assert "encoder_prune_pos_conv" not in pruned.config  # the published program would refuse it
    assert torch.equal(pruned.state_dict()["encoder.transformer.pos_conv_embed.conv.weight_v"].float(), direction)


@PROPERTY
@given(masked_models(kinds=("scattered", "undecided")), st.floats(0.05, 0.95))
def test_expected_size_is_met(masked: Wav2Vec2Model, share: float) -> None:
    """One number is added to all masks, whatever the units; a second call changes nothing."""
    smallest, largest = smallest_size(masked).params, num_elements(masked)
    wanted = smallest + share * (largest - smallest)
    before = torch.cat(log_alphas(masked))
    assert meet_expected_size(masked, Size(wanted, None)) == "params"
    assert expected_size(masked).params == pytest.approx(wanted, rel=2e-5)
    found = torch.cat(log_alphas(masked))
    torch.testing.assert_close(found, before + (found - before).mean())
    meet_expected_size(masked, Size(wanted, None))
    assert torch.equal(torch.cat(log_alphas(masked)), found)


@PROPERTY
@given(masked_models(kinds=("undecided",)), st.tuples(st.floats(0.05, 0.95), st.floats(0.05, 0.95)))
def test_two_sizes_are_met(masked: Wav2Vec2Model, shares: tuple[float, float]) -> None:
    """Neither size is exceeded, and the returned one is used up."""
    largest = size_of(wav2vec2_model(**with_masks(masked.config, ())))
    sizes = zip(smallest_size(masked)[:2], largest[:2], shares, strict=True)
    wanted = Size(*(smallest + share * (largest - smallest) for smallest, largest, share in sizes))
    binding = meet_expected_size(masked, wanted)
    found = expected_size(masked)
    assert getattr(found, binding) == pytest.approx(getattr(wanted, binding), rel=2e-5)
    assert all(size <= most * (1 + 2e-5) for size, most in zip(found[:2], wanted[:2], strict=True))


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
    dim = 16 * share
    projection = 2 * channels[-1] + (channels[-1] + 1) * dim
    attention = 3 * (dim + 1) * 16 * share + (16 * share + 1) * dim
    feed_forward = (dim + 1) * 20 * share + (20 * share + 1) * dim
    layers = 3 * (share * attention + share * feed_forward + 4 * dim)
    pos_conv_and_norm = share * 8 * (1 + dim * 4 * share) + dim + 2 * dim
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
    """The later attentions still share the table when the first are gone, by heads or whole."""
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
    """Only the LayerNorms are left of the blocks, and WavLM's table goes with its last attention."""
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
    """A conv layer whose channels would all go keeps the strongest."""
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
    """Return a model as training leaves it: some units certain, others undecided."""
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


@pytest.mark.parametrize(
    ("family", "units"),
    [("wavlm", ["conv", "head", "interm"]), ("hubert", ["interm"]), ("wavlm", ["head", "ffnlayer"])],
)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_fit_masks_meets_the_target(family: str, units: list[str], share: float) -> None:
    """One number for all masks meets the target within half the largest unit; the pruned model has that size."""
    model = trained_masks(family, units)
    originals, smallest = log_alphas(model), smallest_size(model).params
    target = smallest + share * (num_elements(model) - smallest)
    shift = fit_params(model, target, tolerance=0)
    assert all(mask.shift == shift for mask in masks_of(model).values())
    assert all(map(torch.equal, log_alphas(model), originals))
    size = pruned_size(model).params
    assert abs(size - target) <= largest_unit(model) / 2 + 1
    blocks = blocks_of(model)
    model.prune()
    if blocks_of(model) == blocks:
        assert num_elements(model) == pytest.approx(size, rel=1e-6)


def test_fit_masks_leaves_a_met_target_alone() -> None:
    """Sizes within the tolerance, on either side, need no shift; the model comes back in eval mode."""
    model = trained_masks("hubert", ["conv", "head", "interm"]).train()
    originals, size = log_alphas(model), pruned_size(copy.deepcopy(model).eval()).params
    for target in (size - 50, size, size + 50):
        assert fit_params(model, target, tolerance=50) == 0.0
        assert not model.training
        assert all(map(torch.equal, log_alphas(model), originals))
    assert fit_params(model, size + 500, tolerance=50) > 0.0
    model = trained_masks("hubert", ["conv", "head", "interm"])
    assert fit_params(model, size - 500, tolerance=50) < 0.0


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_fit_masks_keeps_what_training_gave(share: float) -> None:
    """Units stay as if all logits were shifted; their values never fall below the trained ones."""
    model = trained_masks("wavlm", ["conv", "head", "interm"])
    trained = copy.deepcopy(model).eval()
    smallest = smallest_size(model).params
    shift = fit_params(model, smallest + share * (num_elements(model) - smallest), tolerance=0)
    assert (shift < 0) == (share < 0.5)
    shifted = copy.deepcopy(trained)
    for mask in masks_of(shifted).values():
        mask.log_alpha.data.add_(shift)
    all_masks = zip(*(masks_of(each).values() for each in (model, trained, shifted)), strict=True)
    for mask, as_trained, as_shifted in all_masks:
        assert torch.equal(mask() != 0, as_shifted() != 0)
        soft = (as_trained.log_alpha / as_trained.temperature * 0.8).sigmoid()
        assert torch.equal(mask()[mask() != 0], (soft if shift < 0 else as_shifted())[mask() != 0])


def test_fit_masks_is_monotone() -> None:
    """A larger target never makes a smaller model, and keeps every unit of it."""
    sizes, kept = [], []
    for target in range(2500, 9500, 500):
        model = trained_masks("wavlm", ["conv", "head", "interm"])
        fit_params(model, target, tolerance=0)
        sizes.append(pruned_size(model).params)
        kept.append(torch.cat([mask() != 0 for mask in masks_of(model).values()]))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 10
    for fewer, more in zip(kept, kept[1:], strict=False):
        assert (more | ~fewer).all()


@pytest.mark.parametrize(("target", "bound"), [(0, "smallest"), (10**9, "dense")])
def test_fit_masks_out_of_reach(target: int, bound: str) -> None:
    """The nearest size there is."""
    model = trained_masks("hubert", ["interm"])
    nearest = {"smallest": smallest_size(model).params, "dense": num_elements(model)}[bound]
    fit_params(model, target, tolerance=0)
    assert pruned_size(model).params == pytest.approx(nearest, rel=1e-6)


@PROPERTY
@given(masked_models())
def test_sizes_leave_the_masks_alone(masked: Wav2Vec2Model) -> None:
    """Asking for a size changes nothing; no pruned size is below the smallest."""
    before = log_alphas(masked)
    smallest, decided = smallest_size(masked).params, pruned_size(masked).params
    assert all(map(torch.equal, log_alphas(masked), before))
    assert smallest <= decided * (1 + 1e-6)
    assert decided <= num_elements(masked) * (1 + 1e-6)


def test_smallest_num_params() -> None:
    """All else stays if only intermediate dimensions have masks."""
    model = trained_masks("hubert", ["interm"])
    lost = sum((16 + 1) * features + features * 16 for features in model.config["encoder_ff_interm_features"])
    assert smallest_size(model).params == pytest.approx(num_elements(model) - lost, rel=1e-6)


# --- widths in multiples


@PROPERTY
@given(masked_models(), MULTIPLES)
def test_what_is_kept(masked: Wav2Vec2Model, multiple: int) -> None:
    """Whole multiples, everything or nothing; all of the units that stay without it, with the same values, and the
    strongest of the others; as few as that takes. Other masks do not change."""
    plain, rounded = kept(masked), kept(rounded_copy(masked, multiple))
    masks = masks_of(masked)
    for name, found in rounded.items():
        expected, log_alpha = plain[name], masks[name].log_alpha
        if name not in width_masks(masked):
            assert torch.equal(found, expected), name
            continue
        assert torch.equal(found[expected != 0], expected[expected != 0]), name
        num_units, num_plain, num_kept = len(found), int((expected != 0).sum()), int((found != 0).sum())
        assert num_kept == min(-(-num_plain // multiple) * multiple, num_units), name
        if 0 < num_kept < num_units:
            assert log_alpha[found != 0].min() >= log_alpha[found == 0].max(), name
        soft_mask = torch.sigmoid(0.8 * log_alpha / (2 / 3)).clamp(min=torch.finfo(torch.float32).tiny)
        torch.testing.assert_close(found[found != 0], soft_mask[found != 0])


@PROPERTY
@given(masked_models(), MULTIPLES)
def test_sizes_in_multiples(masked: Wav2Vec2Model, multiple: int) -> None:
    """Rounding up adds parameters, the same blocks go, training's expected size is not concerned, and what the model
    would be without it is known to the parameter."""
    rounded, before = rounded_copy(masked, multiple), log_alphas(masked)
    assert expected_size(rounded).params == expected_size(masked).params
    assert pruned_size(rounded).params >= pruned_size(masked).params
    num_plain = num_params_without_rounding(rounded)
    assert all(map(torch.equal, log_alphas(rounded), before))
    decided = pruned_size(rounded).params
    for model in (masked, rounded):
        model.prune()
    assert num_plain == num_elements(masked) <= num_elements(rounded)
    assert blocks_of(masked) == blocks_of(rounded)
    assert decided >= num_elements(rounded) * (1 - 1e-6)


@PROPERTY
@given(masked_models())
def test_multiples_of_one(masked: Wav2Vec2Model) -> None:
    """The published rounding, bit for bit: the formula written out, and the pruned weights."""
    for name, mask in masks_of(rounded_copy(masked, 1)).items():
        log_alpha = mask.log_alpha.detach()
        num_zeros = (mask.n_in - mask.l0_norm().double()).round().clamp(max=mask.n_in - mask.min_kept)
        soft_mask = torch.sigmoid(log_alpha / (2 / 3) * 0.8).clamp(min=torch.finfo(torch.float32).tiny)
        soft_mask = torch.ones_like(soft_mask) if mask.binary else soft_mask
        strength = torch.arange(mask.n_in, 0, -1) if mask.nested else log_alpha
        assert torch.equal(mask(), soft_mask * (strength.argsort(stable=True).argsort() >= num_zeros)), name
    back = rounded_copy(rounded_copy(masked, 8), 1)
    masked.prune()
    back.prune()
    assert masked.config == back.config
    assert all(map(torch.equal, masked.state_dict().values(), back.state_dict().values()))


def wide_model(family: str, size: str, units: list[str]) -> Wav2Vec2Model:
    """Layers wide enough for multiples of 16, of widths that are and that are not multiples of 8; undecided masks."""
    shapes = {
        "extractor_conv_layer_config": [[40, 10, 5], [36, 3, 2], [48, 3, 2], [41, 2, 2]],
        "encoder_ff_interm_features": [96, 100, 64],
    }
    model = random_model(with_masks(small_config(family, size, **shapes), units))
    generator = torch.Generator().manual_seed(0)
    for mask in masks_of(model).values():
        mask.log_alpha.data.copy_(scattered(mask.n_in, generator))
    return model


@pytest.mark.parametrize("family", ["hubert", "wavlm"])
@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("multiple", [8, 16, 64])
def test_families(family: str, size: str, multiple: int) -> None:
    """The first norm's groups, the last conv's scale and every consumer follow the rounded widths."""
    model = rounded_copy(wide_model(family, size, ["conv", "head", "interm"]), multiple)
    full = [40, 36, 48, 41, 96, 100, 64]
    pruned = check_pruning(model)
    found = widths(pruned.config)
    assert all(width % multiple == 0 or width == most for width, most in zip(found, full, strict=True))
    assert (found == full) == (multiple == 64)
    convs = pruned.feature_extractor.conv_layers
    assert [layer.conv.in_channels for layer in convs] == [1, *found[:3]]
    assert len(pruned.feature_extractor.dummy_weight) == found[3]
    assert pruned.encoder.feature_projection.projection.in_features == found[3]
    if size == "base":
        norm = convs[0].layer_norm
        assert isinstance(norm, nn.GroupNorm)
        assert norm.num_groups == norm.num_channels == len(norm.weight) == found[0]
    last_mask = model.feature_extractor.conv_layers[3].hard_concrete()
    scale = (model.feature_extractor.dummy_weight * last_mask)[last_mask != 0]
    torch.testing.assert_close(pruned.feature_extractor.dummy_weight.float(), scale)


@pytest.mark.parametrize("family", ["hubert", "wavlm"])
def test_what_goes_stays_gone(family: str) -> None:
    """No unit comes back to a block that loses them all; a conv layer, which cannot go, keeps its best N."""
    model = wide_model(family, "base", ["conv", "interm"])
    decide(model, "layers.1.feed_forward.hard_concrete_for_intermediate")
    decide(model, "conv_layers.2.hard_concrete")
    best = model.feature_extractor.conv_layers[2].hard_concrete.log_alpha.data
    best[5:13] = -14.0
    model = rounded_copy(model, 8)
    assert model.feature_extractor.conv_layers[2].hard_concrete().nonzero().flatten().tolist() == list(range(5, 13))
    pruned = check_pruning(model)
    assert pruned.config["encoder_use_feed_forward"] == [True, False, True]
    assert pruned.config["extractor_conv_layer_config"][2][0] == 8


# --- meeting a target size in multiples


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "multiple", "share"), [("hubert", 4, 0.3), ("wavlm", 8, 0.6), ("hubert", 16, 0.9), ("wavlm", 16, 0.3)]
)
def test_fit_masks_counts_the_rounding(family: str, multiple: int, share: float) -> None:
    """Within the tolerance, or else the largest that is not above the target; by one number for all masks."""
    model = rounded_copy(wide_model(family, "base", ["conv", "head", "interm"]), multiple)
    originals, smallest = log_alphas(model), smallest_size(model).params
    target = smallest + share * (num_elements(model) - smallest)

    shifted = copy.deepcopy(model)

    def size(shift: float) -> float:
        for mask, value in zip(masks_of(shifted).values(), originals, strict=True):
            mask.log_alpha.data.copy_(value + shift)
        return pruned_size(shifted).params

    reached = sorted({size(shift / 25) for shift in range(-200, 200)})
    nearest = min(reached, key=lambda found: abs(found - target))
    below = max(found for found in reached if found <= target)
    for tolerance in (0.0, abs(nearest - target) * 0.99, abs(nearest - target) * 1.01):
        shift = fit_params(model, target, tolerance)
        assert pruned_size(model).params == size(shift)
        expected = nearest if abs(nearest - target) <= tolerance else below
        assert abs(pruned_size(model).params - target) <= abs(expected - target) + 1
        assert pruned_size(model).params <= target + tolerance


@pytest.mark.parametrize(("target", "bound"), [(0, "smallest"), (10**9, "dense")])
def test_multiples_out_of_reach(target: int, bound: str) -> None:
    """The nearest size there is: every conv layer keeps its N, or all of everything."""
    model = rounded_copy(wide_model("hubert", "base", ["conv"]), 8)
    fit_params(model, target, tolerance=0)
    model.prune()
    assert widths(model.config)[:4] == {"smallest": [8] * 4, "dense": [40, 36, 48, 41]}[bound]


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_rounding_is_paid_for(share: float) -> None:
    """A higher threshold compensates for rounding up."""
    model = wide_model("wavlm", "large", ["conv", "interm"])
    target = share * num_elements(model)
    fit_params(model, target, tolerance=0)
    rounded, tolerance = rounded_copy(model, 16), 0.01 * num_elements(model)
    assert pruned_size(rounded).params > target + tolerance
    assert fit_params(rounded, target, tolerance) < 0
    assert pruned_size(rounded).params <= target + tolerance
