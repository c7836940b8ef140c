"""Adapters and the optimizer's state are ordinary trees to Orbax."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora import LoraConfig, init_lora
from tests.reference import random_array, randomize
from tests.storage.devices import run_with_devices

CONFIG = LoraConfig(rank=2, target_modules="layers", rank_pattern={"layers/1": 4})
OPTIMIZER = optax.adamw(1e-2)


def trained() -> Any:
    """Adapters and the state of their optimizer after two steps."""
    rng = np.random.default_rng(11)
    params = {
        "embed": {"embedding": random_array(rng, (13, 8))},
        "layers": [
            {"kernel": random_array(rng, (8, 16), dtype), "bias": random_array(rng, (16,))}
            for dtype in ("float32", "bfloat16")
        ],
    }
    adapters = init_lora(jax.random.key(0), params, CONFIG)
    state = OPTIMIZER.init(adapters)
    for _ in range(2):
        updates, state = OPTIMIZER.update(randomize(rng, adapters), state, adapters)
        adapters = optax.apply_updates(adapters, updates)
    return {"adapters": adapters, "optimizer": state}


def assert_restored(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert found["adapters"]["embed"] == {"embedding": None}
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_a_standard_checkpointer(tmp_path):
    tree = trained()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tree", tree)
        checkpointer.wait_until_finished()
        assert_restored(checkpointer.restore(tmp_path / "tree", tree), tree)


def test_a_checkpoint_manager_and_training_that_goes_on(tmp_path):
    tree = trained()
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        for step in range(3):
            manager.save(step, args=ocp.args.StandardSave(tree | {"step": jnp.int32(step)}))
        assert manager.all_steps() == [1, 2]
        found = manager.restore(2, args=ocp.args.StandardRestore(tree | {"step": jnp.int32(0)}))
    assert int(found.pop("step")) == 2
    assert_restored(found, tree)
    gradients = jax.tree.map(jnp.ones_like, tree["adapters"])
    wanted = OPTIMIZER.update(gradients, tree["optimizer"], tree["adapters"])
    after = OPTIMIZER.update(gradients, found["optimizer"], found["adapters"])
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def onto_another_sharding(folder: Path) -> None:
    """Saved sharded over eight devices, restored over two, and the other way round."""
    tree = trained()
    wide = NamedSharding(Mesh(np.array(jax.devices()), ("d",)), PartitionSpec(None, "d"))
    narrow = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("d",)), PartitionSpec("d"))

    def sharding_of(leaf: Any, sharding: Any) -> Any:
        fits = leaf.ndim == 2 and leaf.shape[1 if sharding is wide else 0] % sharding.mesh.size == 0
        return sharding if fits else NamedSharding(sharding.mesh, PartitionSpec())

    for number, (before, after) in enumerate([(wide, narrow), (narrow, wide)]):
        placed = jax.tree.map(lambda leaf, at=before: jax.device_put(leaf, sharding_of(leaf, at)), tree)
        like = jax.tree.map(
            lambda leaf, at=after: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(leaf, at)), tree
        )
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / str(number), placed)
            checkpointer.wait_until_finished()
            found = checkpointer.restore(folder / str(number), like)
        assert_restored(found, tree)
        kernel = found["adapters"]["layers"][1]["kernel"]["B" if after is wide else "A"]
        assert kernel.sharding.is_equivalent_to(after, 2)
        assert len(kernel.sharding.device_set) == (8 if after is wide else 2)


def test_onto_another_sharding(tmp_path):
    run_with_devices(__name__, "onto_another_sharding", tmp_path)
