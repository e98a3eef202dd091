"""The names under which s3prl and ``torch.hub`` find this upstream."""

from importlib import import_module as _import_module
from typing import Any as _Any

try:
    _expert = _import_module(".expert", __package__)
except (ImportError, TypeError):  # torch.hub imports this file alone, outside of a package
    _expert = _import_module("expert")


def dphubert_local(ckpt: str, **options: _Any) -> _Any:
    """Return the ``UpstreamExpert`` of a local file, compressed or a teacher."""
    return _expert.UpstreamExpert(ckpt, **options)
