"""The time that a machine takes, as a price list over the operations of a model."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .audio import SAMPLE_RATE
from .files.errors import UserError, listed
from .operations import Operation


class Profile:
    """Times that were measured on a machine, by size: the price list of a machine.

    Between measured sizes a price is bilinear, down to zero at size zero; beyond the largest it is the largest's. No
    smaller size is dearer than a larger one.

    Attributes:
        contents: of the profile's file, see :func:`wav2vec2.files.profiles.read_profile`.
        num_samples: samples of a waveform that was timed, at 16 kHz.
        audio_seconds: seconds of audio that the times are for: of all waveforms of a batch.
        multiple: widths that are multiples of it take less time for their size than others.
    """

    def __init__(self, contents: Mapping[str, Any]) -> None:
        self.contents = contents
        self.num_samples = round(contents["seconds"] * SAMPLE_RATE)
        self.audio_seconds = contents["seconds"] * contents["batch"]
        self.multiple: int = contents.get("multiple") or 1
        prices = contents["prices"].values()
        segments = max(len(grid) for price in prices for grid in price["sizes"])
        self._tables = {key: _Table.of(price, segments) for key, price in contents["prices"].items()}
        self._stacked: dict[Any, _Table] = {}

    def costs(self, operations: Sequence[Operation]) -> Tensor:
        """Return the expected microseconds (n,) of n operations, in double precision where there are no masks.

        Raises:
            UserError: an operation is of a kind that was not measured.
        """
        sizes = [size for _, _, pair, _, share in operations for size in (*pair, share)]
        masked = next((size for size in sizes if isinstance(size, Tensor)), None)
        dtype, device = (torch.float64, torch.device("cpu")) if masked is None else (masked.dtype, masked.device)
        if masked is None:
            rows = torch.tensor(sizes, dtype=dtype, device=device)
        else:  # full: a tensor made from a number would be copied to the device
            full = [x if isinstance(x, Tensor) else torch.full((), x, dtype=dtype, device=device) for x in sizes]
            rows = torch.stack(full)
        rows = rows.view(-1, 3)
        starts, widths, steps = self._stack(tuple(operation.key for operation in operations), dtype, device)
        filled = ((rows[:, :2, None] - starts) / widths).clamp(0, 1)  # (n, 2, segments)
        # No matrix product: autocast would round it.
        return rows[:, 2] * (steps * filled[:, 0, :, None] * filled[:, 1, None]).sum((1, 2))

    def total(self, operations: Sequence[Operation]) -> Tensor:
        """Return the expected microseconds of all of them together; errors as in :meth:`costs`."""
        return self.costs(operations).sum()

    def _stack(self, keys: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> "_Table":
        """Return the tables of n operations as tensors with n rows."""
        if (keys, dtype, device) not in self._stacked:
            if missing := sorted(set(keys) - self._tables.keys()):
                raise UserError(
                    f"the profile has no times for {listed('operations', missing)} of the model; make a profile of "
                    "both models: python -m benchmarks.profile --model TEACHER.pth STUDENT.pth"
                )
            columns = zip(*(self._tables[key] for key in keys), strict=True)
            self._stacked[keys, dtype, device] = _Table(*(torch.stack(x).to(device, dtype) for x in columns))
        return self._stacked[keys, dtype, device]


class _Table(NamedTuple):
    """A piecewise bilinear function of two sizes: a sum over pairs of segments, each counted as far as it is filled."""

    starts: Tensor  # (2, segments)
    widths: Tensor  # (2, segments)
    steps: Tensor  # (segments, segments)

    @classmethod
    def of(cls, price: Mapping[str, Any], segments: int) -> "_Table":
        """Make the function of an entry of a profile; segments that it does not need count nothing."""
        starts, widths = torch.zeros(2, segments).double(), torch.ones(2, segments).double()
        steps = torch.zeros(segments, segments).double()
        grids = [torch.tensor([0.0, *grid]).double() for grid in price["sizes"]]
        for row, grid in enumerate(grids):
            starts[row, : len(grid) - 1], widths[row, : len(grid) - 1] = grid[:-1], grid.diff()
        times = F.pad(torch.tensor(price["microseconds"]).double(), (1, 0, 1, 0)).cummax(0).values.cummax(1).values
        steps[: len(grids[0]) - 1, : len(grids[1]) - 1] = times.diff(dim=0).diff(dim=1)
        return cls(starts, widths, steps)
