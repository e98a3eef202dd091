"""The hard concrete mask against its formulas, written out again in numpy."""

import math

import numpy as np
import pytest
import torch

from hardconcrete import HardConcrete

# (temperature, stretch): the default, and one that no constant in the code can fit by chance.
SETTINGS = [(2 / 3, 0.1), (0.4, 0.25)]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def make_mask(log_alpha: list[float] | np.ndarray | torch.Tensor, **settings: float) -> HardConcrete:
    log_alpha = torch.as_tensor(log_alpha, dtype=torch.float32)
    mask = HardConcrete(len(log_alpha), **settings)
    mask.load_state_dict({"log_alpha": log_alpha})
    return mask


def expected_l0(log_alpha: np.ndarray, temperature: float, stretch: float) -> np.ndarray:
    """P(mask > 0) of each unit."""
    return sigmoid(log_alpha - temperature * math.log(stretch / (1 + stretch)))


def expected_eval_mask(log_alpha: np.ndarray, temperature: float, stretch: float) -> np.ndarray:
    """The deterministic mask: the weakest units at 0, as many as the expected L0 says."""
    num_zeros = round(len(log_alpha) - expected_l0(log_alpha, temperature, stretch).sum())
    soft_mask = sigmoid(0.8 * log_alpha / temperature)
    soft_mask[np.argsort(log_alpha)[:num_zeros]] = 0
    return soft_mask


@pytest.mark.parametrize("init_mean", [0.01, 0.5, 0.9])
def test_initial_log_alpha(init_mean: float) -> None:
    """N(log(1 - init_mean) - log(init_mean), init_std), init_mean being the drop rate."""
    torch.manual_seed(0)
    num_units, init_std = 40_000, 0.03
    log_alpha = HardConcrete(num_units, init_mean=init_mean, init_std=init_std).log_alpha.detach().numpy()
    assert log_alpha.shape == (num_units,)
    assert log_alpha.mean() == pytest.approx(math.log((1 - init_mean) / init_mean), abs=5 * init_std / num_units**0.5)
    assert log_alpha.std() == pytest.approx(init_std, rel=0.02)


def test_defaults() -> None:
    """One parameter, ``log_alpha``; defaults are the released program's."""
    torch.manual_seed(0)
    mask = HardConcrete(20_000)
    assert list(mask.state_dict()) == ["log_alpha"]
    log_alpha = mask.log_alpha.detach().numpy()
    assert log_alpha.mean() == pytest.approx(0, abs=5e-4)
    assert log_alpha.std() == pytest.approx(0.01, rel=0.03)
    expected = expected_l0(log_alpha.astype(np.float64), temperature=2 / 3, stretch=0.1).sum()
    assert mask.l0_norm().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("init_mean", [0, 1, -0.1, 1.5])
def test_impossible_drop_rate(init_mean: float) -> None:
    with pytest.raises(ValueError, match=f"init_mean.*{init_mean}"):
        HardConcrete(3, init_mean=init_mean)


@pytest.mark.parametrize(("temperature", "stretch"), SETTINGS)
def test_l0_norm(temperature: float, stretch: float) -> None:
    """The sum of P(mask > 0), with its gradient, in training and in eval mode."""
    log_alpha = np.linspace(-8, 8, 33)
    mask = make_mask(log_alpha, temperature=temperature, stretch=stretch)
    probability = expected_l0(log_alpha, temperature, stretch)
    for training in (True, False):
        l0_norm = mask.train(training).l0_norm()
        assert l0_norm.shape == ()
        assert l0_norm.item() == pytest.approx(probability.sum(), rel=1e-5)
    l0_norm.backward()
    np.testing.assert_allclose(mask.log_alpha.grad.numpy(), probability * (1 - probability), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("temperature", "stretch"), SETTINGS)
def test_sample(temperature: float, stretch: float) -> None:
    """The value and the gradient of one sample, given the uniform numbers that it was made of."""
    log_alpha = np.random.default_rng(0).normal(0, 2, 500)
    mask = make_mask(log_alpha, temperature=temperature, stretch=stretch, eps=0.01)
    torch.manual_seed(7)
    sample = mask()
    torch.manual_seed(7)
    uniform = torch.empty(500).uniform_(0.01, 1 - 0.01).double().numpy()

    concrete = sigmoid((np.log(uniform / (1 - uniform)) + log_alpha) / temperature)
    stretched = concrete * (1 + 2 * stretch) - stretch
    np.testing.assert_allclose(sample.detach().numpy(), stretched.clip(0, 1), atol=1e-5)
    assert (sample == 0).any()
    assert (sample == 1).any()

    sample.sum().backward()
    inside = (stretched > 0) & (stretched < 1)
    slope = (1 + 2 * stretch) * concrete * (1 - concrete) / temperature
    np.testing.assert_allclose(mask.log_alpha.grad.numpy(), slope * inside, atol=1e-4)


def test_samples_are_fresh_and_follow_the_seed() -> None:
    """Each call draws anew, from torch's generator in the order of the calls; eval mode draws nothing."""
    first, second = make_mask([0.0] * 50), make_mask([0.0] * 30)
    torch.manual_seed(3)
    samples = [first(), second(), first()]
    assert not torch.equal(samples[0], samples[2])

    torch.manual_seed(3)
    uniforms = [torch.empty(n).uniform_(1e-6, 1 - 1e-6) for n in (50, 30, 50)]
    for sample, uniform in zip(samples, uniforms, strict=True):
        torch.testing.assert_close(sample, (torch.sigmoid(uniform.logit() * 1.5) * 1.2 - 0.1).clamp(0, 1))

    state = torch.get_rng_state()
    first.eval()()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 1.5])
def test_distribution_of_samples(log_alpha: float) -> None:
    """Share of exact zeros and ones, and the mean, over many units of one ``log_alpha``."""
    num_units, temperature, stretch = 200_000, 2 / 3, 0.1
    torch.manual_seed(0)
    sample = make_mask(np.full(num_units, log_alpha))().detach().numpy()
    standard_error = 0.5 / num_units**0.5

    # s stretches to 0 where s = stretch / (1 + 2 * stretch), and to 1 symmetrically.
    threshold = temperature * math.log(stretch / (1 + stretch))
    assert (sample == 0).mean() == pytest.approx(1 - sigmoid(log_alpha - threshold), abs=5 * standard_error)
    assert (sample == 1).mean() == pytest.approx(sigmoid(log_alpha + threshold), abs=5 * standard_error)

    midpoints = (np.arange(10_000) + 0.5) / 10_000
    concrete = sigmoid((np.log(midpoints / (1 - midpoints)) + log_alpha) / temperature)
    mean = (concrete * (1 + 2 * stretch) - stretch).clip(0, 1).mean()
    assert sample.mean() == pytest.approx(mean, abs=5 * standard_error)


def test_certain_units() -> None:
    """Samples and deterministic masks agree where ``log_alpha`` leaves no doubt."""
    mask = make_mask([40.0, -40.0, 40.0])
    for training in (True, False):
        assert mask.train(training)().tolist() == [1, 0, 1]
    assert mask.l0_norm().item() == 2


@pytest.mark.parametrize(("temperature", "stretch"), SETTINGS)
@pytest.mark.parametrize("num_units", [1, 2, 7, 300])
@pytest.mark.parametrize("mean", [-4.0, -1.0, 0.0, 2.0])
def test_eval_mask(temperature: float, stretch: float, num_units: int, mean: float) -> None:
    log_alpha = np.random.default_rng(num_units).normal(mean, 2, num_units)
    mask = make_mask(log_alpha, temperature=temperature, stretch=stretch).eval()
    expected = expected_eval_mask(log_alpha, temperature, stretch)
    np.testing.assert_allclose(mask().detach().numpy(), expected, atol=1e-6)
    assert torch.equal(mask(), mask())


def test_number_of_zeros_among_equal_units() -> None:
    """Ties at the threshold: exactly as many zeros as the expected L0 says, not all or none."""
    log_alpha = [-1.0] * 40
    mask = make_mask(log_alpha).eval()()
    num_zeros = round(40 - expected_l0(np.array(log_alpha), 2 / 3, 0.1).sum())
    assert 0 < num_zeros < 40
    assert (mask == 0).sum() == num_zeros


def test_min_kept() -> None:
    """The strongest units stay although all would go; a mask that keeps more is not changed."""
    log_alpha = [-9.0, -7.0, -8.0, -9.5]
    soft_mask = sigmoid(0.8 * np.array(log_alpha) * 1.5)
    for min_kept, kept in [(0, []), (1, [1]), (2, [1, 2]), (4, [0, 1, 2, 3])]:
        mask = make_mask(log_alpha, min_kept=min_kept).eval()()
        assert mask.nonzero().flatten().tolist() == kept
        np.testing.assert_allclose(mask[kept].detach().numpy(), soft_mask[kept], rtol=1e-5)
    assert make_mask([-300.0, -200.0], min_kept=1).eval()()[1] > 0  # where the soft mask itself is 0 in float32
    log_alpha = [3.0, -9.0, 2.0]
    assert torch.equal(make_mask(log_alpha, min_kept=1).eval()(), make_mask(log_alpha).eval()())


def test_multiple() -> None:
    """Rounded up by the strongest units about to go; nothing stays nothing, and all is the most."""
    log_alpha = np.random.default_rng(0).normal(0, 2, 30)
    for mean, min_kept in [(-12.0, 0), (-12.0, 1), (-4.0, 0), (-2.0, 0), (0.0, 0), (4.0, 0), (12.0, 0)]:
        mask = make_mask(log_alpha + mean, min_kept=min_kept).eval()
        num_plain = int((mask() != 0).sum())
        for multiple in (1, 2, 7, 8, 30, 64):
            mask.multiple = multiple
            found = mask().detach().numpy()
            num_kept = min(math.ceil(num_plain / multiple) * multiple, 30)
            assert sorted(found.nonzero()[0]) == sorted(np.argsort(log_alpha)[30 - num_kept :])
            soft_mask = sigmoid(0.8 * (log_alpha + mean) * 1.5)
            np.testing.assert_allclose(found[found != 0], soft_mask[found != 0], rtol=1e-4)


def test_multiple_concerns_the_eval_mask_only() -> None:
    """Training samples and counts as without it."""
    plain, rounded = make_mask([0.5] * 20), make_mask([0.5] * 20)
    rounded.multiple = 8
    assert torch.equal(plain.l0_norm(), rounded.l0_norm())
    torch.manual_seed(0)
    sample = plain()
    torch.manual_seed(0)
    assert torch.equal(rounded(), sample)
    assert list(rounded.state_dict()) == ["log_alpha"]


def test_eval_mask_waits_for_no_value() -> None:
    """On a device without values nothing can be read back: the mask is tensor arithmetic throughout."""
    mask = make_mask([0.5] * 20, min_kept=1)
    mask.multiple = 8
    assert mask.to("meta").eval()().shape == (20,)


def test_eval_mask_follows_log_alpha() -> None:
    """The mask follows ``log_alpha`` after training, and after loading weights in eval mode."""
    mask = make_mask([5.0, -9.0, 5.0]).eval()
    assert mask().nonzero().flatten().tolist() == [0, 2]
    mask.load_state_dict({"log_alpha": torch.tensor([-9.0, 5.0, -9.0])})
    assert mask().nonzero().flatten().tolist() == [1]
    mask.train()
    with torch.no_grad():
        mask.log_alpha.add_(torch.tensor([14.0, 0.0, 0.0]))
    assert mask.eval()().nonzero().flatten().tolist() == [0, 1]
