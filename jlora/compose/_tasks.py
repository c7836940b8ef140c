"""Weighted sums of tensors of which parts are pruned, or kept only where they agree in sign."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jlora.compose._rules import Rule


@dataclasses.dataclass(frozen=True)
class Task:
    """A rule with its numbers: the share that is kept, and how the majority's sign is found."""

    rule: Rule
    density: float = 1.0
    majority_sign: str = "total"

    @property
    def is_linear(self) -> bool:
        """Whether the outcome is the plain weighted sum."""
        return not self.rule.elect and self.density == 1.0

    def join(
        self, tensors: Sequence[np.ndarray], shares: Sequence[float], streams: Sequence[np.random.Generator]
    ) -> np.ndarray:
        """One tensor (n, rows, columns) from one of that shape per part, each of the n pruned for itself."""
        kept = [self._pruned(tensor, stream) for tensor, stream in zip(tensors, streams, strict=True)]
        total = sum(share * tensor for share, tensor in zip(shares, kept, strict=True))
        if not self.rule.elect:
            return np.asarray(total)
        votes = sum(np.sign(tensor) if self.majority_sign == "frequency" else tensor for tensor in kept)
        majority = np.where(np.asarray(votes) >= 0, 1.0, -1.0)
        agreed = [np.sign(tensor) == majority for tensor in kept]
        summed = sum(share * tensor * mask for share, tensor, mask in zip(shares, kept, agreed, strict=True))
        return np.asarray(summed / np.maximum(np.sum(agreed, axis=0), 1).astype(tensors[0].dtype))

    def _pruned(self, tensor: np.ndarray, stream: np.random.Generator) -> np.ndarray:
        if self.density == 1.0 or not self.rule.prune:
            return tensor
        if self.rule.prune == "random":
            return np.where(stream.random(tensor.shape) < self.density, tensor / self.density, 0.0)
        flat = tensor.reshape(len(tensor), -1)
        dropped = flat.shape[1] - int(self.density * flat.shape[1])
        if dropped == flat.shape[1]:
            return np.zeros_like(tensor)
        smallest = np.argpartition(np.abs(flat), dropped, axis=1)[:, :dropped]
        result = flat.copy()
        np.put_along_axis(result, smallest, 0.0, axis=1)
        return result.reshape(tensor.shape)
