"""Checks of the fields of a configuration: each error names the field, the value and what is allowed."""

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jlora.errors import ConfigError, shortened
from jlora.paths import nearest

__all__ = ["check_keys", "choice", "integer", "number", "refusal"]

_MOST, _MOST_KEYS = 200, 5  # characters of a value, and unknown keys, that an error shows


def refusal(field: str, value: Any, wanted: str) -> ConfigError:
    """The error for a field whose value is not allowed."""
    return ConfigError(f"{field} = {shortened(value, _MOST)}: wanted {wanted}")


def check_keys(found: Iterable[str], known: Sequence[str], where: str) -> None:
    """Refuses keys that are not known, each with the known one that is spelled most like it."""
    unknown = [key for key in found if key not in known]
    if unknown:
        shown = unknown[:_MOST_KEYS]
        named = ", ".join(f"{shortened(key)} (did you mean {nearest(str(key), known, 1)[0]!r}?)" for key in shown)
        more = f" and {len(unknown) - len(shown):,} more" if len(unknown) > len(shown) else ""
        raise ConfigError(f"{where}: unknown key {named}{more}; known keys: {', '.join(known)}")


def integer(field: str, value: Any, least: int, below: int | None = None) -> int:
    """A whole number, a NumPy one too, with least <= value < below."""
    try:
        result = operator.index(value)
    except TypeError:
        result = least - 1
    if _is_bool(value) or result < least or (below is not None and result >= below):
        wanted = f"a whole number of at least {least}" + ("" if below is None else f" and below {below}")
        raise refusal(field, value, wanted)
    return result


def number(field: str, value: Any, low: float = -math.inf, high: float = math.inf, wanted: str = "") -> float:
    """A finite number with low <= value < high."""
    try:
        result = math.nan if _is_bool(value) or isinstance(value, str | bytes | bytearray) else float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result) or not low <= result < high:
        raise refusal(field, value, wanted or "a finite number")
    return result


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or getattr(value, "dtype", None) == np.bool_


def choice(field: str, value: Any, allowed: Sequence[str]) -> str:
    """One of the allowed names."""
    if not isinstance(value, str) or value not in allowed:
        hint = f" (did you mean {nearest(value, allowed, 1)[0]!r}?)" if isinstance(value, str) else ""
        raise refusal(field, value, f"one of {', '.join(map(repr, allowed))}{hint}")
    return value
