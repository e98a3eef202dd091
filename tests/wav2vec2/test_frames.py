"""The extractor frame by frame: what torch's convolution, norm and linear layers give, values and gradients."""

import math

import pytest
import torch
from helpers import num_elements, random_model, random_waveforms, small_config
from torch import Tensor, nn
from torch.nn import functional as F
from wav2vec2.frames import NormalizedConv, conv_channels_last, conv_frames, norm_over_time

from wav2vec2 import components, products
from wav2vec2.components import FeatureExtractor
from wav2vec2.fast import plain_paths
from wav2vec2.model import PRUNING_UNITS, with_masks

# Kernels above, at and below the stride, and frames that no window covers.
WINDOWS = [(3, 2, 11), (3, 2, 12), (2, 2, 9), (10, 5, 33), (5, 1, 5), (2, 3, 12), (1, 1, 4)]


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


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
    """As near to float64 as torch's convolution in bfloat16, gradients too: parts add up in bfloat16."""
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


def test_conv_frames_gives_gradients_to_whom_they_are_due():
    x, weight = double(1, 9, 4), double(6, 4, 3, seed=1)
    frozen = weight.detach()
    conv_frames(x, frozen, None, 2).sum().backward()
    expected = torch.autograd.grad(F.conv1d(x.transpose(1, 2), frozen, None, 2).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)
    conv_frames(x.detach(), weight, None, 2).sum().backward()
    assert weight.grad is not None


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
    monkeypatch.setattr("wav2vec2.frames._WINDOWS_AT_ONCE", 300)
    torch.manual_seed(0)
    conv, norm = nn.Conv1d(1, 16, 10, 5, bias=has_bias), nn.GroupNorm(16, 16)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    found = NormalizedConv(waveforms, conv, norm)(waveforms).transpose(1, 2)
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
            NormalizedConv(waveforms.double(), conv, norm)(waveforms).sum(), conv.bias
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


def test_blocks_take_little_memory(monkeypatch):
    """No layer ever sees more than a block, however long the waveform and however many there are."""
    seen = []
    frames = FeatureExtractor._frames
    monkeypatch.setattr(
        FeatureExtractor, "_frames", lambda self, x, *rest: seen.append(x.shape) or frames(self, x, *rest)
    )
    extractor = random_model(small_config("hubert")).feature_extractor
    with torch.no_grad():
        extractor(torch.randn(2, 100_000), None)
    assert len(seen) == 8 and {len(shape) and shape[0] for shape in seen} == {1}
    assert max(shape[1] for shape in seen) <= components._SAMPLES_AT_ONCE + extractor.receptive_field


def test_masks_of_a_waveform_are_the_same_in_all_blocks(monkeypatch):
    """In training mode without gradient, where masks are samples."""
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


# ---------------------------------------------------------------------------------------------- products


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """How often oneDNN is called, on any processor."""
    if not products.HAS_ONEDNN_LINEAR:
        pytest.skip("this PyTorch has no oneDNN, or is older than the call was tried with")
    calls = []
    original = products.onednn_linear
    monkeypatch.setattr(products, "IS_AMD", True)
    monkeypatch.setattr(products, "onednn_linear", lambda *args: calls.append(1) or original(*args))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear(counted, dtype, has_bias):
    x, weight = torch.randn(2, 7, 12).to(dtype), torch.randn(5, 12).to(dtype)
    bias = torch.randn(5).to(dtype) if has_bias else None
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    if dtype == torch.bfloat16 and not products.HAS_ONEDNN_BFLOAT16:
        pytest.skip("oneDNN has no bfloat16 on this CPU")
    with torch.no_grad():
        for rows in (x, x.transpose(0, 1), x[0]):
            found = products.linear(rows, weight, bias)
            torch.testing.assert_close(found, F.linear(rows, weight, bias), rtol=tolerance, atol=tolerance)
        assert len(counted) == 3
        assert products.linear(x[:0], weight, bias).shape == (0, 7, 5)
        assert products.linear(x, weight[:0], None).shape == (2, 7, 0)
        with plain_paths():
            products.linear(x, weight, bias)
    assert len(counted) == 3
    products.linear(x, weight.requires_grad_(), bias).sum().backward()
    assert len(counted) == 3 and weight.grad is not None


def test_linear_follows_autocast(counted):
    x, layer = torch.randn(3, 8), nn.Linear(8, 5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = products.apply_linear(layer, x), layer(x)
    assert bool(counted) == products.HAS_ONEDNN_BFLOAT16 and found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_layers_that_others_have_changed_are_called(counted):
    """Hooks, adapters that take a layer's place, and a patched forward act as anywhere else."""

    class Adapter(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    x, layer = torch.randn(3, 8), nn.Linear(8, 5)
    with torch.no_grad():
        expected = products.apply_linear(layer, x)
        assert len(counted) == 1
        for undo in (
            layer.register_forward_hook(lambda module, args, output: output + 1),
            layer.register_forward_pre_hook(lambda module, args: (args[0] * 0,)),
        ):
            assert not torch.allclose(products.apply_linear(layer, x), expected)
            undo.remove()
        adapter = Adapter(8, 5)
        adapter.load_state_dict(layer.state_dict())
        torch.testing.assert_close(products.apply_linear(adapter, x), expected + 1)
        layer.forward = lambda x: x
        assert products.apply_linear(layer, x) is x
    assert len(counted) == 1


@pytest.mark.parametrize("family", ["hubert", "wavlm"])
def test_a_model_by_onednn(counted, family):
    model = random_model(small_config(family))
    waveforms = random_waveforms(1200, 1200)[0]
    with torch.no_grad():
        found = model.extract_features(waveforms)[0]
        with plain_paths():
            expected = model.extract_features(waveforms)[0]
    assert len(counted) >= 1 + 6 * 3  # projection, six products in each layer
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert num_elements(model) == model.get_num_params()
