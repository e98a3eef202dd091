"""The one switch between the plain paths, which read like the paper, and the fast ones, which give the same numbers.

Fast paths are on. ``with plain_paths():`` (``--plain`` of the training scripts) takes the plain ones; the tests hold
the two together, ``make bench`` shows the ratio.
"""

from collections.abc import Iterator
from contextlib import contextmanager

_fast = True


def fast_paths() -> bool:
    """Whether fast paths are to be taken."""
    return _fast


@contextmanager
def plain_paths(plain: bool = True) -> Iterator[None]:
    """Take the plain paths inside the block (or with ``plain=False`` the fast ones)."""
    global _fast
    before, _fast = _fast, not plain
    try:
        yield
    finally:
        _fast = before
