"""Flax NNX: any model with adapters at its weights, its code unchanged."""

from jlora.nnx._model import LoRA

__all__ = ["LoRA"]
