"""Flax's own layers with an adapter beside them: the layer's scope is shared, A and B stand under `lora`."""

import dataclasses
from typing import Any, ClassVar

import chex
import flax.linen as nn

from jlora.adapter import adapter_dtype
from jlora.boxes import box_like, is_box
from jlora.errors import AdapterError
from jlora.linen._adapters import (
    Initializer,
    LoRAAdapter,
    LoRAConvAdapter,
    LoRADenseAdapter,
    LoRADenseGeneralAdapter,
    LoRAEinsumAdapter,
    LoRAEmbedAdapter,
)
from jlora.linen._scope import InPlace


class LoRALinenLayer(InPlace):
    """What the layers share.

    Attributes:
      rank: the rank of A and B.
      wrapped: the layer; its parameters keep their paths, so that an existing checkpoint loads. In a compact method it
        is the layer that is given a name, as in `nn.Dense(5, name="up")`.
      alpha: the update is scaled by alpha / rank; not at all where None.
      dropout: the share of the adapter's input that is dropped, where the module is called with a `dropout` rng.
      param_dtype: of A and B; where None float32, or the layer's where that is wider.
      a_init, b_init: Flax initializers of A and B; N(0, 0.01^2) and zero where None.

    The output has the dtype of the layer's.
    """

    rank: int
    _: dataclasses.KW_ONLY
    wrapped: nn.Module
    alpha: float | None = None
    dropout: float = 0.0
    param_dtype: Any = None
    a_init: Initializer | None = None
    b_init: Initializer | None = None

    kind: ClassVar[type[nn.Module]]
    adapter: ClassVar[type[LoRAAdapter]]
    shared: ClassVar[tuple[str, ...]]  # what the adapter takes over from the layer
    held = "wrapped"

    def setup(self) -> None:
        if not isinstance(self.wrapped, self.kind):
            raise AdapterError(
                f"{type(self).__name__}: found wrapped={type(self.wrapped).__name__}, wanted nn.{self.kind.__name__}"
            )
        super().setup()

    def __call__(self, inputs: chex.Array, *args: Any, **kwargs: Any) -> chex.Array:
        y = self.wrapped(inputs, *args, **kwargs)
        return y + self._adapter()(inputs, *args, **kwargs).astype(y.dtype)

    def _adapter(self, **more: Any) -> Any:
        """The adapter, in the scope `lora` of the layer's scope; the layer has been called."""
        layer: Any = self.wrapped
        weight = layer.scope.get_variable("params", "embedding" if self.kind is nn.Embed else "kernel")
        fields = self._fields(layer) | {"param_dtype": adapter_dtype(layer.param_dtype)}
        fields["box"] = box_like(weight, None) if is_box(weight) else None
        for name in ("alpha", "dropout", "param_dtype", "a_init", "b_init"):
            if getattr(self, name) is not None:
                fields[name] = getattr(self, name)
        return self.adapter(self.rank, **fields | more, parent=layer.scope.push("lora", reuse=True))

    def _fields(self, layer: nn.Module) -> dict[str, Any]:
        return {name: getattr(layer, name) for name in (*self.shared, "dtype")}


class LoRADense(LoRALinenLayer):
    """An `nn.Dense` and its adapter, `y = wrapped(x) + scaling * (x@A)@B`.

    >>> import jax, jax.numpy as jnp
    >>> layer = LoRADense(rank=2, wrapped=nn.Dense(5), alpha=4.0)
    >>> jax.tree.map(jnp.shape, layer.init(jax.random.key(0), jnp.ones((7, 3)))['params'])
    {'bias': (5,), 'kernel': (3, 5), 'lora': {'A': (3, 2), 'B': (2, 5)}}
    """

    kind = nn.Dense
    adapter = LoRADenseAdapter
    shared = ("features", "precision")


class LoRADenseGeneral(LoRALinenLayer):
    """An `nn.DenseGeneral` and its adapter; any features, axis and batch_dims."""

    kind = nn.DenseGeneral
    adapter = LoRADenseGeneralAdapter
    shared = ("features", "axis", "batch_dims", "precision")


class LoRAEinsum(LoRALinenLayer):
    """An `nn.Einsum` and its adapter; any equation with an in and an out axis."""

    kind = nn.Einsum
    adapter = LoRAEinsumAdapter
    shared = ("shape", "einsum_str", "precision")


class LoRAConv(LoRALinenLayer):
    """An `nn.Conv` and its adapter; any window, strides, padding, dilation and groups."""

    kind = nn.Conv
    adapter = LoRAConvAdapter
    shared = ("precision",)

    def _fields(self, layer: nn.Module) -> dict[str, Any]:
        return super()._fields(layer) | {"conv": layer.clone(parent=None, name=None)}


class LoRAEmbed(LoRALinenLayer):
    """An `nn.Embed` and its adapter, for the rows and for `attend`."""

    kind = nn.Embed
    adapter = LoRAEmbedAdapter
    shared = ("num_embeddings", "features")

    def __call__(self, inputs: chex.Array) -> chex.Array:
        y = self.wrapped(inputs)
        return y + self._adapter(dtype=y.dtype)(inputs)  # an index has no dtype that the adapter could infer

    def attend(self, query: chex.Array) -> chex.Array:
        """query @ (table + update).T, `(..., num_embeddings)`."""
        y = self.wrapped.attend(query)
        return y + self._adapter().attend(query).astype(y.dtype)
