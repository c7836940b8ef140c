"""Checks of the fields of a configuration: each error names the field, the value and what is allowed."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from jlora.errors import ConfigError
from jlora.paths import nearest

__all__ = ["check_keys", "choice", "number", "refusal", "whole"]


def refusal(field: str, value: Any, wanted: str) -> ConfigError:
    """The error for a field whose value is not allowed."""
    return ConfigError(f"{field} = {value!r}: wanted {wanted}")


def check_keys(found: Iterable[str], known: Sequence[str], where: str) -> None:
    """Refuses keys that are not known, each with the known one that is spelled most like it."""
    unknown = [key for key in found if key not in known]
    if unknown:
        named = ", ".join(f"{key!r} (did you mean {nearest(key, known, 1)[0]!r}?)" for key in unknown)
        raise ConfigError(f"{where}: unknown key {named}; known keys: {', '.join(known)}")


def whole(field: str, value: Any, least: int) -> int:
    """A whole number, a numpy one too, of at least `least`."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < least:
        raise refusal(field, value, f"a whole number of at least {least}")
    return int(value)


def number(field: str, value: Any, low: float = -math.inf, high: float = math.inf, wanted: str = "") -> float:
    """A finite number with low <= value < high."""
    try:
        result = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError):
        result = math.nan
    if not math.isfinite(result) or not low <= result < high:
        raise refusal(field, value, wanted or "a finite number")
    return result


def choice(field: str, value: Any, allowed: Sequence[str]) -> str:
    """One of the allowed names."""
    if not isinstance(value, str) or value not in allowed:
        hint = f" (did you mean {nearest(value, allowed, 1)[0]!r}?)" if isinstance(value, str) else ""
        raise refusal(field, value, f"one of {', '.join(map(repr, allowed))}{hint}")
    return value
