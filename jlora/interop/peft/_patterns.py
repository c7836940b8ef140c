"""Patterns of ranks and alphas, from files that nobody vouches for: matched as PEFT does, in bounded time."""

import math
import re
import warnings
from typing import Any

from jlora.errors import DataError, shortened

_MOST_STEPS = 10**8


class Pattern:
    """One pattern, which is matched with the whole name of a module or with its end after a dot.

    Raises:
      DataError: no regular expression, or one that repeats what itself can be matched in several ways.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        wrapped = rf"(.*\.)?({text})$"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a later Python may read otherwise
            try:
                self.compiled = re.compile(wrapped)
            except (re.error, OverflowError, RecursionError) as error:
                raise DataError(
                    f"a pattern of ranks or alphas is no regular expression: {shortened(text)}: {error}"
                ) from None
        self.repeats, self.choices = _measured(wrapped, text)

    def matches(self, module: str) -> bool:
        """Whether the pattern matches; a DataError where finding out can take forever."""
        if math.comb(len(module) + self.repeats, self.repeats) * self.choices > _MOST_STEPS:
            raise _too_slow(self.text)
        return self.compiled.match(module) is not None


def compiled(patterns: Any) -> list[tuple[Pattern, Any]]:
    """The patterns of a mapping, with its values, in its order."""
    return [(Pattern(text), value) for text, value in (patterns or {}).items()]


def _measured(wrapped: str, text: str) -> tuple[int, int]:
    """How many repetitions there are, and how many ways through what is optional or a choice."""
    repeats, choices, position = 0, 1, 0
    inside = [False]  # for each open group, whether it can match in several ways
    while position < len(wrapped):
        char = wrapped[position]
        if char == "\\":
            position += 1
        elif char == "[":
            position = _end_of_set(wrapped, position)
        elif char == "(":
            inside.append(False)
            position += wrapped[position + 1] == "?"
        elif char == ")":
            several = inside.pop()
            if several and wrapped[position + 1 : position + 2] in ("*", "+", "{"):
                raise _too_slow(text)
            inside[-1] |= several
        elif char in "*+{?|":
            inside[-1] = True
            repeats += char in "*+{"
            choices *= 2 if char == "?" else 1
            choices += char == "|"
        position += 1
    return repeats, choices


def _end_of_set(wrapped: str, start: int) -> int:
    position = start + 1
    position += wrapped[position] == "^"
    position += wrapped[position] == "]"
    while wrapped[position] != "]":
        position += 2 if wrapped[position] == "\\" else 1
    return position


def _too_slow(text: str) -> DataError:
    return DataError(f"the pattern {shortened(text)} repeats a repetition or a choice, which can take forever to match")
