"""What PyTorch 2.0 does otherwise, tested with whichever version is installed."""

from contextlib import nullcontext

import pytest
import torch

from wav2vec2 import compat


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        (nullcontext(), None),
        (torch.autocast("cpu", dtype=torch.bfloat16), torch.bfloat16),
        (torch.autocast("cpu", enabled=False), None),
    ],
)
def test_autocast_dtype(context, expected):
    with context:
        assert compat.autocast_dtype("cpu") == expected


def test_is_compiling():
    assert compat.is_compiling() is False
