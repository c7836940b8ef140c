"""What a command did: a text for people, and fields for scripts."""

import argparse
import dataclasses
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DONE, DIFFERENT, REFUSED = 0, 1, 2

WIDTH = 110

EXIT_CODES = (
    "Exit codes: 0 done; 1 diff found differences, or verify something that is not right; 2 something in the call or "
    "its files is wrong, or a file could not be written, or an error was not foreseen, whose traceback is shown; 130 "
    "interrupted by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP."
)
_JSON = (
    'With --json standard output holds one object and nothing else: "command" and "exit_code"; "error", a sentence, '
    "where the code is 2 or above 128; else {fields}. What JSON has no number for (NaN, infinity) is null."
)


@dataclasses.dataclass(frozen=True)
class Done:
    """What a command prints, what it says with --json, its exit code, and what went wrong with a part of its work."""

    text: str
    fields: Mapping[str, Any]
    code: int = DONE
    errors: Sequence[str] = ()


class StoppedError(Exception):
    """A command was interrupted: how to go on, and the exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def add_output_options(parser: argparse.ArgumentParser, fields: str) -> None:
    """The options for scripts, which every command has; `fields` tells what its object holds."""
    paragraphs = [textwrap.fill(text, WIDTH) for text in (EXIT_CODES, _JSON.format(fields=fields))]
    parser.epilog = "\n\n".join([*([parser.epilog.rstrip()] if parser.epilog else []), *paragraphs])
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print one JSON object, for scripts")
    how.add_argument("--quiet", "-q", action="store_true", help="print nothing but errors")


def json_object(command: str | None, code: int, fields: Mapping[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps({"command": command, "exit_code": code, **plain_fields(fields)}, allow_nan=False)


def plain_fields(value: Any) -> Any:
    """Records, paths, tuples and numbers as what JSON has."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return plain_fields(fields)
    if isinstance(value, Mapping):
        return {str(key): plain_fields(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain_fields(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
