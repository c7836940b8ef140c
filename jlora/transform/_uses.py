"""How a function uses its weights: the factorizations that follow, and adapters made with them."""

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax

from jlora import tree
from jlora.config import LoraConfig
from jlora.cost import CostModel
from jlora.errors import ConfigError
from jlora.paths import literal_pattern, names_leaf
from jlora.transform._program import Program
from jlora.transform._rules import RULES
from jlora.transform._run import Run, Settings, Use
from jlora.transform._weight import probe
from jlora.tree import check_config, is_floating, is_targeted

_ADDED = ("add", "sub", "add_any")


def resolve_config(fn: Callable[..., Any], config: LoraConfig, params: Any, *args: Any, **kwargs: Any) -> LoraConfig:
    """`config` with the factorization of every weight written out as `fn` uses it.

    What is contracted is an in axis, what is looked up by index too, what the other operand shares is a batch axis,
    and so is what a scan or an index takes apart; the rest are out axes. Of several uses a lookup counts, then the
    first. With this configuration `lora`, `init_lora`, `merge_params` and `summary` read the axes alike without
    guessing. Weights that `fn` only adds, or that are vectors where it uses them, are excluded unless a pattern names
    them.

    Args:
      fn: a function whose first argument is params.
      config: what is adapted and how; its own factorizations go first.
      params: arrays or shapes; nothing is computed.
      *args: of `fn`, arrays or shapes.
      **kwargs: of `fn`.

    >>> def fn(params, x):
    ...     return jax.numpy.einsum('btd,hdk->bthk', x, params['query'])
    >>> shape = jax.ShapeDtypeStruct
    >>> params, x = {'query': shape((3, 5, 7), 'float32')}, shape((2, 11, 5), 'float32')
    >>> resolve_config(fn, LoraConfig(rank=2), params, x).factorizations
    (('query', 'oio'),)
    """
    check_config(config)
    uses = _probed(fn, config, params, args, kwargs)
    given = dict(config.factorizations)
    found: dict[str, str] = {}
    exclude = list(config.exclude_modules)
    for path, of_path in uses.items():
        pattern = literal_pattern(path)
        split = [use for use in of_path if {"i", "o"} <= set(use.roles)]
        roles = next((use.roles for use in sorted(split, key=lambda use: use.primitive != "gather")), None)
        named = any(names_leaf(target, path) for target in config.target_modules)
        if roles is not None:
            found.setdefault(pattern, roles)
        elif not named and all(_is_vector(use) for use in of_path):
            exclude.append(pattern)
    return config.replace(
        factorizations=given | {p: r for p, r in found.items() if p not in given}, exclude_modules=exclude
    )


def _is_vector(use: Use) -> bool:
    return sum(size != 1 for size in use.shape) < 2 or use.primitive in _ADDED


def _probed(fn: Callable[..., Any], config: LoraConfig, params: Any, args: Any, kwargs: Any) -> dict[str, list[Use]]:
    """The uses of every leaf of two or more axes that the patterns take in, by path, in the order of the program."""
    program = Program(fn, params, args, kwargs)
    uses: list[Use] = []
    run = Run(Settings(RULES, CostModel()), uses=uses)

    def evaluated(*arrays: jax.Array) -> Any:
        probes = {}
        for path, array in zip(program.paths, arrays, strict=True):
            if path is not None and is_targeted(config, path) and array.ndim > 1 and is_floating(array):
                probes[path] = probe(path, array)
        return program.evaluate(run, probes, arrays)

    jax.eval_shape(evaluated, *program.leaves)
    by_path: dict[str, list[Use]] = {}
    for use in uses:
        by_path.setdefault(use.path, []).append(use)
    return by_path


def check_args(args: Any) -> None:
    """Raises a ConfigError for an argument that stands where a tuple of them is wanted."""
    if not isinstance(args, tuple | list):
        raise ConfigError(f"args: found {type(args).__name__}, wanted a tuple of the arguments, such as (x,)")


def init_lora(
    key: chex.PRNGKey | None,
    params: Any,
    config: LoraConfig,
    *,
    fn: Callable[..., Any] | None = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """The adapters of a params tree, with B zero: the model is unchanged.

    Args:
      key: PRNG key; `None` for `jax.random.key(config.seed)`. Each adapter's key is derived from it and the path,
        so that another target does not change the others.
      params: a pytree of arrays or of `jax.ShapeDtypeStruct`: dicts, lists, FrozenDicts, dataclasses.
      config: what is adapted and how.
      fn: a function `fn(params, *args, **kwargs)` that says how the axes of each weight split, by how it uses them;
        without it the names of Flax's parameters do. It is traced, not run.
      args: the arguments of `fn` after params, arrays or shapes.
      kwargs: its keyword arguments.

    Returns:
      A pytree of the structure of `params`: an adapter where a weight is adapted, `None` elsewhere.

    Raises:
      ConfigError: `args` is no tuple.
      TargetError: the configuration does not fit the tree; every problem is named with its path.

    >>> params = {'up': {'kernel': jax.numpy.ones((5, 7)), 'bias': jax.numpy.ones(7)}}
    >>> jax.tree.map(jax.numpy.shape, init_lora(jax.random.key(0), params, LoraConfig(rank=2)))
    {'up': {'bias': None, 'kernel': {'A': (5, 2), 'B': (2, 7)}}}
    """
    check_args(args)
    if fn is not None:
        config = resolve_config(fn, config, params, *args, **(kwargs or {}))
    return tree.init_lora(key, params, config)
