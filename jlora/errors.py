"""The errors of jlora. Each message says what was found, what was wanted, and the way out."""

from typing import Any

__all__ = [
    "AdapterError",
    "ConfigError",
    "DataError",
    "JloraError",
    "JloraWarning",
    "TargetError",
    "printable",
    "shortened",
]

_MOST_LINES, _MOST_CHARACTERS, _LAST = 60, 1000, 300


class JloraError(ValueError):
    """Base class of every error that jlora raises on purpose.

    What a file says may be in a message: it is of bounded length, and characters that do not print are escaped.
    """

    def __init__(self, message: object = "") -> None:
        lines = str(message).split("\n")
        shown = [printable(line) for line in lines[:_MOST_LINES]]
        more = [f"and {len(lines) - _MOST_LINES:,} more lines"] if len(lines) > _MOST_LINES else []
        super().__init__("\n".join([*shown, *more]))


class JloraWarning(UserWarning):
    """What is computed is right, and likely not what was meant."""


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


def printable(line: str) -> str:
    """A line of bounded length, in which what a terminal would obey is escaped."""
    if len(line) > _MOST_CHARACTERS:
        line = f"{line[: _MOST_CHARACTERS - _LAST]}...{line[-_LAST:]}"
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
