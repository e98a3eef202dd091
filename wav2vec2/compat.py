"""What PyTorch 2.0 does not have of what this package uses, one name per difference."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .errors import UserError

try:
    from torch.compiler import is_compiling
except ImportError:
    from torch._utils import is_compiling

__all__ = ["HAS_AMX", "cpu_autocast_dtype", "is_compiling", "unpickling_also"]

# Whether this CPU has AMX, as far as this PyTorch knows.
HAS_AMX: bool = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()

_AUTOCAST_TAKES_A_DEVICE = torch.__version__ >= (2, 4)
_UNPICKLER_TAKES_NAMES = torch.__version__ >= (2, 6)


def cpu_autocast_dtype() -> torch.dtype | None:
    """What autocast makes matrix products on a CPU run in, or None where it is off."""
    if _AUTOCAST_TAKES_A_DEVICE:
        return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None


def unpickling_also(names: Sequence[tuple[Any, str]]) -> AbstractContextManager[None]:
    """A context in which ``torch.load(weights_only=True)`` accepts these (object, dotted name) pairs too.

    Raises:
        UserError: this PyTorch cannot.
    """
    if not names:
        return nullcontext()
    if not _UNPICKLER_TAKES_NAMES:
        raise UserError(
            f"PyTorch {torch.__version__} cannot read foreign checkpoints safely; convert them with 2.6 or newer "
            "(the model file that this makes loads with 2.0)"
        )
    return torch.serialization.safe_globals(list(names))
