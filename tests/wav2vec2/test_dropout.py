"""The dropout of the fast paths: the distribution of torch's, from the same generator."""

import pytest
import torch
from torch.nn import functional as F
from wav2vec2.dropout import Dropout, dropout

from wav2vec2.fast import plain_paths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_distribution(p, dtype):
    torch.manual_seed(0)
    x = dropout(torch.ones(1001, 999, dtype=dtype), p)
    kept = x != 0
    share, expected = kept.double().mean().item(), 1 - round(p * 2**16) / 2**16
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(share - expected) < 4 * deviation
    # One value for all that is kept, which keeps the mean.
    assert x[kept].unique().tolist() == pytest.approx([1 / expected], rel=4e-3 if dtype == torch.bfloat16 else 1e-6)
    # Four elements share a number of the generator: neighbours must not share their fate.
    dropped = (~kept).double().flatten() - (1 - share)
    for distance in (1, 2, 3, 4, 999):
        correlation = (dropped[:-distance] * dropped[distance:]).mean() / dropped.square().mean()
        assert abs(correlation) < 4 / x.numel() ** 0.5, distance


@pytest.mark.parametrize("num_elements", [0, 1, 2, 3, 4, 5, 4097])
def test_any_number_of_elements(num_elements):
    x = torch.ones(num_elements)
    assert dropout(x, 0.5).shape == x.shape and set(dropout(x, 0.5).tolist()) <= {0.0, 2.0}


def test_the_seed_decides():
    x = torch.ones(100)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(dropout(x, 0.5))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert not torch.equal(dropout(x, 0.5), dropout(x, 0.5))


def test_gradient():
    x = torch.randn(3, 50, requires_grad=True)
    y = dropout(x, 0.3)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(y, x * x.grad)


@pytest.mark.parametrize("p", [0.0, 1e-6, 1 - 1e-6, 1.0])
def test_probabilities_that_16_bits_do_not_hold(p):
    torch.manual_seed(0)
    expected = F.dropout(torch.ones(1000), p)
    torch.manual_seed(0)
    assert torch.equal(dropout(torch.ones(1000), p), expected)


def test_the_plain_paths_have_torchs():
    torch.manual_seed(0)
    expected = F.dropout(torch.ones(1000), 0.1)
    with plain_paths():
        torch.manual_seed(0)
        assert torch.equal(dropout(torch.ones(1000), 0.1), expected)


def test_module():
    layer, x = Dropout(0.5), torch.ones(100)
    assert isinstance(layer, torch.nn.Dropout) and (layer(x) == 0).any()
    assert layer.eval()(x) is x
    layer.p = 0.0
    assert layer.train()(x) is x
