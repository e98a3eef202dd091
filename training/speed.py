"""What makes training fast without changing its numbers."""

import ctypes

# glibc's names in <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for its next allocation; for training on a CPU.

    By default glibc gives large blocks back to the system at once and asks for them anew, page by page: an update of
    HuBERT Base on 2 x 8 s spends almost half of its time on that. The process stays as large as it once was.

    Returns:
        Whether the C library can do it (glibc).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
