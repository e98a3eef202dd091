"""Collects the code of a model for its folder, so that transformers loads it where this project is not installed."""

import inspect
import re
from importlib import import_module
from types import ModuleType

_OWN_IMPORT = re.compile(r"^( *)from (\.+|(?=(?:hardconcrete|wav2vec2)\b))((?:\w+\.)*)(\w+) import", re.MULTILINE)
_HEADER = """# {name} of DPHuBERT, copied by its export.py: only imports differ.
# SPDX-License-Identifier: MIT. Copyright (c) 2026 the maintainers of DPHuBERT.
"""


def code_files(name: str) -> dict[str, str]:
    """Collect a module of this package, and all of this project that it imports, as modules of one folder.

    Returns:
        Source by file name; the modules import each other relatively.
    """
    sources: dict[str, str] = {}

    def add(module: ModuleType) -> set[str]:
        """Add a module and what it imports; return the names of the latter."""
        source, needed = inspect.getsource(module), set()
        for _, dots, parents, imported in _OWN_IMPORT.findall(source):
            needed |= {imported, *add(import_module(dots + parents + imported, module.__package__))}
        text = _HEADER.format(name=module.__name__) + _OWN_IMPORT.sub(r"\1from .\4 import", source)
        # transformers loads the modules of this package. Its version 4 copies only what they import themselves.
        if module.__package__ == __package__ and needed:
            text += "\nif False:  # so that transformers copies them\n"
            text += "".join(f"    from .{name} import __name__  # noqa: F401\n" for name in sorted(needed))
        sources[f"{module.__name__.rpartition('.')[2]}.py"] = text
        return needed

    add(import_module(f".{name}", __package__))
    return sources
