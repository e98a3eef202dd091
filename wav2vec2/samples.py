"""Waveforms that callers give, as tensors, arrays or lists of numbers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .files.errors import UserError, one_line, short_repr

# The value of a full-scale sample, and of silence, in arrays of whole numbers.
_FULL_SCALE = {torch.int16: (2**15, 0), torch.int32: (2**31, 0), torch.uint8: (2**7, 2**7)}


def as_samples(value: Any, name: str, num_dims: int = 1) -> Tensor:
    """Return a tensor, array or list of numbers as float32 on the CPU, at full scale 1: (T,), or (B, T) for two dims.

    Raises:
        UserError: it is something else; ``name`` is what the error calls it.
    """
    wanted = "(samples,)" if num_dims == 1 else "(batch, samples)"
    if not hasattr(value, "__array__") and not isinstance(value, Sequence):
        raise UserError(f"{name}: found {short_repr(value)}, expected a path, bytes, or a tensor or array {wanted}")
    try:
        waveform = _plain_tensor(value)
    except Exception as error:  # torch's, numpy's or the object's own: the value decides
        raise UserError(f"{name}: cannot be used ({one_line(error)}), expected floats or int16") from error
    if waveform.ndim != num_dims:
        advice = "average channels, and give several waveforms as a list" if num_dims == 1 else "a row for each stream"
        raise UserError(f"{name}: has shape {list(waveform.shape)}, expected {wanted}; {advice}")
    if not waveform.is_floating_point() and waveform.dtype not in _FULL_SCALE:
        raise UserError(f"{name}: holds {waveform.dtype}, expected floats (full scale 1), int16, int32 or uint8")
    full_scale, silence = _FULL_SCALE.get(waveform.dtype, (1, 0))
    return (waveform.float() - silence) / full_scale


def _plain_tensor(value: Any) -> Tensor:
    """Return a tensor, array or list as a dense tensor on the CPU."""
    if isinstance(value, Tensor):
        if value.is_nested or torch.masked.is_masked_tensor(value):
            raise TypeError("it is nested or masked")
        return value.detach().to_dense().cpu()
    import numpy as np

    if np.ma.is_masked(value):
        raise ValueError("some of its samples are masked")
    array = np.asarray(value)
    if array.dtype.kind not in "fiubc":
        raise TypeError(f"it holds {array.dtype.name}")
    # A copy: torch does not take every array as it is (read-only, reversed, of the other byte order).
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def check_finite(waveform: Tensor, name: str) -> None:
    """Raise a :class:`UserError` if samples are NaN or infinite; ``name`` is what the error calls them."""
    num_bad = waveform.numel() - int(waveform.isfinite().sum())
    if num_bad:
        problem = f"{num_bad} of its {waveform.numel()} samples are NaN or infinite"
        raise UserError(f"{name}: {problem}, expected numbers; mend it")


def check_length(waveform: Tensor, least: int, name: str) -> None:
    """Raise a :class:`UserError` if a waveform (T,) is too short for a frame of ``least`` samples."""
    if len(waveform) < least:
        wanted = f"at least {least}, which make one frame"
        raise UserError(f"{name}: has {len(waveform)} samples at 16 kHz, expected {wanted}; leave it out")
