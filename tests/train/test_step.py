"""The train step against NumPy in float64, and what it must not compute, donate, retrace or change."""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jlora import ConfigError, CostModel, DataError, LoraConfig, combine_params, split_params
from jlora.linen import LoRA
from jlora.train import init_state, make_train_step
from tests.reference import as64, assert_close, random_adapter, random_array, randomize

N, IN, OUT, RANK = 12, 5, 7, 2


def linear_loss(adapters, base, batch, key):
    a, b = adapters["up"]["A"], adapters["up"]["B"]
    wrong = batch["x"] @ base["kernel"] + base["bias"] + (batch["x"] @ a) @ b - batch["y"]
    draw = jax.random.uniform(key)
    return jnp.mean(wrong**2), {"far": jnp.mean(jnp.abs(wrong) > 1), "draw": draw, "draw_squared": draw**2}


def reference_gradients(adapters, base, batch):
    """The loss, the share that is far off, and the gradients of A and B, by hand."""
    a, b, w, bias = (as64(leaf) for leaf in (adapters["up"]["A"], adapters["up"]["B"], base["kernel"], base["bias"]))
    x, y = as64(batch["x"]), as64(batch["y"])
    wrong = x @ (w + a @ b) + bias - y
    dy = 2 * wrong / wrong.size
    return np.mean(wrong**2), np.mean(np.abs(wrong) > 1), {"A": x.T @ dy @ b.T, "B": (x @ a).T @ dy}


@pytest.fixture
def adapters(rng):
    return {"up": random_adapter(rng, (IN, RANK), (RANK, OUT)), "head": None}


@pytest.fixture
def base(rng):
    return {"kernel": random_array(rng, (IN, OUT)), "bias": random_array(rng, (OUT,))}


@pytest.fixture
def batch(rng):
    return {"x": random_array(rng, (N, IN)), "y": random_array(rng, (N, OUT))}


@pytest.mark.parametrize("clip_norm", [None, 1e-2, 1e3])
@pytest.mark.parametrize("accumulate", [1, 3, 12])
def test_a_step_is_that_of_the_full_batch_clipped_over_the_adapters(adapters, base, batch, accumulate, clip_norm):
    optimizer = optax.sgd(1.0)
    step = make_train_step(linear_loss, optimizer, accumulate=accumulate, clip_norm=clip_norm)
    state, metrics = step(init_state(adapters, optimizer), base, batch)
    loss, far, grads = reference_gradients(adapters, base, batch)
    norm = math.sqrt(sum(np.sum(grad**2) for grad in grads.values()))
    scale = 1.0 if clip_norm is None else min(1.0, clip_norm / norm)
    for name in "AB":
        assert_close(state.trained["up"][name], as64(adapters["up"][name]) - scale * grads[name], factor=2)
    for name, wanted in {"loss": loss, "far": far, "grad_norm": norm}.items():
        assert_close(metrics[name], np.float64(wanted))
    assert state.trained["head"] is None
    assert int(state.step) == 1


def draws(adapters, base, batch, seed, steps=3, accumulate=1):
    optimizer = optax.sgd(0.1)
    step = make_train_step(linear_loss, optimizer, seed=seed, accumulate=accumulate)
    state, found = init_state(adapters, optimizer), []
    for _ in range(steps):
        state, metrics = step(state, base, batch)
        found.append((float(metrics["draw"]), float(metrics["draw_squared"])))
    return found


def test_the_key_is_another_one_at_every_step_and_seed_and_the_same_again(adapters, base, batch):
    first = draws(adapters, base, batch, seed=0)
    assert len(set(first)) == 3
    assert first == draws(adapters, base, batch, seed=0)
    assert not set(first) & set(draws(adapters, base, batch, seed=1))


def test_the_key_is_another_one_in_every_part_of_a_batch(adapters, base, batch):
    (mean, mean_of_squares), *_ = draws(adapters, base, batch, seed=0, accumulate=2)
    assert mean_of_squares > mean**2 + 1e-6


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_second_step_does_not_retrace(adapters, base, batch, accumulate):
    traces = []

    def counted(*args):
        traces.append(args)
        return linear_loss(*args)

    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, 9))
    step = make_train_step(counted, optimizer, accumulate=accumulate, clip_norm=1.0)
    state, _ = step(init_state(adapters, optimizer), base, batch)
    once = len(traces)
    for _ in range(3):
        state, _ = step(state, base, {name: np.asarray(leaf) for name, leaf in batch.items()})
    assert 0 < len(traces) == once


def test_the_base_is_bitwise_unchanged_by_ten_steps_of_weight_decay_and_not_donated(adapters, base, batch):
    before = jax.tree.map(np.array, base)
    optimizer = optax.adamw(0.1, weight_decay=0.5)
    step = make_train_step(linear_loss, optimizer)
    state = init_state(adapters, optimizer)
    for _ in range(10):
        state, _ = step(state, base, batch)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, base))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((base, batch)))
    assert all(np.any(new != old) for new, old in zip(*map(jax.tree.leaves, (state.trained, adapters)), strict=True))
    assert len(jax.tree.leaves(state.opt_state)) == 2 * 2 + 1


@pytest.mark.parametrize("optimizer", [optax.adamw(0.1), optax.contrib.schedule_free_sgd(0.1)], ids=["adamw", "free"])
def test_the_state_is_donated_and_holds_copies(adapters, base, batch, optimizer):
    before = jax.tree.map(np.array, adapters)
    state = init_state(adapters, optimizer)
    make_train_step(linear_loss, optimizer)(state, base, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trained))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, adapters))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_keeps_structure_and_dtypes(adapters, base, batch, dtype):
    adapters = jax.tree.map(lambda leaf: leaf.astype(dtype), adapters)
    optimizer = optax.adamw(0.1)
    state = init_state(adapters, optimizer)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    after, _ = make_train_step(linear_loss, optimizer, accumulate=2, clip_norm=1.0)(state, base, batch)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == shapes


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"accumulate": 5}, DataError, "a batch of 12 examples cannot be split into accumulate = 5 equal parts"),
        ({"accumulate": 0}, ConfigError, "accumulate = 0: wanted a whole number of at least 1"),
        ({"accumulate": 1.5}, ConfigError, "accumulate = 1.5: wanted a whole number of at least 1"),
        ({"clip_norm": -1.0}, ConfigError, "clip_norm = -1.0: wanted"),
        ({"clip_norm": float("nan")}, ConfigError, "clip_norm = nan: wanted"),
    ],
)
def test_what_cannot_be_is_refused(adapters, base, batch, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make_train_step(linear_loss, optax.sgd(0.1), **options)(init_state(adapters, optax.sgd(0.1)), base, batch)


def running_loss(weight, base, batch, key, model_state):
    """Least squares, and a running mean of what was seen, which the next part subtracts."""
    wrong = (batch["x"] - model_state["mean"]) @ weight - batch["y"]
    seen = 0.75 * model_state["mean"] + 0.25 * batch["x"].mean(0)
    return jnp.mean(wrong**2), {"seen": jnp.sum(seen)}, {"mean": seen, "calls": model_state["calls"] + 1}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_model_state_goes_from_part_to_part_and_from_step_to_step(batch, rng, accumulate):
    optimizer, weight, mean = optax.sgd(0.5), random_array(rng, (IN, OUT)), random_array(rng, (IN,))
    given = {"mean": mean, "calls": jnp.int32(0)}
    state = init_state(weight, optimizer, given)
    step = make_train_step(running_loss, optimizer, accumulate=accumulate)
    weight, mean, x, y = as64(weight), as64(mean), as64(batch["x"]), as64(batch["y"])
    for number in range(1, 3):
        grad, losses = 0.0, []
        for k in range(accumulate):
            inputs, targets = x[k::accumulate] - mean, y[k::accumulate]
            wrong = inputs @ weight - targets
            losses.append(np.mean(wrong**2))
            grad = grad + inputs.T @ (2 * wrong / wrong.size) / accumulate
            mean = 0.75 * mean + 0.25 * x[k::accumulate].mean(0)
        weight = weight - 0.5 * grad
        state, metrics = step(state, None, batch)
        assert_close(metrics["loss"], np.mean(losses))
        assert_close(state.trained, weight, factor=4)
        assert_close(state.model_state["mean"], mean)
        assert int(state.model_state["calls"]) == number * accumulate
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(given))


def test_no_gradient_goes_through_the_model_state_of_another_part(batch, rng):
    def loss(scale, _, batch, key, model_state):
        return jnp.mean(batch["x"]) * scale + model_state, {}, model_state + scale**2

    state = init_state(jnp.float32(3.0), optax.sgd(1.0), jnp.float32(0.0))
    state, _ = make_train_step(loss, optax.sgd(1.0), accumulate=2)(state, None, batch)
    assert_close(state.trained, 3 - np.mean(as64(batch["x"])))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            lambda s: (0.0, {}),
            "the state has a model state: wanted (value, metrics, model_state), but the loss returned 2",
        ),
        (lambda s: 0.0, "wanted (value, metrics, model_state), but the loss returned float"),
        (lambda s: (0.0, {}, {"mean": s["mean"]}), "calls (found None, wanted int32[])"),
        (
            lambda s: (0.0, {}, s | {"mean": s["mean"].astype("bfloat16")}),
            "is not like the one it was given: mean (found bfloat16[5], wanted float32[5])",
        ),
        (lambda s: (0.0, {}, s | {"mean": None}), "mean (found None, wanted float32[5])"),
        (lambda s: (0.0, {}, tuple(s.values())), "is not like the one it was given: 0 (found"),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_model_state_that_the_next_step_cannot_take_is_refused(batch, returned, message, accumulate):
    state = init_state(jnp.zeros(2), optax.sgd(0.1), {"mean": jnp.zeros(IN), "calls": jnp.int32(0)})
    step = make_train_step(lambda *args: returned(args[-1]), optax.sgd(0.1), accumulate=accumulate)
    with pytest.raises(ConfigError, match=re.escape(message)):
        step(state, None, batch)


class Transformer(nn.Module):
    """Distinct prime sizes: the number of elements of an array tells which kernel's shape it has."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(3, qkv_features=21, name="attention")(nn.LayerNorm()(x))
        x = x + nn.Dense(13, name="down")(nn.gelu(nn.Dense(17, name="up")(x)))
        return nn.Dense(19, name="head")(x.mean(1))


KERNELS = {13 * 3 * 7, 13 * 17, 13 * 19}
MOVES = {"parameter", "get-tuple-element", "bitcast", "copy", "transpose", "reshape", "fusion", "call"}


def programs(way, accumulate, patterns="**"):
    """The train step of a transformer as a jaxpr and as compiled HLO."""
    tokens = jnp.ones((5, 11, 13))
    model = Transformer()
    never_merged = CostModel(merge_from=float("inf"))
    lora = LoRA(model, LoraConfig(rank=RANK, target_modules=patterns), cost_model=never_merged)
    params = randomize(np.random.default_rng(0), jax.eval_shape(lora.init, jax.random.key(0), tokens)["params"])
    base, adapters = split_params(params)
    trained, frozen = (adapters, base) if way == "lora" else (base, None)
    assert {leaf.size for leaf in jax.tree.leaves(base) if leaf.ndim > 1 and leaf.size > 21} == KERNELS

    def loss(trained, frozen, batch, key):
        if way == "lora":
            logits = lora.apply({"params": combine_params(frozen, trained)}, batch["x"])
        else:
            logits = model.apply({"params": trained}, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean(), {}

    optimizer = optax.adamw(0.1)
    step = make_train_step(loss, optimizer, accumulate=accumulate, clip_norm=1.0)
    args = init_state(trained, optimizer), frozen, {"x": tokens, "labels": jnp.zeros(5, jnp.int32)}
    return jax.make_jaxpr(step)(*args).jaxpr, step.lower(*args).compile().as_text()


def equations(jaxpr):
    """Every equation of a jaxpr, those within its calls and loops too."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in equation.params.values():
            for part in parameter if isinstance(parameter, tuple | list) else [parameter]:
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def kernel_sized_equations(jaxpr):
    outputs = [(equation.primitive.name, out.aval.shape) for equation in equations(jaxpr) for out in equation.outvars]
    return {(name, shape) for name, shape in outputs if math.prod(shape) in KERNELS}


def kernel_sized_instructions(hlo):
    """What the compiled program computes in the shape of a kernel; moving a kernel about is no computation."""
    found = re.findall(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(", hlo)
    assert any(opcode == "parameter" and math.prod(map(int, shape.split(","))) in KERNELS for shape, opcode in found)
    return {(op, shape) for shape, op in found if op not in MOVES and math.prod(map(int, shape.split(","))) in KERNELS}


@pytest.mark.parametrize("patterns", ["**", "attention/*", "up"])
@pytest.mark.parametrize("accumulate", [1, 5])
def test_no_gradient_of_a_frozen_kernel_and_no_dense_delta_is_computed(accumulate, patterns):
    jaxpr, hlo = programs("lora", accumulate, patterns)
    assert kernel_sized_equations(jaxpr) == set()
    assert kernel_sized_instructions(hlo) == set()


def test_full_fine_tuning_computes_a_gradient_of_every_kernel():
    jaxpr, hlo = programs("full", 1)
    products = {math.prod(shape) for name, shape in kernel_sized_equations(jaxpr) if name == "dot_general"}
    assert products == KERNELS
    computed = {math.prod(map(int, shape.split(","))) for _, shape in kernel_sized_instructions(hlo)}
    assert computed == KERNELS
