"""A small run that tests of training share: two matrices, trained towards ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from jlora.train import fit, init_state, make_train_step
from tests.reference import random_adapter

OPTIMIZER = optax.adam(0.1)
QUIET = Console(quiet=True)


def loss(adapters, base, batch, key):
    y = (batch["x"] @ adapters["up"]["A"]) @ adapters["up"]["B"]
    return jnp.mean((y - 1) ** 2) + 1e-3 * jax.random.uniform(key), {"accuracy": jnp.mean(y > 0)}


STEP = make_train_step(loss, OPTIMIZER)


def start():
    adapters = {"up": random_adapter(np.random.default_rng(3), (5, 2), (2, 3)), "head": None}
    return init_state(adapters, OPTIMIZER)


def run(batches, steps, state=None, console=QUIET, **options):
    return fit(STEP, start() if state is None else state, None, batches, steps=steps, console=console, **options)


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
