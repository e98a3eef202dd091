"""The model: live parity with torchaudio stage by stage, batches, edges of the input, configs, imports."""

import inspect
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchaudio.models
from helpers import (
    assert_same_frames,
    num_elements,
    random_model,
    random_waveforms,
    randomize,
    small_config,
)
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from wav2vec2 import model as wav2vec2
from wav2vec2.components import WEIGHT_NORM_NAMES
from wav2vec2.model import PRUNING_UNITS, Wav2Vec2Model, normalize_waveforms, wav2vec2_model, with_masks

FAMILIES = ["hubert", "wavlm"]
SIZES = ["base", "large"]
FACTORIES = [
    "wav2vec2_base",
    "wav2vec2_large",
    "wav2vec2_large_lv60k",
    "hubert_base",
    "hubert_large",
    "hubert_xlarge",
    "wavlm_base",
    "wavlm_large",
]


# --- torchaudio


def torchaudio_model(family: str, size: str, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    """torchaudio's small random model, in eval mode, and our config of it.

    torchaudio has no waveform normalisation, so ours is off.
    """
    config = small_config(family, size, normalize_waveform=False, **changes)
    shared = {
        key: value
        for key, value in config.items()
        if "prune" not in key and "use" not in key and "head" not in key and key != "normalize_waveform"
    }
    shared["encoder_num_heads"] = 4
    shared["encoder_ff_interm_features"] = config["encoder_ff_interm_features"][0]
    build = torchaudio.models.wavlm_model if family == "wavlm" else torchaudio.models.wav2vec2_model
    theirs = build(**shared)
    randomize(theirs)
    return theirs.eval(), config


def from_torchaudio(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names where they differ: our scale ``dummy_weight``, and WavLM's projections, which torchaudio stacks."""
    converted = {}
    for key, tensor in state_dict.items():
        prefix, _, name = key.partition("attention.attention.")
        if name.startswith("in_proj_"):
            kind = name.removeprefix("in_proj_")
            for projection, part in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                converted[f"{prefix}attention.{projection}.{kind}"] = part
        else:
            converted[key.replace("attention.attention.", "attention.")] = tensor
    last_conv = max(key for key in state_dict if key.endswith(".conv.weight") and "conv_layers" in key)
    return {"feature_extractor.dummy_weight": torch.ones(len(state_dict[last_conv])), **converted}


def load_from_torchaudio(theirs: nn.Module, config: dict[str, Any]) -> Wav2Vec2Model:
    ours = wav2vec2_model(**config)
    ours.load_state_dict(from_torchaudio(theirs.state_dict()), strict=True)
    return ours.eval()


def torchaudio_stages(theirs: nn.Module, waveforms: Tensor, lengths: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """Projection, every layer and the final output; and the valid frames."""
    features, lengths = theirs.feature_extractor(waveforms, lengths)
    transformer = theirs.encoder.transformer
    x, mask = theirs.encoder._preprocess(features, lengths)
    stages = [x.clone()]
    if mask is None or not hasattr(transformer.layers[0].attention, "gru_rel_pos_const"):
        stages += theirs.encoder.extract_features(features, lengths)
        return [*stages, theirs.encoder(features, lengths)], lengths
    # torchaudio's WavLM cannot be given lengths, but its layers can be given the padding.
    position_bias = None
    x = transformer._preprocess(x)
    for layer in transformer.layers:
        x, position_bias = layer(x, position_bias=position_bias, key_padding_mask=mask[:, 0, 0])
        stages.append(x)
    return [*stages, x if transformer.layer_norm_first else transformer.layer_norm(x)], lengths


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_stages_of_torchaudio(family: str, size: str, padded: bool) -> None:
    """Extractor, projection, positional convolution, each layer, ``extract_features`` and ``forward``."""
    theirs, config = torchaudio_model(family, size)
    ours = load_from_torchaudio(theirs, config)
    waveforms, lengths = random_waveforms(2400, 1500, 2000)  # far enough apart for WavLM's last bucket
    lengths = lengths if padded else None

    our_frames, our_lengths = ours.feature_extractor(waveforms, lengths)
    their_frames, their_lengths = theirs.feature_extractor(waveforms, lengths)
    assert_same_frames([our_frames], [their_frames])
    frames = torch.randn(2, 15, 16, generator=torch.Generator().manual_seed(1))
    our_positions = ours.encoder.transformer.pos_conv_embed(frames)
    assert_same_frames([our_positions], [theirs.encoder.transformer.pos_conv_embed(frames)])

    stages, frame_lengths = torchaudio_stages(theirs, waveforms, lengths)
    hidden_states, feature_lengths = ours.extract_features(waveforms, lengths)
    output, output_lengths = ours(waveforms, lengths)
    assert_same_frames([*hidden_states, output], stages, frame_lengths)
    if padded:
        for found in (our_lengths, feature_lengths, output_lengths):
            assert found.tolist() == their_lengths.tolist() == [59, 37, 49]
    else:
        assert our_lengths is feature_lengths is output_lengths is None
    if family == "hubert" or not padded:
        assert_same_frames(hidden_states[1:], theirs.extract_features(waveforms, lengths)[0], frame_lengths)
        assert_same_frames([output], [theirs(waveforms, lengths)[0]], frame_lengths)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernel", [7, 8])
@torch.inference_mode()
def test_wav2vec2_with_an_output_layer(size: str, kernel: int) -> None:
    """The auxiliary head, odd and even positional kernels, and normalised waveforms fed to torchaudio."""
    theirs, config = torchaudio_model("hubert", size, aux_num_out=7, encoder_pos_conv_kernel=kernel)
    ours = load_from_torchaudio(theirs, {**config, "normalize_waveform": True})
    waveforms, lengths = random_waveforms(2000, 1200)
    for given_lengths in (None, lengths):
        expected, frame_lengths = theirs(normalize_waveforms(waveforms, given_lengths), given_lengths)
        output, _ = ours(waveforms, given_lengths)
        assert output.shape[-1] == 7
        assert_same_frames([output], [expected], frame_lengths)
    assert ours.get_num_params() == num_elements(ours) - 7 * 17  # the head is no part of the size


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_torchaudio(family: str) -> None:
    """The backward pass of training mode without dropout."""
    theirs, config = torchaudio_model(family, "base")
    ours = load_from_torchaudio(theirs, config)
    waveforms, _ = random_waveforms(1200, 1200)
    for model in (ours, theirs):
        model.train()(waveforms)[0].square().mean().backward()
    expected = from_torchaudio({name: parameter.grad for name, parameter in theirs.named_parameters()})
    for new, published in WEIGHT_NORM_NAMES.items():
        prefix = "encoder.transformer.pos_conv_embed.conv."
        expected[prefix + published] = expected.pop(prefix + new)
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=lambda t, n=name: n + t
            )


@pytest.mark.parametrize("name", FACTORIES)
def test_named_factory(name: str) -> None:
    """torchaudio's signature comes first, every key and shape is torchaudio's, masks can be switched on."""
    factory, their_factory = getattr(wav2vec2, name), getattr(torchaudio.models, name)
    ours, theirs = inspect.signature(factory).parameters, inspect.signature(their_factory).parameters
    shared = [(parameter.name, parameter.default) for parameter in theirs.values()]
    assert [(parameter.name, parameter.default) for parameter in ours.values()][: len(shared)] == shared

    with torch.device("meta"):
        model, their_model = factory(aux_num_out=5), their_factory(aux_num_out=5)
        masked = factory(**{unit.switch: True for unit in PRUNING_UNITS.values()})
    expected = from_torchaudio(their_model.state_dict())
    for new, published in WEIGHT_NORM_NAMES.items():
        prefix = "encoder.transformer.pos_conv_embed.conv."
        expected[prefix + published] = expected.pop(prefix + new)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in expected.items()}
    assert set(masked.state_dict()) > set(model.state_dict()) - {"aux.weight", "aux.bias"}
    assert model.encoder.transformer.layer_norm_first != their_model.encoder.transformer.layer_norm_first
    drop_rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    their_rates = [module.p for module in their_model.modules() if isinstance(module, nn.Dropout)]
    assert sorted(drop_rates) == sorted(their_rates)
    attention, their_attention = (m.encoder.transformer.layers[1].attention for m in (model, their_model))
    assert (attention.dropout, attention.head_dim) == (their_attention.dropout, their_attention.head_dim)
    assert model.encoder.transformer.layer_drop == their_model.encoder.transformer.layer_drop
    assert model.normalize_waveform == ("large" in name and name != "wav2vec2_large")


def test_factories_pass_their_arguments_on() -> None:
    with torch.device("meta"):
        model = wav2vec2.hubert_base(0.2, 0.3, 0.4, 0.6, 0.7, 9, normalize_waveform=True)
    layer = model.encoder.transformer.layers[0]
    assert model.encoder.feature_projection.dropout.p == 0.2
    assert layer.attention.dropout == 0.3
    assert layer.feed_forward.intermediate_dropout.p == 0.4
    assert layer.dropout.p == layer.feed_forward.output_dropout.p == model.encoder.transformer.dropout.p == 0.6
    assert model.encoder.transformer.layer_drop == 0.7
    assert model.aux.out_features == 9
    assert model.normalize_waveform


# --- weights


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_norm_names(family: str) -> None:
    """The published names are saved; both they and the parametrization's load, and nothing else does."""
    model = random_model(small_config(family))
    published = model.state_dict()
    prefix = "encoder.transformer.pos_conv_embed.conv."
    assert [key.removeprefix(prefix) for key in published if key.startswith(prefix)] == ["bias", "weight_g", "weight_v"]
    names = {published_name: new for new, published_name in WEIGHT_NORM_NAMES.items()}
    renamed = {
        prefix + names.get(key.removeprefix(prefix), key.removeprefix(prefix)) if key.startswith(prefix) else key: value
        for key, value in published.items()
    }
    assert set(renamed) != set(published)
    for state_dict in (published, renamed):
        loaded = wav2vec2_model(**model.config)
        loaded.load_state_dict(dict(state_dict), strict=True)
        assert all(torch.equal(tensor, published[key]) for key, tensor in loaded.state_dict().items())
    del renamed[prefix + names["weight_g"]]
    with pytest.raises(RuntimeError, match="weight_g"):
        wav2vec2_model(**model.config).load_state_dict(renamed, strict=True)


def test_loading_leaves_the_callers_state_dict_alone() -> None:
    theirs, config = torchaudio_model("hubert", "base")
    state_dict = from_torchaudio(theirs.state_dict())
    keys = list(state_dict)
    wav2vec2_model(**config).load_state_dict(state_dict)
    assert list(state_dict) == keys


# --- batches and lengths


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_batch_equals_single_items(family: str) -> None:
    """Padding changes nothing in a valid frame, in every stage (layer_norm extractor, normalised waveform)."""
    model = random_model(small_config(family, "large"))
    num_samples = (1600, 900, 1203)
    waveforms, lengths = random_waveforms(*num_samples)
    hidden_states, frame_lengths = model.extract_features(waveforms, lengths)
    output, _ = model(waveforms, lengths)
    for row, samples in enumerate(num_samples):
        single = waveforms[row : row + 1, :samples]
        frames = int(frame_lengths[row])
        stages = [stage[row : row + 1, :frames] for stage in (*hidden_states, output)]
        assert_same_frames(stages, [*model.extract_features(single)[0], model(single)[0]])
        with_length = [*model.extract_features(single, lengths[row : row + 1])[0], model(single, lengths[row:][:1])[0]]
        assert_same_frames(stages, with_length)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_unpadded_batch_equals_single_items(family: str) -> None:
    """The group_norm extractor's norm runs over time, so that only batches without padding compare."""
    model = random_model(small_config(family))
    waveforms, lengths = random_waveforms(1600, 1600)
    for given_lengths in (None, lengths):
        hidden_states, _ = model.extract_features(waveforms, given_lengths)
        for row in range(2):
            single = model.extract_features(waveforms[row : row + 1])[0]
            assert_same_frames([stage[row : row + 1] for stage in hidden_states], single)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", SIZES)
@torch.inference_mode()
def test_garbage_behind_the_length(family: str, size: str) -> None:
    """Frames past a length reach no valid one in the transformer: zeroed, and out of every key."""
    model = random_model(small_config(family, size))
    features = torch.randn(2, 20, 9, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([20, 12])
    garbage = features.clone()
    garbage[1, 12:] = 100.0
    stages = [model.encoder.extract_features(each, lengths) for each in (features, garbage)]
    assert_same_frames(*stages, lengths, tolerance=0)
    assert not stages[0][0][1, 12:].any()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_empty_inputs(family: str, size: str, training: bool) -> None:
    """Lengths of 0, waveforms below the receptive field and without samples: no valid frame, and never NaN."""
    model = random_model(with_masks(small_config(family, size), PRUNING_UNITS)).train(training)
    for num_samples, lengths, frames in [
        (1600, [0, 0], [0, 0]),
        (1600, [1600, 0], [39, 0]),
        (1600, [59, 60], [0, 1]),  # 60 samples make the first frame
        (59, [59, 10], [0, 0]),
        (3, [3, 3], [0, 0]),
        (0, [0, 0], [0, 0]),
    ]:
        waveforms = torch.randn(2, num_samples, generator=torch.Generator().manual_seed(0))
        for given_lengths in (torch.tensor(lengths), None):
            hidden_states, frame_lengths = model.extract_features(waveforms, given_lengths)
            output, _ = model(waveforms, given_lengths)
            assert len(hidden_states) == 4
            for stage in (*hidden_states, output):
                assert stage.shape == (2, 39 if num_samples == 1600 else 0, 16)
                assert stage.isfinite().all()
            if given_lengths is not None:
                assert frame_lengths.tolist() == frames


def test_frame_counts() -> None:
    """floor((n - kernel) / stride) + 1 after each conv, at least 0, for numbers and tensors, as the convs make."""
    model = random_model(small_config("hubert"))
    samples = list(range(55, 300))
    counts = [model.feature_extractor.num_frames(n) for n in samples]
    assert model.feature_extractor.num_frames(torch.tensor(samples)).tolist() == counts
    for n, count in zip(samples, counts, strict=True):
        if n % 17 == 0 or count <= 1:
            assert model.extract_features(torch.zeros(1, n))[0][0].size(1) == count
    with torch.device("meta"):
        published = wav2vec2.hubert_base()
    assert [published.feature_extractor.num_frames(n) for n in (0, 399, 400, 719, 720, 16000)] == [0, 0, 1, 1, 2, 49]


@pytest.mark.parametrize("shape", [(16000,), (2, 1, 16000)])
def test_waveforms_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    model = random_model(small_config("hubert"))
    for call in (model, model.extract_features):
        with pytest.raises(ValueError, match=r"waveforms.*\(batch, samples\).*16000"):
            call(torch.zeros(shape))


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_num_layers(family: str) -> None:
    """The first of all the stages; a number of layers that there is not is an error."""
    model = random_model(small_config(family))
    waveforms, _ = random_waveforms(800)
    everything, _ = model.extract_features(waveforms)
    assert len(everything) == 4
    for num_layers in (1, 2, 3):
        assert_same_frames(model.extract_features(waveforms, None, num_layers)[0], everything[: num_layers + 1])
    for num_layers in (0, -1, 4):
        with pytest.raises(ValueError, match=f"num_layers.*3.*{num_layers}"):
            model.extract_features(waveforms, num_layers=num_layers)


def test_normalize_waveforms() -> None:
    """Each row's LayerNorm over its valid samples; padding becomes zero, whatever it was."""
    waveforms, lengths = random_waveforms(700, 300, 512)
    padded_with_garbage = waveforms + 9.0 * (torch.arange(700) >= lengths[:, None])
    normalized = normalize_waveforms(padded_with_garbage, lengths)
    for row, length in enumerate(lengths.tolist()):
        expected = nn.functional.layer_norm(waveforms[row, :length], (length,))
        torch.testing.assert_close(normalized[row, :length], expected, rtol=1e-5, atol=1e-5)
        assert not normalized[row, length:].any()
    torch.testing.assert_close(normalize_waveforms(waveforms[:1]), normalized[:1], rtol=1e-5, atol=1e-5)
    assert not normalize_waveforms(waveforms, torch.tensor([0, 0, 0])).any()
    assert normalize_waveforms(torch.full((1, 50), 3.0)).abs().max() < 1e-3  # silence with an offset


# --- layer drop and dropout


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_layer_drop(family: str, size: str) -> None:
    """It skips layers in ``forward`` in training, never in ``extract_features`` and never in eval mode."""
    model = random_model(small_config(family, size))
    waveforms, _ = random_waveforms(800)
    hidden_states, output = model.extract_features(waveforms)[0], model(waveforms)[0]
    transformer = model.encoder.transformer
    no_layers = transformer._preprocess(hidden_states[0])
    if size == "large":
        no_layers = transformer.layer_norm(no_layers)
    transformer.layer_drop = 1.0
    assert_same_frames([model(waveforms)[0]], [output])
    model.train()
    assert_same_frames([model(waveforms)[0]], [no_layers])
    assert_same_frames(model.extract_features(waveforms)[0], hidden_states)


@torch.no_grad()
def test_rate_of_layer_drop() -> None:
    """``encoder_layer_drop`` is the probability that a layer is skipped."""
    model = random_model(small_config("hubert", encoder_layer_drop=0.3)).train()
    calls = []
    for layer in model.encoder.transformer.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    for _ in range(200):
        model.encoder.transformer(torch.zeros(1, 2, 16))
    assert len(calls) / 600 == pytest.approx(0.7, abs=0.08)


def test_layer_drop_leaves_wavlms_position_bias() -> None:
    """The first layer holds the table, but the others are biased by it when it is skipped."""
    model = random_model(small_config("wavlm")).train()
    transformer = model.encoder.transformer
    table = transformer.layers[0].attention.rel_attn_embed.weight
    waveforms, _ = random_waveforms(800)
    transformer.layer_drop = 0.5
    torch.manual_seed(next(seed for seed in range(99) if _first_layer_alone_is_skipped(seed)))
    model(waveforms)[0].square().sum().backward()
    assert transformer.layers[0].attention.q_proj.weight.grad is None
    assert transformer.layers[1].attention.q_proj.weight.grad.any()
    assert table.grad.any()


def _first_layer_alone_is_skipped(seed: int) -> bool:
    torch.manual_seed(seed)
    return [torch.rand(1).item() <= 0.5 for _ in range(3)] == [True, False, False]


@pytest.mark.parametrize("key", ["projection", "attention", "ff_interm", ""])
@torch.no_grad()
def test_each_dropout_acts_in_training_only(key: str) -> None:
    model = random_model(small_config("hubert", **{f"encoder_{key}_dropout".replace("__", "_"): 0.5}))
    waveforms, _ = random_waveforms(800)
    expected = model.extract_features(waveforms)[0]
    assert_same_frames(model.extract_features(waveforms)[0], expected, tolerance=0)
    torch.manual_seed(0)
    trained = model.train().extract_features(waveforms)[0]
    assert not torch.allclose(trained[-1], expected[-1], atol=1e-3)
    assert torch.equal(trained[0], expected[0]) == (key != "projection")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_waits_for_the_device(family: str, size: str) -> None:
    """On a pretended GPU, whose tensors have no values, so that reading one is an error."""
    config = with_masks(small_config(family, size, encoder_attention_dropout=0.1, encoder_dropout=0.1), PRUNING_UNITS)
    with FakeTensorMode(), torch.device("cuda"):
        model = wav2vec2_model(**config)
        waveforms = torch.randn(2, 1200)
        for lengths, training in itertools.product((None, torch.full((2,), 1200)), (True, False)):
            outputs, _ = model.train(training).extract_features(waveforms, lengths)
            if not training:  # in training, layer drop asks the CPU's generator, which is pretended here, too
                outputs.append(model(waveforms, lengths)[0])
            loss = sum(x.mean() for x in outputs) + model.get_num_params()
            assert loss.device.type == "cuda" and loss.requires_grad
            with torch.no_grad():
                model.extract_features(waveforms, lengths)


# --- configs


@pytest.mark.parametrize("family", FAMILIES)
def test_single_values_stand_for_all_layers(family: str) -> None:
    """One number or switch may replace a list with one entry per layer."""
    config = small_config(family)
    short = {
        **config,
        "encoder_ff_interm_features": 20,
        "encoder_use_attention": True,
        "encoder_use_feed_forward": True,
    }
    if family == "wavlm":
        short["encoder_total_num_heads"] = 4
    else:
        short["encoder_num_heads"] = 4
        del short["encoder_head_dim"]
    assert wav2vec2_model(**short).config == config


def test_default_conv_layers() -> None:
    with torch.device("meta"):
        model = wav2vec2_model(**small_config("hubert", extractor_conv_layer_config=None))
    expected = [[512, 10, 5]] + [[512, 3, 2]] * 4 + [[512, 2, 2]] * 2
    assert model.config["extractor_conv_layer_config"] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_config_is_a_copy(family: str) -> None:
    """The model shares its config neither with the caller's dict nor with the one that it returns."""
    config = small_config(family)
    model = wav2vec2_model(**config)
    config["encoder_ff_interm_features"][0] = 1
    returned = model.config
    returned["encoder_embed_dim"] = 1
    returned["encoder_use_attention"][0] = False
    if family == "wavlm":
        returned["encoder_remaining_heads"][0].clear()
    assert model.config == small_config(family)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("hubert", {"extractor_mode": "batch_norm"}),
        ("hubert", {"encoder_num_layers": 0}),
        ("hubert", {"encoder_num_heads": [4, 4]}),
        ("hubert", {"encoder_ff_interm_features": [20] * 4}),
        ("hubert", {"encoder_use_attention": [True]}),
        ("hubert", {"encoder_use_feed_forward": []}),
        ("hubert", {"encoder_head_dim": None}),
        ("hubert", {"encoder_feature_projection_layer_norm": None}),
        ("wavlm", {"encoder_total_num_heads": [4, 4, 2]}),
        ("wavlm", {"encoder_total_num_heads": [5, 5, 5]}),
        ("wavlm", {"encoder_remaining_heads": [[0], [1], [4]]}),
        ("wavlm", {"encoder_remaining_heads": [[0], [1], [-1]]}),
        ("wavlm", {"encoder_remaining_heads": [[0], [1, 1], [2]]}),
        ("wavlm", {"encoder_remaining_heads": [[0], [2, 1], [2]]}),
        ("wavlm", {"encoder_remaining_heads": [[0], [1]]}),
    ],
)
def test_impossible_config(family: str, changes: dict[str, Any]) -> None:
    """The error names the key."""
    (key,) = changes
    with pytest.raises(ValueError, match=key):
        wav2vec2_model(**small_config(family, **changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_and_unknown_keys(family: str) -> None:
    """The error names the key; masks, switched-off blocks, normalisation and the output layer have defaults."""
    config = small_config(family)
    defaults = {key for key in config if "_prune_" in key or "_use_" in key}
    defaults |= {"normalize_waveform", "aux_num_out", "encoder_head_dim"}
    # Without encoder_remaining_heads it is no WavLM, and WavLM's other keys are unknown.
    for key in config.keys() - defaults - {"encoder_remaining_heads"}:
        with pytest.raises(TypeError, match=key):
            wav2vec2_model(**{name: value for name, value in config.items() if name != key})
    required = {key: value for key, value in config.items() if key not in defaults - {"encoder_head_dim"}}
    assert wav2vec2_model(**required).config == config
    with pytest.raises(TypeError, match="encoder_speed"):
        wav2vec2_model(**config, encoder_speed=2)


# --- what loading it takes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", SIZES)
def test_no_warnings(family: str, size: str) -> None:
    """Building, running, training, pruning, saving and loading use nothing deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = wav2vec2_model(**with_masks(small_config(family, size), PRUNING_UNITS))
        waveforms, lengths = random_waveforms(800, 500)
        (model(waveforms, lengths)[0].mean() + model.get_num_params()).backward()
        model.prune()
        model(waveforms, lengths)
        wav2vec2_model(**model.config).load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", ["hubert_base", "wavlm_base"])
@torch.inference_mode()
def test_half_precision(name: str) -> None:
    """bfloat16 weights run, padded: the padding's score is finite there, and positions stay exact."""
    family = name.removesuffix("_base")
    model = random_model(with_masks(small_config(family), PRUNING_UNITS))
    waveforms, lengths = random_waveforms(1600, 900)
    expected, frame_lengths = model(waveforms, lengths)
    output, _ = model.to(torch.bfloat16)(waveforms.bfloat16(), lengths)
    assert output.dtype == torch.bfloat16
    assert_same_frames([output.float()], [expected], frame_lengths, tolerance=0.15)


def test_factories_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """A named model runs with real tensors (Base, shrunk to one layer)."""
    monkeypatch.setitem(wav2vec2._BASE, "encoder_num_layers", 1)
    builders: list[Callable[..., Wav2Vec2Model]] = [wav2vec2.wav2vec2_base, wav2vec2.hubert_base]
    for build in builders:
        model = build(extractor_prune_conv_channels=True).eval()
        with torch.inference_mode():
            assert model(torch.randn(1, 4000))[0].shape == (1, 12, 768)
