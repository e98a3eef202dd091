"""The one switch between the plain paths, which read like the paper, and the fast ones, which give the same numbers.

Fast paths are on. ``with plain_paths():`` (``--plain`` of the training scripts) takes the plain ones; the tests hold
the two together, ``make bench`` shows the ratio.
"""

import contextlib
import ctypes
from collections.abc import Iterator

_fast = True

# glibc's names in <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def fast_paths() -> bool:
    """Whether fast paths are to be taken."""
    return _fast


@contextlib.contextmanager
def plain_paths(plain: bool = True) -> Iterator[None]:
    """Take the plain paths inside the block (or with ``plain=False`` the fast ones)."""
    global _fast
    before, _fast = _fast, not plain
    try:
        yield
    finally:
        _fast = before


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for its next allocation; for work on a CPU, where it is not undone.

    By default glibc gives large blocks back to the system at once and asks for them anew, page by page: a training
    update of HuBERT Base on 2 x 8 s spends almost half of its time on that. The process stays as large as it once was.

    Returns:
        Whether the C library can do it (glibc).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def give_back_freed_memory() -> None:
    """Give what this process keeps of freed memory back to the system, where the C library can do it (glibc)."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
