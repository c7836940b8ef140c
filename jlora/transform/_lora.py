"""`lora`: a function of params as a function of params and adapters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jlora.adapter import is_update
from jlora.config import LoraConfig
from jlora.cost import CostModel
from jlora.errors import AdapterError
from jlora.paths import leaves_by_path
from jlora.transform._program import Program
from jlora.transform._rules import RULES
from jlora.transform._run import Run, Settings
from jlora.transform._weight import Weight, adapted
from jlora.tree import adapted_targets, check_config, check_floating, settle_params


def lora(
    fn: Callable[..., Any], config: LoraConfig, *, strict: bool = False, cost_model: CostModel | None = None
) -> Callable[..., Any]:
    """The same function with adapters: `lora(fn, config)(params, adapters, *args, **kwargs)`.

    `fn` is traced, and every product with an adapted weight becomes x@W + scaling (x@A)@B, whatever axes it contracts,
    through jit, scan, while, cond, checkpoint, custom_jvp, custom_vjp, vmap and shard_map. What cannot be factored is
    computed with the merged weight; so is a weight with a magnitude (DoRA). `explain` shows which is which.

    Args:
      fn: any function whose first argument is a pytree of params. Arrays among its arguments are traced; everything
        else (strings, flags, Python numbers, functions) reaches it as it is.
      config: the configuration that the adapters were made with.
      strict: whether a weight that has to be merged is an error.
      cost_model: chooses, from static shapes, between factored and merged where both are possible.

    Returns:
      A function `(params, adapters, *args, dropout_key=None, **kwargs)` of the output of `fn`, in its dtypes. Without
      `dropout_key`, a PRNG key, there is no dropout. It composes with jit, grad, jvp, vmap, scan and checkpoint; the
      base has gradients only where they are asked for.

    Raises:
      ConfigError: `config` is no LoraConfig.
      TargetError: when called: params, adapters and configuration do not fit.
      AdapterError: when called, with `strict`: the path, the primitive and the source line of what would be merged.

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
    settings = Settings(RULES, cost_model or CostModel(), strict, config.dropout)

    def adapted_fn(params: Any, adapters: Any, *args: Any, dropout_key: jax.Array | None = None, **kwargs: Any) -> Any:
        params = settle_params(params, adapters, config)
        weights = adapted_weights(params, adapters, config, strict)
        program = Program(fn, params, args, kwargs)
        run = Run(settings, dropout_key if config.dropout else None)
        return program.output(program.evaluate(run, weights, program.leaves))

    name = getattr(fn, "__name__", type(fn).__name__)
    adapted_fn.__name__ = adapted_fn.__qualname__ = f"lora_{name}"
    adapted_fn.__doc__ = f"`{name}` with adapters; see `jlora.lora`."
    return adapted_fn


def adapted_weights(params: Any, adapters: Any, config: LoraConfig, strict: bool = False) -> dict[str, Weight]:
    """The weights of `params` that are followed with their A and B, by path; not those with a magnitude."""
    targets = adapted_targets(params, adapters, config)
    found = leaves_by_path(adapters, is_leaf=is_update)
    leaves = leaves_by_path(params)
    check_floating({path: leaves[path] for path in found})
    if strict and (merged := [path for path in targets if "magnitude" in found[path]]):
        raise AdapterError(f"{merged[0]}: a weight with a magnitude (DoRA) cannot be factored; strict=False merges it")
    return {
        path: adapted(
            path,
            jnp.asarray(leaves[path]),
            jnp.asarray(found[path]["A"]),
            jnp.asarray(found[path]["B"]),
            target.factorization,
            target.effective_alpha / target.rank,
        )
        for path, target in targets.items()
        if "magnitude" not in found[path]
    }
