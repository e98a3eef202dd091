"""Hard concrete masks: differentiable on/off gates for pruning units.

The distribution is that of Louizos et al., "Learning Sparse Neural Networks through L0
Regularization" (arXiv 1712.01312); the deterministic mask is that of FLOP (arXiv 1910.04732), which
DPHuBERT uses.
"""

import math

import torch
from torch import Tensor, nn

# FLOP's sharpening of the soft mask at inference (its "magical number").
_EVAL_SHARPNESS = 0.8


class HardConcrete(nn.Module):
    """Mask over ``n_in`` units with one trained parameter, ``log_alpha``.

    Args:
        n_in: number of units.
        init_mean: initial *drop* rate of a unit.
        init_std: standard deviation of the initial ``log_alpha``.
        temperature: β, the temperature of the concrete distribution.
        stretch: the distribution on (0, 1) is stretched to (-stretch, 1 + stretch) and then clamped,
            which puts mass on exactly 0 and exactly 1.
        eps: uniform samples stay this far away from 0 and 1.
        min_kept: the deterministic mask keeps at least this many units (the strongest).
        nested: the units lie one around the other, the innermost first: the deterministic mask drops them from the
            outside in, whatever their ``log_alpha``.
        binary: the deterministic mask has 1 for every unit that it keeps.

    Attributes:
        multiple: the deterministic mask keeps a multiple of this many units, or none, or all: the strongest of the
            units that would go are kept as well.
        shift: moves the threshold of the deterministic mask as if it were added to every ``log_alpha``: above zero more
            units are kept, and all values rise with it; below zero fewer, with the values that they were trained with.
    """

    def __init__(
        self,
        n_in: int,
        init_mean: float = 0.5,
        init_std: float = 0.01,
        temperature: float = 2 / 3,
        stretch: float = 0.1,
        eps: float = 1e-6,
        min_kept: int = 0,
        nested: bool = False,
        binary: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < init_mean < 1:
            raise ValueError(f"init_mean is the initial drop rate, between 0 and 1; found {init_mean}")
        self.n_in = n_in
        self.init_mean, self.init_std = init_mean, init_std
        self.temperature = temperature
        self.limit_low, self.limit_high = -stretch, 1.0 + stretch
        self.eps = eps
        self.min_kept, self.nested, self.binary = min_kept, nested, binary
        self.multiple = 1
        self.shift = 0.0
        # P(mask > 0) = sigmoid(log_alpha + bias)
        self.bias = -temperature * math.log(-self.limit_low / self.limit_high)
        self.log_alpha = nn.Parameter(torch.empty(n_in))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw ``log_alpha`` from N(:attr:`init_log_alpha`, init_std)."""
        nn.init.normal_(self.log_alpha, self.init_log_alpha, self.init_std)

    @property
    def init_log_alpha(self) -> float:
        """The mean of the initial ``log_alpha``."""
        return math.log(1 - self.init_mean) - math.log(self.init_mean)

    def l0_norm(self) -> Tensor:
        """Expected number of units that are not exactly zero: a differentiable scalar."""
        return self._l0_norm(self.log_alpha)

    def _l0_norm(self, log_alpha: Tensor) -> Tensor:
        return (log_alpha + self.bias).sigmoid().sum()

    def forward(self) -> Tensor:
        """Mask of shape ``(n_in,)``: a fresh sample in training, the deterministic mask in eval mode."""
        return self._sample() if self.training else self._deterministic_mask()

    def _sample(self) -> Tensor:
        uniform = torch.empty_like(self.log_alpha).uniform_(self.eps, 1 - self.eps)
        concrete = torch.sigmoid((torch.logit(uniform) + self.log_alpha) / self.temperature)
        stretched = concrete * (self.limit_high - self.limit_low) + self.limit_low
        return stretched.clamp(min=0.0, max=1.0)

    def _deterministic_mask(self) -> Tensor:
        # Pure tensor arithmetic instead of a cached Python result: nothing waits for the device,
        # torch.compile can trace it, and a mask can never be older than its log_alpha.
        l0_norm = self._l0_norm(self.log_alpha + self.shift)
        num_zeros = (self.n_in - l0_norm.double()).round().clamp(max=self.n_in - self.min_kept)
        # Above n_in where that is no multiple: all are kept then.
        num_kept = ((self.n_in - num_zeros) / self.multiple).ceil() * self.multiple
        strength: Tensor = self.log_alpha
        if self.nested:
            strength = torch.arange(self.n_in, 0, -1, device=strength.device)
        rank = strength.argsort(stable=True).argsort()  # 0 is the weakest unit
        kept = rank >= self.n_in - num_kept
        if self.binary:
            return kept.to(self.log_alpha.dtype)
        soft_mask = torch.sigmoid((self.log_alpha + max(self.shift, 0.0)) / self.temperature * _EVAL_SHARPNESS)
        # A kept unit must not count as dropped because its soft value underflows.
        soft_mask = soft_mask.clamp(min=torch.finfo(soft_mask.dtype).tiny)
        return soft_mask * kept

    def extra_repr(self) -> str:
        return f"n_in={self.n_in}, init_mean={self.init_mean}, min_kept={self.min_kept}"
