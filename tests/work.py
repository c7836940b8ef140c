"""How much a call does, counted and not timed."""

import re
import sys
from collections.abc import Callable
from typing import Any

import jax

_COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: _COMPILED.append(event))


def calls(fn: Callable[[], Any]) -> int:
    """How many functions are called while `fn` is, those in C too."""
    count = 0

    def counted(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    re.purge()  # a cache that would hold some of the patterns
    sys.setprofile(counted)
    try:
        fn()
    finally:
        sys.setprofile(None)
    return count


def compilations(fn: Callable[[], Any]) -> int:
    """How many programs XLA compiles, or reads from a cache of those compiled, while `fn` is called."""
    _COMPILED.clear()
    fn()
    return _COMPILED.count("/jax/core/compile/backend_compile_duration")


def assert_linear(make: Callable[[int], Callable[[], Any]], size: int = 150, most: float = 1000.0) -> None:
    """The work for twice and four times the size is twice and four times as much at most, and no more than `most` each.

    `make` prepares the call for a size; the preparation is not counted.
    """
    make(4 * size)()  # fills the caches
    first, second, third = (calls(make(size * times)) for times in (1, 2, 4))
    assert second <= 2.2 * first, (first, second, third)
    assert third <= 4.4 * first, (first, second, third)
    assert third <= 4 * size * most, (first, second, third)
