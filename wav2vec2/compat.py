"""What PyTorch 2.0 does not have of what this package uses, one name per difference."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from .errors import UserError

try:
    from torch.compiler import is_compiling
except ImportError:
    from torch._utils import is_compiling

__all__ = [
    "HAS_AMX",
    "HAS_ONEDNN_BFLOAT16",
    "HAS_ONEDNN_LINEAR",
    "IS_AMD",
    "autocast_dtype",
    "is_compiling",
    "onednn_linear",
    "unpickling_also",
]

_CPUINFO = Path("/proc/cpuinfo")

# Whether this CPU has AMX, as far as this PyTorch knows.
HAS_AMX: bool = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()

# Whether an AMD processor is at work, as far as Linux says.
IS_AMD: bool = _CPUINFO.is_file() and "AuthenticAMD" in _CPUINFO.read_text(errors="replace")

# oneDNN's product of rows and a weight matrix, with the bias added on the way; torch has it for its own compiler.
# Asked for only in the versions that it was tried in.
_ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.__version__ >= (2, 11) else None
HAS_ONEDNN_LINEAR: bool = _ONEDNN_LINEAR is not None and torch.backends.mkldnn.is_available()
# Whether it takes bfloat16 on this CPU.
HAS_ONEDNN_BFLOAT16: bool = HAS_ONEDNN_LINEAR and torch.ops.mkldnn._is_mkldnn_bf16_supported()

_AUTOCAST_TAKES_A_DEVICE = torch.__version__ >= (2, 4)
_UNPICKLER_TAKES_NAMES = torch.__version__ >= (2, 6)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast makes matrix products on a kind of device run in, or None where it is off."""
    if device_type == "meta":
        return None
    if _AUTOCAST_TAKES_A_DEVICE:
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    if device_type == "cpu":
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``F.linear`` on a CPU by oneDNN, without gradient; only where :data:`HAS_ONEDNN_LINEAR`."""
    return _ONEDNN_LINEAR(x, weight, bias, "none", [], "")


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
