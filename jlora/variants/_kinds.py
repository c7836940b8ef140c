"""The variants by the `kind` of a configuration."""

from types import ModuleType
from typing import Any

from jlora.config import LoraConfig
from jlora.errors import ConfigError
from jlora.tree import check_config
from jlora.variants import vera, xs

KINDS = ("vera", "xs")


def init(key: Any, params: Any, config: LoraConfig) -> tuple[Any, Any]:
    """What is trained and what is frozen, `init` of the variant that the configuration names.

    >>> import numpy as np
    >>> params = {"up": np.ones((5, 7), np.float32)}
    >>> trained, frozen = init(None, params, LoraConfig(rank=2, kind="xs", factorizations={"up": "io"}))
    >>> trained["up"]["R"].shape
    (2, 2)
    """
    return variant_of(config).init(key, params, config)


def adapters(trained: Any, frozen: Any, params: Any, config: LoraConfig) -> Any:
    """The ordinary adapters that they stand for, `adapters` of the variant that the configuration names."""
    return variant_of(config).adapters(trained, frozen, params, config)


def variant_of(config: LoraConfig) -> ModuleType:
    """The module of a configuration's variant.

    Raises:
      ConfigError: it names none.
    """
    check_config(config)
    if config.kind not in KINDS:
        raise ConfigError(
            f"kind = {config.kind!r}: has no smaller tree in front of its adapters; {' and '.join(KINDS)} do"
        )
    return {"vera": vera, "xs": xs}[config.kind]
