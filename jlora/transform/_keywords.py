"""Keywords of jlora's own, beside the arguments of the function that they stand with."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from jlora.errors import ConfigError


def check_keywords(taker: str, fn: Callable[..., Any], own: Sequence[str], given: int, way_out: str) -> None:
    """Raises a ConfigError where `fn` has an argument that a keyword of jlora's own would keep from it.

    Args:
      taker: the function of jlora's that takes the keywords.
      fn: the function whose arguments are handed on.
      own: the keywords.
      given: how many arguments `fn` is given by position: those are its own.
      way_out: what to do; `{name}` is the keyword.
    """
    taken = _arguments(fn, given).intersection(own)
    if taken:
        name = min(taken)
        raise ConfigError(
            f"{name_of(fn)} has an argument {name!r}, which it would never get: {taker} takes the keyword {name!r} "
            f"itself; {way_out.format(name=name)}"
        )


def name_of(fn: Callable[..., Any]) -> str:
    """What a function is called, or its class."""
    return getattr(fn, "__name__", type(fn).__name__)


def _arguments(fn: Callable[..., Any], given: int) -> set[str]:
    """The names by which arguments of `fn` can be given that are not yet; none where its signature cannot be read."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        return set()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    placed = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    bound = fn.keywords if isinstance(fn, functools.partial) else ()
    return named.difference(placed[:given], bound)
