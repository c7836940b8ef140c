"""`lora`: a function of params as a function of params and adapters."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax

from jlora.adapter import Entry, base_weight, gain_of
from jlora.config import LoraConfig
from jlora.contraction import Factorization
from jlora.cost import CostModel
from jlora.errors import AdapterError, ConfigError, JloraWarning, listed
from jlora.paths import leaves_by_path
from jlora.transform._keywords import check_keywords, name_of
from jlora.transform._lazy import as_lazy, element, is_packed, on_dense, packed
from jlora.transform._program import Program
from jlora.transform._registry import registry
from jlora.transform._run import Run, Settings
from jlora.transform._weight import Plain, Weight, adapted
from jlora.tree import bind, check_config, check_floating


def lora(
    fn: Callable[..., Any],
    config: LoraConfig,
    *,
    strict: bool = False,
    cost_model: CostModel | None = None,
    dropout_keyword: str = "dropout_key",
    partial: bool = False,
) -> Callable[..., Any]:
    """The same function with adapters: `lora(fn, config)(params, adapters, *args, **kwargs)`.

    `fn` is traced, and every product with an adapted weight becomes x@W + scaling (x@A)@B, whatever axes it contracts,
    through jit, scan, while, cond, checkpoint, custom_jvp, custom_vjp, vmap and shard_map. What cannot be factored is
    computed with the merged weight. `explain` shows which is which. Of a weight with a magnitude (DoRA) the product is
    multiplied with m / ||V||, whose norm is computed from the weight, A and B.

    Args:
      fn: any function whose first argument is a pytree of params. Arrays among its arguments are traced; everything
        else (strings, flags, Python numbers, functions) reaches it as it is.
      config: the configuration that the adapters were made with.
      strict: whether a weight that has to be merged is an error, and an adapter that reaches nothing.
      cost_model: chooses, from static shapes, between factored and merged where both are possible.
      dropout_keyword: the keyword by which the new function takes the key of its dropout. `fn` never gets it: where
        `fn` has an argument of this name, give another.
      partial: whether `fn` may use some of the adapted weights only, as one of several methods of a model does; then
        nothing tells of adapters that reach nothing.

    Returns:
      A function `(params, adapters, *args, dropout_key=None, **kwargs)` of the output of `fn`, in its dtypes. Without
      `dropout_key`, a PRNG key, there is no dropout; nor is there any where a weight is merged, of which a
      `JloraWarning` tells. Another tells of adapters on whose weights the output does not depend. It composes with
      jit, grad, jvp, vmap, scan and checkpoint; the base has gradients only where they are asked for.

    Raises:
      ConfigError: `config` is no LoraConfig; `fn` has an argument named as `dropout_keyword`.
      TargetError: when called: params, adapters and configuration do not fit.
      AdapterError: when called, with `strict`: the path, the primitive and the source line of what would be merged;
        the paths of adapters that reach nothing.

    >>> def fn(params, x):
    ...     return jnp.tanh(x @ params['up']) @ params['down']
    >>> params = {'up': jnp.ones((3, 5)), 'down': jnp.ones((5, 2))}
    >>> config = LoraConfig(rank=1, alpha=1, target_modules="up")
    >>> adapters = {'up': {'A': jnp.ones((3, 1)), 'B': jnp.ones((1, 5))}, 'down': None}
    >>> lora(fn, config)(params, adapters, jnp.ones((7, 3))).shape
    (7, 2)

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
    """
    check_config(config)
    _check_keyword(fn, dropout_keyword)
    name = name_of(fn)

    def adapted_fn(params: Any, adapters: Any, /, *args: Any, **kwargs: Any) -> Any:
        key = kwargs.pop(dropout_keyword, None)
        entries = bind(params, adapters, config)
        weights = adapted_weights(params, entries)
        program = Program(fn, params, args, kwargs)
        if not partial:
            tell_of_unread(name, program, entries, strict)
        settings = Settings(registry(), cost_model or CostModel(), strict, config.dropout)
        run = Run(settings, key if config.dropout else None)
        outputs = program.evaluate(run, weights, program.leaves)
        if run.key is not None:
            _tell_of_undropped([path for path in entries if path in run.undropped])
        return program.output(outputs)

    adapted_fn.__name__ = adapted_fn.__qualname__ = f"lora_{name}"
    adapted_fn.__doc__ = f"`{name}` with adapters; see `jlora.lora`."
    return adapted_fn


def adapted_weights(params: Any, entries: Mapping[str, Entry]) -> dict[str, Weight | Plain]:
    """The weights of `params` that have an entry, by path; those with A and B are followed with them and their gain."""
    leaves = leaves_by_path(params)
    check_floating({path: leaves[path] for path in entries})
    weights: dict[str, Weight | Plain] = {}
    for path, entry in entries.items():
        leaf = as_lazy(leaves[path], path)
        weight = leaf if is_packed(leaf) else jnp.asarray(leaf)
        base = on_dense(partial(base_weight, entry), weight) if entry.parts.keys() & {"value", "offset"} else weight
        value = base if is_packed(base) else base.astype(weight.dtype)
        if entry.split is None:
            weights[path] = Plain(value)
        else:
            a, b = (jnp.asarray(entry.parts[name]) for name in "AB")
            weights[path] = adapted(path, value, a, b, entry.split, entry.scaling, _gain(entry, base))
    return weights


def _gain(entry: Entry, base: Any) -> Any:
    """The gain of an entry; that of a stack of lazy bases one by one, so that only one of them is dense at a time."""
    if "magnitude" not in entry.parts or entry.split is None:
        return None
    if not is_packed(base) or not base.front or entry.split.roles[0] != "b":
        return on_dense(partial(gain_of, entry), base)
    split = Factorization(entry.split.roles[1:])

    def of_one(one: Any) -> Any:
        taken, parts = one
        return on_dense(partial(gain_of, Entry(parts, entry.scaling, split)), element(base, taken))

    return lax.map(of_one, (packed(base), dict(entry.parts)))


def _check_keyword(fn: Callable[..., Any], keyword: Any) -> None:
    """Raises a ConfigError for a keyword that is none, or that `fn` has an argument of."""
    if not isinstance(keyword, str) or not keyword.isidentifier():
        raise ConfigError(f"dropout_keyword: found {keyword!r}, wanted the name of an argument, such as 'dropout_key'")
    way_out = "give that another name, as in jlora.lora(fn, config, dropout_keyword='lora_{name}')"
    check_keywords("jlora.lora", fn, [keyword], 1, way_out)


def tell_of_unread(name: str, program: Program, entries: Iterable[str], strict: bool) -> None:
    """Warns of adapters, by the paths of their weights, that reach nothing; with `strict` that is an error."""
    read = program.read()
    paths = [path for path in entries if path not in read]
    if not paths:
        return
    text = (
        f"the adapters of {listed(paths)} reach nothing: what {name} returns does not depend on these params. Does "
        "it use weights of its own instead, as a bound model or a closure does (lambda params, x: x @ weight)? Or does "
        "this call not use them, as one of another mode does not use a head? Then leave them out with exclude_modules"
    )
    if strict:
        raise AdapterError(text)
    warnings.warn(text, JloraWarning, stacklevel=3)


def _tell_of_undropped(paths: Sequence[str]) -> None:
    """Warns of weights that are merged although there is a dropout key."""
    if paths:
        text = f"no dropout for the adapters of {listed(paths)}: the weights are merged, and jlora.explain says where"
        warnings.warn(text, JloraWarning, stacklevel=3)
