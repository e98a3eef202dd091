"""Reads torch files that foreign programs pickled, without those programs and without running code from the file.

The names that fairseq's checkpoints need beyond tensors are added to the allow-list of :mod:`.archive`, and each of
them stands for something of this module that only holds data.
"""

import itertools
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import UserError
from .archive import UnreadableFileError, read_archive

# Published settings have some hundred entries; shared lists could make a small file endless.
_MAX_ENTRIES = 20_000


class _Inert:
    """Stands for a foreign class: keeps the pickled state, does nothing with it."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Namespace(_Inert):
    """``argparse.Namespace``; the state is its attributes."""


class _ConfigContainer(_Inert):
    """omegaconf's DictConfig and ListConfig; ``state["_content"]`` is a dict or list of nodes."""


class _ConfigValue(_Inert):
    """omegaconf's value nodes; ``state["_val"]`` is the value."""


class _Opaque(_Inert):
    """What is read past and never looked at."""


def _plain_dict(*_factory: Any) -> dict[Any, Any]:
    """Stands for ``collections.defaultdict``: an empty dict that makes nothing up."""
    return {}


_FOREIGN_GLOBALS = [
    (_Namespace, "argparse.Namespace"),
    (_ConfigContainer, "omegaconf.dictconfig.DictConfig"),
    (_ConfigContainer, "omegaconf.listconfig.ListConfig"),
    (_ConfigValue, "omegaconf.nodes.AnyNode"),
    (_ConfigValue, "omegaconf.nodes.BooleanNode"),
    (_ConfigValue, "omegaconf.nodes.FloatNode"),
    (_ConfigValue, "omegaconf.nodes.IntegerNode"),
    (_ConfigValue, "omegaconf.nodes.StringNode"),
    (_Opaque, "fairseq.data.dictionary.Dictionary"),
    (_Opaque, "omegaconf.base.ContainerMetadata"),
    (_Opaque, "omegaconf.base.Metadata"),
    (_Opaque, "typing.Any"),
    (_plain_dict, "collections.defaultdict"),
    # Python 2's names for these, "__builtin__.dict" and "__builtin__.long" among them, are translated by torch.
    (dict, "builtins.dict"),
    (list, "builtins.list"),
    (int, "builtins.int"),
]


def read_foreign_file(path: str | PathLike) -> Any:
    """Read a file written by ``torch.save`` (zip or the older format); tensors are put on the CPU.

    Objects of foreign classes come back as inert stand-ins; :func:`to_plain` opens those that hold settings.

    Raises:
        UserError: the file is missing, damaged or not torch's, or names a global outside the allow-list.
    """
    path = Path(path)
    try:
        return read_archive(path, _FOREIGN_GLOBALS)
    except UnreadableFileError as error:
        if error.forbidden_name:
            raise UserError(
                f"{path}: the file asks for {error.forbidden_name}, which is not among the names that a checkpoint of "
                "this kind needs; it was not read, and nothing in it was run; get the file from its publisher"
            ) from error
        raise UserError(
            f"{path}: damaged, or not a checkpoint written by torch.save ({error}); download it again"
        ) from error


def to_plain(value: Any, source: str | PathLike) -> Any:
    """``value`` with Namespace, DictConfig, ListConfig and their nodes replaced by dicts, lists and plain values.

    Raises:
        UserError: the settings are nested without end or lack their content.
    """
    try:
        return _to_plain(value, itertools.count(1))
    except (RecursionError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{source}: the settings in the file are damaged ({type(error).__name__}); download it again"
        ) from error


def _to_plain(value: Any, entries: Iterator[int]) -> Any:
    if next(entries) > _MAX_ENTRIES:
        raise ValueError
    if isinstance(value, _Namespace):
        value = value.state
    elif isinstance(value, _ConfigContainer):
        value = value.state["_content"]
    elif isinstance(value, _ConfigValue):
        return value.state["_val"]
    if isinstance(value, dict):
        return {key: _to_plain(item, entries) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_plain(item, entries) for item in value]
    return value
