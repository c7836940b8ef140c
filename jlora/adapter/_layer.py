"""`LoRALayer`: a weight and its adapter as one immutable pytree, over the functions of this room."""

from collections.abc import Mapping
from typing import Any, Self

import chex
import jax
import jax.numpy as jnp
from jax import lax

from jlora.adapter._functions import (
    adapter_dtype,
    init_lora_adapter,
    linear,
    lora_linear,
    lora_singular_values,
    merge_lora_weight,
    unmerge_lora_weight,
)
from jlora.config import SCALINGS, effective_alpha
from jlora.contraction import Factorization, factorization_from_shapes
from jlora.errors import AdapterError
from jlora.fields import check_keys, choice, number

_WEIGHTS = ("base_weight", "lora_a", "lora_b")
_STATIC = ("alpha", "scaling_mode", "is_base_frozen", "is_merged")


@jax.tree_util.register_pytree_with_keys_class
class LoRALayer:
    """A linear layer with an adapter: `layer(x)` is x@W + scaling (x@A)@B.

    An immutable pytree of three arrays, so that it passes through jit, grad, vmap and scan; alpha, the scaling mode
    and the two flags are static. Every method returns a new layer.

    Args:
      base_weight: `(in, out)`, or any shape that `factorization` splits.
      rank: the rank of the adapter.
      alpha: the update is scaling * A@B.
      key: PRNG key for A.
      scaling_mode: "standard", scaling = alpha / rank, or "rslora", alpha / sqrt(rank).
      init_std, factorization, init: as in `init_lora_adapter`. The weight's axes must be in the order batch, in, out.
      dtype: of A and B; float32 unless given, or the weight's where that is wider.
      is_base_frozen: whether gradients stop at the base weight.

    >>> layer = LoRALayer(jnp.ones((3, 5)), rank=2, alpha=4.0, key=jax.random.key(0))
    >>> layer(jnp.ones((7, 3))).shape, layer.scaling, sorted(layer.trainable_params())
    ((7, 5), 2.0, ['lora_a', 'lora_b'])
    """

    base_weight: jax.Array
    lora_a: jax.Array
    lora_b: jax.Array
    alpha: float
    scaling_mode: str
    is_base_frozen: bool
    is_merged: bool

    def __init__(
        self,
        base_weight: chex.Array,
        rank: int,
        alpha: float = 1.0,
        *,
        key: chex.PRNGKey,
        scaling_mode: str = "standard",
        init_std: float = 0.01,
        dtype: Any = None,
        factorization: Factorization | str | None = None,
        init: str = "gaussian",
        is_base_frozen: bool = True,
    ) -> None:
        weight = jnp.asarray(base_weight)
        dtype = adapter_dtype(weight.dtype, dtype)
        adapter = init_lora_adapter(
            key, weight, rank, init_std=init_std, dtype=dtype, factorization=factorization, init=init
        )
        split = factorization_from_shapes(weight.shape, adapter["A"].shape, adapter["B"].shape)
        if not split.is_canonical or factorization not in (None, split, split.roles):
            raise AdapterError(f"factorization {factorization!r}: wanted the weight's axes in the order batch, in, out")
        alpha = number("alpha", alpha)
        choice("scaling_mode", scaling_mode, SCALINGS)
        values = (weight, adapter["A"], adapter["B"], alpha, scaling_mode, bool(is_base_frozen), False)
        self.__dict__.update(zip((*_WEIGHTS, *_STATIC), values, strict=True))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name}: LoRALayer is immutable; set(), load() and freeze_base() return a changed layer")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{name}: LoRALayer is immutable")

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in _STATIC)
        shapes = ", ".join(f"{name}={getattr(getattr(self, name), 'shape', None)}" for name in _WEIGHTS)
        return f"LoRALayer({shapes}, {fields})"

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        children = tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in _WEIGHTS)
        return children, tuple(getattr(self, name) for name in _STATIC)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> Self:
        layer = object.__new__(cls)
        layer.__dict__.update(zip((*_WEIGHTS, *_STATIC), (*children, *static), strict=True))
        return layer

    def _replace(self, **changes: Any) -> Self:
        layer = object.__new__(type(self))
        layer.__dict__.update(self.__dict__ | changes)
        return layer

    @property
    def rank(self) -> int:
        """The rank of the adapter."""
        return jnp.shape(self.lora_a)[-1]

    @property
    def scaling(self) -> float:
        """alpha / rank, or alpha / sqrt(rank): the update is scaling * A@B."""
        return self._alpha / self.rank

    @property
    def adapter(self) -> dict[str, jax.Array]:
        """The adapter as the functions of jlora take it."""
        return {"A": self.lora_a, "B": self.lora_b}

    @property
    def _alpha(self) -> float:
        return effective_alpha(self.alpha, self.rank, self.scaling_mode)

    @property
    def _unmerged_base(self) -> jax.Array:
        """The base without the update, through which no gradient passes while it is frozen."""
        return lax.stop_gradient(self.base_weight) if self.is_base_frozen else self.base_weight

    def __call__(self, x: chex.Array) -> jax.Array:
        """x@W + scaling (x@A)@B; x@W once merged. x is `(..., in)`, or `(*batch, ..., *in)`."""
        if not self.is_merged:
            return lora_linear(x, self._unmerged_base, self.adapter, self._alpha)
        split = factorization_from_shapes(self.base_weight.shape, self.lora_a.shape, self.lora_b.shape)
        return linear(jnp.asarray(x), self.base_weight, split)

    def merge(self) -> Self:
        """The layer with the update folded into its base weight."""
        if self.is_merged:
            raise AdapterError("the layer is merged already: unmerge() it first, or keep it as it is")
        return self._replace(
            base_weight=merge_lora_weight(self._unmerged_base, self.adapter, self._alpha), is_merged=True
        )

    def unmerge(self) -> Self:
        """The layer with the update taken out of its base weight again; see `unmerge_lora_weight` for rounding."""
        if not self.is_merged:
            raise AdapterError("the layer is not merged: merge() it first, or keep it as it is")
        return self._replace(
            base_weight=unmerge_lora_weight(self.base_weight, self.adapter, self._alpha), is_merged=False
        )

    def merge_to_base(self) -> jax.Array:
        """The plain weight for deployment, with the update in it."""
        return (self if self.is_merged else self.merge()).base_weight

    def freeze_base(self, frozen: bool = True) -> Self:
        """The layer with its base frozen, or trainable."""
        return self._replace(is_base_frozen=bool(frozen))

    def trainable_params(self) -> dict[str, jax.Array]:
        """The weights that training changes, by name: A and B, and the base where it is not frozen."""
        names = _WEIGHTS[1:] if self.is_base_frozen else _WEIGHTS
        return {name: getattr(self, name) for name in names}

    def set(self, name: str, value: chex.Array) -> Self:
        """The layer with one weight replaced.

        Raises:
          AdapterError: another shape, or the layer is merged, when its base no longer fits another A or B.
          ConfigError: no weight of this name.
        """
        check_keys([name], _WEIGHTS, "LoRALayer.set")
        if self.is_merged:
            raise AdapterError(f"{name}: the layer is merged; unmerge() it before its weights change")
        found, wanted = jnp.shape(value), jnp.shape(getattr(self, name))
        if found != wanted:
            raise AdapterError(f"{name}: found shape {found}, wanted {wanted}")
        return self._replace(**{name: jnp.asarray(value, getattr(self, name).dtype)})

    def load(self, weights: Mapping[str, chex.Array]) -> Self:
        """The layer with the weights that `trainable_params` named, all of them, from a mapping.

        Raises:
          AdapterError: a weight is missing or has another shape.
          ConfigError: a name that is not known.
        """
        check_keys(weights, _WEIGHTS, "LoRALayer.load")
        missing = [name for name in self.trainable_params() if name not in weights]
        if missing:
            raise AdapterError(f"missing {', '.join(missing)}: found {', '.join(weights) or 'nothing'}")
        layer = self
        for name, value in weights.items():
            layer = layer.set(name, value)
        return layer

    def diagnostics(self) -> dict[str, float | int]:
        """Numbers on the state of the layer, all plain Python.

        `delta_norm` and `relative_norm` are ||delta|| and ||delta|| / ||W|| in the Frobenius norm, W the base
        without the update; `effective_rank` is exp(entropy of the singular values over their sum), 0 where the
        delta is zero (Roy and Vetterli 2007).
        """
        base = self.unmerge().base_weight if self.is_merged else self.base_weight
        values = lora_singular_values(self.adapter, self._alpha).reshape(-1)
        norm = float(jnp.linalg.norm(values))
        base_norm = float(jnp.linalg.norm(base.astype(values.dtype).reshape(-1)))
        shares = values / jnp.maximum(values.sum(), jnp.finfo(values.dtype).tiny)
        entropy = -jnp.sum(shares * jnp.log(jnp.where(shares > 0, shares, 1)))
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "scaling": self.scaling,
            "base_parameters": int(base.size),
            "lora_parameters": int(self.lora_a.size + self.lora_b.size),
            "delta_norm": norm,
            "relative_norm": norm / base_norm if base_norm else float("inf") if norm else 0.0,
            "effective_rank": float(jnp.exp(entropy)) if norm else 0.0,
        }
