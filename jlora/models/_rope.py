"""Rotary position embeddings (Su et al. 2021), and what stretches them to longer contexts."""

import dataclasses
import math

import numpy as np

__all__ = ["Rope"]


@dataclasses.dataclass(frozen=True)
class Rope:
    """How the queries and keys of a layer are turned by their positions.

    Attributes:
      kind: "default", "linear" (positions divided by `factor`), "llama3" (low frequencies alone divided by it), "yarn"
        (Peng et al. 2023) or "longrope" (Ding et al. 2024, one factor for each frequency).
      theta: the base of the frequencies.
      dims: the first axes of a head that are turned, an even number.
      factor: how much longer the context is made.
      original: positions that the model was trained with before that.
      low, high: turns within `original`: a frequency of fewer than `low` is divided by `factor`, one of more than
        `high` is not; "llama3" and "yarn", which has them as beta_slow and beta_fast.
      truncate: "yarn": the bounds that follow from it are rounded to whole axes.
      scale: of the turned queries and keys ("yarn" and "longrope").
      short, long: "longrope": what each frequency is divided by, where no position is `original` or more, and where
        some position is.
    """

    kind: str
    theta: float
    dims: int
    factor: float = 1.0
    original: int = 0
    low: float = 1.0
    high: float = 1.0
    truncate: bool = True
    scale: float = 1.0
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()

    def frequencies(self, *, far: bool = False) -> np.ndarray:
        """Radians for each position, float32 (dims / 2,); `far` says that some position is `original` or more."""
        plain = self.theta ** -(np.arange(0, self.dims, 2) / self.dims)  # float64
        divided = plain / self.factor
        if self.kind == "linear":
            plain = divided
        elif self.kind == "llama3":
            within = self.original * plain / (2 * math.pi)  # turns within the original context
            share = np.clip((within - self.low) / (self.high - self.low), 0, 1)
            plain = share * plain + (1 - share) * divided
        elif self.kind == "yarn":
            share = self._share_of_yarn()
            plain = share * plain + (1 - share) * divided
        elif self.kind == "longrope":
            plain = plain / np.asarray(self.long if far else self.short)
        return plain.astype(np.float32)

    def _share_of_yarn(self) -> np.ndarray:
        """How much of each frequency stays as it is: all of the high ones, nothing of the low ones."""

        def axis(turns: float) -> float:
            return self.dims * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        first, last = axis(self.high), axis(self.low)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, self.dims - 1)
        if first == last:
            last += 0.001
        return 1 - np.clip((np.arange(self.dims // 2) - first) / (last - first), 0, 1)
