"""The operations of a forward pass, and their price in multiply-adds.

A block says once what it does and with which sizes. A price list turns that into a cost, differentiable in the expected
sizes: :data:`MACS` by formula, :class:`wav2vec2.profiles.Profile` by what was measured on a machine.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

Count = Tensor | float
"""A number of units, parameters or multiply-adds: whole without masks, a differentiable scalar with them."""


class Operation(NamedTuple):
    """The work of one block for one waveform, without that of blocks inside it that have operations of their own."""

    module: nn.Module
    kind: str  # a key of MACS
    sizes: tuple[Count, Count]  # expected, of what pruning changes; the order is that of MACS
    fixed: Mapping[str, Any]  # what it does not change
    share: Count = 1  # how likely the block is to be there

    @property
    def key(self) -> str:
        """Name what has one price list over sizes: the kind, with all that pruning does not change."""
        return " ".join([self.kind, *(f"{name}={value}" for name, value in self.fixed.items())])


def part(size: Count, num_parts: int) -> Count:
    """Return one of ``num_parts`` equal parts of an expected size; a whole number stays whole."""
    return size // num_parts if isinstance(size, int) else size / num_parts


def _attention(heads: Count, dim: Count, *, head_dim: int, frames: int, gates: int, keys: int | None = None) -> Count:
    keys = frames if keys is None else keys
    macs = heads * dim * (4 * head_dim * frames) + heads * (2 * head_dim * frames * keys)
    return macs + heads * part(dim, gates) * (8 * frames) if gates else macs


# The multiply-adds of each kind of operation, given its sizes and what is fixed. Products are counted alone.
MACS: Mapping[str, Callable[..., Count]] = {
    "conv": lambda channels_in, channels, *, kernel, frames, **_: channels_in * channels * (kernel * frames),
    "projection": lambda channels, dim, *, frames, **_: channels * dim * frames,
    "positional": lambda taps, dim, *, groups, frames: taps * dim * part(dim, groups) * frames,
    "attention": _attention,
    "feed_forward": lambda width, dim, *, frames: width * dim * (2 * frames),
    "norms": lambda _, dim, *, frames, **__: 0,
    "rest": lambda _, dim, *, frames, **__: 0,
}


def macs_of(operations: Iterable[Operation]) -> Count:
    """Return the expected multiply-adds."""
    return sum(MACS[kind](*sizes, **fixed) * share for _, kind, sizes, fixed, share in operations)
