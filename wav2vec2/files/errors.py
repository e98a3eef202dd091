"""The one exception class for what a user can mend, and how its messages show what a file holds."""

import reprlib
from typing import Any


class UserError(ValueError):
    """Bad input: a file, an option or a combination of them that cannot work.

    The message is one line that names the file or option, what was found, what was expected and
    what to do. Scripts print it without a traceback and exit with status 1 (see ``cli.run``).
    """


class _ShortRepr(reprlib.Repr):
    """Looks at a few entries of a few levels: what a file holds may be endless, and may be no plain value."""

    def repr_instance(self, x: Any, level: int) -> str:
        plain = x is None or isinstance(x, (bool, float, bytes))
        return repr(x)[:40] if plain else f"<{type(x).__name__}>"

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 512 else "<a number of over 150 digits>"


_SHORT_REPR = _ShortRepr()
_SHORT_REPR.maxlevel, _SHORT_REPR.maxstring, _SHORT_REPR.maxother = 3, 60, 60


def short_repr(value: Any) -> str:
    """``repr(value)`` on one short line, whatever ``value`` is; the contents of tensors and objects are left out."""
    return single_line(_SHORT_REPR.repr(value), 160)


def single_line(text: str, most: int = 200) -> str:
    """The first ``most`` characters of ``text`` on one line; what would steer a terminal becomes a question mark."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text[: 2 * most].split()))[:most]


def one_line(error: Exception) -> str:
    """What an error says, on one line, or its class if it says nothing."""
    return single_line(str(error)) or type(error).__name__


def listed(label: str, names: list[str], most: int = 8) -> str:
    """``"9 missing (a, b, ...)"``: how many, what is wrong with them and the first names."""
    shown = ", ".join(single_line(name, 80) for name in names[:most]) + (", ..." if len(names) > most else "")
    return f"{len(names)} {label}" + (f" ({shown})" if names else "")
