"""What the parts of a combination hold beside A and B: values, magnitudes and offsets of one weight."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jlora.arrays import is_floating, is_jax_array
from jlora.compose._factors import Factors, Held, common_dtype, rounded
from jlora.compose._tasks import Task


@dataclasses.dataclass(frozen=True)
class Member:
    """One part's entry of a weight: its number among the parts, what it holds, its share and its scaling."""

    part: int
    held: Held
    share: float
    scaling: float

    @property
    def scale(self) -> float:
        return self.share * self.scaling

    @property
    def factors(self) -> Factors:
        """Those of a member that is known to have them."""
        assert self.held.factors is not None
        return self.held.factors


def with_factors(members: Sequence[Member]) -> list[Member]:
    """Those that have A and B."""
    return [member for member in members if member.held.factors is not None]


def holders(members: Sequence[Member], name: str) -> list[tuple[Member, Any]]:
    """Those that hold this part beside A and B, each with its array."""
    return [(member, member.held.others[name]) for member in members if name in member.held.others]


def whole_problems(path: str, members: Sequence[Member], values: str, magnitudes: str) -> Iterator[str]:
    """What keeps the values, the magnitudes and the offsets from becoming one."""
    yield from _value_problems(path, members, values)
    yield from _magnitude_problems(path, members, magnitudes)
    offsets = holders(members, "offset")
    if len({tuple(array.shape) for _, array in offsets}) > 1:
        yield f"{path}: the offsets are of different weights: {_shapes(offsets)}"


def joined_value(path: str, members: Sequence[Member], how: str) -> Any | None:
    """The value that takes the weight's place, None where there is none."""
    found = holders(members, "value")
    if not found or how == "leave_out":
        return None
    if how == "mean" and not _agree(found):
        return _mean(path, found)
    return found[-1 if how == "last" else 0][1]


def joined_magnitude(path: str, members: Sequence[Member]) -> Any | None:
    """The magnitude, None where there is none."""
    found = holders(members, "magnitude")
    if not found:
        return None
    return found[0][1] if _agree(found) else _mean(path, found)


def joined_offset(
    path: str, members: Sequence[Member], task: Task, streams: Sequence[np.random.Generator]
) -> Any | None:
    """The scaled offsets as the deltas that they are, one vector each; None where there is none."""
    found = holders(members, "offset")
    if not found:
        return None
    shape = found[0][1].shape
    vectors = [member.scaling * np.asarray(array).astype(np.float64).reshape(1, 1, -1) for member, array in found]
    own = [stream for member, stream in zip(members, streams, strict=True) if "offset" in member.held.others]
    total = task.join(vectors, [member.share for member, _ in found], own)
    return _like(path, total.reshape(shape), [array for _, array in found])


def is_taken_whole(members: Sequence[Member], how: str) -> bool:
    """Whether one part alone has a value, and counts with another weight than 1."""
    found = holders(members, "value")
    return len(found) == 1 and how != "leave_out" and found[0][0].share != 1


def _value_problems(path: str, members: Sequence[Member], how: str) -> Iterator[str]:
    found = holders(members, "value")
    if not found or how == "leave_out":
        return
    if not _agree(found):
        if how == "same":
            yield (
                f"{path}: {_numbers(found)} replace the weight by different values: {_shapes(found)}; give "
                "values='first' or 'last' to take one, 'mean' for their mean by weight, 'leave_out' for none"
            )
            return
        if how == "mean" and (problem := _no_mean(found)):
            yield f"{path}: the values have no mean: {problem}; give values='first', 'last' or 'leave_out'"
            return
    shape = tuple(found[-1 if how == "last" else 0][1].shape)
    for member in with_factors(members):
        batch, ins, outs = member.factors.sides
        if sorted(shape) != sorted(batch + ins + outs):
            yield (
                f"{path}: the value {shape} does not fit A and B in parts[{member.part}], batch {batch}, in {ins}, out "
                f"{outs}; give values='leave_out', or 'first' or 'last' for another one"
            )


def _magnitude_problems(path: str, members: Sequence[Member], how: str) -> Iterator[str]:
    found = holders(members, "magnitude")
    if not found:
        return
    total = sum(member.share for member in members)
    if len(found) == len(members) and _agree(found) and math.isclose(total, 1.0):
        return
    if how == "same":
        beside = [member for member in members if "magnitude" not in member.held.others]
        others = f", none in {', '.join(f'parts[{member.part}]' for member in beside)}" if beside else ""
        yield (
            f"{path}: DoRA cannot be summed: found a magnitude in {_numbers(found)}{others}, weights that sum to "
            f"{total:.6g}; wanted the same magnitude in all that adapt it, and weights that sum to 1. Give "
            "magnitudes='mean' for the mean of them, or merge it into the base and extract plain adapters first"
        )
    elif problem := _no_mean(found):
        yield f"{path}: the magnitudes have no mean: {problem}"


def _agree(found: Sequence[tuple[Member, Any]]) -> bool:
    """Whether all arrays hold the same numbers, whatever their dtypes."""
    first = np.asarray(found[0][1])
    for _, leaf in found[1:]:
        other = np.asarray(leaf)
        if first.dtype != other.dtype and is_floating(first.dtype) and is_floating(other.dtype):
            first, other = first.astype(np.float64), other.astype(np.float64)
        if not np.array_equal(first, other):
            return False
    return True


def _no_mean(found: Sequence[tuple[Member, Any]]) -> str:
    """Why arrays have no mean by weight, "" where they have one."""
    if len({tuple(array.shape) for _, array in found}) > 1:
        return _shapes(found)
    if whole := [f"{array.dtype} in parts[{member.part}]" for member, array in found if not is_floating(array.dtype)]:
        return f"found {whole[0]}, wanted floating dtypes"
    shares = [member.share for member, _ in found]
    if math.isclose(sum(shares), 0.0, abs_tol=1e-9 * max(map(abs, shares))):
        return f"their weights sum to 0 in {_numbers(found)}"
    return ""


def _mean(path: str, found: Sequence[tuple[Member, Any]]) -> Any:
    """sum w x / sum w."""
    total = sum(member.share for member, _ in found)
    mean = sum(member.share / total * np.asarray(array).astype(np.float64) for member, array in found)
    return _like(path, np.asarray(mean), [array for _, array in found])


def _like(path: str, array: np.ndarray, leaves: Sequence[Any]) -> Any:
    """The array in the dtype of these, of JAX where one of them is."""
    return rounded(path, array, common_dtype(leaf.dtype for leaf in leaves), any(map(is_jax_array, leaves)))


def _numbers(found: Sequence[tuple[Member, Any]]) -> str:
    return ", ".join(f"parts[{member.part}]" for member, _ in found)


def _shapes(found: Sequence[tuple[Member, Any]]) -> str:
    return ", ".join(f"{tuple(array.shape)} in parts[{member.part}]" for member, array in found)
