"""Programs of several processes (`jax.distributed`): one writes what all hold, and all learn what came of it."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jlora.errors import DataError

_MOST_BYTES = 2000


def is_global(array: Any) -> bool:
    """Whether an array is one of several processes, with a part of it, or a copy, in each."""
    return isinstance(array, jax.Array) and not array.is_fully_addressable


def unreachable(array: Any) -> str | None:
    """Why the numbers of an array are not at hand, None where they are: each process has to have all of them."""
    if not is_global(array) or (array.is_fully_replicated and array.addressable_shards):
        return None
    return (
        "found an array spread over several processes; gather it first, in all of them: "
        "jax.experimental.multihost_utils.process_allgather(adapters, tiled=True)"
    )


def write_once(arrays: Iterable[Any], write: Callable[[], None]) -> None:
    """Writes what holds these arrays: where they are of several processes, all of which call this, in the first alone.

    The others wait until it is written.

    Raises:
      DataError: in every process, where the first one could not write.
    """
    if not any(is_global(array) for array in arrays):
        write()
        return
    failure: BaseException | None = None
    if jax.process_index() == 0:
        try:
            write()
        except BaseException as error:  # the others are told of an interrupt too, so that they do not wait for ever
            failure = error
    told = _told("" if failure is None else f"{failure}" or type(failure).__name__)
    if failure is not None:
        raise failure
    if told:
        raise DataError(told)


def _told(message: str) -> str:
    """The message of the first process, in all."""
    from jax.experimental import multihost_utils

    text = message.encode("utf-8", "replace")[:_MOST_BYTES]
    sent = np.frombuffer(text.ljust(_MOST_BYTES, b"\0"), np.uint8)
    found = np.asarray(multihost_utils.broadcast_one_to_all(sent), np.uint8)
    return found.tobytes().rstrip(b"\0").decode("utf-8", "replace")
