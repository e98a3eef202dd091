"""The one switch between plain and fast computation, and what is fast on CPUs: the extractor frame by frame.

Plain code reads like the paper; fast code gives the same numbers up to rounding, and the tests hold the two together.
Fast is the default.

On CPUs the extractor keeps a frame's channels side by side in memory, (B, T, C). What a window covers is one stretch of
memory then, a convolution is a few matrix products, and no channel moves between one layer and the next.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_fast = True


def fast_paths() -> bool:
    """Whether to compute the fast way."""
    return _fast


@contextlib.contextmanager
def plain_paths(plain: bool = True) -> Iterator[None]:
    """Compute the plain way inside the block (or with ``plain=False`` the fast way)."""
    global _fast
    before, _fast = _fast, not plain
    try:
        yield
    finally:
        _fast = before


def on_cpu(x: Tensor) -> bool:
    """Whether ``x`` is computed with on a CPU by torch's own kernels, not traced by a compiler."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast makes matrix products on a kind of device run in, or None where it is off."""
    is_on = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if is_on else None


def prefers_fused_attention(query: Tensor, dropout: float) -> bool:
    """Whether torch's fused attention of ``query`` (B, H, T, K) is faster than its single steps.

    On CPUs torch has no fused kernel with dropout; what it does instead takes twice the time; and in bfloat16 single
    steps take 0.7 to 0.9 of the time. It divides by the number of heads, which may be none.
    """
    if query.numel() == 0 or query.device.type != "cpu":
        return query.numel() > 0
    return dropout == 0.0 and query.dtype == torch.float32


def conv_channels_last(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, groups: int) -> Tensor:
    """``F.conv1d`` of (B, C_in, T) whose channels lie side by side in memory; so do those of the result.

    To torch such a waveform is an image of one row, "channels last", for which oneDNN has faster kernels.
    """
    weight = weight[:, :, None].contiguous(memory_format=torch.channels_last)
    return F.conv2d(x[:, :, None], weight, bias, padding=(0, padding), groups=groups)[:, :, 0]


def conv_frames(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """What ``F.conv1d`` makes of ``x.transpose(1, 2)``, transposed: (B, T, C_in) -> (B, T', C_out).

    Args:
        x: frames.
        weight: (C_out, C_in, kernel).
        bias: (C_out,) or None.
        stride: of the windows, in frames.
    """
    batch, num_frames, channels = x.shape
    kernel = weight.size(2)
    if channels == 1:
        return F.linear(x[..., 0].unfold(-1, kernel, stride), weight[:, 0], bias)
    num_windows = (num_frames - kernel) // stride + 1
    if not torch.is_grad_enabled():
        windows = x.unfold(1, kernel, stride).transpose(2, 3)  # (B, T', kernel, C_in), which overlap
        return F.linear(windows.flatten(2), weight.transpose(1, 2).flatten(1), bias)
    # A copy of the overlapping windows would be kept for the backward pass. Parts of ``stride`` frames do not overlap:
    # part p of all windows is a matrix without a copy, and the parts' products add up.
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


# Windows whose statistics are taken at once, in float64.
_WINDOWS_AT_ONCE = 100_000


def _window_statistics(waveforms: Tensor, conv: nn.Conv1d) -> tuple[Tensor, Tensor]:
    """Mean of the windows of (B, T) waveforms, and variance over time of what ``conv`` makes of them.

    The convolution is linear in a window's samples: their covariance tells the variance, and nothing of the output
    need be computed.

    Returns:
        (B, kernel) and (B, C_out) in float64.
    """
    windows = waveforms.unfold(-1, conv.kernel_size[0], conv.stride[0])  # (B, T', kernel), no copy
    blocks = windows.split(_WINDOWS_AT_ONCE, dim=1)
    # Float64, and about their mean: windows of a low tone differ by little from each other.
    mean = sum(block.sum(1, dtype=torch.float64) for block in blocks) / windows.size(1)
    covariance = 0
    for block in blocks:
        centred = block.double() - mean[:, None]
        covariance = covariance + centred.transpose(1, 2) @ centred / windows.size(1)  # (B, kernel, kernel)
    weight = conv.weight[:, 0].double()
    return mean, ((weight @ covariance) * weight).sum(-1).clamp(min=0)


def norm_over_time(waveforms: Tensor, conv: nn.Conv1d, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """What ``norm`` does to the output y of ``conv`` for whole waveforms (B, T): y * scale + shift.

    Args:
        waveforms: (B, T), without gradient.
        conv: of one input channel.
        norm: with one group per channel.

    Returns:
        scale and shift, (B, C_out) in float64.
    """
    mean, variance = _window_statistics(waveforms, conv)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    bias = 0 if conv.bias is None else conv.bias.double()
    return scale, norm.bias - (mean @ conv.weight[:, 0].double().t() + bias) * scale


class NormalizedConv:
    """A convolution of waveforms and the norm of its channels over time, as one matrix product.

    Arguments as of :func:`norm_over_time`. The convolution's bias, if any, moves the mean only, which the norm takes
    away again.
    """

    def __init__(self, waveforms: Tensor, conv: nn.Conv1d, norm: nn.GroupNorm) -> None:
        self._kernel, self._stride = conv.kernel_size[0], conv.stride[0]
        mean, variance = _window_statistics(waveforms, conv)
        scale = (norm.weight * torch.rsqrt(variance + norm.eps)).to(waveforms.dtype)  # (B, C)
        self._mean = mean[:, None].to(waveforms.dtype)
        self._weight = conv.weight.transpose(0, 1) * scale[..., None]  # (B, C, kernel)
        # The gradient of the convolution's bias is zero, not missing: DDP waits for it.
        self._shift = norm.bias if conv.bias is None else norm.bias + 0 * conv.bias

    def __call__(self, waveforms: Tensor) -> Tensor:
        """The normalised convolution of any stretch of the waveforms: (B, T) -> (B, T', C_out)."""
        windows = waveforms.unfold(-1, self._kernel, self._stride) - self._mean
        return torch.baddbmm(self._shift, windows, self._weight.transpose(1, 2))
