"""Batches as a function of the step, so that a resumed run sees the same ones."""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from jlora.errors import DataError
from jlora.fields import integer

Examples = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Batches:
    """Shuffled batches of a dataset in memory: `batches(step)` is the same whenever it is asked for.

    Attributes:
      examples: arrays with one common leading axis, by name.
      size: the examples of a batch; what is left at the end of an epoch is dropped.
      seed: of the shuffling, which differs from epoch to epoch.

    >>> batches = Batches({'x': np.arange(10)}, size=4, seed=0)
    >>> batches(0)['x'].shape, sorted(np.concatenate([batches(2)['x'], batches(3)['x']]))[:2] != [0, 0]
    ((4,), True)

    Raises:
      DataError: the dataset is empty, smaller than a batch, or of arrays that differ in length.
    """

    examples: Examples
    size: int
    seed: int

    def __post_init__(self) -> None:
        integer("batch_size", self.size, 1)
        integer("seed", self.seed, 0)
        if count_examples(self.examples) < self.size:
            raise DataError(f"{count_examples(self.examples)} examples are fewer than a batch of {self.size}")

    def __call__(self, step: int) -> Examples:
        epoch, position = divmod(step, count_examples(self.examples) // self.size)
        order = _order(self.seed, epoch, count_examples(self.examples))
        chosen = order[position * self.size : (position + 1) * self.size]
        return {name: array[chosen] for name, array in self.examples.items()}


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def count_examples(examples: Examples, name: str = "the dataset") -> int:
    """The common length of the arrays of a dataset.

    Raises:
      DataError: it is empty, or its arrays differ in length.
    """
    lengths = {name: len(array) for name, array in examples.items()}
    if not lengths or 0 in lengths.values():
        raise DataError(f"{name} is empty: found {lengths or 'no arrays'}")
    if len(set(lengths.values())) > 1:
        raise DataError(f"the arrays of {name} differ in length: {lengths}")
    return next(iter(lengths.values()))
