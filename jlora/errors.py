"""The errors of jlora. Each message says what was found, what was wanted, and the way out."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = [
    "AdapterError",
    "ConfigError",
    "DataError",
    "JloraError",
    "JloraWarning",
    "TargetError",
    "listed",
    "plain",
    "printable",
    "shortened",
    "together",
]

_MOST_LINES, _MOST_CHARACTERS, _LAST = 60, 1000, 300
_NEXT_LINE = re.compile("\n(?=  )")


class JloraError(ValueError):
    """Base class of every error that jlora raises on purpose.

    What a file says may be in a message: it is of bounded length, and characters that do not print are escaped.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(plain(str(message)))


class JloraWarning(UserWarning):
    """What is computed is right, and likely not what was meant."""

    def __init__(self, message: object = "") -> None:
        super().__init__(plain(str(message)))


class ConfigError(JloraError):
    """A configuration holds an unknown key or a value that is not allowed."""


class TargetError(JloraError):
    """The patterns of a configuration and the paths of a params tree do not fit."""


class AdapterError(JloraError):
    """An adapter, its weight and its rank do not fit."""


class DataError(JloraError):
    """A file, folder or dataset cannot be used as it is."""


def shortened(value: Any, most: int = 100) -> str:
    """The repr of what a file holds, no longer than a message bears."""
    if isinstance(value, str):
        value = value[: most + 1]
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # too deep, or a number of too many digits
        return type(value).__name__
    return text if len(text) <= most else f"{text[:most]}..."


def listed(names: Iterable[object], most: int = 8) -> str:
    """`a, b, c and 4 more`."""
    every = list(names)
    more = f" and {len(every) - most:,} more" if len(every) > most else ""
    return ", ".join(printable(str(name)) for name in every[:most]) + more


def together(problems: Sequence[str], where: str = "", most: int = 12) -> str:
    """One message for all problems, each on a line of its own where there are several."""
    head = f"{where}: " if where else ""
    if len(problems) == 1:
        return head + problems[0]
    more = [f"and {len(problems) - most:,} more"] if len(problems) > most else []
    return "\n  ".join([f"{head}{len(problems):,} problems:", *problems[:most], *more])


def raise_all(problems: Iterable[str], error: type[JloraError], where: str = "") -> None:
    """Raises one error for all problems, if there are any."""
    found = list(problems)
    if found:
        raise error(together(found, where))


def plain(message: str) -> str:
    """A message of bounded length, in which what a terminal would obey is escaped.

    A new line begins with two spaces; any other line break is out of a name or a file, and is escaped.
    """
    lines = _NEXT_LINE.split(message)
    more = [f"  and {len(lines) - _MOST_LINES:,} more lines"] if len(lines) > _MOST_LINES else []
    return "\n".join([*map(printable, lines[:_MOST_LINES]), *more])


def printable(line: str) -> str:
    """A line of bounded length, in which what a terminal would obey is escaped."""
    if len(line) > _MOST_CHARACTERS:
        line = f"{line[: _MOST_CHARACTERS - _LAST]}...{line[-_LAST:]}"
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
