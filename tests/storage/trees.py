"""Trees of adapters for the tests of this folder, and what is the same to the bit."""

from typing import Any

import numpy as np

from jlora import LoraConfig


def entry(
    rng: np.random.Generator, a: tuple[int, ...] = (5, 2), b: tuple[int, ...] = (2, 7), dtype: Any = "float32"
) -> dict[str, Any]:
    """An adapter of random numbers."""
    return {name: random(rng, shape, dtype) for name, shape in (("A", a), ("B", b))}


def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = "float32") -> Any:
    return rng.uniform(0.5, 3, shape).astype(np.dtype(dtype))


def small(rng: np.random.Generator, **fields: Any) -> tuple[Any, LoraConfig]:
    """Two adapters and their configuration."""
    adapters = {"up": {"kernel": entry(rng), "bias": None}, "down": {"kernel": entry(rng, (7, 2), (2, 5))}}
    return adapters, LoraConfig(rank=2, alpha=3, **fields)


def assert_same(found: Any, wanted: Any) -> None:
    """Structure, key types, shapes, dtypes and bytes."""
    if isinstance(wanted, dict):
        assert type(found) is dict
        assert [(type(key), key) for key in sorted(found)] == [(type(key), key) for key in sorted(wanted)]
        for key in wanted:
            assert_same(found[key], wanted[key])
    elif isinstance(wanted, list | tuple):
        assert type(found) is type(wanted)
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    elif wanted is None:
        assert found is None
    else:
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes()
