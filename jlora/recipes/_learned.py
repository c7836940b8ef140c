"""What a job trains: the adapters themselves, or the smaller tree of VeRA or LoRA-XS of which they are made."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from jlora import variants
from jlora.config import LoraConfig
from jlora.transform import adapt, lora, resolve
from jlora.tree import Summary, count_params, summary

_NAMES = {"dora": "DoRA", "vera": "VeRA", "xs": "LoRA-XS"}


@dataclasses.dataclass(frozen=True)
class Learned:
    """What is trained, where it begins, and the adapters that it stands for.

    Attributes:
      model: the function with adapters, `model(params, adapters, *args, **kwargs)`.
      report: the table of what is adapted; it counts what is trained.
      config: with every factorization written out.
      trained: the adapters, or the smaller tree.
      frozen: what a smaller tree has beside the params; None where the adapters are trained.
    """

    model: Callable[..., Any]
    report: Summary
    config: LoraConfig
    trained: Any
    frozen: Any = None

    @property
    def name(self) -> str:
        """What people call it."""
        return _NAMES.get(self.config.kind, "LoRA")

    @property
    def config_of_adapters(self) -> LoraConfig:
        """The configuration that is written beside the adapters."""
        return self.config if self.frozen is None else self.config.replace(kind="lora")

    def adapters(self, trained: Any, frozen: Any, params: Any) -> Any:
        """The adapters of what is trained; differentiable."""
        return trained if self.frozen is None else variants.adapters(trained, frozen, params, self.config)


def learned(fn: Callable[..., Any], config: LoraConfig, params: Any, /, *args: Any) -> Learned:
    """What `config` trains of a function of params, by an example of its other arguments.

    Raises:
      TargetError, ConfigError: as of `jlora.adapt` and `jlora.variants.init`.
    """
    if config.kind not in variants.KINDS:
        adapted = adapt(fn, config, params, *args)
        return Learned(adapted.model, adapted.report, adapted.config, adapted.adapters)
    resolved, left_out = resolve(fn, config, params, args, {})
    trained, frozen = variants.init(None, params, resolved)
    made = functools.partial(variants.adapters, config=resolved)
    table = summary(params, jax.eval_shape(made, trained, frozen, params), resolved)
    counts = tuple(count_params(trained[target.path]) for target in table.targets)
    report = dataclasses.replace(table, parameters=counts, left_out=left_out)
    return Learned(lora(fn, resolved), report, resolved, trained, frozen)
