"""`LoRA`: a Linen module whose targeted layers get an adapter while it is called, its code unchanged."""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
from flax.core import freeze
from flax.linen.module import InterceptorContext

from jlora.adapter import is_adapter
from jlora.config import LoraConfig
from jlora.errors import AdapterError
from jlora.linen._adapters import AInit, LoRAAdapter
from jlora.linen._layers import adapter_of, layer_kind, weight_name
from jlora.paths import leaves_by_path
from jlora.tree import check_patterns, is_targeted, split_params

_INTERCEPTED = ("__call__", "attend")


class LoRA(nn.Module):
    """A Linen module with adapters at its targeted layers.

    `nn.Dense`, `nn.DenseGeneral`, `nn.Einsum`, `nn.Conv` and `nn.Embed` are adapted where `config` targets their
    weight, at any depth, in nn.scan, nn.remat and nn.jit too. The base's parameters keep their paths; A and B stand
    beside them under `lora`. Methods of the model are called as before: `lora.apply(variables, x, method="encode")`.
    The adapter's input is dropped out where a `dropout` rng reaches the layer and config.dropout > 0.

    Attributes:
      model: the module.
      config: what is adapted and how.

    >>> import jax.numpy as jnp
    >>> lora = LoRA(nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(7)]), LoraConfig(rank=2, target_modules="layers_2"))
    >>> variables = lora.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> jax.tree.map(jnp.shape, variables['params']['layers_2'])
    {'bias': (7,), 'kernel': (5, 7), 'lora': {'A': (5, 2), 'B': (2, 7)}}

    Raises:
      TargetError: from `init`, where a pattern matches no layer of the model.
    """

    model: nn.Module
    config: LoraConfig

    @nn.nowrap
    def __post_init__(self) -> None:
        """Binds the model to this module's own scope, as though it stood here itself.

        `nn.share_scope` alone leaves the submodules that the model was given as fields with the path, and so the
        PRNG keys, of a child.
        """
        model = self.model
        if model.parent is not None:
            super().__post_init__()
            return
        object.__setattr__(self, "model", None)
        super().__post_init__()
        bound = model if self.scope is None else model.clone(parent=self.scope, name=type(model).__name__)
        object.__setattr__(self, "model", bound)

    def setup(self) -> None:
        if self.model.scope is not self.scope:
            nn.share_scope(self, self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call("__call__", *args, **kwargs)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """A method of the model, by name, with the adapters in it."""
        with _scope_flag(self, self.config), nn.intercept_methods(_interceptor(self.config, len(self.path))):
            return getattr(self.model, method)(*args, **kwargs)

    @nn.nowrap
    def __getattr__(self, name: str) -> Any:
        fields = vars(self)
        if not name.startswith("_") and callable(getattr(type(fields.get("model")), name, None)):
            return types.MethodType(lambda module, *args, **kwargs: module.call(name, *args, **kwargs), self)
        return super().__getattr__(name)

    @nn.nowrap
    def init_with_output(self, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.init_with_output`, and refuses patterns that no layer of the model matches."""
        y, variables = super().init_with_output(*args, **kwargs)
        base, adapters = split_params(variables.get("params", {}))
        check_patterns(self.config, list(leaves_by_path(base)), list(leaves_by_path(adapters, is_leaf=is_adapter)))
        return y, variables


def resolve_config(model: nn.Module, config: LoraConfig, *args: Any, **kwargs: Any) -> LoraConfig:
    """`config` with the factorization of every adapted layer written out, as the layers themselves have it.

    A params tree alone does not tell an einsum's equation, nor a layer without a bias from a stack of layers. With
    the configuration that this returns, `init_lora`, `merge_params` and `summary` need not guess.

    Args:
      model: the base.
      config: what is adapted and how; its own factorizations go first.
      *args, **kwargs: of `model.init`, after the rngs; shapes are enough, nothing is computed.

    >>> import jax.numpy as jnp
    >>> model = nn.Einsum((3, 5, 7), 'BTD,NDH->BTNH', use_bias=False)
    >>> resolve_config(model, LoraConfig(rank=2), jnp.ones((11, 13, 5))).factorizations
    (('kernel', 'oio'),)
    """
    found: dict[str, str] = {}

    def note(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: InterceptorContext) -> Any:
        layer = context.module
        if layer_kind(layer) is not None and context.method_name == "__call__":
            path = "/".join((*layer.path, weight_name(layer)))
            if is_targeted(config, path):
                found[path] = adapter_of(layer, config.rank_of(path)).factorization(*args, **kwargs).roles
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(note):
        variables = jax.eval_shape(model.init, jax.random.key(0), *args, **kwargs)
    weights = leaves_by_path(variables["params"])
    stacked = {path: "b" * (len(weights[path].shape) - len(roles)) + roles for path, roles in found.items()}
    given = dict(config.factorizations)
    return config.replace(factorizations=given | {path: stacked[path] for path in stacked if path not in given})


def _interceptor(config: LoraConfig, depth: int) -> Callable[..., Any]:
    """Adds the adapter's output to that of every targeted layer; `depth` is the length of the LoRA module's path."""
    busy = False

    def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: InterceptorContext) -> Any:
        nonlocal busy
        layer, method = context.module, context.method_name
        if busy or method not in _INTERCEPTED or layer_kind(layer) is None:
            return next_fun(*args, **kwargs)
        path = "/".join((*layer.path[depth:], weight_name(layer)))
        if not is_targeted(config, path):
            return next_fun(*args, **kwargs)
        busy = True
        try:
            y = next_fun(*args, **kwargs)
            adapter = _bound_adapter(layer, config, path)
            return y + getattr(adapter, method)(*args, **kwargs).astype(y.dtype)
        except AdapterError as error:
            raise AdapterError(f"{path}: {error}") from None
        finally:
            busy = False

    return intercept


def _bound_adapter(layer: nn.Module, config: LoraConfig, path: str) -> LoRAAdapter:
    """The adapter of a layer, in the scope `lora` of the layer's scope."""
    assert layer.scope is not None
    return adapter_of(
        layer,
        config.rank_of(path),
        parent=layer.scope.push("lora", reuse=True),
        alpha=config.effective_alpha_of(path),
        dropout=config.dropout,
        param_dtype=config.dtype,
        a_init=AInit(config.init, config.init_std),
    )


@contextmanager
def _scope_flag(module: nn.Module, config: LoraConfig) -> Iterator[None]:
    """Marks the scope with the configuration, so that nn.jit does not take what it compiled for another one.

    nn.jit keys its cache on the module and the flags of its scope, and knows nothing of interceptors.
    """
    scope = module.scope
    assert scope is not None
    before = scope.flags
    scope.flags = freeze({**before, "jlora": config})
    try:
        yield
    finally:
        scope.flags = before
