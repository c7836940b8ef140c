"""`adapt`: all that training adapters of a function needs, in one call."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex

from jlora import tree
from jlora.config import LoraConfig
from jlora.cost import CostModel
from jlora.transform._explain import adapted_uses
from jlora.transform._lora import lora
from jlora.transform._registry import registry
from jlora.transform._run import Settings
from jlora.transform._uses import check_handed_on, resolve


class Adapted(NamedTuple):
    """A function with adapters.

    Attributes:
      model: the adapted function, `model(params, adapters, *args, **kwargs)`; see `lora`.
      adapters: new ones, with B zero; see `init_lora`.
      config: the configuration with every factorization written out, for `merge_params`, `save_adapters` and the rest.
      report: the table of what is adapted, and of what is left out and why.
    """

    model: Callable[..., Any]
    adapters: Any
    config: LoraConfig
    report: tree.Summary


def adapt(
    fn: Callable[..., Any],
    config: LoraConfig,
    params: Any,
    /,
    *args: Any,
    key: chex.PRNGKey | None = None,
    strict: bool = False,
    cost_model: CostModel | None = None,
    dropout_keyword: str = "dropout_key",
    **kwargs: Any,
) -> Adapted:
    """`resolve_config`, `init_lora` and `lora` of a function, by an example of its arguments.

    Args:
      fn: a function whose first argument is params, whoever wrote it and whatever its weights are called. It is
        traced, not run.
      config: what is adapted and how.
      params: arrays or shapes.
      *args: of `fn`, arrays or shapes.
      key: PRNG key of the adapters; `None` for `jax.random.key(config.seed)`.
      strict: whether it is an error that a weight is left out, that one has to be merged, or that an adapter reaches
        nothing.
      cost_model: as in `lora`.
      dropout_keyword: as in `lora`.
      **kwargs: of `fn`. An argument of `fn` that is named as one of the keywords here is given by position.

    Returns:
      The adapted function, the adapters, the resolved configuration and the report.

    Raises:
      TargetError: a pattern matches or adapts nothing, or names what cannot be adapted; with `strict`, a weight that a
        pattern spans is left out.
      AdapterError: with `strict`, what would be merged.
      ConfigError: `config` is no LoraConfig, or `fn` has an argument that is named as one of the keywords.

    >>> import jax.numpy as jnp
    >>> params = {'experts': jnp.ones((3, 5, 7)), 'order': jnp.zeros((5, 5), int)}
    >>> fn = lambda params, x: jnp.einsum('etd,edf->etf', x[..., params['order'][0]], params['experts'])
    >>> model, adapters, config, report = adapt(fn, LoraConfig(rank=2), params, jnp.ones((3, 11, 5)))
    >>> model(params, adapters, jnp.ones((3, 11, 5))).shape, config.factorizations
    ((3, 11, 7), (('experts', 'bio'),))
    >>> print(*report.left_out)
    order (5, 5): dtype int32 is not floating, nothing can be added to it
    """
    check_handed_on("jlora.adapt", fn, ["key", "strict", "cost_model", "dropout_keyword"], args)
    resolved, left_out = resolve(fn, config, params, args, kwargs, strict=strict)
    adapters = tree.init_lora(key, params, resolved)
    if strict:
        settings = Settings(registry(), cost_model or CostModel(), strict, config.dropout)
        adapted_uses(fn, resolved, params, adapters, args, kwargs, settings)
    report = dataclasses.replace(tree.summary(params, adapters, resolved), left_out=left_out)
    model = lora(fn, resolved, strict=strict, cost_model=cost_model, dropout_keyword=dropout_keyword)
    return Adapted(model, adapters, resolved, report)
