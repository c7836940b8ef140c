"""A training run that is killed at any call to the system leaves a checkpoint that can be read, and goes on alike."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import jlora
from jlora.train import Batches, Checkpoints, fit, init_state, make_train_step

# Children are forked from a process that has imported JAX and not yet started it.
CHILDREN = """
import os, sys
from pathlib import Path
from tests.train.test_kill import killed_at, trained

for line in sys.stdin:
    folder, steps, call = line.split()
    child = os.fork()
    if child == 0:
        killed_at(int(call), Path(folder))
        trained(Path(folder), int(steps))
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""
CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"}


def killed_at(call: int, folder: Path) -> None:
    """From here on this process is killed before its call of this number that changes something in a folder."""
    calls = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal calls
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in CHANGES) and str(folder) in os.fsdecode(str(args[0])):
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


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
    quiet = Console(quiet=True)
    with Checkpoints(folder) as checkpoints:
        if checkpoints.latest_step is not None:
            state = checkpoints.restore(state)
        return fit(
            step, state, params, batches, steps=steps, checkpoints=checkpoints, checkpoint_every=1, console=quiet
        )


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_calls(tmp_path, every):
    folder = tmp_path / "killed" / "checkpoints"
    trained(folder, 2)
    like, reached, call = start()[0], 2, 1 - every
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
        status = signal.SIGKILL.value
        while status == signal.SIGKILL:
            call += every
            children.stdin.write(f"{folder} {reached + 1} {call}\n")
            children.stdin.flush()
            status = int(children.stdout.readline())
            with Checkpoints(folder) as checkpoints:  # a warning of a damaged one would be an error here
                step = int(checkpoints.restore(like).step)
            assert step == checkpoints.latest_step
            assert step - reached in (0, 1)
            reached = step
        children.stdin.close()
    assert status == 0
    assert {path.name for path in folder.iterdir()} == {str(reached - 1), str(reached)}
    whole = trained(tmp_path / "whole" / "checkpoints", reached + 3)
    resumed = trained(folder, reached + 3)
    for found, wanted in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes()
