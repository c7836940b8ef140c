"""Lines of JSON, each an example for training: what they say, and what is wrong with those that say something else."""

import codecs
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jlora.disk import open_to_read, parse_json, reason
from jlora.errors import DataError, raise_all, shortened
from jlora.text._template import Conversation

MOST_LINE, MOST_PROBLEMS = 16 << 20, 1000

KINDS = ({"prompt", "completion"}, {"messages"}, {"text"})
WANTED = 'wanted {"prompt": ..., "completion": ...}, {"messages": [...]} or {"text": ...}'


class Problems:
    """What is wrong with the lines of a file, up to a bound."""

    def __init__(self, path: str | Path) -> None:
        self._path = str(path)
        self._found: list[tuple[int, object]] = []

    def add(self, line: int, problem: object) -> None:
        """Keeps a problem of a line, and raises all when there are too many."""
        self._found.append((line, problem))
        if len(self._found) == MOST_PROBLEMS:
            self.raise_all()

    def raise_all(self) -> None:
        """Raises a DataError with all of them, if there are any."""
        found = sorted(self._found, key=lambda problem: problem[0])
        raise_all((f"line {line:,}: {problem}" for line, problem in found), DataError, self._path)


def read_lines(path: str | Path, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects in the lines of a file, with the numbers of the lines; blank lines are passed over.

    Raises:
      DataError: the file cannot be read, or is one JSON array.
    """
    for number, line in _raw_lines(path):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
            _check_beginning(path, line)
        if len(line) > MOST_LINE:
            raise DataError(f"{path}: line {number:,}: longer than {MOST_LINE:,} bytes")
        if not line.strip():
            continue
        try:
            yield number, parse_json(line)
        except ValueError as error:
            problems.add(number, f"not valid JSON: {error}: {shortened(line[:200].decode(errors='replace'), 60)}")


def _raw_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    with os.fdopen(open_to_read(path), "rb") as file:
        number = 0
        while True:
            try:
                line = file.readline(MOST_LINE + 2)
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {reason(error)}") from None
            if not line:
                return
            number += 1
            yield number, line.rstrip(b"\r\n")


def _check_beginning(path: str | Path, line: bytes) -> None:
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}: in UTF-16; save it as UTF-8")
    if line.lstrip().startswith(b"["):
        raise DataError(f"{path}: one JSON array; wanted one object a line: jq -c '.[]' FILE > LINES")


class Plain(NamedTuple):
    """A text, and the character from which on it counts."""

    text: str
    begin: int


class Chat(NamedTuple):
    """A conversation, and the message from which on the assistant's count."""

    conversation: Conversation
    begin: int


def parse_example(row: Mapping[str, Any], template: bool) -> Plain | Chat:
    """What a line says; with `template`, strings are what a user says and the assistant answers.

    Raises:
      DataError: none of these, or of the wrong kind.
    """
    given = [kind for kind in KINDS if kind & row.keys()]
    if len(given) != 1 or not given[0] <= row.keys():
        raise DataError(f"{WANTED}, found the keys {shortened(sorted(row))}")
    if "text" in row:
        if not isinstance(row["text"], str):
            raise DataError(f"text: wanted a string, found {shortened(row['text'], 60)}")
        return Plain(row["text"], 0)
    if "messages" in row:
        return Chat(Conversation(messages_of("messages", row["messages"]), variables_of(row)), 0)
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not template:
            return Plain(prompt + completion, len(prompt))
        prompt = [{"role": "user", "content": prompt}]
        completion = [{"role": "assistant", "content": completion}]
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        found = f"{type(prompt).__name__} and {type(completion).__name__}"
        raise DataError(f"prompt and completion: wanted two strings or two lists of messages, found {found}")
    before, after = messages_of("prompt", prompt), messages_of("completion", completion)
    return Chat(Conversation([*before, *after], variables_of(row)), len(before))


def messages_of(key: str, value: Any) -> list[dict[str, Any]]:
    """The messages that a line has under a key, checked."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{key}: wanted a list of messages, found {shortened(value, 60)}")
    for number, message in enumerate(value, 1):
        where = f"{key}: message {number:,}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f'{where}: wanted {{"role": ..., "content": ...}}, found {shortened(message, 60)}')
        content = message.get("content")
        if not isinstance(content, str | list) and not message.get("tool_calls"):
            raise DataError(f"{where}: content: wanted a string, found {shortened(content, 60)}")
    return value


def variables_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a line tells the template beside its messages."""
    found: dict[str, Any] = {}
    for key in ("tools", "documents"):
        value = row.get(key)
        if value is not None:
            if not isinstance(value, list):
                raise DataError(f"{key}: wanted a list, found {shortened(value, 60)}")
            found[key] = value
    more = row.get("chat_template_kwargs")
    if more is not None and not isinstance(more, dict):
        raise DataError(f"chat_template_kwargs: wanted an object, found {shortened(more, 60)}")
    return found | (more or {})
