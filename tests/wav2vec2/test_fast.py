"""Fast computation gives what plain computation gives: convolutions by frames, features, gradients."""

import copy
import math
from typing import Any

import pytest
import torch
from helpers import FAMILIES, num_elements, random_model, random_waveforms, small_config
from torch import Tensor, nn
from torch.nn import functional as F

from wav2vec2 import components
from wav2vec2.components import FeatureExtractor
from wav2vec2.fast import (
    conv_channels_last,
    conv_frames,
    linear,
    norm_over_time,
    normalized_conv,
    plain_paths,
    prefers_fused_attention,
    prefers_onednn,
)
from wav2vec2.model import PRUNING_UNITS, with_masks

LENGTHS = {"no lengths": None, "padded": (1200, 1000, 700), "lengths without padding": (1200, 1200, 1200)}


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def masked_model(family: str, size: str) -> torch.nn.Module:
    model = random_model(with_masks(small_config(family, size), list(PRUNING_UNITS)), seed=3)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("log_alpha"):
            parameter.data = 2 + torch.randn(parameter.shape, generator=generator)
    return model


def features_and_gradients(model: torch.nn.Module, waveforms: Tensor, lengths: Tensor | None, plain: bool) -> Any:
    torch.manual_seed(0)  # the masks' samples
    model.zero_grad()
    with plain_paths(plain):
        hidden, frames = model.extract_features(waveforms, lengths)
        if frames is not None:  # what padded frames hold is nobody's business
            valid = torch.arange(hidden[0].size(1)) < frames[:, None]
            hidden = [x * valid[..., None] for x in hidden]
        sum(x.square().mean() for x in hidden).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [x.detach() for x in hidden], frames, gradients


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("family", "size"), FAMILIES)
def test_features_and_gradients(family, size, training, lengths):
    model = masked_model(family, size).train(training)
    waveforms = random_waveforms(*(lengths or (1200, 1200)))[0]
    given = None if lengths is None else torch.tensor(lengths)
    fast, plain = (features_and_gradients(model, waveforms, given, plain) for plain in (False, True))
    for ours, theirs in zip(fast[0], plain[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert fast[1] is plain[1] is None or torch.equal(fast[1], plain[1])
    assert fast[2].keys() == plain[2].keys() and len(fast[2]) > 50
    for name, gradient in fast[2].items():
        torch.testing.assert_close(
            gradient, plain[2][name], rtol=1e-4, atol=1e-5, msg=lambda t, name=name: f"{name}: {t}"
        )


@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
@pytest.mark.parametrize("family", ["hubert", "wavlm"])
def test_attention_of_nothing(family, plain):
    """No head, no frame, no waveform: torch's fused kernel would end the process."""
    none_left = {"encoder_num_heads": [0] * 3} if family == "hubert" else {"encoder_remaining_heads": [[]] * 3}
    waveforms = random_waveforms(1200, 1200)[0]
    with plain_paths(plain), torch.no_grad():
        hidden, _ = random_model(small_config(family, **none_left)).extract_features(waveforms)
        assert all(x.shape == (2, hidden[0].size(1), 16) and x.isfinite().all() for x in hidden)
        model = random_model(small_config(family))
        assert model.extract_features(waveforms[:, :5])[0][-1].shape == (2, 0, 16)
        assert model.extract_features(waveforms[:0])[0][-1].shape[0] == 0


@pytest.mark.parametrize(("family", "size"), FAMILIES)
def test_bfloat16_is_as_near_to_float32(family, size):
    """Channels last and masks in bfloat16 lose no more than the plain path in bfloat16 does."""
    model = masked_model(family, size)
    waveforms = random_waveforms(4000, 4000)[0]
    with torch.no_grad(), plain_paths():
        exact = model.extract_features(waveforms)[0]
    errors = {}
    for plain in (False, True):
        with torch.no_grad(), plain_paths(plain), torch.autocast("cpu", torch.bfloat16):
            rounded = model.extract_features(waveforms)[0]
        errors[plain] = [float((x.float() - y).norm() / y.norm()) for x, y in zip(rounded, exact, strict=True)]
    for fast, plain in zip(errors[False], errors[True], strict=True):
        assert fast < 0.05 and fast < 1.5 * plain + 1e-3


def test_weights_in_bfloat16():
    """A model converted as a whole, as for inference, keeps its precision."""
    model = random_model(small_config("hubert")).bfloat16()
    with torch.no_grad():
        hidden, _ = model.extract_features(random_waveforms(1200, 1200)[0].bfloat16())
    assert all(x.dtype == torch.bfloat16 and x.isfinite().all() for x in hidden)


@pytest.mark.parametrize(("family", "size"), FAMILIES)
def test_folded_weight_norm(family, size):
    """The same numbers and the same state dict, until the weights change."""
    model = random_model(small_config(family, size))
    waveforms, lengths = random_waveforms(1200, 900)
    state_dict = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model.extract_features(waveforms, lengths)[0]
    model.fold_weight_norm()
    conv = model.encoder.transformer.pos_conv_embed.conv
    assert model.state_dict().keys() == state_dict.keys() and model.get_num_params() == num_elements(model)

    def assert_equal() -> None:
        for ours, theirs in zip(model.extract_features(waveforms, lengths)[0], expected, strict=True):
            assert torch.equal(ours, theirs)

    assert_equal()
    with torch.no_grad():
        conv.weight_v.mul_(-1)
    assert_equal()  # the folded weight is what acts
    conv.requires_grad_()
    assert not torch.equal(model.extract_features(waveforms, lengths)[0][-1], expected[-1])
    conv.requires_grad_(False)
    model.load_state_dict(state_dict)
    assert_equal()
    assert conv.folded_weight is None


def test_a_folded_model_can_be_copied_and_cast():
    model = random_model(small_config("hubert"))
    model.fold_weight_norm()
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.encoder.transformer.pos_conv_embed.conv.folded_weight.dtype == torch.bfloat16
    waveforms = random_waveforms(1200)[0]
    expected = model(waveforms)[0]
    actual = half(waveforms.to(torch.bfloat16))[0].float()
    assert (actual - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_wavlms_bias_in_the_precision_of_its_scores(dtype):
    """The largest tensor of a WavLM layer, laid out for what every layer does with it."""
    transformer = random_model(small_config("wavlm")).encoder.transformer
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        bias = transformer._position_bias(9)
        gated = transformer.layers[0].attention._gate(torch.randn(2, 9, 16), bias)
        with plain_paths():
            plain = transformer._position_bias(9)
    assert bias.dtype == gated.dtype == (dtype or torch.float32) and bias.is_contiguous()
    torch.testing.assert_close(bias.float(), plain, rtol=0 if dtype is None else 4e-3, atol=0)


def test_fused_attention_on_a_cpu():
    """Not with dropout, for which torch has no kernel, and not without heads, where it would divide by zero."""
    query = torch.zeros(1, 2, 3, 4)
    assert prefers_fused_attention(query, 0.0) and not prefers_fused_attention(query, 0.1)
    assert not prefers_fused_attention(query[:, :0], 0.0)
    assert prefers_fused_attention(query.to("meta"), 0.1)


# --- products by oneDNN


@pytest.fixture(params=[True, False], ids=["AMD", "another processor"])
def is_amd(request, monkeypatch) -> bool:
    monkeypatch.setattr("wav2vec2.fast._is_amd", request.param)
    return request.param


def single(*shape: int, seed: int = 0) -> Tensor:
    return double(*shape, seed=seed).detach().float().requires_grad_()


@pytest.mark.parametrize("has_bias", [True, False])
def test_linear(has_bias, is_amd):
    """The same numbers and gradients, of rows and weights that are no contiguous memory, too."""
    whole, transposed, bias = single(2, 12, 9), single(6, 7, seed=1), single(7, seed=2) if has_bias else None
    inputs = [x for x in (whole, transposed, bias) if x is not None]

    def results(multiply) -> tuple[Tensor, ...]:
        y = multiply(whole[:, 1:11, :6], transposed.t(), bias)
        return y, *torch.autograd.grad(y, inputs, torch.ones_like(y).cumsum(1))

    assert prefers_onednn(whole, transposed) is is_amd
    found, expected = results(linear), results(F.linear)
    assert found[0].layout == torch.strided and found[0].is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(linear(whole, whole[0, :5], None), F.linear(whole, whole[0, :5], None))


def test_products_that_torch_makes(monkeypatch):
    """Other precisions, nothing to multiply, and the plain paths: the very numbers of torch."""
    monkeypatch.setattr("wav2vec2.fast._is_amd", True)
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    assert prefers_onednn(x, weight)
    for one, other in ((x.double(), weight.double()), (x.bfloat16(), weight), (x[:0], weight), (x, weight[:0])):
        assert not prefers_onednn(one, other)
    assert not prefers_onednn(x.to("meta"), weight)
    assert linear(x[:0], weight, None).shape == (0, 5) and linear(x, weight[:0], None).shape == (3, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert not prefers_onednn(x, weight)
    with plain_paths():
        assert not prefers_onednn(x, weight) and torch.equal(linear(x, weight, None), F.linear(x, weight))


@pytest.mark.parametrize(("kernel", "stride", "num_frames"), [(3, 2, 12), (2, 2, 9), (2, 3, 12), (10, 5, 33)])
def test_conv_frames_in_float32(kernel, stride, num_frames, is_amd):
    inputs = [single(2, num_frames, 4), single(6, 4, kernel, seed=1), single(6, seed=2)]
    found = conv_frames(*inputs, stride)
    expected = F.conv1d(inputs[0].transpose(1, 2), *inputs[1:], stride).transpose(1, 2)
    gradient = torch.randn_like(expected)
    ours, theirs = ((y, *torch.autograd.grad(y, inputs, gradient)) for y in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("family", "size"), FAMILIES)
def test_features_and_gradients_on_each_processor(family, size, is_amd):
    model = masked_model(family, size)
    fast, plain = (features_and_gradients(model, random_waveforms(1200, 1200)[0], None, plain) for plain in (0, 1))
    torch.testing.assert_close(fast[0], plain[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast[2], plain[2], rtol=1e-4, atol=1e-5)


# --- the extractor frame by frame


# Kernels above, at and below the stride, and frames that no window covers.
WINDOWS = [(3, 2, 11), (3, 2, 12), (2, 2, 9), (10, 5, 33), (5, 1, 5), (2, 3, 12), (1, 1, 4), (12, 4, 30)]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("kernel", "stride", "num_frames"), WINDOWS)
def test_conv_frames(kernel, stride, num_frames, has_bias):
    inputs = [double(2, num_frames, 4), double(6, 4, kernel, seed=1)] + [double(6, seed=2)] * has_bias
    x, weight, bias = [*inputs, None][:3]
    found = conv_frames(x, weight, bias, stride)
    expected = F.conv1d(x.transpose(1, 2), weight, bias, stride).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(y, inputs, gradient) for y in (found, expected))
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad():  # another way
        torch.testing.assert_close(conv_frames(x, weight, bias, stride), expected)


def test_conv_frames_in_bfloat16():
    """The result is as near to float64 as torch's convolution in bfloat16, and so are gradients."""
    exact_inputs = [double(2, 401, 64), double(48, 64, 3, seed=1), double(48, seed=2)]
    gradient = double(2, 200, 48, seed=3).detach()

    def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv1d(x.transpose(1, 2), weight, bias, 2).transpose(1, 2)

    def results(convolve, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in exact_inputs]
        y = convolve(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, gradient.to(dtype))]

    exact = results(torchs, torch.float64)
    errors = [
        [
            float((x.double() - y).norm() / y.norm())
            for x, y in zip(results(convolve, torch.bfloat16), exact, strict=True)
        ]
        for convolve in (lambda x, weight, bias: conv_frames(x, weight, bias, 2), torchs)
    ]
    for ours, theirs in zip(*errors, strict=True):
        assert ours < 0.01 and ours < 1.5 * theirs


def test_conv_frames_of_parts_of_a_tensor():
    """Frames that start in the middle of a tensor or are no contiguous memory."""
    whole, weight = double(4, 20, 3).detach(), double(5, 3, 3, seed=1)
    for x in (whole[1:3], whole[:, 4:15], whole.transpose(0, 1)):
        torch.testing.assert_close(
            conv_frames(x, weight, None, 2), F.conv1d(x.transpose(1, 2), weight, None, 2).transpose(1, 2)
        )


def test_conv_channels_last():
    x, weight, bias = double(2, 9, 8), double(8, 4, 4, seed=1), double(8, seed=2)
    found = conv_channels_last(x.transpose(1, 2), weight, bias, padding=2, groups=2)
    torch.testing.assert_close(found, F.conv1d(x.transpose(1, 2), weight, bias, padding=2, groups=2))
    assert found.transpose(1, 2).is_contiguous()


def sounds() -> dict[str, Tensor]:
    """(2, T) waveforms, of the second of which little is left after its mean."""
    time = torch.arange(4000) / 16000
    noise = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    return {
        "noise": 0.1 * noise,
        "quiet, with an offset": 0.9 + 1e-3 * noise,
        "a low tone": torch.sin(2 * math.pi * torch.tensor([[50.0], [80.0]]) * time),
        "silence": torch.zeros(2, 4000),
    }


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("waveforms", sounds().values(), ids=sounds())
def test_normalized_conv(waveforms, has_bias, monkeypatch):
    """Against the same in float64; torch's own float32 is no nearer. Statistics are taken in blocks."""
    monkeypatch.setattr("wav2vec2.fast._WINDOWS_AT_ONCE", 300)
    torch.manual_seed(0)
    conv, norm = nn.Conv1d(1, 16, 10, 5, bias=has_bias), nn.GroupNorm(16, 16)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    found = normalized_conv(waveforms, conv, norm)(waveforms).transpose(1, 2)
    gradient = torch.randn_like(found)
    parameters = [conv.weight, *norm.parameters()]
    ours = torch.autograd.grad(found, parameters, gradient)
    torchs = norm(conv(waveforms[:, None]))
    conv.double()
    norm.double()
    exact = norm(conv(waveforms[:, None].double()))
    theirs = torch.autograd.grad(exact, [conv.weight, *norm.parameters()], gradient.double())
    error, torchs_error = ((x - exact).abs().max().item() for x in (found, torchs))
    assert error < max(1e-5, 1.1 * torchs_error)
    for name, one, other in zip(("weight", "scale", "shift"), ours, theirs, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6, name
    if has_bias:
        (bias_gradient,) = torch.autograd.grad(
            normalized_conv(waveforms.double(), conv, norm)(waveforms).sum(), conv.bias
        )
        assert not bias_gradient.any()
    scale, shift = norm_over_time(waveforms, conv, norm)
    torch.testing.assert_close(conv(waveforms[:, None].double()) * scale[..., None] + shift[..., None], exact)


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("num_frames", [1, 9, 10, 11, 20, 33])
def test_blocks_change_nothing(size, num_frames, monkeypatch):
    monkeypatch.setattr(components, "_SAMPLES_AT_ONCE", 400)  # ten frames
    extractor = random_model(small_config("hubert", size)).feature_extractor
    hop = 40
    for more in (0, hop - 1):  # samples that make no frame
        waveforms = random_waveforms(*[(num_frames - 1) * hop + extractor.receptive_field + more] * 3)[0]
        with torch.no_grad():
            found = extractor(waveforms, None)[0]
            with plain_paths():
                expected = extractor(waveforms, None)[0]
        assert found.shape == expected.shape == (3, num_frames, 9)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", ["base", "large"])
def test_wide_kernels(size):
    """Layers that see the waveform at a low rate: the first and the others, whole and in blocks, and gradients."""
    layers = [[16, 40, 40], [24, 6, 4], [12, 2, 2]]
    extractor = random_model(small_config("hubert", size, extractor_conv_layer_config=layers)).feature_extractor
    assert (extractor.stride, extractor.receptive_field) == (320, 400)
    waveforms = random_waveforms(70_000, 70_000)[0]  # three blocks
    results = []
    for plain in (False, True):
        extractor.zero_grad()
        with plain_paths(plain):
            with torch.no_grad():
                in_blocks = extractor(waveforms, None)[0]
            whole = extractor(waveforms, None)[0]
        whole.square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in extractor.named_parameters() if p.grad is not None}
        results.append([in_blocks, whole.detach(), gradients])
    (ours_in_blocks, ours, our_gradients), (theirs_in_blocks, theirs, their_gradients) = results
    for found, expected in ((ours_in_blocks, theirs), (ours, theirs), (theirs_in_blocks, theirs)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_gradients, their_gradients, rtol=1e-4, atol=1e-5)


def test_blocks_take_little_memory(monkeypatch):
    """No layer ever sees more than a block, however long the waveform and however many there are."""
    seen = []
    frames = FeatureExtractor._convolve
    monkeypatch.setattr(
        FeatureExtractor, "_convolve", lambda self, x, *rest: seen.append(x.shape) or frames(self, x, *rest)
    )
    extractor = random_model(small_config("hubert")).feature_extractor
    with torch.no_grad():
        extractor(torch.randn(2, 100_000), None)
    assert len(seen) == 8 and {len(shape) and shape[0] for shape in seen} == {1}
    assert max(shape[1] for shape in seen) <= components._SAMPLES_AT_ONCE + extractor.receptive_field


def test_masks_of_a_waveform_are_the_same_in_all_blocks(monkeypatch):
    """The extractor draws masks in training mode without gradient."""
    monkeypatch.setattr(components, "_SAMPLES_AT_ONCE", 400)
    extractor = random_model(with_masks(small_config("hubert"), list(PRUNING_UNITS))).train().feature_extractor
    waveforms = random_waveforms(3000, 3000)[0]
    with torch.no_grad():
        torch.manual_seed(0)
        found = extractor(waveforms, None)[0]
        with plain_paths():
            torch.manual_seed(0)
            expected = extractor(waveforms, None)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_receptive_field():
    extractor = random_model(small_config("hubert")).feature_extractor
    assert extractor.num_frames(extractor.receptive_field) == 1
    assert extractor.num_frames(extractor.receptive_field - 1) == 0
