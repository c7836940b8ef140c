"""Patterns of ranks and alphas, from files that nobody vouches for: matched as PEFT does, in bounded time."""

import re
import warnings
from collections.abc import Mapping
from typing import Any

from jlora.errors import DataError, shortened
from jlora.interop.peft._regular import Automaton, Budget, parsed

MOST_STEPS = 20_000_000
_MOST_CHARACTERS = 2000  # of a pattern, and of a module's name


class Patterns:
    """Patterns with values, of which the first that matches a module counts.

    A pattern is matched with the whole name of a module, or with its end after a dot: as `(.*\\.)?(pattern)$`.

    Raises:
      DataError: a pattern that is none, that is too long, or that refers to what it matched.
    """

    def __init__(self, values: Mapping[str, Any] | None, budget: Budget) -> None:
        self._budget, self._found = budget, dict[str, Any]()
        self._patterns = [_Pattern(text) for text in values or {}]
        self._values = list((values or {}).values())
        self._whole: dict[str, int] = {}  # plain names, which many files give one for each module
        self._ends: dict[str, int] = {}
        self._others = []
        for position, pattern in enumerate(self._patterns):
            if pattern.name is None:
                self._others.append(position)
            else:
                (self._whole if pattern.is_whole else self._ends).setdefault(pattern.name, position)

    def value_of(self, module: str, default: Any) -> Any:
        """The value for a module; a DataError where finding it takes too many steps."""
        if not self._patterns:
            return default
        if module not in self._found:
            position = self._first(module)
            self._found[module] = default if position is None else self._values[position]
        return self._found[module]

    def _first(self, module: str) -> int | None:
        if len(module) > _MOST_CHARACTERS:
            raise DataError(f"a module's name of more than {_MOST_CHARACTERS:,} characters: {shortened(module)}")
        if "\n" in module:  # at which a pattern may end, and which a dot does not match
            every = range(len(self._patterns))
            return next((p for p in every if self._patterns[p].matches(module, self._budget, plainly=False)), None)
        ends = [0, *(match.end() for match in re.finditer(r"\.", module))]
        named = [self._whole.get(module), *(self._ends.get(module[end:]) for end in ends)]
        best = min((position for position in named if position is not None), default=None)
        among = (position for position in self._others if best is None or position < best)
        return next((p for p in among if self._patterns[p].matches(module, self._budget)), best)


class _Pattern:
    """One pattern: a plain name, characters of a fixed number, or an automaton."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._made: Automaton | None = None
        self._wrapped = rf"(.*\.)?({text})$"
        if len(text) > _MOST_CHARACTERS:
            raise DataError(f"a pattern of more than {_MOST_CHARACTERS:,} characters: {shortened(text)}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a later Python may read otherwise
            try:
                tree = parsed(self._wrapped)
            except (re.error, OverflowError, RecursionError) as error:
                raise DataError(
                    f"a pattern of ranks or alphas is no regular expression: {shortened(text)}: {error}"
                ) from None
            except ValueError as error:
                raise self._refused(error) from None
            self._read(tree)
            if self._fixed is None:
                self._automaton()  # whose errors come now

    def matches(self, module: str, budget: Budget, *, plainly: bool = True) -> bool:
        """Whether the pattern matches; `plainly` for a name in one line."""
        if not plainly or self._fixed is None:
            return self._automaton().matches(module, budget)
        budget.spend(1)
        start = len(module) - self._width
        if start < 0 or (start and (self.is_whole or module[start - 1] != ".")):
            return False
        return self._fixed.match(module, start) is not None

    def _read(self, tree: Any) -> None:
        """Finds out whether the pattern is a name or of a fixed number of characters, perhaps behind a ^."""
        self.name: str | None = None
        self.is_whole, self._fixed, self._width = False, None, 0
        nodes = tree[1] if tree[0] == "all" and len(tree[1]) == 3 and tree[1][1][0] == "all" else None
        inner = nodes[1][1] if nodes is not None else [("at", "")]
        self.is_whole = inner[:1] == [("at", "start")]
        inner = inner[self.is_whole :]
        if not all(node[0] == "char" for node in inner):
            return
        sources = [source for _, source in inner]
        plain = [_plain(source) for source in sources]
        if None not in plain:
            self.name = "".join(plain)  # type: ignore[arg-type]
        self._fixed, self._width = re.compile("".join(sources)), len(sources)

    def _automaton(self) -> Automaton:
        if self._made is None:
            try:
                self._made = Automaton(self._wrapped)
            except ValueError as error:
                raise self._refused(error) from None
        return self._made

    def _refused(self, error: Exception) -> DataError:
        return DataError(
            f"the pattern {shortened(self.text)} has {error}, which jlora does not match; write it in another way"
        )


def _plain(source: str) -> str | None:
    """The character that a source of one character stands for, None where it stands for several."""
    if len(source) == 1:
        return None if source == "." else source
    return source[1] if len(source) == 2 and source[0] == "\\" and not source[1].isalnum() else None


def budget_of_patterns() -> Budget:
    """The steps that the patterns of one file may take in all."""
    return Budget(
        MOST_STEPS, lambda: DataError(f"its patterns of ranks and alphas take more than {MOST_STEPS:,} steps to match")
    )
