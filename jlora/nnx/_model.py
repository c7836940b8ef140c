"""`LoRA`: an NNX model with adapters, by split, transform and merge."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jlora.adapter import Entry, part_axes
from jlora.boxes import names_of
from jlora.config import LoraConfig
from jlora.errors import AdapterError
from jlora.lazy import is_lazy
from jlora.paths import path_string
from jlora.transform import Explanation, check_args, explain, lora, resolve_config
from jlora.tree import bind, init_lora, merge_params

_NAMES = ("out_sharding", "sharding_names", "sharding")  # Flax before 0.12 says "sharding"
_BASE = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))


class LoRA(nnx.Module):
    """An NNX model with adapters at its targeted weights, and called like the model.

    The model is held as it is, and every A and B is an `nnx.LoRAParam`: `nnx.DiffState(0, nnx.LoRAParam)` takes their
    gradients alone, `nnx.Optimizer(lora, optimizer, wrt=nnx.LoRAParam)` trains them alone. A call splits the model
    into its params and the rest, runs `jlora.lora` of it, and writes what changed of the rest (batch statistics, counts
    of random streams, caches) back to the model; params that the model itself sets while it runs are not written back.
    Other methods of the model are called by their names. Outside `nnx.jit` every call traces the model anew.

    Dropout acts on the input of the adapters where config.dropout > 0, and is switched as that of `nnx.Dropout` is:
    by `lora.eval()` and `lora.train()`, and by `nnx.view(lora, deterministic=True)`, which leaves `lora` as it was.

    Args:
      model: the base.
      config: what is adapted and how. Paths are those of `nnx.state(model, nnx.Param)`, as `blocks/0/query/kernel`.
      args: example arguments of the model, arrays, by which each weight's factorization follows from its use; without
        any it follows from the names of Flax's parameters.
      kwargs: example keyword arguments.
      rngs: A is drawn from its stream `params`, dropout from `dropout`; both from config.seed where None.
      adapters: adapters at the paths of their weights, instead of new ones with B = 0.

    Attributes:
      model: the base.
      config: with the factorizations that were found; `merge_params` and `summary` take it.
      lora: the variables of the adapters, at the paths of their weights.

    Raises:
      ConfigError: `args` is no tuple.
      AdapterError: the model is no `nnx.Module`, or has a LoRA in it.
      TargetError: the configuration does not fit the model, or the adapters do not.

    >>> import jax.numpy as jnp
    >>> model = nnx.Sequential(nnx.Linear(3, 5, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(5, 7, rngs=nnx.Rngs(1)))
    >>> x = jnp.ones((2, 3))
    >>> lora = LoRA(model, LoraConfig(rank=2, target_modules="layers/2"), args=(x,), rngs=nnx.Rngs(2))
    >>> bool((lora(x) == model(x)).all())
    True
    >>> jax.tree.map(jnp.shape, lora.adapters['layers'][2])
    {'bias': None, 'kernel': {'A': (5, 2), 'B': (2, 7)}}
    """

    def __init__(
        self,
        model: nnx.Module,
        config: LoraConfig,
        *,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs | None = None,
        adapters: Any = None,
    ) -> None:
        if not isinstance(model, nnx.Module):
            raise AdapterError(f"model: found {type(model).__name__}, wanted an nnx.Module")
        if any(isinstance(node, LoRA) for _, node in nnx.iter_graph(model)):
            raise AdapterError("a LoRA inside another: give one of them a configuration that targets both")
        check_args(args)
        self.model = model
        if args or kwargs:
            function, params, rest = self._function("__call__", args, kwargs or {})
            config = resolve_config(function, config, params, rest)
        if adapters is None:
            adapters = init_lora(None if rngs is None else rngs.params(), self.params, config)
        entries = bind(self.params, adapters, config)
        self.config = config
        self.lora = nnx.data(_variables(model, adapters, entries))
        self.deterministic = False
        if config.dropout:
            self.rngs = (nnx.Rngs(config.seed) if rngs is None else rngs).dropout.fork()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run("__call__", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and callable(getattr(type(vars(self).get("model")), name, None)):
            return functools.partial(self._run, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def set_view(self, deterministic: bool | None = None) -> None:
        """What `nnx.view` calls.

        Args:
          deterministic: if True, disables the dropout of the adapters.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def set_mode(self, deterministic: bool | None = None, **others: Any) -> dict[str, Any]:
        """`set_view` as Flax 0.12.1 to 0.12.3 call it, by `nnx.eval_mode` and `nnx.train_mode`."""
        self.set_view(deterministic)
        return others

    @property
    def params(self) -> Any:
        """The params of the base, arrays in nested dicts."""
        return nnx.to_pure_dict(nnx.state(self.model, _BASE))

    @property
    def adapters(self) -> Any:
        """The adapters, arrays in the structure of `params`, for `jlora.merge_params` and `jlora.summary`."""
        return jax.tree.map(lambda node: jax.tree.leaves(node)[0], self.lora, is_leaf=_is_variable)

    def merge(self) -> nnx.Module:
        """A copy of the base whose weights hold their updates; see `jlora.merge_params`."""
        model = nnx.clone(self.model)
        nnx.update(model, merge_params(self.params, self.adapters, self.config))
        return model

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """How a call of the model computes each use of each adapted weight; see `jlora.explain`."""
        function, params, rest = self._function("__call__", args, kwargs)
        return explain(function, self.config, params, rest, entries=self.adapters)

    def _run(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """A method of the model, by name, with the adapters in it."""
        function, params, rest = self._function(method, args, kwargs)
        key = self.rngs() if self.config.dropout and not self.deterministic else None
        adapted = lora(function, self.config, partial=method != "__call__")
        output, graphdef, state = adapted(params, self.adapters, rest, dropout_key=key)
        if not _written((self.model, args, kwargs), rest, state, graphdef):
            raise AdapterError(
                f"{type(self.model).__name__}.{method} changes attributes that are no variables while it runs; call it "
                "on the model itself"
            )
        return output

    def _function(self, method: str, args: Any, kwargs: Any) -> tuple[Callable[..., Any], Any, Any]:
        """A method as a function of params and the rest, which holds the arguments too, and these two.

        The function returns the method's output, and the graph and the rest as the method leaves them.
        """
        graphdef, params, rest = _split((self.model, args, kwargs))
        structure: Any = jax.tree.structure(params, is_leaf=is_lazy)

        def function(params: Any, rest: Any) -> Any:
            nodes: Any = nnx.merge(graphdef, structure.unflatten(jax.tree.leaves(params, is_leaf=is_lazy)), rest)
            model, args, kwargs = nodes
            output = getattr(model, method)(*args, **kwargs)
            graphdef_after, _, rest_after = _split(nodes)
            return output, graphdef_after, rest_after

        return function, self.params, rest


def _variables(model: nnx.Module, adapters: Any, entries: Mapping[str, Entry]) -> Any:
    """The adapters as variables; where a weight's metadata name its axes, those of its parts name theirs."""
    weights = {"/".join(map(str, path)): weight for path, weight in nnx.to_flat_state(nnx.state(model, _BASE))}

    def variable(key_path: Any, part: Any) -> nnx.LoRAParam:
        *at, name = key_path
        path = path_string(at)
        weight = weights[path]
        axes = part_axes(len(weight.shape), entries[path].split)[name.key]
        return nnx.LoRAParam(part, **_named(weight.get_metadata(), axes))

    return jax.tree_util.tree_map_with_path(variable, adapters)


def _named(metadata: Mapping[str, Any], axes: Sequence[int | None]) -> dict[str, Any]:
    """What of a weight's metadata says how its axes are sharded, for a part that has these axes of it."""
    field = next((field for field in _NAMES if metadata.get(field)), None)
    if field is None:
        return {}
    own = {other: metadata[other] for other in ("mesh", "sharding_rules", "eager_sharding") if other in metadata}
    if "eager_sharding" in own and own.get("mesh") is None and jax.sharding.get_abstract_mesh().empty:
        own["eager_sharding"] = False  # Flax 0.12 places a variable as it is made, and needs a mesh to do so
    return own | {field: names_of(metadata[field], axes)}


def _split(nodes: Any) -> Any:
    """The graph, the params of the model, which is the first node, and the rest."""
    return nnx.split(nodes, nnx.All(_BASE, lambda path, _: path[0] == 0), ...)


def _written(nodes: Any, before: nnx.State, after: nnx.State, graphdef: Any) -> bool:
    """Writes what differs to the variables of `before`, those of the nodes; whether that makes them the graph."""
    known = dict(nnx.to_flat_state(before))
    changed = {path: leaf for path, leaf in nnx.to_flat_state(after) if not _holds(known.get(path), leaf)}
    old = {path: leaf for path, leaf in changed.items() if _is_variable(known.get(path))}
    try:
        nnx.update(nodes, nnx.from_flat_state({path: leaf for path, leaf in changed.items() if path not in old}))
    except ValueError:
        return False
    for path, leaf in old.items():
        known[path].copy_from(leaf)  # nnx.update would not refuse a variable of another trace
    return nnx.graphdef(nodes) == graphdef


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _holds(known: Any, leaf: Any) -> bool:
    """Whether these are the same arrays: what a trace does not touch comes out of it as the same objects."""
    return [*map(id, jax.tree.leaves(known))] == [*map(id, jax.tree.leaves(leaf))]
