"""Batches as a function of the step, so that a resumed run sees the same ones."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jlora.errors import DataError, listed
from jlora.fields import integer
from jlora.paths import leaves_by_path

Examples = Mapping[str, Any]  # arrays, or mappings of arrays, with one common leading axis


@dataclasses.dataclass(frozen=True)
class Batches:
    """Shuffled batches of a dataset in memory: `batches(step)` is the same whenever it is asked for.

    Attributes:
      examples: arrays with one common leading axis, by name; a name may stand for a mapping of arrays. Or a sequence
        of such datasets, of examples of one length each: every batch is of one of them, and each gives as many as it
        has, in an order that is shuffled too.
      size: the examples of a batch; what is left at the end of an epoch is dropped.
      seed: of the shuffling, which differs from epoch to epoch.

    >>> batches = Batches({'x': np.arange(10)}, size=4, seed=0)
    >>> batches(0)['x'].shape, sorted(np.concatenate([batches(2)['x'], batches(3)['x']]))[:2] != [0, 0]
    ((4,), True)
    >>> of_lengths = Batches([{'x': np.zeros((5, 8))}, {'x': np.zeros((9, 16))}], size=4, seed=0)
    >>> len(of_lengths), sorted(of_lengths(step)['x'].shape for step in range(3))
    (3, [(4, 8), (4, 16), (4, 16)])

    Raises:
      DataError: a dataset is empty, smaller than a batch, or of arrays that differ in length.
    """

    examples: Examples | Sequence[Examples]
    size: int
    seed: int

    def __post_init__(self) -> None:
        integer("batch_size", self.size, 1)
        integer("seed", self.seed, 0)
        if not self._groups:
            raise DataError("the dataset is empty: found no arrays")
        if few := [count for count in self._counts if count < self.size]:
            raise DataError(f"{listed(few)} examples are fewer than a batch of {self.size}")

    def __len__(self) -> int:
        """The batches of an epoch."""
        return sum(count // self.size for count in self._counts)

    def __call__(self, step: int) -> Examples:
        epoch, position = divmod(step, len(self))
        group, chosen = _order(self.seed, epoch, self._counts, self.size)[position]
        return jax.tree.map(lambda array: array[chosen], dict(self._groups[group]))

    @property
    def _groups(self) -> Sequence[Examples]:
        return [self.examples] if isinstance(self.examples, Mapping) else self.examples

    @functools.cached_property
    def _counts(self) -> tuple[int, ...]:
        return tuple(count_examples(group) for group in self._groups)


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, counts: tuple[int, ...], size: int) -> list[tuple[int, np.ndarray]]:
    """The batches of an epoch: of which dataset, and which of its examples."""
    rng = np.random.default_rng((seed, epoch))
    batches = []
    for group, count in enumerate(counts):
        order = rng.permutation(count)
        batches += [(group, order[start : start + size]) for start in range(0, count - size + 1, size)]
    if len(counts) > 1:
        batches = [batches[i] for i in rng.permutation(len(batches))]
    return batches


def count_examples(examples: Examples, name: str = "the dataset") -> int:
    """The common length of the arrays of a dataset.

    Raises:
      DataError: it is empty, or its arrays differ in length.
    """
    lengths = {path: len(array) for path, array in leaves_by_path(dict(examples)).items()}
    if not lengths or 0 in lengths.values():
        raise DataError(f"{name} is empty: found {lengths or 'no arrays'}")
    if len(set(lengths.values())) > 1:
        raise DataError(f"the arrays of {name} differ in length: {lengths}")
    return next(iter(lengths.values()))
