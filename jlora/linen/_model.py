"""`LoRA`: a Linen module with adapters at its targeted weights, by `jlora.lora`, its code unchanged."""

import functools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import bind
from flax.errors import CallCompactUnboundModuleError, FlaxError

from jlora import transform
from jlora.adapter import is_adapter, is_entry
from jlora.boxes import unboxed
from jlora.config import LoraConfig
from jlora.contraction import factorization_from_shapes
from jlora.cost import CostModel
from jlora.errors import AdapterError, TargetError
from jlora.linen._scope import InPlace, Method, in_scope, lifted
from jlora.paths import is_param, leaves_by_path, literal_pattern, path_string
from jlora.tree import (
    Survey,
    Target,
    check_patterns,
    combine_params,
    in_structure,
    init_lora,
    is_targeted,
    split_params,
    survey,
)

_UNADAPTED = "excluded, narrower than the rank, or no weight that the model multiplies or looks up"


class LoRA(InPlace):
    """A Linen module with adapters at its targeted weights.

    A call runs `jlora.lora` of the model: what `config` targets is adapted wherever and however the model uses it, in
    layers of its own, tied heads and lifted transforms too. The base's parameters keep their paths; A and B stand
    beside them under `lora`, as in `jlora.combine_params`. Methods of the model are called as before, by their names:
    `lora.apply(variables, x, method="encode")`, `lora.bind(variables).encode(x)`; `model` itself stays unbound, so that
    nobody calls it without its adapters. It is traced, outside jit at every call: what it does must not depend on the
    values of arrays. The input of the adapters is dropped out where there is a `dropout` rng and config.dropout > 0.

    Attributes:
      model: the module.
      config: what is adapted and how. `init` reads from the model's use of its weights what it does not say.
      strict, cost_model: as in `jlora.lora`: whether a weight that has to be merged is an error; what chooses between
        factored and merged.

    >>> import jax.numpy as jnp
    >>> lora = LoRA(nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(7)]), LoraConfig(rank=2, target_modules="layers_2"))
    >>> variables = lora.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> jax.tree.map(jnp.shape, variables['params']['layers_2'])
    {'bias': (7,), 'kernel': (5, 7), 'lora': {'A': (5, 2), 'B': (2, 7)}}

    Raises:
      TargetError: from `init`, where a pattern adapts no weight of the model; from a call, where a weight has no
        adapter.
      AdapterError: a layer has an adapter of its own, as a LoRA within has.
    """

    model: nn.Module
    config: LoraConfig
    strict: bool = False
    cost_model: CostModel | None = None

    held = "model"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run("__call__", *args, **kwargs)

    def _run(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """A method of the model, by name, with the adapters in it."""
        if self.scope is None:
            raise CallCompactUnboundModuleError()
        is_new = self.is_initializing() or (
            self.is_mutable_collection("params") and not _parted(self._params(), self.config)[1]
        )
        use = self._initialized if is_new else functools.partial(self._adapted, partial=name != "__call__")
        model = self.model if self.model.scope is not None else in_scope(self.model, self.scope.rewound())
        return lifted(model, name, args, kwargs, use)

    @nn.nowrap
    def _hold(self, module: nn.Module) -> None:
        """The model stays unbound: whoever calls it would miss the adapters."""

    @nn.nowrap
    def _params(self) -> Any:
        assert self.scope is not None
        return self.scope.variables().get("params", {})

    @nn.nowrap
    def _adapted(self, method: Method, partial: bool) -> Any:
        """The output of the model with the adapters at hand."""
        base, adapters, others = nn.unbox(_parted(self._params(), self.config))

        def function(params: Any, rest: Any, others: Any) -> Any:
            return method.apply(combine_params(params, others), rest)

        function.__name__ = type(self.model).__name__
        wanted = self._wanted(method, base, others, adapters)
        missing = [path for path in wanted if path not in adapters]
        if missing:
            raise TargetError(
                f"{missing[0]}: the params hold no adapter for it; put adapters in with jlora.combine_params, take the "
                "params that init returns, or leave it out with exclude_modules"
            )
        if not adapters:
            return function(base, method.rest, others)
        roles = {path: _roles(target, adapters[path]) for path, target in wanted.items() if "A" in adapters[path]}
        config = _exactly(self.config, adapters, roles)
        key = self._dropout_key()
        call = transform.lora(function, config, strict=self.strict, cost_model=self.cost_model, partial=partial)
        return call(base, _tree(base, adapters), method.rest, others, dropout_key=key)

    @nn.nowrap
    def _wanted(self, method: Method, base: Any, others: Any, adapters: Mapping[str, Any]) -> dict[str, Target]:
        """The targets among the weights that a call of a method uses.

        The model is traced for it where the configuration does not give the factorization of every adapter at hand.
        """
        given = [path for path in leaves_by_path(base) if self.config.matches("factorizations", path)]
        if adapters and adapters.keys() <= set(given):
            targets = survey(base, self.config).targets
            return {path: targets[path] for path in given if path in targets}
        return transform.survey_uses(_rehearsal(method), self.config, base, method.rest, others)[1].targets

    @nn.nowrap
    def _dropout_key(self) -> jax.Array | None:
        assert self.scope is not None
        if not self.config.dropout or not self.has_rng("dropout"):
            return None
        return self.scope.push("lora", reuse=True).make_rng("dropout")

    @nn.nowrap
    def _initialized(self, method: Method) -> Any:
        """The output of the model alone, which makes its params; then A and B are made beside them, with B zero."""
        before = _parted(self._params(), self.config)[1]

        def complete(params: Any, collections: tuple[str, ...]) -> Any:
            base, adapters, others = _parted(params, self.config)
            own = [path for path in adapters if path not in before]
            if own:
                raise AdapterError(f"{own[0]}: the layer has an adapter of its own; leave it out with exclude_modules")
            rest = method.rest, unboxed(others)
            _, found = _uses(_rehearsal(method), self.config, unboxed(base), rest, collections)
            roles = {path: target.factorization.roles for path, target in found.targets.items() if path not in adapters}
            if not roles:
                return params
            assert self.scope is not None
            key = self.scope.push("lora", reuse=True).make_rng("params")
            made = init_lora(key, base, _exactly(self.config, roles, roles))
            return combine_params(combine_params(base, others), _tree(base, adapters | _entries(made)))

        return method.init(complete)

    @nn.nowrap
    def __getattr__(self, name: str) -> Any:
        fields = vars(self)
        if not name.startswith("_") and callable(getattr(type(fields.get("model")), name, None)):
            return types.MethodType(lambda module, *args, **kwargs: module._run(name, *args, **kwargs), self)
        return super().__getattr__(name)

    @nn.nowrap
    def init_with_output(self, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As `nn.Module.init_with_output`, and refuses patterns that no weight of the model matches."""
        y, variables = super().init_with_output(*args, method=self._by_name(method), **kwargs)
        base, adapters, _ = _parted(variables.get("params", {}), self.config)
        check_patterns(self.config, list(leaves_by_path(base)), list(adapters), _UNADAPTED)
        return y, variables

    @nn.nowrap
    def apply(self, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As `nn.Module.apply`; `method` is the name of a method of the model, or the method."""
        return super().apply(*args, method=self._by_name(method), **kwargs)

    @nn.nowrap
    def explain(self, variables: Any, *args: Any, **kwargs: Any) -> transform.Explanation:
        """How `apply` with these arguments computes each use of each adapted weight; see `jlora.explain`.

        Args:
          variables: arrays or shapes, with or without adapters.
          *args: of `apply`.
          **kwargs: of `apply`, such as `method`, `rngs` and `mutable`.
        """
        base, entries, others = unboxed(_parted(variables["params"], self.config))
        rest = variables, others, args, kwargs
        adapters = None if all(map(is_adapter, entries.values())) else in_structure(base, entries, self.config)

        def function(params: Any, variables: Any, others: Any, args: Any, kwargs: Any) -> Any:
            return self.model.apply({**variables, "params": combine_params(params, others)}, *args, **kwargs)

        return transform.explain(function, self.config, base, *rest, cost_model=self.cost_model, entries=adapters)

    @nn.nowrap
    def _by_name(self, method: Any) -> Any:
        name = getattr(method, "__name__", "")
        return name if name and getattr(type(self.model), name, None) is method else method


def resolve_config(model: nn.Module, config: LoraConfig, *args: Any, **kwargs: Any) -> LoraConfig:
    """`config` with the factorization of every adapted weight written out, as the model uses it.

    `jlora.resolve_config` of `model.init`. With the configuration that this returns, `init_lora`, `merge_params` and
    `summary` need not guess, and adapt the same weights as `LoRA(model, config)`.

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
    key = jax.random.key(0)
    variables = jax.eval_shape(lambda *args: model.init(key, *args, **kwargs), *args)
    base, adapters = split_params(unboxed(variables.pop("params", {})))
    method = kwargs.pop("method", None) or "__call__"

    def function(params: Any, adapters: Any, *args: Any, mutable: Any, **flags: bool) -> Any:
        both = {"params": combine_params(params, adapters)}
        bound = model.clone(parent=bind(both, {"params": key}, mutable=mutable, flags=flags))
        call = getattr(type(bound), method) if isinstance(method, str) else getattr(method, "__func__", method)
        return call(bound, *args, **kwargs)

    resolved, found = _uses(function, config, base, (adapters, *args), tuple(variables))
    found.checked()
    return resolved


def _uses(
    function: Callable[..., Any], config: LoraConfig, base: Any, rest: tuple[Any, ...], collections: tuple[str, ...]
) -> tuple[LoraConfig, Survey]:
    """What a configuration makes of a model that is initialized, and so makes these collections beside its params.

    Some lifted transforms (`nn.map_variables`) make params anew then, and find those at hand in the way: such a model
    is asked as it is applied.
    """
    try:
        initializing = functools.partial(function, mutable=collections, initializing=True)
        return transform.survey_uses(initializing, config, base, *rest)
    except FlaxError:
        applying = functools.partial(function, mutable=collections, initializing=False)
        return transform.survey_uses(applying, config, base, *rest)


def _rehearsal(method: Method) -> Callable[..., Any]:
    """A method as a function of the base, the rest of what it reads, and the adapters of its own."""

    def function(params: Any, rest: Any, others: Any, **settings: Any) -> Any:
        return method.rehearse(combine_params(params, others), rest, **settings)

    return function


def _parted(params: Any, config: LoraConfig) -> tuple[Any, dict[str, Any], Any]:
    """The base, the adapters of its targets by path, and the tree of the adapters that the model has of its own."""
    base, adapters = split_params(params)
    weights = leaves_by_path(base)
    targeted = {
        path: entry
        for path, entry in _entries(adapters).items()
        if path in weights and ("A" not in entry or is_targeted(config, path))  # no target names a bias or a norm
    }
    others = jax.tree_util.tree_map_with_path(
        lambda path, entry: None if path_string(path) in targeted else entry, adapters, is_leaf=is_entry
    )
    return base, targeted, others


def _entries(adapters: Any) -> dict[str, Any]:
    """The entries of the adapters by path, in boxes where they are in some."""
    leaves = jax.tree_util.tree_leaves_with_path(adapters, is_leaf=is_entry)
    return {path_string(path): entry for path, entry in leaves}


def _tree(base: Any, entries: Mapping[str, Any]) -> Any:
    """Entries by path as a tree of the structure of the base."""
    return jax.tree_util.tree_map_with_path(lambda path, _: entries.get(path_string(path)), base, is_leaf=is_param)


def _exactly(config: LoraConfig, paths: Iterable[str], factorizations: Mapping[str, str]) -> LoraConfig:
    """The configuration that says of these paths, and of no other, what `config` says."""
    patterns = {path: literal_pattern(path) for path in paths}
    given = {path: roles for path in patterns for _, roles in config.matches("factorizations", path)[:1]}
    return config.replace(
        target_modules=tuple(patterns.values()),
        exclude_modules=(),
        rank_pattern={pattern: config.rank_of(path) for path, pattern in patterns.items()},
        alpha_pattern={pattern: config.alpha_of(path) for path, pattern in patterns.items()},
        factorizations={
            patterns[path]: roles for path, roles in (dict(factorizations) | given).items() if path in patterns
        },
    )


def _roles(target: Target, adapter: Mapping[str, Any]) -> str:
    """The roles of a weight's axes as it is used, or as its adapter has them, which another use has made."""
    shapes = adapter["A"].shape, adapter["B"].shape
    if target.factorization.adapter_shapes(target.shape, shapes[0][-1]) == shapes:
        return target.factorization.roles
    try:
        return factorization_from_shapes(target.shape, *shapes, transposed=True).roles
    except AdapterError as error:
        raise TargetError(f"{target.path}: {error}") from None
