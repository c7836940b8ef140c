"""`LoRA`: a Linen module whose targeted layers get an adapter while it is called, its code unchanged."""

import types
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax.core import freeze
from flax.errors import CallCompactUnboundModuleError, ScopeParamNotFoundError
from flax.linen.module import InterceptorContext

from jlora.adapter import is_adapter
from jlora.config import LoraConfig
from jlora.errors import AdapterError, TargetError
from jlora.linen._adapters import AInit, LoRAAdapter
from jlora.linen._layers import LoRALinenLayer, adapter_of, bound_adapter, layer_kind, weight_name
from jlora.linen._scope import InPlace
from jlora.paths import leaves_by_path
from jlora.tree import check_patterns, is_targeted, split_params

_INTERCEPTED = ("__call__", "attend")
_UNADAPTED = "excluded, or is not the weight of an nn.Dense, DenseGeneral, Einsum, Conv or Embed that was called"


class LoRA(InPlace):
    """A Linen module with adapters at its targeted layers.

    `nn.Dense`, `nn.DenseGeneral`, `nn.Einsum`, `nn.Conv` and `nn.Embed` are adapted where `config` targets their
    weight, at any depth, in nn.scan, nn.remat and nn.jit too. The base's parameters keep their paths; A and B stand
    beside them under `lora`. Methods of the model are called as before: `lora.apply(variables, x, method="encode")`.
    The adapter's input is dropped out where a `dropout` rng reaches the layer and config.dropout > 0; a lifted
    transform hands one on only where its `split_rngs` names it. Modules of one class that nn.jit made share what it
    compiled: the configuration has to treat them alike, which `init` checks.

    Attributes:
      model: the module.
      config: what is adapted and how.

    >>> import jax.numpy as jnp
    >>> lora = LoRA(nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(7)]), LoraConfig(rank=2, target_modules="layers_2"))
    >>> variables = lora.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> jax.tree.map(jnp.shape, variables['params']['layers_2'])
    {'bias': (7,), 'kernel': (5, 7), 'lora': {'A': (5, 2), 'B': (2, 7)}}

    Raises:
      TargetError: from `init`, where a pattern adapts no layer of the model, or nn.jit hides a difference.
    """

    model: nn.Module
    config: LoraConfig

    held = "model"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run("__call__", *args, **kwargs)

    def _run(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """A method of the model, by name, with the adapters in it."""
        if self.scope is None:
            raise CallCompactUnboundModuleError()
        if "jlora" in self.scope.flags:
            raise AdapterError("a LoRA inside another: give one of them a configuration that targets both")
        flags = self.scope.flags
        try:
            with nn.intercept_methods(_interceptor(self.config, len(self.path))):
                return getattr(self.model, method)(*args, **kwargs)
        finally:
            self.scope.flags = flags

    @nn.nowrap
    def __getattr__(self, name: str) -> Any:
        fields = vars(self)
        if not name.startswith("_") and callable(getattr(type(fields.get("model")), name, None)):
            return types.MethodType(lambda module, *args, **kwargs: module._run(name, *args, **kwargs), self)
        return super().__getattr__(name)

    @nn.nowrap
    def init_with_output(self, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As `nn.Module.init_with_output`, and refuses patterns that no layer of the model matches."""
        called: set[str] = set()
        with nn.intercept_methods(_recorder(called)):
            y, variables = super().init_with_output(*args, method=self._by_name(method), **kwargs)
        base, adapters = split_params(variables.get("params", {}))
        paths, adapted = list(leaves_by_path(base)), list(leaves_by_path(adapters, is_leaf=is_adapter))
        check_patterns(self.config, paths, adapted, _UNADAPTED)
        _check_hidden(self.config, paths, called)
        return y, variables

    @nn.nowrap
    def apply(self, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As `nn.Module.apply`; `method` is the name of a method of the model, or the method."""
        return super().apply(*args, method=self._by_name(method), **kwargs)

    @nn.nowrap
    def _by_name(self, method: Any) -> Any:
        name = getattr(method, "__name__", "")
        return name if name and getattr(type(self.model), name, None) is method else method


def resolve_config(model: nn.Module, config: LoraConfig, *args: Any, **kwargs: Any) -> LoraConfig:
    """`config` with the factorization of every adapted layer written out, as the layers themselves have it.

    A params tree alone does not tell an einsum's equation, nor a layer without a bias from a stack of layers. With
    the configuration that this returns, `init_lora`, `merge_params` and `summary` need not guess, and adapt the same
    weights as `LoRA(model, config)`: what that cannot adapt is excluded.

    Args:
      model: the base.
      config: what is adapted and how; its own factorizations go first.
      *args: of `model.init`, after the rngs; shapes are enough, nothing is computed.
      **kwargs: of `model.init`, as they are, such as `method`.

    >>> import jax.numpy as jnp
    >>> model = nn.Einsum((3, 5, 7), 'BTD,NDH->BTNH', use_bias=False)
    >>> resolve_config(model, LoraConfig(rank=2), jnp.ones((11, 13, 5))).factorizations
    (('kernel', 'oio'),)
    """
    found: dict[str, str] = {}
    found_here = object()  # nn.jit must trace anew for the interceptor to see every layer

    def note(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: InterceptorContext) -> Any:
        _flag(context.module, found_here)
        layer = _called_layer(context)
        if layer is not None and context.method_name == "__call__":
            path = "/".join((*layer.path, weight_name(layer)))
            if is_targeted(config, path):
                found[path] = adapter_of(layer, config.rank_of(path)).factorization(*args, **kwargs).roles
        return next_fun(*args, **kwargs)

    called: set[str] = set()
    with nn.intercept_methods(_recorder(called)), nn.intercept_methods(note):
        variables = jax.eval_shape(lambda *args: model.init(jax.random.key(0), *args, **kwargs), *args)
    weights = leaves_by_path(variables["params"])
    others = tuple(
        path
        for path, leaf in weights.items()
        if path not in found and path.rpartition("/")[0] in called and is_targeted(config, path)
        if len(leaf.shape) > 1 and path.rpartition("/")[2] not in ("bias", "scale")
    )
    stacked = {path: "b" * (len(weights[path].shape) - len(roles)) + roles for path, roles in found.items()}
    given = dict(config.factorizations)
    exclude = (*config.exclude_modules, *others)
    return config.replace(
        exclude_modules=exclude, factorizations=given | {path: stacked[path] for path in stacked if path not in given}
    )


def _recorder(called: set[str]) -> Callable[..., Any]:
    """Adds the path of every module of which a method is called; nn.jit hides those that it compiled before."""

    def record(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: InterceptorContext) -> Any:
        if context.module.scope is not None:
            called.add("/".join(context.module.path))
        return next_fun(*args, **kwargs)

    return record


def _check_hidden(config: LoraConfig, paths: list[str], called: set[str]) -> None:
    """Refuses a configuration that would treat a module apart from the one whose compiled function it shares.

    A module that was not called runs what nn.jit compiled for another: one whose path differs in one segment.
    """

    def treatment(path: str) -> tuple[bool, int, float]:
        return is_targeted(config, path), config.rank_of(path), config.alpha_of(path)

    def is_twin(path: str, other: str) -> bool:
        segments, others = path.split("/"), other.split("/")
        return len(segments) == len(others) and sum(a != b for a, b in zip(segments, others, strict=True)) == 1

    seen = {path: path.rpartition("/")[0] in called for path in paths}
    for path in (path for path in paths if not seen[path]):
        for twin in (twin for twin in paths if seen[twin] and is_twin(path, twin)):
            if treatment(path) != treatment(twin):
                raise TargetError(
                    f"{path}: nn.jit compiled this module together with another of its class, that of {twin}, of which "
                    "the configuration differs; treat them alike, or leave nn.jit out"
                )


def _interceptor(config: LoraConfig, depth: int) -> Callable[..., Any]:
    """Adds the adapter's output to that of every targeted layer; `depth` is the length of the LoRA module's path."""
    adapting = False  # an adapter may call layers of Flax's

    def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: InterceptorContext) -> Any:
        nonlocal adapting
        _flag(context.module, config)
        layer = _called_layer(context)
        if adapting or layer is None:
            return next_fun(*args, **kwargs)
        path = "/".join((*layer.path[depth:], weight_name(layer)))
        if not is_targeted(config, path):
            return next_fun(*args, **kwargs)
        if layer is not context.module:
            raise AdapterError(f"{path}: the layer has an adapter of its own; leave it out with exclude_modules")
        y = next_fun(*args, **kwargs)
        adapting = True
        try:
            adapter = _adapter_at(path, layer, config)
            return y + getattr(adapter, context.method_name)(*args, **kwargs).astype(y.dtype)
        except ScopeParamNotFoundError:
            raise TargetError(
                f"{path}: the params hold no adapter for it; put adapters in with jlora.combine_params, or take the "
                "params that init returns"
            ) from None
        finally:
            adapting = False

    return intercept


def _called_layer(context: InterceptorContext) -> nn.Module | None:
    """The layer of Flax's whose own method is called, that of the class, which a derived one may call from its own."""
    module = context.module
    if isinstance(module, LoRALinenLayer):
        return module.wrapped
    method = getattr(context.orig_method, "func", context.orig_method)
    is_own = context.method_name in _INTERCEPTED and method.__module__ == nn.Dense.__module__
    return module if is_own and layer_kind(module) is not None else None


def _flag(module: nn.Module, tag: Any) -> None:
    """Marks a module's scope with a tag and its path, so that nn.jit does not take what it compiled for another.

    nn.jit keys its cache on the fields of a module and the flags of its scope, and knows nothing of interceptors.
    """
    if module.scope is not None:
        module.scope.flags = freeze({**module.scope.flags, "jlora": (tag, module.path)})


def _adapter_at(path: str, layer: nn.Module, config: LoraConfig) -> LoRAAdapter:
    return bound_adapter(
        layer,
        config.rank_of(path),
        alpha=config.effective_alpha_of(path),
        dropout=config.dropout,
        param_dtype=config.dtype,
        a_init=AInit(config.init, config.init_std),
    )
