"""How the axes of a weight split, read off the shapes of another library's LoRA params."""

import itertools
import math
from collections.abc import Iterator

from jlora.contraction import Factorization, canonical


def possible_factorizations(
    shape: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], flattened: bool
) -> Iterator[str]:
    """Every factorization of a weight that a and b fit; with `flattened`, in axes and out axes may be one axis each.

    Readings that differ in axes of size 1 alone are the same update; the first of them stands for all.
    """
    seen = set()
    if not a:
        return
    for letters in itertools.product("bio", repeat=len(shape)):
        if "i" not in letters or "o" not in letters:
            continue
        split = Factorization("".join(letters))
        batch, ins, outs = (split.sizes(shape, role) for role in "bio")
        shapes = [split.adapter_shapes(shape, a[-1])]
        if flattened:
            shapes.append(((*batch, math.prod(ins), a[-1]), (*batch, a[-1], math.prod(outs))))
        distinct = tuple(letter for letter, size in zip(letters, shape, strict=True) if size != 1 or letter == "b")
        if (a, b) in shapes and distinct not in seen:
            seen.add(distinct)
            yield split.roles


def preferred(name: str, is_einsum: bool, shape: tuple[int, ...], readings: list[str]) -> list[str]:
    """The reading in the order batch, in, out, where the name or two axes say that this is the weight's order.

    The weight of an einsum may have any order.
    """
    if is_einsum or (len(shape) > 2 and name != "kernel"):
        return readings
    in_order = [roles for roles in readings if roles == canonical(*(roles.count(role) for role in "bio")).roles]
    return in_order or readings
