"""Flax Linen modules: adapters alone, Flax's layers with an adapter, and any model with adapters at its layers."""

from jlora.linen._adapters import (
    AInit,
    LoRAConvAdapter,
    LoRADenseAdapter,
    LoRADenseGeneralAdapter,
    LoRAEinsumAdapter,
    LoRAEmbedAdapter,
)
from jlora.linen._layers import LoRAConv, LoRADense, LoRADenseGeneral, LoRAEinsum, LoRAEmbed
from jlora.linen._model import LoRA, resolve_config

__all__ = [
    "AInit",
    "LoRA",
    "LoRAConv",
    "LoRAConvAdapter",
    "LoRADense",
    "LoRADenseAdapter",
    "LoRADenseGeneral",
    "LoRADenseGeneralAdapter",
    "LoRAEinsum",
    "LoRAEinsumAdapter",
    "LoRAEmbed",
    "LoRAEmbedAdapter",
    "resolve_config",
]
