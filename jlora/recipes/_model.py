"""The model of a job: a Linen module, a function or an NNX module, as one function of params and state."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import unfreeze
from flax.errors import ScopeCollectionNotFound, ScopeVariableNotFoundError
from rich.console import Console

from jlora.errors import ConfigError
from jlora.paths import leaves_by_path
from jlora.recipes._config import JobConfig
from jlora.recipes._language import LanguageModel

_FORMS = """wanted it to return one of
  (module, params), (module, params, collections): a Linen module; collections are such as {"batch_stats": ...}
  (function, params): any function(params, inputs) -> outputs
  (function, params, state): function(params, state, inputs) -> (outputs, state)
  model: an nnx.Module, with its params
  a jlora.recipes.LanguageModel"""
_IN_TRAINING = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}
_NNX_PARAMS = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))


class Model(NamedTuple):
    """What `jlora.lora` adapts.

    Attributes:
      fn: `fn(params, inputs, state, key)` returns the outputs and the state as the model leaves it. The key is of the
        step, None outside of training: the model then runs without dropout, and on the statistics that it has.
      params: its base.
      state: what it changes as it runs, such as batch statistics, a pytree of arrays; None where there is nothing.
      language: the language model that it is, with its tokenizer; None for another.
    """

    fn: Callable[[Any, Any, Any, Any], tuple[Any, Any]]
    params: Any
    state: Any
    language: LanguageModel | None = None


def call_model(job: JobConfig, console: Console) -> Model:
    """The model that the function of a job's [model] returns."""
    where = f"model.function = {job.model.function!r}"
    return read_model(job.model.call("model.function", console=console), where)


def read_model(found: Any, where: str) -> Model:
    """The model that a job's function returned.

    Raises:
      ConfigError: what is none of the forms; `where` names the function.
    """
    if isinstance(found, LanguageModel):
        return _checked(_of_language(found), where)
    if isinstance(found, nnx.Module):
        return _checked(_of_nnx(found, where), where)
    if isinstance(found, tuple) and len(found) in (2, 3):
        first, params, state = (*found, None)[:3]
        if isinstance(first, nn.Module):
            return _checked(_of_linen(first, params, state, where), where)
        if callable(first) and not isinstance(first, type | nnx.Module):
            return _checked(_of_function(first, params, state), where)
        raise ConfigError(f"{where}: found {type(first).__name__} in the first place; {_FORMS}")
    raise ConfigError(f"{where}: found {_described(found)}; {_FORMS}")


def _described(found: Any) -> str:
    return f"a tuple of {len(found)}" if isinstance(found, tuple) else type(found).__name__


def _checked(model: Model, where: str) -> Model:
    """The model, its state of arrays, or None where that is empty.

    Raises:
      ConfigError: what no checkpoint can hold.
    """
    if not jax.tree.leaves(model.params):
        raise ConfigError(f"{where}: the params are empty; {_FORMS}")
    for path, leaf in leaves_by_path(model.state).items():
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
            raise ConfigError(
                f"{where}: the state {path} is {dtype or type(leaf).__name__}, wanted an array of numbers"
            )
    state = jax.tree.map(jnp.asarray, model.state) if jax.tree.leaves(model.state) else None
    return model._replace(state=state)


def _of_function(function: Callable[..., Any], params: Any, state: Any) -> Model:
    takes = _taken(function, 2 if state is None else 3, ("key", "rngs"))
    if state is None:
        return Model(lambda params, inputs, _, key: (function(params, inputs, **takes(key)), None), params, None)
    return Model(lambda params, inputs, state, key: function(params, state, inputs, **takes(key)), params, state)


def _of_language(language: LanguageModel) -> Model:
    decode = language.function()

    def fn(params: Any, inputs: Any, state: Any, key: Any) -> tuple[Any, Any]:
        known = {name: inputs[name] for name in ("positions", "segments") if name in inputs}
        return decode(params, inputs["tokens"], **known), state

    return Model(fn, language.read_params(), None, language)


def _of_linen(module: nn.Module, params: Any, collections: Any, where: str) -> Model:
    if isinstance(params, Mapping) and "params" in params:
        raise ConfigError(
            f"{where}: found the variables of init in the place of the params: return (module, "
            "variables['params'], the other collections)"
        )
    if collections is not None and not isinstance(collections, Mapping):
        raise ConfigError(f"{where}: found {type(collections).__name__} for the collections; {_FORMS}")
    takes = _taken(module.__call__, 1)

    def fn(params: Any, inputs: Any, state: Any, key: Any) -> tuple[Any, Any]:
        variables = {"params": params, **(state or {})}
        rngs = None if key is None else {"dropout": key}
        try:
            if state is None:
                return module.apply(variables, inputs, rngs=rngs, **takes(key)), None
            outputs, changed = module.apply(variables, inputs, rngs=rngs, mutable=list(state), **takes(key))
        except (ScopeCollectionNotFound, ScopeVariableNotFoundError) as error:
            raise ConfigError(
                f"{where}: the module has variables beside its params, which it did not get: return (module, params, "
                f"collections), all of module.init: {str(error).partition(' (http')[0]}"
            ) from None
        return outputs, {**state, **changed}

    return Model(fn, params, None if collections is None else unfreeze(dict(collections)))


def _of_nnx(model: Any, where: str) -> Model:
    if not callable(model):
        raise ConfigError(f"{where}: {type(model).__name__} has no __call__(inputs)")
    takes = _taken(model.__call__, 1)
    model.train()
    in_training = nnx.graphdef(model)
    model.eval()
    parts: Any = nnx.split(model, _NNX_PARAMS, nnx.RngState, ...)
    evaluated, params, streams, state = parts
    params_structure: Any = jax.tree.structure(params)
    state_structure: Any = jax.tree.structure(state)

    def fn(params: Any, inputs: Any, state: Any, key: Any) -> tuple[Any, Any]:
        own_params = params_structure.unflatten(jax.tree.leaves(params))
        own_state = state_structure.unflatten(jax.tree.leaves(state))
        drawn = streams if key is None else _streams_of(key, streams)
        copy: Any = nnx.merge(evaluated if key is None else in_training, own_params, drawn, own_state)
        outputs = copy(inputs, **takes(key))
        if state is None:
            return outputs, None
        split: Any = nnx.split(copy, _NNX_PARAMS, nnx.RngState, ...)
        after = leaves_by_path(nnx.to_pure_dict(split[-1]))
        return outputs, jax.tree.unflatten(jax.tree.structure(state), [after[path] for path in leaves_by_path(state)])

    return Model(fn, nnx.to_pure_dict(params), nnx.to_pure_dict(state))


def _streams_of(key: Any, streams: Any) -> Any:
    """The random streams of an NNX model, begun anew from the key of a step, so that a resumed run draws the same."""
    leaves: list[Any] = jax.tree.leaves(streams)
    structure: Any = jax.tree.structure(streams)
    for i, leaf in enumerate(leaves):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaves[i] = jax.random.split(jax.random.fold_in(key, i), leaf.shape)
    return structure.unflatten(leaves)


def _taken(
    function: Callable[..., Any], positional: int, keys: tuple[str, ...] = ()
) -> Callable[[Any], dict[str, Any]]:
    """What a call gets by name: what the function has parameters for, of the mode of the model and of `keys`."""
    try:
        parameters = [*inspect.signature(function).parameters.values()][positional:]
    except (TypeError, ValueError):  # a builtin has no signature
        parameters = []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = {parameter.name for parameter in parameters if parameter.kind in named} & {*_IN_TRAINING, *keys}

    def taken(key: Any) -> dict[str, Any]:
        given: dict[str, Any] = {"key": key, "rngs": None if key is None else {"dropout": key}}
        for name, in_training in _IN_TRAINING.items():
            given[name] = in_training if key is not None else not in_training
        return {name: given[name] for name in names}

    return taken
