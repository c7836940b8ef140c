"""A batch in parts against the whole: what a mean is over, counts, keys, scalars, optimizers that ask for values."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jlora import ConfigError, DataError
from jlora.train import Mean, Sum, init_state, make_train_step
from tests.reference import as64, assert_close, random_adapter, random_array
from tests.work import compilations

N, TIME, IN, OUT, RANK = 12, 3, 5, 7, 2


@pytest.fixture
def adapter(rng):
    return random_adapter(rng, (IN, RANK), (RANK, OUT))


@pytest.fixture
def weight(rng):
    return random_array(rng, (IN, OUT))


@pytest.fixture
def batch(rng):
    """Sequences of which some have many tokens, some few and some none; no two parts have as many."""
    mask = np.arange(TIME) < np.array([3, 0, 2, 0, 1, 1, 3, 3, 0, 2, 0, 0])[:, None]
    return {
        "x": random_array(rng, (N, TIME, IN)),
        "y": random_array(rng, (N, TIME, OUT)),
        "mask": jnp.asarray(mask),
        "scale": jnp.float32(0.5),
    }


def errors(adapter, weight, batch):
    wrong = batch["x"] @ weight + (batch["x"] @ adapter["A"]) @ adapter["B"] - batch["y"]
    return jnp.where(batch["mask"], jnp.sum(wrong**2, axis=-1), 0) * batch["scale"]


def token_loss(adapter, weight, batch, key):
    """A mean over the tokens that are no padding."""
    each, tokens = errors(adapter, weight, batch), jnp.sum(batch["mask"])
    far = jnp.sum(each > 5.0)
    return Mean(jnp.sum(each), tokens), {"tokens": Sum(tokens), "far": Mean(far, tokens), "far count": Sum(far)}


def summed_loss(adapter, weight, batch, key):
    return Sum(jnp.sum(errors(adapter, weight, batch))), {}


def reference(adapter, weight, batch):
    """The sum of the errors, how many are far off, how many tokens there are, the gradients of A and B of the sum."""
    a, b, w, x, y = (as64(leaf) for leaf in (adapter["A"], adapter["B"], weight, batch["x"], batch["y"]))
    mask, scale = np.asarray(batch["mask"]), float(batch["scale"])
    wrong = x @ (w + a @ b) - y
    each = np.where(mask, (wrong**2).sum(-1), 0) * scale
    dy = 2 * wrong * mask[..., None] * scale
    dw = np.einsum("nti,nto->io", x, dy)
    return each.sum(), (each > 5).sum(), mask.sum(), {"A": dw @ b.T, "B": a.T @ dw}


@pytest.mark.parametrize("accumulate", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("loss", [token_loss, summed_loss])
def test_any_number_of_parts_is_the_whole_batch(adapter, weight, batch, accumulate, loss):
    total, far, tokens, grads = reference(adapter, weight, batch)
    divisor = tokens if loss is token_loss else 1
    step = make_train_step(loss, optax.sgd(1.0), accumulate=accumulate)
    state, metrics = step(init_state(adapter, optax.sgd(1.0)), weight, batch)
    assert_close(metrics["loss"], total / divisor, factor=4)
    for name in "AB":
        assert_close(state.trained[name], as64(adapter[name]) - grads[name] / divisor, factor=8)
    norm = math.sqrt(sum(np.sum((grad / divisor) ** 2) for grad in grads.values()))
    assert_close(metrics["grad_norm"], norm, factor=4)
    if loss is token_loss:
        assert int(metrics["tokens"]) == tokens
        assert int(metrics["far count"]) == far
        assert_close(metrics["far"], far / tokens)
        assert metrics["tokens"].dtype == metrics["far count"].dtype == jnp.int32


def test_a_part_of_no_weight_counts_nothing_and_a_batch_of_none_has_no_mean(adapter, weight, batch):
    step = make_train_step(token_loss, optax.sgd(0.0), accumulate=2)
    empty = batch | {"mask": jnp.zeros_like(batch["mask"])}
    assert np.isnan(step(init_state(adapter, optax.sgd(0.0)), weight, empty)[1]["loss"])
    half = batch | {"mask": batch["mask"].at[::2].set(False)}
    total, _, tokens, _ = reference(adapter, weight, half)
    _, metrics = step(init_state(adapter, optax.sgd(0.0)), weight, half)
    assert_close(metrics["loss"], total / tokens, factor=4)


def test_no_gradient_is_taken_of_the_weight(batch):
    def loss(w, _, batch, key):
        return Mean(w * 3, w**2), {}

    for accumulate in (1, 2):
        state = init_state(jnp.float32(2.0), optax.sgd(1.0))
        state, _ = make_train_step(loss, optax.sgd(1.0), accumulate=accumulate)(state, None, batch)
        assert_close(state.trained, 2 - 3 / 4)


def test_a_loss_that_returns_a_scalar_is_one_without_metrics(adapter, weight, batch):
    loss = lambda *args: jnp.mean(errors(*args[:3]))  # noqa: E731
    _, metrics = make_train_step(loss, optax.sgd(0.1))(init_state(adapter, optax.sgd(0.1)), weight, batch)
    assert set(metrics) == {"loss", "grad_norm"}
    assert_close(metrics["loss"], reference(adapter, weight, batch)[0] / (N * TIME), factor=4)


def test_scalars_and_keys_of_a_batch_are_given_to_every_part(batch):
    def loss(w, _, batch, key):
        drawn = jax.random.uniform(batch["key"])
        return w * batch["scale"] * drawn, {"drawn": drawn, "rows": Sum(jnp.int32(batch["x"].shape[0]))}

    batch = {"x": batch["x"], "scale": 3.0, "key": jax.random.key(5)}
    drawn = float(jax.random.uniform(batch["key"]))
    for accumulate in (1, 4):
        state = init_state(jnp.float32(2.0), optax.sgd(1.0))
        _, metrics = make_train_step(loss, optax.sgd(1.0), accumulate=accumulate)(state, None, batch)
        assert_close(metrics["drawn"], drawn)
        assert_close(metrics["loss"], 6 * drawn)
        assert int(metrics["rows"]) == N


def test_part_k_has_every_row_from_k_on(batch):
    seen = lambda w, _, batch, key: (w * 0.0, {"first": Sum(batch["x"][:, 0, 0] * jnp.array([1.0, 0.0, 0.0]))})  # noqa: E731
    _, metrics = make_train_step(seen, optax.sgd(1.0), accumulate=4)(
        init_state(jnp.float32(1), optax.sgd(1.0)), None, batch
    )
    assert_close(metrics["first"], [as64(batch["x"])[:4, 0, 0].sum(), 0, 0])


def minimised(optimizer, accumulate, clip_norm=None, loss=token_loss, steps=5, dtype="float32"):
    rng = np.random.default_rng(1)
    adapter = random_adapter(rng, (IN, RANK), (RANK, OUT), dtype)
    weight = random_array(rng, (IN, OUT), dtype)
    mask = np.arange(TIME) < np.array([3, 0, 2, 0, 1, 1])[:, None]
    batch = {"x": random_array(rng, (6, TIME, IN)), "y": random_array(rng, (6, TIME, OUT)), "mask": mask, "scale": 0.1}
    step = make_train_step(loss, optimizer, accumulate=accumulate, clip_norm=clip_norm)
    state, losses, compiled = init_state(adapter, optimizer), [], []

    def one_more():
        nonlocal state
        state, metrics = step(state, weight, batch)
        losses.append(float(metrics["loss"]))

    for _ in range(steps):
        compiled.append(compilations(one_more))
    assert compiled[0] > 0
    assert set(compiled[1:]) == {0}
    return state, losses


def plateau():
    return optax.chain(optax.sgd(1e-2), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))


def backtracking():
    return optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(9))


@pytest.mark.parametrize("optimizer", [plateau, optax.polyak_sgd, backtracking])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_an_optimizer_gets_the_value_and_the_function_of_the_whole_batch(optimizer, clip_norm):
    whole, losses = minimised(optimizer(), 1, clip_norm)
    parts, losses_of_parts = minimised(optimizer(), 3, clip_norm)
    np.testing.assert_allclose(losses_of_parts, losses, rtol=1e-3)
    assert losses[-1] < losses[0]
    for one, other in zip(jax.tree.leaves(whole.trained), jax.tree.leaves(parts.trained), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-3)


def test_lbfgs_steps_as_optax_says_to_call_it():
    optimizer = optax.lbfgs()
    state, _ = minimised(optimizer, 2, steps=3)
    rng = np.random.default_rng(1)
    params = random_adapter(rng, (IN, RANK), (RANK, OUT))
    weight = random_array(rng, (IN, OUT))
    mask = np.arange(TIME) < np.array([3, 0, 2, 0, 1, 1])[:, None]
    batch = {"x": random_array(rng, (6, TIME, IN)), "y": random_array(rng, (6, TIME, OUT)), "mask": mask, "scale": 0.1}

    @jax.jit
    def step(params, opt_state):
        value_fn = lambda params: jnp.sum(errors(params, weight, batch)) / mask.sum()  # noqa: E731
        value, grad = jax.value_and_grad(value_fn)(params)
        updates, opt_state = optimizer.update(grad, opt_state, params, value=value, grad=grad, value_fn=value_fn)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    for _ in range(3):
        params, opt_state = step(params, opt_state)
    for name in "AB":
        np.testing.assert_allclose(state.trained[name], params[name], rtol=1e-3, atol=1e-4)


def test_the_function_of_an_optimizer_has_the_model_state_before_the_step():
    def loss(w, _, batch, key, state):
        return jnp.mean((batch * w - 1 - state) ** 2), {}, state + 100

    without = lambda w, _, batch, key: loss(w, _, batch, key, 0.0)[0]  # noqa: E731
    optimizer = backtracking()
    state = init_state(jnp.float32(0.1), optimizer, jnp.float32(0.0))
    state, _ = make_train_step(loss, optimizer)(state, None, jnp.ones(4))
    wanted, _ = make_train_step(without, optimizer)(init_state(jnp.float32(0.1), optimizer), None, jnp.ones(4))
    assert float(state.model_state) == 100
    assert float(state.trained) == float(wanted.trained) != 0.1


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda b: (0.0, {"loss": 1.0}), "a metric 'loss', which the step itself gives; give it another name"),
        (lambda b: (0.0, {"grad_norm": 1.0}), "a metric 'grad_norm', which the step itself gives"),
        (lambda b: (0.0, {}, 3), "wanted a scalar or (value, metrics), but the loss returned 3 values"),
        (lambda b: (0.0, 1.0), "the loss returned metrics of type float; wanted a dict, by name"),
        (lambda b: b["mask"] * 1.0, "the loss returned a value of shape (6, 3); wanted a scalar: its mean, or Mean("),
        (lambda b: Mean(b["mask"] * 1.0, 3), "the loss returned a value of shape (6, 3); wanted a scalar"),
    ],
)
def test_what_a_loss_may_not_return_is_refused(batch, returned, message):
    step = make_train_step(lambda w, f, batch, key: returned(batch), optax.sgd(0.1), accumulate=2)
    with pytest.raises(ConfigError, match=re.escape(message)):
        step(init_state(jnp.zeros(2), optax.sgd(0.1)), None, batch)


def test_arrays_of_a_batch_that_differ_in_length_are_refused(batch):
    step = make_train_step(lambda w, f, batch, key: jnp.sum(w), optax.sgd(0.1), accumulate=2)
    message = "the arrays of a batch differ in length: {'x': 12, 'y': 4}; only scalars are given to every part"
    with pytest.raises(DataError, match=re.escape(message)):
        step(init_state(jnp.zeros(2), optax.sgd(0.1)), None, {"x": jnp.zeros((12, 2)), "y": jnp.zeros(4)})
