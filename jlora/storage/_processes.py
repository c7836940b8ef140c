"""Programs of several processes (`jax.distributed`): one writes what all hold, and all learn what came of it."""

import json
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import numpy as np

from jlora.arrays import is_jax_array
from jlora.disk import is_dry_run
from jlora.errors import DataError

_MOST_CHARACTERS = 1000
_MOST_BYTES = 12 * _MOST_CHARACTERS + 1000  # JSON writes a character in twelve bytes at most

Plain = TypeVar("Plain")


def is_global(array: Any) -> bool:
    """Whether an array is one of several processes, with a part of it, or a copy, in each."""
    return is_jax_array(array) and not array.is_fully_addressable


def unreachable(array: Any) -> str | None:
    """Why the numbers of an array are not at hand, None where they are: each process has to have all of them."""
    if not is_global(array) or (array.is_fully_replicated and array.addressable_shards):
        return None
    return (
        "found an array spread over several processes; gather it first, in all of them: "
        "jax.experimental.multihost_utils.process_allgather(adapters, tiled=True)"
    )


def write_once(arrays: Iterable[Any], write: Callable[[], None], check: Callable[[], None]) -> None:
    """Writes what holds these arrays: where they are of several processes, all of which call this, in the first alone.

    The others wait until it is written. In a dry run `check` stands for `write`: it refuses what that would refuse.

    Raises:
      DataError: in every process, where the first one could not write.
    """
    work = check if is_dry_run() else write
    if any(is_global(array) for array in arrays):
        in_first(work)
    else:
        work()


def in_first(work: Callable[[], Plain]) -> Plain:
    """Does something in the first of all processes, all of which call this; the others wait, and fail where it fails.

    Returns:
      What `work` returned in the first process, plain data, in every one.

    Raises:
      DataError: in the others, with what the first one raised.
    """
    import jax  # which all programs of several processes have imported

    if jax.process_count() == 1:
        return work()
    failure: BaseException | None = None
    result: Any = None
    if jax.process_index() == 0:
        try:
            result = work()
        except BaseException as error:  # the others are told of an interrupt too, so that they do not wait for ever
            failure = error
    problem = "" if failure is None else f"{failure}" or type(failure).__name__
    problem, result = _told([problem[:_MOST_CHARACTERS], result])
    if failure is not None:
        raise failure
    if problem:
        raise DataError(problem)
    return cast(Plain, result)


def _told(found: list[Any]) -> list[Any]:
    """What the first process has found, in all."""
    from jax.experimental import multihost_utils

    sent = np.frombuffer(json.dumps(found).encode("ascii").ljust(_MOST_BYTES), np.uint8)
    return list(json.loads(np.asarray(multihost_utils.broadcast_one_to_all(sent), np.uint8).tobytes()))
