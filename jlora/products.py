"""Products of inputs, weights and adapters, as factorizations split the axes; every einsum of jlora is read here."""

import dataclasses
import math
import string
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.contraction import Factorization
from jlora.cost import CostModel
from jlora.errors import AdapterError

__all__ = [
    "FactoredEinsum",
    "common_dtype",
    "contract",
    "dense_delta",
    "factored_einsum",
    "factored_product",
    "scaled",
    "spec_of",
    "spec_of_sharding",
]


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
