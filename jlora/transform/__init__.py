"""LoRA for any JAX function of a params pytree: `lora`, and what it makes of a function: `explain`."""

from jlora.transform._explain import Explanation, explain
from jlora.transform._lora import lora
from jlora.transform._uses import check_args, init_lora, resolve_config

__all__ = ["Explanation", "check_args", "explain", "init_lora", "lora", "resolve_config"]
