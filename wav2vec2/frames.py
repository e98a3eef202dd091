"""Convolutions over frames whose channels lie side by side in memory, (B, T, C), as matrix products.

The extractor's fast path on CPUs. What a window covers is one stretch of memory then, and no channel moves between one
layer and the next. Everything here gives what torch's convolution and GroupNorm give, up to rounding.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .compat import autocast_dtype, is_compiling
from .products import linear


def conv_frames(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """What ``F.conv1d`` makes of ``x.transpose(1, 2)``, transposed: (B, T, C_in) -> (B, T', C_out).

    Args:
        x: frames, contiguous.
        weight: (C_out, C_in, kernel).
        bias: (C_out,) or None.
        stride: of the windows, in frames.
    """
    if x.size(-1) == 1:
        return F.linear(x[..., 0].unfold(-1, weight.size(-1), stride), weight[:, 0], bias)
    if x.device.type == "cpu" and not is_compiling():
        x = x.to(autocast_dtype("cpu") or x.dtype).contiguous()
        if torch.is_grad_enabled():
            return _ConvFrames.apply(x, weight, bias, stride)
        batch, frames, channels = x.shape
        windows = (frames - weight.size(2)) // stride + 1, weight.size(2) * channels
        rows = x.as_strided((batch, *windows), (frames * channels, stride * channels, 1))
        return linear(rows.contiguous(), weight.transpose(1, 2).flatten(1), bias)
    return conv_channels_last(x.transpose(1, 2), weight, bias, stride).transpose(1, 2)


def conv_channels_last(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0, groups: int = 1
) -> Tensor:
    """``F.conv1d`` of (B, C_in, T) whose channels lie side by side in memory; so do those of the result.

    To torch such a waveform is an image of one row, "channels last", for which oneDNN and cuDNN have kernels.
    """
    weight = weight[:, :, None].contiguous(memory_format=torch.channels_last)
    return F.conv2d(x[:, :, None], weight, bias, (1, stride), (0, padding), groups=groups)[:, :, 0]


# Windows whose statistics are taken at once, in float64.
_WINDOWS_AT_ONCE = 100_000


def _statistics(waveforms: Tensor, conv: nn.Conv1d) -> tuple[Tensor, Tensor]:
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
    mean, variance = _statistics(waveforms, conv)
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
        mean, variance = _statistics(waveforms, conv)
        scale = norm.weight * torch.rsqrt(variance + norm.eps)  # (B, C)
        # The norm's bias is the weight of a 1 behind each window's samples: one product makes its gradient, too.
        shift = norm.bias.expand_as(scale)
        if conv.bias is not None:
            shift = shift + 0 * conv.bias  # its gradient is zero, not missing: DDP waits for it
        weight = torch.cat([conv.weight[:, 0] * scale[..., None], shift[..., None]], -1)  # (B, C, kernel + 1)
        self._mean = mean[:, None].to(waveforms.dtype)
        self._weight = weight.transpose(1, 2).to(waveforms.dtype)

    def __call__(self, waveforms: Tensor) -> Tensor:
        """The normalised convolution of any stretch of the waveforms: (B, T) -> (B, T', C_out)."""
        windows = waveforms.unfold(-1, self._kernel, self._stride)
        return F.pad(windows - self._mean, (0, 1), value=1.0) @ self._weight


class _ConvFrames(torch.autograd.Function):
    """:func:`conv_frames` in the precision of ``x``, forward and backward.

    Windows of ``kernel`` frames that start ``stride`` frames apart overlap, which the rows of a matrix cannot. Cut into
    parts of ``stride`` frames they do not: part p of all windows is a matrix, and the parts' products add up.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        matrix = weight.transpose(1, 2).flatten(1).to(x.dtype)  # (C_out, kernel * C_in)
        windows = _Windows(x.size(1), x.size(2), weight.size(2), stride)
        y = x.new_empty(len(x), windows.number, len(weight))
        for frames, output in zip(x, y, strict=True):
            for part, columns in windows.parts():
                rows, part_matrix = windows.rows(frames, part), matrix[:, columns].t()
                if part:
                    output.addmm_(rows, part_matrix)
                elif bias is None:
                    torch.mm(rows, part_matrix, out=output)
                else:
                    torch.addmm(bias.to(x.dtype), rows, part_matrix, out=output)
        ctx.save_for_backward(x, weight, bias)
        ctx.windows = windows
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (x, weight, bias), windows = ctx.saved_tensors, ctx.windows
        gradient = gradient.to(x.dtype).contiguous()
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        matrix = weight.transpose(1, 2).flatten(1).to(x.dtype)
        x_gradient = torch.empty_like(x) if wants_x else None
        weight_gradient = torch.zeros(matrix.shape, dtype=weight.dtype) if wants_weight else None
        for number, (frames, rows) in enumerate(zip(x, gradient, strict=True)):
            if wants_x:
                windows.spread(rows, matrix, x_gradient[number])
            if wants_weight:
                for part, columns in windows.parts():
                    weight_gradient[:, columns] += rows.t() @ windows.rows(frames, part)
        if wants_weight:
            weight_gradient = weight_gradient.view(len(weight), weight.size(2), -1).transpose(1, 2)
        bias_gradient = gradient.sum((0, 1), dtype=bias.dtype) if wants_bias else None
        return x_gradient, weight_gradient, bias_gradient, None


class _Windows:
    """The windows of a convolution over (T, C) frames that are contiguous, part by part.

    Args:
        num_frames: T.
        channels: C.
        kernel: frames in a window.
        stride: frames from one window's start to the next.
    """

    def __init__(self, num_frames: int, channels: int, kernel: int, stride: int) -> None:
        self.number = (num_frames - kernel) // stride + 1
        self._channels, self._kernel, self._stride = channels, kernel, stride

    def parts(self) -> list[tuple[int, slice]]:
        """Each part's number and its columns of a (C_out, kernel * C) weight matrix."""
        ends = [min(start + self._stride, self._kernel) for start in range(0, self._kernel, self._stride)]
        return [
            (part, slice(part * self._stride * self._channels, end * self._channels)) for part, end in enumerate(ends)
        ]

    def rows(self, frames: Tensor, part: int) -> Tensor:
        """Part ``part`` of every window of ``frames`` (T, C), without a copy: (T', at most stride * C)."""
        step = self._stride * self._channels
        start = part * step
        width = min(step, self._kernel * self._channels - start)
        return frames.as_strided((self.number, width), (step, 1), frames.storage_offset() + start)

    def spread(self, gradient: Tensor, matrix: Tensor, out: Tensor) -> None:
        """The gradient of the frames (T, C) into ``out``, from that of the windows' products (T', C_out)."""
        covered = self.number * self._stride
        if self._kernel < self._stride:
            out.zero_()
        else:
            out[covered:] = 0
        for part, columns in self.parts():
            rows = self.rows(out, part)
            if part:
                rows.addmm_(gradient, matrix[:, columns])
            else:
                torch.mm(gradient, matrix[:, columns], out=rows)
