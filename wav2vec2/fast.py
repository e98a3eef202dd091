"""The switch between plain and fast computation, and the extractor's fast path on CPUs, frame by frame.

Plain code reads like the paper; fast code, the default, gives the same numbers up to rounding. Tests compare the two.

On CPUs the extractor keeps a frame's channels side by side in memory, (B, T, C). A window is then one stretch of
memory, a convolution is a few matrix products, and no channel moves between one layer and the next.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_fast = True

# Private to torch: a release that lacks it does without.
_has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# Of Linux, which names the maker of the processor.
_CPUINFO = Path("/proc/cpuinfo")
_is_amd = _CPUINFO.is_file() and "AuthenticAMD" in _CPUINFO.read_text(errors="replace")


def fast_paths() -> bool:
    """Return whether to compute the fast way."""
    return _fast


@contextlib.contextmanager
def plain_paths(plain: bool = True) -> Iterator[None]:
    """Compute the plain way inside the block, or with ``plain=False`` the fast way."""
    global _fast
    before, _fast = _fast, not plain
    try:
        yield
    finally:
        _fast = before


def on_cpu(x: Tensor) -> bool:
    """Return whether torch's own kernels compute with ``x`` on a CPU: it is not traced by a compiler."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the precision of matrix products under autocast on a kind of device, or None if it is off."""
    is_on = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if is_on else None


def prefers_fused_attention(query: Tensor, dropout: float) -> bool:
    """Return whether torch's fused attention of ``query`` (B, H, T, K) is faster than single steps.

    On CPUs torch has no fused kernel with dropout, and its substitute takes twice the time; in bfloat16 single steps
    take 0.7 to 0.9 of the time. The fused kernel divides by the number of heads, which may be 0.
    """
    if query.numel() == 0 or query.device.type != "cpu":
        return query.numel() > 0
    return dropout == 0.0 and query.dtype == torch.float32


def prefers_onednn(x: Tensor, weight: Tensor) -> bool:
    """Return whether oneDNN's products of ``x`` and ``weight`` are faster than those of MKL, which torch takes.

    They are in float32 on AMD's processors, whose AVX-512 MKL leaves unused. Empty products are left to torch.
    """
    if not (_is_amd and _has_onednn and fast_paths() and on_cpu(x)):
        return False
    is_float32 = x.dtype == weight.dtype == torch.float32 and autocast_dtype("cpu") is None
    return is_float32 and min(x.numel(), weight.numel()) > 0


def _onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # The operator of torch's own compiler: torch.utils.mkldnn would copy what goes in and what comes out.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    """``F.linear`` of contiguous tensors by oneDNN, and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn_product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), rows = ctx.saved_tensors, gradient.flatten(0, -2)
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            _onednn_product(gradient, weight.t()) if wants_x else None,
            _onednn_product(rows.t(), x.flatten(0, -2).t()) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``F.linear``: (..., K), (N, K) and (N,) -> (..., N)."""
    if prefers_onednn(x, weight):
        return _OneDnnLinear.apply(x.contiguous(), weight.contiguous(), bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def conv_channels_last(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, groups: int) -> Tensor:
    """Return ``F.conv1d`` of (B, C_in, T), computed with channels side by side in memory.

    torch sees an image of one row in the "channels last" layout, for which oneDNN has faster kernels.
    """
    weight = weight[:, :, None].contiguous(memory_format=torch.channels_last)
    return F.conv2d(x[:, :, None], weight, bias, padding=(0, padding), groups=groups)[:, :, 0]


def conv_frames(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Return ``F.conv1d`` of ``x.transpose(1, 2)``, transposed: (B, T, C_in) -> (B, T', C_out)."""
    batch, num_frames, channels = x.shape
    kernel = weight.size(2)
    if channels == 1:
        return F.linear(x[..., 0].unfold(-1, kernel, stride), weight[:, 0], bias)
    num_windows = (num_frames - kernel) // stride + 1
    if not torch.is_grad_enabled() or prefers_onednn(x, weight):  # wants contiguous rows
        windows = x.unfold(1, kernel, stride).transpose(2, 3)  # (B, T', kernel, C_in), overlapping
        return linear(windows.flatten(2), weight.transpose(1, 2).flatten(1), bias)
    # A copy of the overlapping windows would be kept for the backward pass. Parts of ``stride`` frames do not overlap:
    # part p of all windows is a matrix that needs no copy, and the parts' products add up.
    columns = weight.permute(2, 1, 0).flatten(0, 1)  # (kernel * C_in, C_out)
    num_parts = -(-kernel // stride)
    needed = (num_windows - 1 + num_parts) * stride
    if needed > num_frames:
        x = F.pad(x, (0, 0, 0, needed - num_frames))
    steps = x[:, :needed].reshape(batch, -1, stride * channels)
    y = x.new_zeros(1) if bias is None else bias
    for part, matrix in enumerate(columns.split(stride * channels)):
        rows = steps[:, part : part + num_windows, : len(matrix)]
        y = torch.baddbmm(y, rows, matrix.expand(batch, -1, -1))
    return y


# Windows to take statistics of at once, in float64.
_WINDOWS_AT_ONCE = 100_000


Moments = tuple[Tensor, Tensor]
"""The mean (B, kernel) of windows of samples and their covariance (B, kernel, kernel), in float64."""


def _moments(waveforms: Tensor, conv: nn.Conv1d) -> Moments:
    """Return the moments of the windows that ``conv`` sees of waveforms (B, T)."""
    windows = waveforms.unfold(-1, conv.kernel_size[0], conv.stride[0])  # (B, T', kernel), no copy
    blocks = windows.split(_WINDOWS_AT_ONCE, dim=1)
    # In float64, and about the mean: windows of a low tone differ little from each other.
    mean = sum(block.sum(1, dtype=torch.float64) for block in blocks) / windows.size(1)
    covariance: Any = 0
    for block in blocks:
        centred = block.double() - mean[:, None]
        covariance = covariance + centred.transpose(1, 2) @ centred / windows.size(1)  # (B, kernel, kernel)
    return mean, covariance


def _variance(covariance: Tensor, conv: nn.Conv1d) -> Tensor:
    """Return the variance (B, C_out) over time of the output of ``conv``.

    The convolution is linear in a window's samples, so their covariance gives the variance without the output.
    """
    weight = conv.weight[:, 0].double()
    return ((weight @ covariance) * weight).sum(-1).clamp(min=0)


def norm_over_time(waveforms: Tensor, conv: nn.Conv1d, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Express ``norm`` on the output y of ``conv`` for whole waveforms (B, T) as y * scale + shift.

    The waveforms have no gradient, and the norm has one group per channel. Both results are (B, C_out) in float64.
    """
    mean, covariance = _moments(waveforms, conv)
    scale = norm.weight * torch.rsqrt(_variance(covariance, conv) + norm.eps)
    bias = 0 if conv.bias is None else conv.bias.double()
    return scale, norm.bias - (mean @ conv.weight[:, 0].double().t() + bias) * scale


def normalized_conv(
    waveforms: Tensor, conv: nn.Conv1d, norm: nn.GroupNorm, moments: Moments | None = None
) -> Callable[[Tensor], Tensor]:
    """Return a convolution and the norm of its channels over time as one function of any stretch of the waveforms.

    It maps (B, T) to (B, T', C_out). The norm is by ``moments``, those of the waveforms by default. The convolution's
    bias only moves the mean, which the norm subtracts.
    """
    mean, covariance = _moments(waveforms, conv) if moments is None else moments
    scale = (norm.weight * torch.rsqrt(_variance(covariance, conv) + norm.eps)).to(waveforms.dtype)  # (B, C)
    weight = conv.weight.transpose(0, 1) * scale[..., None]  # (B, C, kernel)
    mean = mean[:, None].to(waveforms.dtype)
    # The gradient of the convolution's bias is zero, not missing: DDP waits for it.
    shift = norm.bias if conv.bias is None else norm.bias + 0 * conv.bias

    def apply(stretch: Tensor) -> Tensor:
        windows = stretch.unfold(-1, conv.kernel_size[0], conv.stride[0]) - mean
        return torch.baddbmm(shift, windows, weight.transpose(1, 2))

    return apply
