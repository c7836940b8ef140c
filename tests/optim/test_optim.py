"""LoRA+, LoRA-FA and the Riemannian preconditioner: their steps against formulas in float64, and what they keep."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import jlora
from jlora import ConfigError, LoraConfig
from jlora.optim import freeze_parts, lora_fa, lora_plus, riemannian
from jlora.train import init_state, make_train_step

# A matrix, a stack of them, and heads: the shapes of A and of B, and how many batch axes they have.
SHAPES = {
    "up": ((5, 2), (2, 7), 0),
    "layers": ((3, 5, 2), (3, 2, 7), 1),
    "heads": ((5, 2), (2, 3, 7), 0),
    "out": ((3, 7, 2), (2, 5), 0),
}
ROLES = {"up": "io", "layers": "bio", "heads": "ioo", "out": "iio"}
CONFIG = LoraConfig(rank=2, alpha=3, factorizations=ROLES)


def adapters_and_gradients(rng):
    trees = []
    for _ in range(2):
        tree = {
            name: {"A": rng.standard_normal(a, np.float32), "B": rng.standard_normal(b, np.float32)}
            for name, (a, b, _) in SHAPES.items()
        }
        trees.append({**tree, "head": None, "bias": {"value": rng.standard_normal(7, np.float32)}})
    return trees


def matrices(entry, batch_dims):
    """A (n, in, r) and B (n, r, out) in float64."""
    a, b = (np.asarray(entry[name], np.float64) for name in "AB")
    n = int(np.prod(a.shape[:batch_dims]))
    return a.reshape(n, -1, 2), b.reshape(n, 2, -1)


def one_step(optimizer, grads, adapters):
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(adapters), adapters)
    return updates


class TestLoraPlus:
    def test_everything_but_a_moves_faster(self, rng):
        adapters, grads = adapters_and_gradients(rng)
        found = one_step(lora_plus(optax.sgd(0.1), 16), grads, adapters)
        for name in SHAPES:
            np.testing.assert_allclose(found[name]["A"], -0.1 * grads[name]["A"], rtol=1e-6)
            np.testing.assert_allclose(found[name]["B"], -1.6 * grads[name]["B"], rtol=1e-6)
        np.testing.assert_allclose(found["bias"]["value"], -1.6 * grads["bias"]["value"], rtol=1e-6)

    def test_decay_and_schedule_are_those_of_a_rate_of_its_own(self, rng):
        adapters, grads = adapters_and_gradients(rng)
        rate = optax.linear_schedule(0.1, 0.0, 5)
        fast = optax.linear_schedule(0.4, 0.0, 5)
        one = lora_plus(optax.adamw(rate, weight_decay=0.1), 4)
        labels = jlora.lora_labels(adapters, by="part")
        groups = {"A": optax.adamw(rate, weight_decay=0.1)}
        groups |= dict.fromkeys(("B", "value"), optax.adamw(fast, weight_decay=0.1))
        other = optax.partition(groups, labels)
        moved = []
        for optimizer in (one, other):
            trained, state = adapters, optimizer.init(adapters)
            for _ in range(3):
                updates, state = optimizer.update(grads, state, trained)
                trained = optax.apply_updates(trained, updates)
            moved.append(trained)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *moved)

    def test_a_ratio_that_is_none_is_refused(self):
        with pytest.raises(ConfigError, match=re.escape("ratio = -1: wanted a finite number of at least 0")):
            lora_plus(optax.sgd(0.1), -1)


class TestRiemannian:
    @pytest.mark.parametrize("damping", [0.01, 3.0])
    def test_gradients_are_divided_by_the_gram_matrix_of_the_other_factor(self, rng, damping):
        adapters, grads = adapters_and_gradients(rng)
        found = one_step(riemannian(optax.sgd(1.0), CONFIG, damping=damping), grads, adapters)
        for name, (_, _, batch_dims) in SHAPES.items():
            (a, b), (da, db) = (matrices(tree[name], batch_dims) for tree in (adapters, grads))
            eye = damping * np.eye(2)
            wanted_a = da @ np.linalg.inv(b @ b.transpose(0, 2, 1) + eye)
            wanted_b = np.linalg.inv(a.transpose(0, 2, 1) @ a + eye) @ db
            moved_a, moved_b = matrices(found[name], batch_dims)
            np.testing.assert_allclose(-moved_a, wanted_a, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(-moved_b, wanted_b, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found["bias"]["value"], -grads["bias"]["value"])

    def test_a_step_does_not_depend_on_how_the_scale_is_shared(self, rng):
        """Of A and B, and of 2 A and B / 2, the products after a small step are the same to first order."""
        adapters, grads = adapters_and_gradients(rng)
        optimizer = riemannian(optax.sgd(1e-3), CONFIG, damping=0.0)
        products = []
        for share in (1.0, 2.0):
            entry = {"A": share * adapters["up"]["A"], "B": adapters["up"]["B"] / share}
            grad = {"A": grads["up"]["A"] / share, "B": share * grads["up"]["B"]}
            moved = one_step(optimizer, {"up": grad}, {"up": entry})["up"]
            products.append((entry["A"] + moved["A"]) @ (entry["B"] + moved["B"]))
        np.testing.assert_allclose(*products, rtol=1e-4, atol=1e-5)

    def test_bfloat16_is_computed_in_float32(self, rng):
        adapters, grads = adapters_and_gradients(rng)
        low = jax.tree.map(lambda array: jnp.asarray(array, jnp.bfloat16), (adapters, grads))
        optimizer = riemannian(optax.sgd(1.0), CONFIG)
        found = one_step(optimizer, low[1], low[0])
        wanted = one_step(
            optimizer, *(jax.tree.map(lambda array: array.astype(jnp.float32), tree) for tree in low[::-1])
        )
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a.astype(np.float32), b, rtol=8e-3), found, wanted)

    def test_parts_in_boxes_stay_in_them(self, rng):
        adapters, grads = (tree["up"] for tree in adapters_and_gradients(rng))
        boxes = [{name: nn.Partitioned(tree[name], (name, None)) for name in "AB"} for tree in (adapters, grads)]
        for optimizer in (riemannian(optax.sgd(1.0), CONFIG), lora_fa(optax.sgd(1.0), CONFIG)):
            wanted = one_step(optimizer, {"up": grads}, {"up": adapters})["up"]
            found = one_step(optimizer, {"up": boxes[1]}, {"up": boxes[0]})["up"]
            for name in "AB":
                assert found[name].names == (name, None)
                np.testing.assert_array_equal(found[name].value, wanted[name])

    def test_an_update_without_the_adapters_says_so(self, rng):
        adapters, grads = adapters_and_gradients(rng)
        optimizer = riemannian(optax.sgd(1.0), CONFIG)
        with pytest.raises(ConfigError, match=re.escape("optimizer.update(grads, state, adapters)")):
            optimizer.update(grads, optimizer.init(adapters))


class TestLoraFa:
    def test_a_stays_and_has_no_state(self, rng):
        adapters, grads = adapters_and_gradients(rng)
        optimizer = lora_fa(optax.adamw(0.1, weight_decay=0.1))
        found = one_step(optimizer, grads, adapters)
        assert all((found[name]["A"] == 0).all() and (found[name]["B"] != 0).all() for name in SHAPES)
        moments = sum(leaf.size for leaf in jax.tree.leaves(optimizer.init(adapters)) if leaf.ndim)
        rest = sum(adapters[name]["B"].size for name in SHAPES) + 7
        assert moments == 2 * rest

    def test_b_is_preconditioned_as_the_paper_says(self, rng):
        adapters, grads = adapters_and_gradients(rng)
        found = one_step(lora_fa(optax.sgd(1.0), CONFIG), grads, adapters)
        for name, (_, _, batch_dims) in SHAPES.items():
            (a, _), (_, db) = (matrices(tree[name], batch_dims) for tree in (adapters, grads))
            wanted = np.linalg.inv(a.transpose(0, 2, 1) @ a) @ db / 1.5**2
            np.testing.assert_allclose(-matrices(found[name], batch_dims)[1], wanted, rtol=1e-3, atol=1e-4)
            assert (found[name]["A"] == 0).all()

    def test_the_clipped_norm_is_that_of_all_that_is_trained(self, rng):
        adapters, grads = adapters_and_gradients(rng)
        found = one_step(lora_fa(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))), grads, adapters)
        assert float(optax.tree.norm(found)) == pytest.approx(1, rel=1e-5)

    def test_frozen_parts_keep_no_input_for_the_gradient_of_a(self, rng):
        """What the backward pass keeps: x (rows, in) of every layer with A trained, h (rows, r) without."""
        layers, rows, width = 6, 512, 64
        config = LoraConfig(rank=2, factorizations={"w": "bio"})
        params = {"w": jnp.asarray(rng.standard_normal((layers, width, width), np.float32) / 8)}
        adapters = jlora.init_lora(jax.random.key(0), params, config)

        def model(params, x):
            return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]

        adapted = jlora.lora(model, config)

        def kept(freeze):
            def loss(adapters, params, x):
                return adapted(params, freeze_parts(adapters, "A") if freeze else adapters, x).sum()

            x = jax.ShapeDtypeStruct((rows, width), jnp.float32)
            grad = jax.jit(jax.grad(loss)).lower(adapters, params, x).compile()
            return grad.memory_analysis().temp_size_in_bytes

        inputs = 4 * layers * rows * width
        assert kept(True) < kept(False) - 0.9 * inputs

    @pytest.mark.parametrize("accumulate", [1, 4])
    def test_a_whole_step_keeps_less_than_a_plain_one(self, accumulate):
        """Of a part of the batch, x (rows, in) of every layer, and both moments of A."""
        layers, rows, width, rank = 6, 512, 64, 2
        config = LoraConfig(rank=rank, factorizations={"w": "bio"})
        params = {"w": jnp.ones((layers, width, width)) / width}
        adapters = jlora.init_lora(jax.random.key(0), params, config)
        adapted = jlora.lora(lambda params, x: jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0], config)

        def compiled(optimizer, parts):
            def loss(adapters, params, x, key):
                return adapted(params, freeze_parts(adapters, parts), x).mean()

            step = make_train_step(loss, optimizer, accumulate=accumulate, clip_norm=1.0)
            x = jax.ShapeDtypeStruct((rows, width), jnp.float32)
            return step.lower(init_state(adapters, optimizer), params, x).compile().memory_analysis()

        plain, frozen = compiled(optax.adamw(0.1), ()), compiled(lora_fa(optax.adamw(0.1)), "A")
        inputs, moments = 4 * layers * rows * width // accumulate, 2 * 4 * layers * width * rank
        assert frozen.temp_size_in_bytes < plain.temp_size_in_bytes - 0.9 * inputs
        assert frozen.output_size_in_bytes <= plain.output_size_in_bytes - moments

    def test_scalings_of_other_paths_are_refused(self, rng):
        adapters, grads = adapters_and_gradients(rng)
        config = CONFIG.replace(alpha_pattern={"up": 5.0})
        one_step(lora_fa(optax.sgd(1.0), config), grads, adapters)
        with pytest.raises(
            ConfigError, match=re.escape("alpha_pattern: 'up' matches nothing that the optimizer trains")
        ):
            one_step(lora_fa(optax.sgd(1.0), config), {"lora": grads}, {"lora": adapters})

    def test_a_frozen_part_is_named_as_parts_are(self, rng):
        with pytest.raises(ConfigError, match=re.escape("parts = ['a']: wanted of value, offset, A, B, magnitude")):
            freeze_parts(adapters_and_gradients(rng)[0], "a")


@pytest.mark.parametrize("name", ["plus", "fa", "riemannian"])
def test_a_train_step_takes_each_with_parts_and_clipping(rng, name):
    """The step of accumulated parts is that of the whole batch, and what is trained goes down."""
    params = {"up": jnp.asarray(rng.standard_normal((5, 7), np.float32))}
    config = LoraConfig(rank=2, target_modules="up")
    adapters = jlora.init_lora(jax.random.key(0), params, config)
    adapted = jlora.lora(lambda params, x: x @ params["up"], config)
    optimizer = {
        "plus": lora_plus(optax.adamw(0.01), 8),
        "fa": lora_fa(optax.adamw(0.01), config),
        "riemannian": riemannian(optax.adamw(0.01), config),
    }[name]
    batch = {"x": jnp.asarray(rng.standard_normal((12, 5), np.float32))}
    batch["y"] = batch["x"] @ (params["up"] + 1)

    def loss(adapters, params, batch, key):
        return jnp.mean((adapted(params, adapters, batch["x"]) - batch["y"]) ** 2)

    ends = []
    for accumulate in (1, 3):
        step = make_train_step(loss, optimizer, accumulate=accumulate, clip_norm=1.0)
        state = init_state(adapters, optimizer)
        losses = []
        for _ in range(5):
            state, metrics = step(state, params, batch)
            losses.append(float(metrics["loss"]))
        assert losses[-1] < losses[0]
        ends.append(state.trained)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *ends)
    assert (ends[0]["up"]["A"] == adapters["up"]["A"]).all() == (name == "fa")
