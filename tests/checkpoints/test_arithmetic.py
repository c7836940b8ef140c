"""The arithmetic on blocks, where the tests of whole files do not look closely enough."""

import ml_dtypes
import numpy as np
import pytest

from jlora.adapter import Entry
from jlora.checkpoints._arithmetic import Weight, _neighbours
from jlora.contraction import Factorization


def test_scaling_is_rounded_once(rng):
    """B times the scaling in float64, rounded to float32; the scaling in float32 would be a second rounding."""
    b = rng.standard_normal((1, 997)).astype(np.float32)
    for scaling in (1 / 3, 16 / 6, 2 / np.sqrt(7)):
        change = Entry({"A": np.ones((1, 1), np.float32), "B": b}, scaling, Factorization("io"))
        weight = Weight((1, 997), np.dtype(np.float32), [change])
        wanted = (b.astype(np.float64) * scaling).astype(np.float32)
        assert not np.array_equal(wanted, b * np.float32(scaling))
        np.testing.assert_array_equal(weight.merged(np.zeros((1, 997), np.float32), 0, 1), wanted)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64, ml_dtypes.float8_e5m2])
def test_neighbours(dtype):
    """The next numbers away from zero and towards it; of both zeros, those of either sign."""
    finfo = ml_dtypes.finfo(dtype)
    tiny = np.array(finfo.smallest_subnormal, dtype)
    numbers = np.array([0.0, -0.0, float(tiny), -float(tiny), 1.0, -1.0], dtype)
    away, towards = (found.copy().astype(np.float64) for found in _neighbours(numbers))
    step, eps = float(tiny), float(finfo.eps)
    np.testing.assert_array_equal(away, [step, -step, 2 * step, -2 * step, 1 + eps, -1 - eps])
    np.testing.assert_array_equal(towards, [-step, step, 0, 0, 1 - eps / 2, -1 + eps / 2])


def test_the_audit_counts_numbers_that_round_to_zero():
    """0.25 of the smallest number merges to zero from -0 too, and from nothing else that is nearer than a spacing."""
    dtype = np.dtype(np.float16)
    tiny = float(np.finfo(np.float16).smallest_subnormal)
    change = Entry({"offset": np.array([0.25 * tiny, 0.75 * tiny], np.float32)}, 1.0)
    weight = Weight((2,), dtype, [change])
    base = np.array([0.0, 0.0], dtype)
    merged = weight.merged(base, 0, 2).copy()
    np.testing.assert_array_equal(merged.astype(np.float64), [0.0, tiny])
    candidates = np.array([-tiny, 0.0, tiny], dtype)
    ways = [sum(weight.merged(np.array([c, c], dtype), 0, 2)[i] == merged[i] for c in candidates) for i in (0, 1)]
    assert weight.uncertain(merged, 0, 2)[0] == sum(way > 1 for way in ways)
