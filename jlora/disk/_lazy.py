"""Arrays that are read when their numbers are asked for, and not kept."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np


class LazyArray:
    """An array by its shape and dtype; `np.asarray` reads its numbers, as often as it is asked to.

    Reshapes, transposes and slices are lazy too.

    >>> array = LazyArray((2, 3), np.float32, lambda: np.arange(6, dtype=np.float32).reshape(2, 3))
    >>> array.T[1].shape, np.asarray(array.T[1]).tolist()
    ((2,), [1.0, 4.0])
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, load: Callable[[], np.ndarray[Any, Any]]) -> None:
        self.shape, self.dtype, self._load = tuple(shape), np.dtype(dtype), load

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of numbers."""
        return math.prod(self.shape)

    @property
    def T(self) -> "LazyArray":  # noqa: N802
        """With the axes in reverse."""
        return self.transpose()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        array = self._load()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __getitem__(self, key: Any) -> "LazyArray":
        return self._then(lambda array: array[key])

    def reshape(self, *shape: Any) -> "LazyArray":
        """As of an array."""
        return self._then(lambda array: array.reshape(*shape))

    def transpose(self, *axes: Any) -> "LazyArray":
        """As of an array."""
        return self._then(lambda array: array.transpose(*axes))

    def _then(self, change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> "LazyArray":
        empty = np.lib.stride_tricks.as_strided(np.empty(1, np.bool_), self.shape, (0,) * self.ndim)
        return LazyArray(change(empty).shape, self.dtype, lambda: change(self._load()))
