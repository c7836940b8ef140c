"""The contraction algebra: how the axes of a weight split, and every shape and product that follows.

A weight of any rank is a matrix once its axes are split into batch, in and out axes. Every shape of A and B and
every einsum string of jlora is computed here and nowhere else.
"""

import dataclasses
import math
import string
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.cost import CostModel
from jlora.errors import AdapterError

__all__ = [
    "FactoredEinsum",
    "Factorization",
    "canonical",
    "common_dtype",
    "contract",
    "dense_delta",
    "factored_einsum",
    "factored_product",
    "factorization_from_shapes",
    "scaled",
    "spec_of",
    "spec_of_sharding",
    "split_batch_axes",
]

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


def common_dtype(*dtypes: Any) -> Any:
    """The dtype that holds all of these, also under strict promotion; float8 and another dtype meet in float32."""
    if len(names := {jnp.dtype(dtype).name for dtype in dtypes}) > 1:
        dtypes = tuple(jnp.float32 if name.startswith("float8") else name for name in names)
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def scaled(array: jax.Array, scale: jax.Array | float) -> jax.Array:
    """The array times a scalar that is not rounded to the array's dtype; float32 at least, rounded once."""
    wide = common_dtype(array.dtype, jnp.float32)
    return (array.astype(wide) * jnp.asarray(scale, wide)).astype(array.dtype)


def dense_delta(a: jax.Array, b: jax.Array, factorization: Factorization) -> jax.Array:
    """A@B in the order of the weight's axes, unscaled; float32 at least."""
    n = len(factorization.axes("b"))
    dtype = common_dtype(a.dtype, b.dtype, jnp.float32)
    batch = tuple(range(n))
    product = lax.dot_general(
        a.astype(dtype), b.astype(dtype), (((a.ndim - 1,), (n,)), (batch, batch)), precision=lax.Precision.HIGHEST
    )  # (*batch, *in, *out)
    if factorization.is_canonical:
        return product
    order = factorization.order
    return product.transpose([order.index(axis) for axis in range(len(order))])


def spec_of(array: Any) -> tuple[Any, ...]:
    """For each axis of an array those of an explicit mesh that it is split over; None in other meshes."""
    return spec_of_sharding(getattr(jax.typeof(array), "sharding", None), array.ndim)


def spec_of_sharding(sharding: Any, axes: int) -> tuple[Any, ...]:
    """For each of so many axes those of a mesh that it is split over."""
    spec = tuple(getattr(sharding, "spec", ()))
    return (*spec, *[None] * (axes - len(spec)))


def contract(
    x: jax.Array, weight: jax.Array, axis: Sequence[int], batch_dims: int = 0, *, precision: lax.PrecisionLike = None
) -> jax.Array:
    """x @ weight over the axes `axis` of x, the weight in the order batch, in, out.

    The first `batch_dims` axes of x are the weight's batch axes. Returns `(*batch, *rest, *out)`.
    """
    batch = tuple(range(batch_dims))
    ins = tuple(range(batch_dims, batch_dims + len(axis)))
    return lax.dot_general(x, weight, ((tuple(axis), ins), (batch, batch)), precision=precision)


def factored_product(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    axis: Sequence[int],
    batch_dims: int = 0,
    *,
    scale: jax.Array | float | None = None,
    precision: lax.PrecisionLike = None,
    flatten: bool | None = None,
) -> jax.Array:
    """scale * (x@A)@B over the axes `axis` of x, never building A@B.

    The first `batch_dims` axes of x are A's and B's batch axes; `axis` counts from 0. Returns `(*batch, *rest, *out)`
    in the common dtype of x, A and B. With `flatten`, the default of `CostModel`, all other axes of x are joined to one
    before the products. A is taken as (r, in) and B as (r, out): their gradients are formed as g.T @ x and h.T @ g. As
    x.T @ g and g.T @ h, where the wide activation is the one that is turned, they take up to four times as long on CPU.
    """
    rest = [d for d in range(batch_dims, x.ndim) if d not in axis]
    order = [*range(batch_dims), *rest, *axis]
    if order != list(range(x.ndim)):
        x = x.transpose(order)  # (*batch, *rest, *in)
    batch = x.shape[:batch_dims]
    rest_shape = x.shape[batch_dims : batch_dims + len(rest)]
    out_shape = b.shape[batch_dims + 1 :]
    rank = a.shape[-1]
    rows = (math.prod(rest_shape),) if (CostModel().flattens() if flatten is None else flatten) else rest_shape
    ins = math.prod(a.shape[batch_dims:-1])
    down = _as_it_stands(a.reshape(*batch, ins, rank).mT)  # (*batch, r, in)
    up = _as_it_stands(b.reshape(*batch, rank, math.prod(out_shape)))  # (*batch, r, out)
    hidden = _last_with(x.reshape(*batch, *rows, ins), down, batch_dims + 1, precision)  # (*batch, *rows, r)
    if scale is not None:
        hidden = scaled(hidden, scale)
    y = _last_with(hidden, up, batch_dims, precision)  # (*batch, *rows, out)
    return y.reshape(*batch, *rest_shape, *out_shape)


def _as_it_stands(matrix: jax.Array) -> jax.Array:
    """The same numbers; the gradient is formed in the order of these axes, and turned afterwards if at all.

    XLA makes of a transposed product the product of its operands in the other order, but does not look through
    `reduce_precision`, which changes nothing where the precision is the array's own. An optimization_barrier is no
    help: it is gone before layouts are chosen. Then XLA turns a batch of products into a layout that is unknown to its
    code generator for small products, and the process aborts (JAX 0.7 to 0.10, tests/xla_abort.py).
    """
    if not jnp.issubdtype(matrix.dtype, jnp.floating):
        return matrix
    precision = jnp.finfo(matrix.dtype)
    whole = lax.optimization_barrier(matrix)  # XLA of JAX 0.7 folds the two steps of a turned constant wrongly
    return lax.reduce_precision(whole, precision.nexp, precision.nmant)


def _last_with(x: jax.Array, matrices: jax.Array, axis: int, precision: lax.PrecisionLike) -> jax.Array:
    """The last axis of x contracted with one of two axes of a matrix, or of a stack of them."""
    batch = tuple(range(matrices.ndim - 2))
    return lax.dot_general(x, matrices, (((x.ndim - 1,), (axis,)), (batch, batch)), precision=precision)


@dataclasses.dataclass(frozen=True)
class FactoredEinsum:
    """The einsum of an input and a weight, as letters with every `...` written out, computed from A and B.

    A letter of the weight is a batch axis where the input and the output have it too, an in axis where the input has
    it and the output does not, else an out axis. A letter that one operand alone has is summed away.
    """

    x: str
    weight: str
    y: str

    @property
    def factorization(self) -> Factorization:
        """How the axes of the weight split."""
        return Factorization("".join("o" if c not in self.x else "b" if c in self.y else "i" for c in self.weight))

    def product(
        self,
        x: jax.Array,
        a: jax.Array,
        b: jax.Array,
        *,
        scale: jax.Array | float | None = None,
        precision: lax.PrecisionLike = None,
    ) -> jax.Array:
        """scale * the einsum of x and A@B, never building A@B; see `factored_product`."""
        batch, ins, outs = self._letters("b"), self._letters("i"), self._letters("o")
        rest = "".join(c for c in self.x if c in self.y and c not in batch)
        order = batch + rest + ins
        x = x.sum([d for d, c in enumerate(self.x) if c not in order])
        kept = [c for c in self.x if c in order]
        x = x.transpose([kept.index(c) for c in order])  # (*batch, *rest, *in)
        n, axis = len(batch), range(len(batch + rest), len(order))
        sizes = jnp.broadcast_shapes(x.shape[:n], a.shape[:n])
        x = jnp.broadcast_to(x, sizes + x.shape[n:])
        a = jnp.broadcast_to(a, sizes + a.shape[n:])  # (*batch, *in, r)
        b = jnp.broadcast_to(b, sizes + b.shape[n:])  # (*batch, r, *out)
        y = factored_product(x, a, b, axis, n, scale=scale, precision=precision)  # (*batch, *rest, *out)
        letters = batch + rest + outs
        y = y.sum([d for d, c in enumerate(letters) if c not in self.y])
        left = [c for c in letters if c in self.y]
        return y.transpose([left.index(c) for c in self.y])

    def _letters(self, role: str) -> str:
        """The letters of the weight's axes with this role."""
        return "".join(self.weight[axis] for axis in self.factorization.axes(role))


def factored_einsum(equation: str, x_ndim: int, weight_ndim: int) -> FactoredEinsum:
    """Reads an einsum of an input and a weight, such as `"BTD,NDH->BTNH"`.

    >>> factored_einsum("...D,NDH->...NH", 3, 3)
    FactoredEinsum(x='abD', weight='NDH', y='abNH')

    Raises:
      AdapterError: the einsum is not of two operands, repeats a letter, or has no in or no out axis.
    """
    x, weight, y = _parse_einsum(equation, x_ndim, weight_ndim)
    contracted = [c for c in weight if c in x and c not in y]
    if not contracted or set(weight) <= set(x):
        raise AdapterError(
            f"einsum {equation!r} cannot be factored: the weight {weight!r} needs an axis that is contracted with the "
            "input and an axis that only the weight has"
        )
    return FactoredEinsum(x, weight, y)


def _parse_einsum(equation: str, x_ndim: int, weight_ndim: int) -> tuple[str, str, str]:
    """The letters of the input, the weight and the output, with every `...` written out."""
    text = "".join(equation.split())
    operands, arrow, y = text.partition("->")
    names = operands.split(",")
    plain = "".join(name.replace("...", "", 1) for name in (*names, y))
    if not arrow or len(names) != 2 or not set(plain) <= set(string.ascii_letters):
        raise AdapterError(f"einsum {equation!r}: wanted two operands and '->', as in 'btd,dhk->bthk'")
    free = [c for c in string.ascii_letters if c not in text]
    spans = []
    for name, ndim, what in zip(names, (x_ndim, weight_ndim), ("input", "weight"), strict=True):
        span = ndim - len(name.replace("...", ""))
        if span < 0 or (span and "..." not in name):
            raise AdapterError(f"einsum {equation!r}: the {what} {name!r} does not have {ndim} axes")
        spans.append(span)
    letters = "".join(free[: max(spans)])
    x, weight = (name.replace("...", letters[len(letters) - span :]) for name, span in zip(names, spans, strict=True))
    y = y.replace("...", letters)
    for name in (x, weight, y):
        if len(set(name)) != len(name):
            raise AdapterError(f"einsum {equation!r} cannot be factored: {name!r} repeats a letter")
    if missing := set(y) - set(x + weight):
        raise AdapterError(f"einsum {equation!r}: the output has {sorted(missing)}, which no operand has")
    return x, weight, y
