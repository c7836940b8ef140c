"""Regular expressions in bounded time: Python's syntax, all ways through a pattern followed at once.

A backtracking matcher, as Python's, tries the ways one after the other, of which there can be exponentially many. Here
a pattern is an automaton, whose states are followed side by side, one character after the other (Thompson 1968). What
single characters match is asked of Python itself. References to groups, atomic groups, look-behind and flags are
refused.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

_MOST_STATES, _MOST_HELD = 5000, 200_000
_REPEAT = re.compile(r"\{(?!\})(\d*)(?:(,)(\d*))?\}")
_ESCAPE = re.compile(r"\\(?:x..|u.{4}|U.{8}|N\{[^}]*\}|0[0-7]{0,2}|.)", re.S)
_PLACES = {"\\A": "start", "\\Z": "end", "\\b": "boundary", "\\B": "no boundary"}
_REFUSED = {
    "P=": "a reference to a group",
    "(": "a condition",
    ">": "an atomic group",
    "<=": "look-behind",
    "<!": "look-behind",
}
_WORD = re.compile(r"\w")

# ("char", source), ("all", nodes), ("any", nodes), ("repeat", node, least, most), ("at", place), ("look", wanted, node)
Node = Any
States = frozenset[int]


class Budget:
    """Steps that may be taken in all."""

    def __init__(self, steps: int, exceeded: Callable[[], Exception]) -> None:
        self._left, self._exceeded = steps, exceeded

    def spend(self, steps: int) -> None:
        """Takes steps; an error where there are no more."""
        self._left -= steps
        if self._left < 0:
            raise self._exceeded()


class _State(NamedTuple):
    """A state: what it leads to, behind a character that passes the `test`, or else where `place` and `look` permit."""

    test: re.Pattern[str] | None = None
    nexts: tuple[int, ...] = ()
    place: str = ""
    look: tuple[bool, int] | None = None


class Automaton:
    """A pattern, ready to be matched.

    Raises:
      ValueError: what is no pattern of Python's, has too many states, or refers to what was matched.

    >>> automaton = Automaton(r"(a|a)*b")
    >>> budget = Budget(10**6, ValueError)
    >>> automaton.matches("a" * 1000 + "b", budget), automaton.matches("a" * 1000, budget)
    (True, False)
    """

    def __init__(self, pattern: str) -> None:
        self._states: list[_State] = [_State()]  # 0 accepts
        self._cache: dict[tuple[States, int, str], States | bool] = {}
        self._held = 0
        self.has_looks = self.has_boundaries = False
        self._start = self._built(parsed(pattern), 0)

    def matches(self, text: str, budget: Budget) -> bool:
        """Whether the pattern matches the beginning of a text, as `re.match` does."""
        return self._matches(self._start, text, 0, budget)

    def _matches(self, start: int, text: str, position: int, budget: Budget) -> bool:
        current: States | bool = frozenset((start,))
        while True:
            budget.spend(1)
            char = text[position : position + 1]
            key = (current, self._where(text, position), char)
            found = self._cache.get(key)  # type: ignore[arg-type]
            if found is None:
                found = self._followed(current, text, position, budget)  # type: ignore[arg-type]
                if not self.has_looks:
                    self._keep(key, found)
            if isinstance(found, bool):
                return found
            current, position = found, position + 1

    def _where(self, text: str, position: int) -> int:
        """What the places that the pattern asks for depend on."""
        left = len(text) - position
        where = (position == 0) + 2 * (left == 0) + 4 * (left == 1 and text[-1] == "\n")
        if self.has_boundaries:
            where += 8 * _is_word(text, position - 1) + 16 * _is_word(text, position)
        return where

    def _keep(self, key: Any, found: States | bool) -> None:
        self._held += 1 if isinstance(found, bool) else len(found)
        if self._held > _MOST_HELD:
            self._cache.clear()
            self._held = 0
        self._cache[key] = found

    def _followed(self, current: States, text: str, position: int, budget: Budget) -> States | bool:
        """The states after the next character; True where the pattern has matched, False where it cannot any more."""
        left, seen, following = list(current), set(current), set()
        char = text[position : position + 1]
        while left:
            budget.spend(1)
            number = left.pop()
            if number == 0:
                return True
            state = self._states[number]
            if state.test is not None:
                if char and state.test.fullmatch(char):
                    following.add(state.nexts[0])
            elif self._is_open(state, text, position, budget):
                left += [other for other in state.nexts if other not in seen]
                seen.update(state.nexts)
        return frozenset(following) if following else False

    def _is_open(self, state: _State, text: str, position: int, budget: Budget) -> bool:
        if state.look is not None:
            wanted, start = state.look
            return self._matches(start, text, position, budget) == wanted
        return not state.place or _is_at(state.place, text, position)

    def _built(self, node: Node, then: int) -> int:
        """The number of the state from which a node leads to the state `then`."""
        kind, *rest = node
        if kind == "char":
            return self._new(_State(test=re.compile(rest[0]), nexts=(then,)))
        if kind == "all":
            for inner in reversed(rest[0]):
                then = self._built(inner, then)
            return then
        if kind == "any":
            return self._new(_State(nexts=tuple(self._built(inner, then) for inner in rest[0])))
        if kind == "at":
            self.has_boundaries |= rest[0].endswith("boundary")
            return self._new(_State(nexts=(then,), place=rest[0]))
        if kind == "look":
            self.has_looks = True
            return self._new(_State(nexts=(then,), look=(rest[0], self._built(rest[1], 0))))
        inner, least, most = rest
        return self._repeated(inner, least, most, then)

    def _repeated(self, node: Node, least: int, most: int | None, then: int) -> int:
        if most is None:
            loop = self._new(_State())
            self._states[loop] = _State(nexts=(self._built(node, loop), then))
            end = loop
        else:
            end = then
            for _ in range(min(most - least, _MOST_STATES + 1)):
                end = self._new(_State(nexts=(self._built(node, end), then)))
        for _ in range(min(least, _MOST_STATES + 1)):
            end = self._built(node, end)
            self._new(_State())  # so that empty nodes count too
        return end

    def _new(self, state: _State) -> int:
        if len(self._states) > _MOST_STATES:
            raise ValueError(f"more than {_MOST_STATES:,} states")
        self._states.append(state)
        return len(self._states) - 1


def parsed(pattern: str) -> Node:
    """The tree of a pattern, which `re.compile` takes."""
    re.compile(pattern)
    node, position = _alternatives(pattern, 0, 0)
    assert position == len(pattern)
    return node


def _alternatives(pattern: str, position: int, depth: int) -> tuple[Node, int]:
    """What stands until the end of the group."""
    if depth > 50:
        raise ValueError("groups nested too deeply")
    choices: list[list[Node]] = [[]]
    while position < len(pattern) and pattern[position] != ")":
        counts, after = _repeat(pattern, position)
        if pattern[position] == "|":
            choices.append([])
            position += 1
        elif pattern.startswith("(?#", position):
            position = pattern.index(")", position) + 1
        elif counts is not None:  # of what stands before it, a comment between them or not
            choices[-1].append(("repeat", choices[-1].pop(), *counts))
            position = after
        else:
            node, position = _item(pattern, position, depth)
            choices[-1].append(node)
    sequences = [("all", nodes) for nodes in choices]
    return (sequences[0] if len(sequences) == 1 else ("any", sequences)), position


def _item(pattern: str, position: int, depth: int) -> tuple[Node, int]:
    char = pattern[position]
    if char == "(":
        return _group(pattern, position + 1, depth)
    if char == "[":
        end = _end_of_set(pattern, position) + 1
        return ("char", pattern[position:end]), end
    if char in "^$":
        return ("at", "start" if char == "^" else "end of line"), position + 1
    if char == "\\":
        match = _ESCAPE.match(pattern, position)
        assert match is not None
        if match[0] in _PLACES:
            return ("at", _PLACES[match[0]]), match.end()
        if match[0][1] in "123456789":
            raise ValueError("a reference to a group")
        return ("char", match[0]), match.end()
    return ("char", "." if char == "." else re.escape(char)), position + 1


def _group(pattern: str, position: int, depth: int) -> tuple[Node, int]:
    wanted = None
    if pattern[position] == "?":
        position += 1
        if what := next((name for start, name in _REFUSED.items() if pattern.startswith(start, position)), None):
            raise ValueError(what)
        if pattern[position] in "=!":
            wanted = pattern[position] == "="
            position += 1
        elif pattern[position] == ":":
            position += 1
        elif pattern.startswith("P<", position):
            position = pattern.index(">", position) + 1
        else:
            raise ValueError("flags")
    node, position = _alternatives(pattern, position, depth + 1)
    return (node if wanted is None else ("look", wanted, node)), position + 1


def _repeat(pattern: str, position: int) -> tuple[tuple[int, int | None] | None, int]:
    """The least and the most that a repetition at this place says, None where there is none, and where it ends."""
    counts = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(pattern[position : position + 1])
    if counts is not None:
        position += 1
    elif match := _REPEAT.match(pattern, position):
        least, comma, most = match.groups()
        counts = int(least or 0), (int(most) if most else None) if comma else int(least)
        position = match.end()
    else:
        return None, position
    if pattern[position : position + 1] == "+":
        raise ValueError("a possessive repetition")
    return counts, position + (pattern[position : position + 1] == "?")


def _end_of_set(pattern: str, start: int) -> int:
    position = start + 1
    position += pattern[position] == "^"
    position += pattern[position] == "]"
    while pattern[position] != "]":
        position += 2 if pattern[position] == "\\" else 1
    return position


def _is_at(place: str, text: str, position: int) -> bool:
    if place == "start":
        return position == 0
    if place == "end":
        return position == len(text)
    if place == "end of line":
        return position == len(text) or (position == len(text) - 1 and text[-1] == "\n")
    return (_is_word(text, position - 1) != _is_word(text, position)) == (place == "boundary")


def _is_word(text: str, position: int) -> bool:
    return 0 <= position < len(text) and _WORD.match(text[position]) is not None
