"""The adapters of `LoRA` under nnx.jit, nnx.grad, nnx.Optimizer, nnx.split and nnx.vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jlora import count_params
from tests.nnx.models import CONFIG, VECTORS, Noisy, adapt, arrays, at, call, draw, merged, same
from tests.reference import as64, assert_close, random_array

ADAPTERS = nnx.DiffState(0, nnx.LoRAParam)


def loss(model, x):
    return jnp.mean(jnp.sin(model(x)) ** 2)


@pytest.mark.parametrize("name", ["linear general", "einsum", "conv", "attention", "scan"])
def test_gradients_are_those_of_the_dense_updates(name, rng):
    model, x, einsums = draw(rng, name)
    lora = adapt(rng, model, x)
    value, grads = nnx.jit(nnx.value_and_grad(loss, argnums=ADAPTERS))(lora, x)
    copy = merged(model, lora.adapters, einsums)
    wanted, dense = nnx.jit(nnx.value_and_grad(loss))(copy, x)
    assert_close(value, as64(wanted), factor=20)
    found, dense = nnx.to_pure_dict(grads)["lora"], nnx.to_pure_dict(dense)
    assert len(jax.tree.leaves(found)) == 2 * len(einsums)
    for path, einsum in einsums.items():
        a, b, w = einsum.replace("->", ",").split(",")
        adapter, grad = at(lora.adapters, path), 1.5 * as64(at(dense, path))
        assert_close(at(found, path)["A"], np.einsum(f"{w},{b}->{a}", grad, as64(adapter["B"])), factor=50)
        assert_close(at(found, path)["B"], np.einsum(f"{w},{a}->{b}", grad, as64(adapter["A"])), factor=50)


@pytest.mark.parametrize(("name", "dropout"), [("transformer", 0.0), ("linear", 0.1)])
def test_training_moves_the_adapters_alone_and_traces_once(name, dropout, rng):
    model, x, _ = draw(rng, name)
    lora = adapt(rng, model, x, config=CONFIG.replace(dropout=dropout))
    optimizer = nnx.Optimizer(lora, optax.adamw(3e-2, weight_decay=0.1), wrt=nnx.LoRAParam)
    base, before = arrays(model, ...), arrays(lora, nnx.LoRAParam)
    traces = 0

    @nnx.jit
    def step(lora, optimizer, x):
        nonlocal traces
        traces += 1
        value, grads = nnx.value_and_grad(lambda lora, x: jnp.mean(lora(x) ** 2), argnums=ADAPTERS)(lora, x)
        optimizer.update(lora, grads)
        return value

    losses = [float(step(lora, optimizer, x)) for _ in range(10)]
    assert traces == 1
    assert losses[-1] < 0.9 * losses[0]
    same(arrays(model, ...), base)
    assert all(
        np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (arrays(lora, nnx.LoRAParam), before)), strict=True)
    )
    assert count_params(nnx.state(optimizer, nnx.optimizer.OptState)) == 2 * count_params(lora.adapters) + 2


def test_split_merge_and_clone_give_the_same_lora(rng):
    model, x, _ = draw(rng, "attention")
    lora = adapt(rng, model, x)
    graphdef, adapters, rest = nnx.split(lora, nnx.LoRAParam, ...)
    assert hash(graphdef) == hash(nnx.graphdef(lora))
    wanted = call(lora, x)
    assert nnx.graphdef(lora) == graphdef
    for again in (nnx.merge(graphdef, adapters, rest), nnx.clone(lora)):
        same(again.adapters, lora.adapters)
        np.testing.assert_array_equal(call(again, x), wanted)

    def pure(adapters, rest, x):
        return loss(nnx.merge(graphdef, adapters, rest), x)

    found = nnx.to_pure_dict(jax.jit(jax.grad(pure))(adapters, rest, x))
    wanted = nnx.to_pure_dict(nnx.jit(nnx.grad(loss, argnums=ADAPTERS))(lora, x))
    jax.tree.map(lambda f, w: assert_close(f, as64(w), factor=50), found, wanted)


def test_state_changes_inside_a_gradient(rng):
    lora = adapt(rng, Noisy(nnx.Rngs(0)), x := random_array(rng, VECTORS))
    twin = lora.merge()
    nnx.jit(nnx.grad(loss, argnums=ADAPTERS))(lora, x)
    nnx.jit(nnx.grad(loss))(twin, x)
    found, wanted = (arrays(each, nnx.BatchStat) for each in (lora.model, twin))
    jax.tree.map(lambda f, w: assert_close(f, w, factor=20), found, wanted)
    same(arrays(lora.model, nnx.RngState), arrays(twin, nnx.RngState))


def test_a_stack_of_adapters_under_vmap(rng):
    model, x, _ = draw(rng, "attention")
    loras = [adapt(rng, model, x) for _ in range(3)]
    graphdef, _, rest = nnx.split(loras[0], nnx.LoRAParam, ...)
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.state(lora, nnx.LoRAParam) for lora in loras))
    stacked = nnx.merge(graphdef, stack, rest)
    axes = nnx.StateAxes({nnx.LoRAParam: 0, ...: None})
    found = nnx.vmap(call, in_axes=(axes, None))(stacked, x)
    assert_close(found, as64(jnp.stack([call(lora, x) for lora in loras])), factor=20)
