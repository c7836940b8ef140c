"""Lazy arrays are the arrays that they stand for, read anew each time."""

import numpy as np
import pytest

from jlora import DataError
from jlora.disk import LazyArray, TensorFile, write_tensors

CHANGES = {
    "transpose": lambda a: a.transpose(2, 0, 1),
    "reverse": lambda a: a.T,
    "reshape": lambda a: a.reshape(3, -1),
    "reshape by a tuple": lambda a: a.reshape((5, 21)),
    "index": lambda a: a[2],
    "slices": lambda a: a[1:, :, 2:4],
    "a chain": lambda a: a.transpose(1, 0, 2).reshape(5, -1)[1:3].T,
    "moveaxis": lambda a: np.moveaxis(a, 0, -1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_done_to_it(rng, name):
    array, reads = rng.normal(size=(3, 5, 7)).astype(np.float32), []
    lazy = LazyArray(array.shape, array.dtype, lambda: reads.append(1) or array)
    found, wanted = CHANGES[name](lazy), CHANGES[name](array)
    assert not reads
    assert (found.shape, found.ndim, found.size, found.dtype) == (wanted.shape, wanted.ndim, wanted.size, wanted.dtype)
    np.testing.assert_array_equal(np.asarray(found), wanted)
    np.testing.assert_array_equal(np.asarray(found, np.float64), wanted.astype(np.float64))
    assert len(reads) == 2


def test_of_a_file(tmp_path, rng):
    array, path = rng.normal(size=(3, 5)).astype(np.float16), tmp_path / "a.safetensors"
    with path.open("wb") as file:
        write_tensors(file, {"a": array})
    with TensorFile(path) as tensors:
        lazy = tensors.lazy("a")
        assert np.asarray(lazy).tobytes() == array.tobytes()
        assert tensors.read("a").tobytes() == array.tobytes()
    assert np.asarray(lazy.T).tolist() == array.T.tolist()
    with path.open("wb") as file:
        write_tensors(file, {"a": array + 1, "b": array})
    with pytest.raises(DataError, match="was changed while it was read"):
        np.asarray(lazy)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        np.asarray(lazy)
