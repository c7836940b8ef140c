"""The contraction algebra: how the axes of a weight split, and every shape that follows.

A weight of any rank is a matrix once its axes are split into batch, in and out axes. Every shape of A and B is computed
here and nowhere else; the products that follow are in `jlora.products`.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from jlora.errors import AdapterError

__all__ = ["Factorization", "canonical", "factorization_from_shapes", "split_batch_axes"]

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Factorization:
    """How the axes of one weight split: one letter per axis, `b` batch, `i` in, `o` out.

    `"io"` is the kernel of a Dense layer, `"ioo"` the query of an attention layer (d, heads, head_dim), `"iiio"` a
    two-dimensional convolution (height, width, in, out), `"bio"` a stack of layers or of experts. The adapter of the
    weight is `A (*batch, *in, r)` and `B (*batch, r, *out)`, each group in the order of the weight's axes.

    >>> Factorization("bioo").adapter_shapes((3, 5, 7, 11), rank=2)
    ((3, 5, 2), (3, 2, 7, 11))
    """

    roles: str

    def __post_init__(self) -> None:
        known = isinstance(self.roles, str) and set(self.roles) <= set("bio")
        if not known or "i" not in self.roles or "o" not in self.roles:
            raise AdapterError(
                f"factorization {self.roles!r}: wanted one letter per axis of the weight, b (batch), i (in) or "
                "o (out), with at least one i and one o, such as 'io', 'ioo' or 'bio'"
            )

    def axes(self, role: str) -> tuple[int, ...]:
        """The weight's axes with this role, in order."""
        return tuple(axis for axis, found in enumerate(self.roles) if found == role)

    def sizes(self, shape: Sequence[int], role: str) -> Shape:
        """The sizes of the axes with this role in a weight of this shape."""
        if len(shape) != len(self.roles):
            raise AdapterError(
                f"factorization {self.roles!r} is for weights of {len(self.roles)} axes; found shape {tuple(shape)}"
            )
        return tuple(shape[axis] for axis in self.axes(role))

    def adapter_shapes(self, shape: Sequence[int], rank: int) -> tuple[Shape, Shape]:
        """The shapes of A and B for a weight of this shape."""
        batch, ins, outs = (self.sizes(shape, role) for role in "bio")
        return (*batch, *ins, rank), (*batch, rank, *outs)

    def out_like(self, array: Any) -> Any:
        """An array with the axes `(*batch, *out)`, in the order in which the weight has these axes."""
        order = [*self.axes("b"), *self.axes("o")]
        return array.transpose([order.index(axis) for axis in sorted(order)])

    @property
    def order(self) -> tuple[int, ...]:
        """The weight's axes in the order batch, in, out."""
        return (*self.axes("b"), *self.axes("i"), *self.axes("o"))

    @property
    def adapter_axes(self) -> tuple[tuple[int | None, ...], tuple[int | None, ...]]:
        """The axes of the weight that the axes of A and of B are; None for the rank."""
        batch, ins, outs = (self.axes(role) for role in "bio")
        return (*batch, *ins, None), (*batch, None, *outs)

    def max_rank(self, shape: Sequence[int]) -> int:
        """The smaller side of the matrix that the weight is, beyond which a rank has no use."""
        return min(math.prod(self.sizes(shape, "i")), math.prod(self.sizes(shape, "o")))

    @property
    def is_canonical(self) -> bool:
        """Whether the weight's axes come in the order batch, in, out."""
        return self.order == tuple(range(len(self.roles)))


def canonical(batch: int, ins: int, outs: int) -> Factorization:
    """The factorization of a weight whose axes come in the order batch, in, out."""
    return Factorization("b" * batch + "i" * ins + "o" * outs)


def split_batch_axes(
    a_shape: Shape, b_shape: Shape, batch_dims: int | None = None, way_out: str = "pass batch_dims= to say"
) -> int:
    """The number of leading axes that A and B share as batch axes.

    `batch_dims` states it where the shapes alone can be read in two ways; where it is not given, `way_out` tells how.
    """
    rank = a_shape[-1] if a_shape else 0
    fits = [
        n
        for n in range(min(len(a_shape), len(b_shape)) - 1)
        if a_shape[:n] == b_shape[:n] and b_shape[n] == rank and (batch_dims is None or n == batch_dims)
    ]
    if len(fits) == 1:
        return fits[0]
    found = f"A {a_shape} and B {b_shape}"
    if not fits:
        raise AdapterError(
            f"{found} do not fit: wanted A (*batch, *in, r) and B (*batch, r, *out) with the same r and batch axes"
            + ("" if batch_dims is None else f" and {batch_dims} batch axes")
        )
    raise AdapterError(f"{found} can be read with {' or '.join(map(str, fits))} batch axes; {way_out}")


def factorization_from_shapes(
    weight_shape: Shape, a_shape: Shape, b_shape: Shape, *, transposed: bool = False
) -> Factorization:
    """The factorization of a weight of which the adapter is known.

    The order batch, in, out is taken where it fits, so that a square weight is in, out; another order where it is the
    one order that fits. For a weight of two axes that is (out, in), and taken with `transposed` only.
    """
    batch = len(a_shape) + len(b_shape) - 2 - len(weight_shape)
    ins, outs = a_shape[max(batch, 0) : -1], b_shape[max(batch, 0) + 1 :]
    if batch >= 0 and ins and outs and (*a_shape[:batch], a_shape[-1]) == b_shape[: batch + 1]:
        orders = sorted(_orders(weight_shape, a_shape[:batch], ins, outs))
        first = canonical(batch, len(ins), len(outs))
        if first.roles in orders:
            return first
        if len(orders) == 1 and (len(weight_shape) > 2 or transposed):
            return Factorization(orders[0])
        if len(orders) > 1:
            raise AdapterError(
                f"A {a_shape} and B {b_shape} fit the weight {weight_shape} in several ways: {', '.join(orders)}; "
                "give the factorization"
            )
    raise AdapterError(
        f"A {a_shape} and B {b_shape} do not fit the weight {weight_shape}: "
        "wanted A (*batch, *in, r) and B (*batch, r, *out) with the weight's axes in the order batch, in, out"
    )


def _orders(shape: Shape, *groups: Shape) -> Iterator[str]:
    """The roles that give the axes of `shape` to the batch, in and out sizes, each group in its order."""
    if not shape:
        yield ""
    for position, sizes in enumerate(groups):
        if shape and sizes[:1] == shape[:1]:
            rest = (*groups[:position], sizes[1:], *groups[position + 1 :])
            yield from ("bio"[position] + roles for roles in _orders(shape[1:], *rest))
