"""LoRA for any JAX function of a params pytree: `adapt`, of which `lora` is a part; `explain` tells what it does.

`register` says what a primitive of your own does to a weight.
"""

from jlora.lazy import LazyBase
from jlora.transform._adapt import Adapted, adapt
from jlora.transform._explain import Explanation, explain
from jlora.transform._lora import lora
from jlora.transform._register import Moves, Multiplies, register
from jlora.transform._uses import check_args, init_lora, resolve, resolve_config, survey_uses

__all__ = [
    "Adapted",
    "Explanation",
    "LazyBase",
    "Moves",
    "Multiplies",
    "adapt",
    "check_args",
    "explain",
    "init_lora",
    "lora",
    "register",
    "resolve",
    "resolve_config",
    "survey_uses",
]
