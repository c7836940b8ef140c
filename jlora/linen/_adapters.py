"""Linen modules of the low-rank product alone: scaling * (x@A)@B, without the base."""

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import chex
import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from jlora.adapter import PARTS, draw_a
from jlora.boxes import box_named, is_box
from jlora.contraction import Factorization, canonical
from jlora.errors import AdapterError
from jlora.fields import integer, number
from jlora.products import FactoredEinsum, factored_einsum, factored_product, scaled

Initializer = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class AInit:
    """How A begins, as a Flax initializer that can be compared and hashed; see `jlora.LoraConfig.init`."""

    init: str = "gaussian"
    std: float = 0.01
    batch_dims: int = 0

    def __call__(self, key: chex.PRNGKey, shape: tuple[int, ...], dtype: Any = jnp.float32) -> chex.Array:
        return draw_a(key, tuple(shape), dtype, init=self.init, std=self.std, batch_dims=self.batch_dims)


class LoRAAdapter(nn.Module):
    """What the adapters share.

    Attributes:
      rank: the rank of A and B.
      alpha: the product is scaled by alpha / rank; not at all where None.
      dropout: the share of the input that is dropped, where the module is called with a `dropout` rng.
      dtype: of the computation; inferred from the input, A and B where None.
      param_dtype: of A and B.
      precision: of the products.
      a_init, b_init: Flax initializers of A and B. `None` for A is `AInit()`.
      box: a box of Flax's (`nn.Partitioned`) as the weight has it, whose names of axes A and B take over.
    """

    rank: int
    _: dataclasses.KW_ONLY
    alpha: float | None = None
    dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    a_init: Initializer | None = None
    b_init: Initializer = nn.initializers.zeros_init()
    box: Any = None

    def _adapter(self, factorization: Factorization, shape: Sequence[int]) -> tuple[chex.Array, chex.Array]:
        """A and B of a weight of this shape."""
        others = [name for name in PARTS if name not in "AB" and self.has_variable("params", name)]
        if others:
            raise self._error(
                f"found {', '.join(others)} beside A and B, which this layer does not apply; jlora.linen.LoRA does, "
                "and jlora.lora"
            )
        rank, most = integer("rank", self.rank, 1), factorization.max_rank(shape)
        if rank > most:
            raise self._error(f"rank {rank} is larger than the smaller side {most} of {tuple(shape)}")
        a_shape, b_shape = factorization.adapter_shapes(shape, rank)
        a_init = self.a_init or AInit()
        if isinstance(a_init, AInit):
            a_init = dataclasses.replace(a_init, batch_dims=factorization.roles.count("b"))
        a_axes, b_axes = factorization.adapter_axes
        a = self.param("A", self._boxed(a_init, a_axes), a_shape, self.param_dtype)
        b = self.param("B", self._boxed(self.b_init, b_axes), b_shape, self.param_dtype)
        return a, b

    def _boxed(self, init: Initializer, axes: Sequence[int | None]) -> Initializer:
        """The initializer with what it gives in a box that names its axes, where it is in none and the weight is."""

        def boxed(*args: Any) -> Any:
            value = init(*args)
            return value if is_box(value) else box_named(self.box, value, axes)

        return boxed if is_box(self.box) else init

    def _error(self, message: str) -> AdapterError:
        where = "/".join(self.path)
        return AdapterError(f"{where}: {message}" if where else message)

    def _scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def _drop(self, x: chex.Array) -> chex.Array:
        rate = number("dropout", self.dropout, 0.0, 1.0, "0 <= dropout < 1")
        if rate == 0.0 or not self.has_rng("dropout"):
            return x
        return nn.Dropout(rate, deterministic=False, parent=None).apply(
            {}, x, rngs={"dropout": self.make_rng("dropout")}
        )

    def _promote(self, *arrays: chex.Array) -> Any:
        return promote_dtype(*arrays, dtype=self.dtype)


class LoRADenseGeneralAdapter(LoRAAdapter):
    """x@A@B over any axes of x, for everything that `nn.DenseGeneral` accepts.

    Attributes:
      features: the size or sizes of the out axes.
      axis: the axis or axes of x that are contracted.
      batch_dims: the leading axes of x, consecutive from 0, for each position of which A and B differ.

    Parameters `A (*batch, *in, rank)` and `B (*batch, rank, *features)`; returns `(*batch, *rest, *features)`.

    >>> import jax
    >>> layer = LoRADenseGeneralAdapter(rank=2, features=(3, 5), axis=(1, -1))
    >>> variables = layer.init(jax.random.key(0), jnp.ones((7, 11, 13, 17)))
    >>> jax.tree.map(jnp.shape, variables['params'])
    {'A': (11, 17, 2), 'B': (2, 3, 5)}
    >>> layer.apply(variables, jnp.ones((7, 11, 13, 17))).shape
    (7, 13, 3, 5)
    """

    features: int | Sequence[int]
    axis: int | Sequence[int] = -1
    batch_dims: int | Sequence[int] = ()

    @nn.compact
    def __call__(self, inputs: chex.Array) -> chex.Array:
        axis, batch = self._axes(self.axis, inputs), self._axes(self.batch_dims, inputs)
        if batch != tuple(range(len(batch))) or set(batch) & set(axis):
            raise self._error(
                f"batch_dims {self.batch_dims}: wanted consecutive leading axes from 0, apart from axis {self.axis}"
            )
        shape = (*inputs.shape[: len(batch)], *(inputs.shape[d] for d in axis), *_sizes(self.features))
        features = len(shape) - len(batch) - len(axis)
        a, b = self._adapter(canonical(len(batch), len(axis), features), shape)
        x, a, b = self._promote(self._drop(inputs), a, b)
        return factored_product(x, a, b, axis, len(batch), scale=self._scale(), precision=self.precision)

    def _axes(self, axis: int | Sequence[int], inputs: chex.Array) -> tuple[int, ...]:
        """The axes of the input, sorted, as Flax takes them for the order of the kernel's axes."""
        axes = sorted(d + inputs.ndim if d < 0 else d for d in _sizes(axis))
        if len(set(axes)) != len(axes) or any(not 0 <= d < inputs.ndim for d in axes):
            raise self._error(f"axis {axis}: wanted different axes of an input of {inputs.ndim} axes")
        return tuple(axes)


class LoRADenseAdapter(LoRADenseGeneralAdapter):
    """x@A@B over the last axis of x: `LoRADenseGeneralAdapter` with one in and one out axis.

    >>> import jax
    >>> variables = LoRADenseAdapter(rank=2, features=5).init(jax.random.key(0), jnp.ones((7, 3)))
    >>> jax.tree.map(jnp.shape, variables['params'])
    {'A': (3, 2), 'B': (2, 5)}
    """


class LoRAEinsumAdapter(LoRAAdapter):
    """The einsum of an input and a weight of which the weight is A@B.

    Attributes:
      shape: the shape of the weight, the second operand.
      einsum_str: the equation, such as `'BTD,NDH->BTNH'`; may be given in the call instead.

    Parameters A and B in the order batch, in, out, each in the order of the weight's letters.

    >>> import jax
    >>> layer = LoRAEinsumAdapter(rank=2, shape=(3, 5, 7), einsum_str='BTD,NDH->BTNH')
    >>> jax.tree.map(jnp.shape, layer.init(jax.random.key(0), jnp.ones((11, 13, 5)))['params'])
    {'A': (5, 2), 'B': (2, 3, 7)}
    """

    shape: Sequence[int]
    einsum_str: str | None = None

    @nn.compact
    def __call__(self, inputs: chex.Array, einsum_str: str | None = None) -> chex.Array:
        einsum = self._einsum(inputs, einsum_str)
        a, b = self._adapter(einsum.factorization, self.shape)
        x, a, b = self._promote(self._drop(inputs), a, b)
        return einsum.product(x, a, b, scale=self._scale(), precision=self.precision)

    def _einsum(self, inputs: chex.Array, einsum_str: str | None) -> FactoredEinsum:
        given = [equation for equation in (self.einsum_str, einsum_str) if equation is not None]
        if len(given) != 1:
            raise self._error("einsum_str: wanted it once, in the constructor or in the call")
        try:
            return factored_einsum(given[0], inputs.ndim, len(self.shape))
        except AdapterError as error:
            raise self._error(str(error)) from None


class LoRAConvAdapter(LoRAAdapter):
    """The convolution with a kernel that is A@B: one with A, to `rank` features, then a product with B.

    Attributes:
      conv: the `nn.Conv` that is adapted; its window, strides, padding, dilation and groups hold for A.

    Parameters `A (*window, in / groups, rank)` and `B (rank, features)`.
    """

    conv: nn.Conv

    @nn.compact
    def __call__(self, inputs: chex.Array) -> chex.Array:
        conv = self.conv
        if conv.mask is not None:
            raise self._error("a convolution with a mask: its update is masked too, and so has no low rank")
        groups = conv.feature_group_count
        window = tuple(_sizes(conv.kernel_size))
        shape = (*window, inputs.shape[-1] // groups, conv.features)
        a, b = self._adapter(canonical(0, len(shape) - 1, 1), shape)
        x, a, b = self._promote(self._drop(inputs), a, b)
        narrow = conv.clone(
            features=self.rank * groups, use_bias=False, dtype=x.dtype, precision=self.precision, parent=None, name=None
        )
        hidden = scaled(jnp.asarray(narrow.apply({"params": {"kernel": jnp.tile(a, groups)}}, x)), self._scale())
        hidden = hidden.reshape(*hidden.shape[:-1], groups, self.rank)
        per_group = b.reshape(self.rank, groups, -1)
        y = jnp.einsum("...gr,rgo->...go", hidden, per_group, precision=self.precision)
        return y.reshape(*y.shape[:-2], conv.features)


class LoRAEmbedAdapter(LoRAAdapter):
    """The rows of A@B that an embedding looks up, and the same table as an output head in `attend`.

    Attributes:
      num_embeddings: the size of the vocabulary.
      features: the size of a row.

    Parameters `A (num_embeddings, rank)` and `B (rank, features)`. Indices are not dropped out; the query of `attend`
    is.
    """

    num_embeddings: int
    features: int

    def setup(self) -> None:
        self.adapter = self._adapter(canonical(0, 1, 1), (self.num_embeddings, self.features))

    def __call__(self, inputs: chex.Array) -> chex.Array:
        a, b = self._promote(*self.adapter)
        flat = inputs.reshape(math.prod(inputs.shape))
        rows = jnp.broadcast_to(a, (*flat.shape, self.rank)) if len(a) == 1 else jnp.take(a, flat, axis=0)
        y = jnp.matmul(scaled(rows, self._scale()), b, precision=self.precision)
        return y.reshape(*inputs.shape, self.features)

    def attend(self, query: chex.Array) -> chex.Array:
        """query @ (A@B).T, `(..., num_embeddings)`."""
        a, b = self.adapter
        query, a, b = self._promote(self._drop(query), a, b)
        return factored_product(query, b.T, a.T, (query.ndim - 1,), scale=self._scale(), precision=self.precision)


def _sizes(sizes: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(map(operator.index, sizes)) if isinstance(sizes, Iterable) else (operator.index(sizes),)
