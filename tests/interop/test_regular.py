"""The matcher of patterns against Python's, where that ends; and in bounded time where it does not."""

import re
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest

from jlora.interop.peft._regular import Automaton, Budget

ATOMS = [
    "a",
    "b",
    ".",
    r"\.",
    r"\d",
    r"[ab]",
    r"[^b.]",
    r"[]a]",
    r"\w",
    r"\n",
    r"\x61",
    r"\b",
    "^",
    "$",
    r"\Z",
    "{",
    "é",
]

REPEATS = ["*", "+", "?", "*?", "{2}", "{,2}", "{1,}", "{1,2}", "(?#)*", "{}"]


def budget(steps: int = 10**6) -> Budget:
    return Budget(steps, lambda: TimeoutError("too many steps"))


def grouped(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    group = st.sampled_from(["({})", "(?:{})", "(?=a{})", "(?!{}b)", "(?#c){}", "(?P<n>{})"])
    return (
        st.tuples(group, inner).map(lambda pair: pair[0].format(pair[1]))
        | st.tuples(inner, st.sampled_from(REPEATS)).map("".join)
        | st.lists(inner, min_size=2, max_size=3).map("".join)
        | st.lists(inner, min_size=2, max_size=2).map("|".join)
    )


PATTERNS = st.recursive(st.sampled_from(ATOMS), grouped, max_leaves=6)


@hypothesis.settings(max_examples=600, deadline=None)
@hypothesis.given(PATTERNS, st.lists(st.text("ab.1\né", max_size=6), min_size=4, max_size=4))
def test_as_python_matches(pattern, texts):
    wrapped = rf"(.*\.)?({pattern})$"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wanted = re.compile(wrapped)
            automaton = Automaton(wrapped)
        except (re.error, ValueError):
            hypothesis.assume(False)
        for text in texts:
            assert automaton.matches(text, budget()) == (wanted.match(text) is not None), text


@pytest.mark.parametrize(
    "pattern", ["(a|a)*b", "(a|a*)*b", "(a|a)(?#)*b", "(a+)+b", r"(\w+\s?)*b", "(a?){60}b", "(x|a*)+b", ".*" * 9 + "b"]
)
def test_patterns_with_many_ways_through(pattern):
    automaton, steps = Automaton(pattern + "$"), budget(200_000)
    assert automaton.matches("a" * 60 + "b", steps)
    assert not automaton.matches("a" * 60, steps)
    assert not automaton.matches("a" * 60 + "c", steps)


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        (r"(a)\1", "a reference to a group"),
        ("(?P<x>a)(?P=x)", "a reference to a group"),
        ("(a)?(?(1)b|c)", "a condition"),
        ("(?>a*)b", "an atomic group"),
        ("a*+b", "a possessive repetition"),
        ("(?<=a)b", "look-behind"),
        ("(?<!a)b", "look-behind"),
        ("(?x:(a|a) *)b", "flags"),
        ("(?i)a", "flags"),
        ("(?i:a)", "flags"),
        ("((a{100}){100}){100}", "more than 5,000 states"),
        ("(a{0,4000}){0,4000}", "more than 5,000 states"),
        ("((){9999}){9999}", "more than 5,000 states"),
        ("(" * 60 + "a" + ")" * 60, "groups nested too deeply"),
    ],
)
def test_what_is_refused(pattern, what):
    with pytest.raises(ValueError, match=f"^{what}$"):
        Automaton(pattern)


def test_a_budget():
    automaton = Automaton("(a|b)*c")
    steps = budget(100)
    assert not automaton.matches("a" * 20, steps)
    with pytest.raises(TimeoutError, match="too many steps"):
        automaton.matches("a" * 1000, steps)


def test_states_are_not_kept_without_end():
    """(a|b)*a(a|b){12} has thousands of sets of states."""
    automaton = Automaton("(a|b)*a" + "(a|b)" * 12 + "$")
    text = "".join("ab"[(i * i + i // 7) % 2] for i in range(20_000))
    assert automaton.matches(text, budget(10**7)) == (text[-13] == "a")
    assert sum(len(found) if isinstance(found, frozenset) else 1 for found in automaton._cache.values()) <= 200_000
