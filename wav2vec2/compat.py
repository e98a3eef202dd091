"""Reading files with names beyond torch's own list."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch


def unpickling_also(names: Sequence[tuple[Any, str]]) -> AbstractContextManager[None]:
    """A context in which ``torch.load(weights_only=True)`` accepts these (object, dotted name) pairs too."""
    return torch.serialization.safe_globals(list(names))
