"""A training run that is killed at any moment leaves a checkpoint that can be read, and goes on to the same bits."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import jlora
from jlora.train import Batches, Checkpoints, fit, init_state, make_train_step

# Children are forked from a process that has imported JAX and not yet started it.
CHILDREN = """
import os, signal, sys, time
from pathlib import Path
from tests.train.test_kill import trained

for line in sys.stdin:
    folder, seconds = line.split()
    child = os.fork()
    if child == 0:
        trained(Path(folder), 10**6)
    while not (Path(folder).parent / str(child)).exists():
        time.sleep(0.005)
    time.sleep(float(seconds))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("killed", flush=True)
"""


def start() -> Any:
    """The state of a run before its first step, the base, and what trains it."""
    params = {"up": jnp.ones((5, 7)) / 7, "down": jnp.ones((7, 3)) / 3}
    config = jlora.LoraConfig(rank=2)
    adapters = jlora.init_lora(None, params, config)
    model = jlora.lora(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], config)

    def loss(adapters, params, batch, key):
        return ((model(params, adapters, batch["x"]) - batch["y"]) ** 2).mean(), {}

    optimizer = optax.adamw(1e-2)
    return init_state(adapters, optimizer), params, make_train_step(loss, optimizer)


def trained(folder: Path, steps: int) -> Any:
    """The state after so many steps, from the newest checkpoint on, one written after every step."""
    rng = np.random.default_rng(0)
    batches = Batches({"x": rng.normal(size=(11, 5)), "y": rng.normal(size=(11, 3))}, size=4, seed=0)
    state, params, step = start()
    with Checkpoints(folder) as checkpoints:
        if checkpoints.latest_step is not None:
            state = checkpoints.restore(state)
        quiet, first = Console(quiet=True), int(state.step)

        def batch(number: int) -> Any:
            if number > first:  # the first checkpoint of this process is written
                (folder.parent / str(os.getpid())).touch()
            return batches(number)

        return fit(step, state, params, batch, steps=steps, checkpoints=checkpoints, checkpoint_every=1, console=quiet)


def test_killed_at_random_moments(tmp_path, rng):
    folder = tmp_path / "killed" / "checkpoints"
    reached, like = [0], start()[0]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with subprocess.Popen(
        [sys.executable, "-c", CHILDREN],
        cwd=Path(__file__).parents[2],
        env=os.environ | cache | {"JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as children:
        assert children.stdin is not None
        assert children.stdout is not None
        for seconds in rng.uniform(0.0, 0.15, 50):
            children.stdin.write(f"{folder} {seconds}\n")
            children.stdin.flush()
            assert children.stdout.readline() == "killed\n"
            with Checkpoints(folder) as checkpoints:
                reached.append(int(checkpoints.restore(like).step))
                assert reached[-1] == checkpoints.latest_step > reached[-2]
        children.stdin.close()
    assert reached[-1] > 10
    whole = trained(tmp_path / "whole" / "checkpoints", reached[-1] + 3)
    resumed = trained(folder, reached[-1] + 3)
    for found, wanted in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes()
