"""Matrix products with weights on a CPU, without gradient: by oneDNN itself where it is faster than torch's way.

In bfloat16 torch calls oneDNN, after it has copied the bias to every row. In float32 it calls MKL, which leaves a
quarter of an AMD processor unused.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .compat import HAS_ONEDNN_BFLOAT16, HAS_ONEDNN_LINEAR, IS_AMD, autocast_dtype, is_compiling, onednn_linear
from .paths import fast_paths


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``: (..., K), (N, K) and (N,) or None -> (..., N)."""
    if not fast_paths() or not HAS_ONEDNN_LINEAR or torch.is_grad_enabled() or is_compiling():
        return F.linear(x, weight, bias)
    dtype = autocast_dtype("cpu") or x.dtype
    pays = HAS_ONEDNN_BFLOAT16 if dtype == torch.bfloat16 else dtype == torch.float32 and IS_AMD
    if not pays or x.device.type != "cpu" or weight.device.type != "cpu" or not (x.numel() and weight.numel()):
        return F.linear(x, weight, bias)
    return onednn_linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def apply_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``, by :func:`linear` where the layer is an ``nn.Linear`` and nothing else (no hooks, no adapter)."""
    is_bare = type(layer) is nn.Linear and not (
        layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__
    )
    return linear(x, layer.weight, layer.bias) if is_bare else layer(x)
