"""Checkpoints: what is kept, what comes back, what is refused."""

import jax
import jax.numpy as jnp
import optax
import pytest

from jlora import DataError
from jlora.train import Checkpoints, init_state, restore_tree, save_tree
from tests.reference import random_adapter
from tests.train.runs import OPTIMIZER, assert_same, run, start


class TestCheckpoints:
    def test_the_newest_two_are_kept_and_come_back_bitwise(self, tmp_path, batches):
        with Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.latest_step is None
            for steps in (1, 2, 3):
                checkpoints.save(steps, state := run(batches, steps))
            checkpoints.save(3, start())
        assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"2", "3"}
        with Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.latest_step == 3
            assert_same(checkpoints.restore(start()), state)

    @pytest.mark.parametrize("model_state", [None, {"mean": jnp.arange(3.0), "unused": None}])
    def test_a_model_state_comes_back_too(self, tmp_path, model_state):
        state = init_state({"a": jnp.ones(2)}, OPTIMIZER, model_state)
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, state)
            assert_same(checkpoints.restore(jax.tree.map(jnp.zeros_like, state)), state)

    def test_where_there_is_none_it_says_so(self, tmp_path):
        with Checkpoints(tmp_path) as checkpoints, pytest.raises(DataError, match="no checkpoint to resume from"):
            checkpoints.restore(start())

    @pytest.mark.parametrize(
        "change",
        [
            lambda state: state._replace(trained=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[::-1]), state.trained)),
            lambda state: state._replace(trained={"other": state.trained["up"]}),
            lambda state: state._replace(opt_state=optax.sgd(0.1, momentum=0.9).init(state.trained)),
        ],
        ids=["shapes", "paths", "optimizer"],
    )
    def test_one_that_does_not_fit_is_refused(self, tmp_path, change):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(4, start())
            with pytest.raises(
                DataError, match=f"^{tmp_path}: the checkpoint of step 4 does not fit this run in .+, such as .+"
            ):
                checkpoints.restore(change(start()))

    def test_a_tree_is_saved_in_place_of_another_and_restored_bitwise(self, tmp_path, rng):
        trees = [{"up": random_adapter(rng, (5, 2), (2, 3), dtype), "head": None} for dtype in ("float32", "bfloat16")]
        for tree in trees:
            save_tree(tmp_path / "tree", tree)
            assert_same(restore_tree(tmp_path / "tree", jax.tree.map(jnp.zeros_like, tree)), tree)
