"""Dropout whose noise costs a fraction of torch's on a CPU."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .compat import is_compiling
from .paths import fast_paths

# Numbers that 16 random bits can be.
_LEVELS = 2**16


def dropout(x: Tensor, p: float) -> Tensor:
    """``F.dropout(x, p)``.

    On a CPU torch's own takes two numbers of its generator, one after the other, for each element: as long as all else
    in an attention. The fast path takes 16 bits for each, of the same generator: other noise of the same seed. The
    probability is rounded to a multiple of 2^-16, for which the scale is exact. Compiled code has torch's own.
    """
    threshold = round(p * _LEVELS)
    if x.device.type != "cpu" or not fast_paths() or is_compiling() or not 0 < threshold < _LEVELS:
        return F.dropout(x, p)
    return x * _noise(x, threshold)


@torch.no_grad()
def _noise(x: Tensor, threshold: int) -> Tensor:
    """What to multiply ``x`` by: 0 with probability ``threshold`` / 2^16, otherwise what keeps the mean."""
    num_words = -(-x.numel() // 4)
    bits = torch.empty(num_words, dtype=torch.int64, device=x.device).random_(-(2**63), None).view(torch.int16)
    noise = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.ge(bits[: x.numel()].view(x.shape), threshold - _LEVELS // 2, out=noise)
    return noise.mul_(_LEVELS / (_LEVELS - threshold))


class Dropout(nn.Dropout):
    """``nn.Dropout`` by :func:`dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training and self.p else x
