"""Settings of every test: the CPU, and property tests that are the same each time."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import numpy as np
import pytest

hypothesis.settings.register_profile("jlora", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("jlora")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(7)
