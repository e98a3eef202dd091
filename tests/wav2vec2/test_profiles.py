"""A machine's times as a price list: closed formulas, gradients, and what is beyond what was measured."""

import pytest
import torch
from helpers import made_up_profile, masks_of, random_model, small_config
from torch import Tensor

from wav2vec2.files.errors import UserError
from wav2vec2.model import PRUNING_UNITS, with_masks
from wav2vec2.operations import MACS, macs_of
from wav2vec2.profiles import Profile

SECONDS = 0.05


@pytest.mark.parametrize("family", ["hubert", "wavlm"])
@pytest.mark.parametrize("size", ["base", "large"])
def test_a_price_by_formula(family, size):
    """A bilinear price is exact between grid points."""
    dense = random_model(small_config(family, size))
    masked = random_model(with_masks(small_config(family, size), PRUNING_UNITS))
    profile = Profile(made_up_profile(dense, SECONDS, lambda operation, x, y: len(operation.kind) * x * y + 3 * x * y))
    with torch.no_grad():
        for mask in masks_of(masked).values():
            mask.log_alpha.uniform_(-3, 3)
        for model in (dense, masked):
            operations = model.operations(profile.num_samples)
            costs = [op.share * (len(op.kind) + 3) * op.sizes[0] * op.sizes[1] for op in operations]
            assert profile.costs(operations).tolist() == pytest.approx([float(cost) for cost in costs], rel=1e-5)
            assert float(profile.total(operations)) == pytest.approx(float(sum(costs)), rel=1e-5)


def test_multiply_adds_as_times():
    model = random_model(small_config("hubert"))
    profile = Profile(made_up_profile(model, SECONDS, lambda op, x, y: MACS[op.kind](x, y, **op.fixed)))
    operations = model.operations(profile.num_samples)
    assert float(profile.total(operations)) == model.get_num_macs(profile.num_samples) == macs_of(operations)


def test_gradients_are_finite_differences():
    masked = random_model(with_masks(small_config("wavlm"), PRUNING_UNITS), seed=3).double()
    dense = random_model(small_config("wavlm"))
    profile = Profile(made_up_profile(dense, SECONDS, lambda _, x, y: 100 + 7 * x**0.7 * y**0.4, points=3))
    masks = masks_of(masked)

    def total() -> Tensor:
        return profile.total(masked.operations(profile.num_samples))

    gradients = torch.autograd.grad(total(), [mask.log_alpha for mask in masks.values()])
    for mask, gradient in zip(masks.values(), gradients, strict=True):
        values = []
        for step in (1e-5, -2e-5):
            mask.log_alpha.data[0] += step
            values.append(float(total().detach()))
        mask.log_alpha.data[0] += 1e-5
        assert float(gradient[0]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-6)


def test_between_and_beyond_what_was_measured():
    """Linear down to nothing at size zero, never falling with size, and level above the largest."""
    model = random_model(small_config("hubert"))
    contents = made_up_profile(model, SECONDS, lambda *_: 0.0)
    (operation,) = (op for op in model.operations(round(SECONDS * 16_000)) if op.kind == "projection")
    contents["prices"][operation.key] = {"sizes": [[4, 8, 16], [10]], "microseconds": [[40.0], [30.0], [60.0]]}
    profile = Profile(contents)
    sizes = [(0, 10), (2, 10), (4, 10), (8, 10), (12, 10), (16, 10), (99, 10), (16, 5), (16, 0)]
    found = profile.costs([operation._replace(sizes=pair) for pair in sizes])
    assert found.tolist() == pytest.approx([0, 20, 40, 40, 50, 60, 60, 30, 0])
    with pytest.raises(UserError, match=r"no times for .*kernel=9.*STUDENT.pth"):
        profile.costs([operation._replace(fixed={"kernel": 9})])
