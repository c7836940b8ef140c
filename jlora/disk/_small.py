"""Small text files, read whole: TOML, JSON, and lines of JSON, from people and from files that nobody vouches for.

All that is read goes through here: a regular file of bounded size, UTF-8, and a bounded nesting, which is counted
before a parser recurses. A key that stands twice is an error, half of a surrogate pair too. What the values are is
checked by those who use them.
"""

import codecs
import itertools
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from jlora.disk._formats import START, format_of
from jlora.disk._open import read_bytes
from jlora.errors import DataError, shortened

MOST_BYTES = 100 << 20
MOST_LEVELS = 100
_MOST_PARTS, _MOST_WORD = 20, 1000  # of a dotted key; the time to read one grows with the square of both

_OPENING, _CLOSING = b"[{", b"]}"
_UNMARKED = bytes(code for code in range(256) if code not in b'[]{}"')
# Nothing is tried twice, and every opening quote opens something, be it without an end.
_TOML_TEXT = re.compile(
    r'"""(?:[^"\\]++|\\.|"(?!""))*+(?:""")?'
    r"|'''(?:[^']++|'(?!''))*+(?:''')?"
    r'|"(?:[^"\\\n]++|\\.)*+"?'
    r"|'[^'\n]*+'?|#[^\n]*+",
    re.S,
)
_TOML_WORD, _TOML_END = re.compile(rf"[0-9A-Za-z_\-]{{{_MOST_WORD},}}"), re.compile(r"[=,\n\[\]{}]")


def read_json(path: str | Path, most: int = MOST_BYTES) -> dict[str, Any]:
    """The object that a JSON file of at most `most` bytes holds.

    Raises:
      DataError: no such file, a larger one, not JSON, nested too deeply, a key that stands twice, no object.
    """
    text = read_bytes(path, most)
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None


def read_json_lines(path: str | Path, most: int = MOST_BYTES) -> list[dict[str, Any]]:
    """The objects in the lines of a file; a last line without an end, which a killed run left, is no error.

    Raises:
      DataError: as `read_json`, with the number of the line.
    """
    *lines, last = read_bytes(path, most).split(b"\n")
    rows = []
    for number, line in enumerate([*lines, last], 1):
        if not line.strip():
            continue
        try:
            rows.append(parse_json(line, constants=True))
        except ValueError as error:
            if number <= len(lines):
                raise DataError(f"{path}: line {number}: not valid JSON: {error}") from None
    return rows


def parse_json(text: bytes, *, constants: bool = False) -> dict[str, Any]:
    """The object in a JSON text in UTF-8; a ValueError where it is none, or a key stands twice.

    With `constants` it may say NaN and Infinity.
    """
    data = parse_json_value(text, constants=constants)
    if not isinstance(data, dict):
        raise ValueError(f"wanted an object, found {type(data).__name__}")
    return data


def parse_json_value(text: bytes, *, constants: bool = False, levels: int = MOST_LEVELS) -> Any:
    """What a JSON text says, which may be any value."""
    if text.startswith(codecs.BOM_UTF8):
        raise ValueError("it begins with a byte order mark: save it as UTF-8 without one")
    if what := format_of(text[:START]):
        raise ValueError(what)
    try:
        plain = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{error}; save it as UTF-8") from None
    _check_nesting(re.sub(rb'"[^"]*"?', b"", re.sub(rb"\\.", b"", text, flags=re.S).translate(None, _UNMARKED)), levels)
    try:
        data = json.loads(plain, object_pairs_hook=_unique, parse_constant=None if constants else _no_constant)
    except RecursionError:  # of a caller that is deep in the stack itself
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error}{_way_out(plain, error.pos)}") from None
    if "\\u" in plain:
        _check_pairs(data)
    return data


def parse_toml(text: bytes) -> dict[str, Any]:
    """The table of a TOML text in UTF-8; a ValueError where it is none."""
    plain = text.decode("utf-8")
    unquoted = _TOML_TEXT.sub('"', plain)
    _check_nesting(unquoted.encode().translate(None, _UNMARKED).replace(b'"', b""), MOST_LEVELS)
    if word := _TOML_WORD.search(unquoted):
        raise ValueError(f"a word or a number of more than {_MOST_WORD:,} characters: {shortened(word[0], 20)}")
    if any(piece.count(".") >= _MOST_PARTS for piece in _TOML_END.split(unquoted)):
        raise ValueError(f"a dotted key of more than {_MOST_PARTS} parts")
    try:
        return tomllib.loads(plain)
    except RecursionError:
        raise ValueError("nested too deeply") from None


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


def _way_out(text: str, at: int) -> str:
    """What to do where a text stops being JSON, for what people write."""
    if not text.strip():
        return "; the file is empty"
    if text[at:].lstrip().startswith(("//", "/*", "#")):
        return "; JSON has no comments: take them out"
    comma = text.rfind(",", 0, at + 1)  # Python 3.13 stops there, those before it at the bracket
    if comma >= 0 and text[comma + 1 :].lstrip().startswith(("}", "]")):
        return "; JSON has no comma behind the last item: take it out"
    return ""


def _check_nesting(brackets: bytes, most: int) -> None:
    """Raises a ValueError where brackets are open within more than `most` others."""
    if len(brackets) <= most:  # as of nearly every line of a long file
        return
    codes = np.frombuffer(brackets, np.uint8)
    steps = np.where(np.isin(codes, list(_OPENING)), 1, -1)
    if steps.cumsum().max(initial=0) > most:
        raise ValueError(f"nested too deeply: more than {most} levels")


def _check_pairs(data: Any) -> None:
    try:
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair in a string") from None


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(items)
    if len(data) < len(items):
        keys = sorted(key for key, _ in items)
        twice = next(key for key, following in itertools.pairwise(keys) if key == following)
        raise ValueError(f"key {shortened(twice)} stands twice")
    return data


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
