"""Optimizers for adapters, around any of optax: another rate for B, A frozen, gradients divided by Gram matrices."""

from jlora.optim._parts import freeze_parts, lora_fa, lora_plus
from jlora.optim._riemannian import riemannian

__all__ = ["freeze_parts", "lora_fa", "lora_plus", "riemannian"]
