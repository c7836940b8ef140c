"""JSON from files that nobody vouches for."""

import itertools
import json
from pathlib import Path
from typing import Any

from jlora.disk._open import read_bytes
from jlora.errors import DataError

MOST_BYTES = 100 << 20


def read_json(path: str | Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      DataError: no such file, larger than 100 MiB, not JSON, a key that stands twice, no object.
    """
    text = read_bytes(path, MOST_BYTES)
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None


def parse_json(text: bytes) -> dict[str, Any]:
    """The object in a JSON text in UTF-8; a ValueError where it is none, or a key stands twice."""
    try:
        data = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair in a string") from None
    if not isinstance(data, dict):
        raise ValueError(f"wanted an object, found {type(data).__name__}")
    return data


def dump_json(data: Any, *, sort_keys: bool = True) -> bytes:
    """Readable JSON with sorted keys, as PEFT writes it, or with keys in the order of the data.

    Raises:
      DataError: what JSON cannot hold, such as NaN, an array, or half of a surrogate pair.
    """
    try:
        text = json.dumps(data, indent=2, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False)
        return (text + "\n").encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"cannot be written as JSON: {error}") from None


def shortened(value: Any, most: int = 100) -> str:
    """The repr of what a file holds, no longer than a message bears."""
    if isinstance(value, str):
        value = value[: most + 1]
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # too deep, or a number of too many digits
        return type(value).__name__
    return text if len(text) <= most else f"{text[:most]}..."


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(items)
    if len(data) < len(items):
        keys = sorted(key for key, _ in items)
        twice = next(key for key, following in itertools.pairwise(keys) if key == following)
        raise ValueError(f"key {shortened(twice)} stands twice")
    return data


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
