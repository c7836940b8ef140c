"""What a train step costs, from what XLA says of the compiled program: FLOPs, temporaries, copies of activations.

The floor is the step without adapters: forward, and backward for activations only.
"""

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from jlora import CostModel, LoraConfig, init_lora, lora

RANK = 8
SIZES = {"A": (4, 512, 2048, 8, 4, 256), "B": (2, 1024, 4096, 8, 4, 256), "small": (1, 96, 160, 4, 3, 32)}
NAMES = ("q", "k", "v", "o", "up", "down")
CONFIG = LoraConfig(rank=RANK, alpha=16, target_modules=tuple(f"**/{name}" for name in NAMES))


def plain(x, layer, name, adapter):
    return x @ layer[name]


def hand_written(x, layer, name, adapter):
    return x @ layer[name] + CONFIG.alpha / RANK * ((x @ adapter["A"]) @ adapter["B"])


def hand_flattened(x, layer, name, adapter):
    rows = x.reshape(-1, x.shape[-1])
    return hand_written(rows, layer, name, adapter).reshape(*x.shape[:-1], -1)


def block(product, heads, x, layer, adapters):
    def norm(x, scale):
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale

    def linear(x, name):
        return product(x, layer, name, adapters and adapters[name])

    batch, time, width = x.shape
    y = norm(x, layer["norm_1"])
    q, k, v = (linear(y, name).reshape(batch, time, heads, width // heads) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(width // heads))
    x = x + linear(jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape), "o")
    return x + linear(jax.nn.gelu(linear(norm(x, layer["norm_2"]), "up")), "down")


def unrolled(heads, product, params, adapters, x):
    for number, layer in enumerate(params):
        x = block(product, heads, x, layer, adapters and adapters[number])
    return x


def scanned(heads, product, params, adapters, x):
    @jax.checkpoint
    def step(x, layers):
        return block(product, heads, x, *layers), None

    return jax.lax.scan(step, x, (params, adapters))[0]


def shapes(size, stacked=False):
    layers, width, inner, _, batch, time = SIZES[size]
    wide = dict.fromkeys("qkvo", (width, width)) | {"up": (width, inner), "down": (inner, width)}
    layer = wide | {"norm_1": (width,), "norm_2": (width,)}
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    x = array((batch, time, width))
    if stacked:
        return {name: array((layers, *shape)) for name, shape in layer.items()}, x
    return [{name: array(shape) for name, shape in layer.items()} for _ in range(layers)], x


def compiled(size, form, stacked=False, cost_model=None):
    """The compiled train step of one form of the transformer."""
    model = functools.partial(scanned if stacked else unrolled, SIZES[size][3])
    params, x = shapes(size, stacked)
    base = lambda params, x: model(plain, params, None, x)  # noqa: E731
    adapters = jax.eval_shape(lambda: init_lora(None, params, CONFIG, fn=base, args=(x,)))
    if form == "floor":
        step = jax.value_and_grad(lambda x, params: jnp.mean(base(params, x) ** 2))
        return jax.jit(step).lower(x, params).compile()
    if form == "jlora":
        adapted = lora(base, CONFIG, strict=True, cost_model=cost_model)
    else:
        adapted = lambda params, adapters, x: model(form, params, adapters, x)  # noqa: E731
    optimizer = optax.adam(1e-3)

    def step(adapters, state, params, x):
        loss, grads = jax.value_and_grad(lambda adapters: jnp.mean(adapted(params, adapters, x) ** 2))(adapters)
        updates, state = optimizer.update(grads, state)
        return loss, optax.apply_updates(adapters, updates), state

    return jax.jit(step).lower(adapters, jax.eval_shape(optimizer.init, adapters), params, x).compile()


def flops(program):
    return program.cost_analysis()["flops"]


def temporaries(program):
    return program.memory_analysis().temp_size_in_bytes


def moved(program, elements):
    """The transposes and copies of arrays of at least so many elements."""
    found = re.findall(r"= \w+\[([\d,]+)\]\S* (transpose|copy)\(", program.as_text())
    big = [(op, shape) for shape, op in found if math.prod(map(int, shape.split(","))) >= elements]
    return collections.Counter(big)


@pytest.mark.parametrize("size", ["A", "B"])
def test_flops_are_those_of_the_frozen_model_and_temporaries_those_of_the_hand_written_form(size):
    adapted, floor, hand = (compiled(size, form) for form in ("jlora", "floor", hand_written))
    assert flops(adapted) <= 1.04 * flops(floor)
    assert temporaries(adapted) <= temporaries(hand)
    assert temporaries(adapted) <= 1.001 * temporaries(compiled(size, hand_flattened))


def test_no_activation_is_transposed_or_copied_that_the_frozen_model_does_not():
    *_, batch, time = SIZES["small"]
    elements = batch * time * SIZES["small"][1]
    never = CostModel(merge_from=float("inf"))
    adapted, floor, hand = (compiled("small", f, cost_model=never) for f in ("jlora", "floor", hand_written))
    assert moved(adapted, elements) == moved(floor, elements)
    assert moved(hand, elements) - moved(floor, elements)


@pytest.mark.parametrize("stacked", [False, True], ids=["", "scan"])
def test_no_gradient_is_formed_from_a_transposed_activation(stacked):
    never = CostModel(merge_from=float("inf"))
    adapted, hand = (slow_gradients(compiled("small", f, stacked, never)) for f in ("jlora", hand_flattened))
    assert hand >= len(NAMES)
    assert adapted == 0


def slow_gradients(program):
    """The products x.T @ g of (rows, wide) and (rows, r), which are slower on CPU than g.T @ x."""
    pattern = rf"\[\d+,{RANK}\]\{{1,0\}} dot\(.*lhs_contracting_dims=\{{0\}}, rhs_contracting_dims=\{{0\}}"
    return len(re.findall(pattern, program.as_text()))


def test_with_scan_and_remat_every_layer_adds_what_it_adds_to_the_base(monkeypatch):
    layers, *rest = SIZES["B"]
    monkeypatch.setitem(SIZES, "deep", (2 * layers, *rest))
    adapted, floor = ({n: temporaries(compiled(n, f, stacked=True)) for n in ("B", "deep")} for f in ("jlora", "floor"))
    low_rank = 4 * layers * rest[-2] * rest[-1] * RANK * len(NAMES)
    assert floor["deep"] > floor["B"]
    assert adapted["deep"] - adapted["B"] <= floor["deep"] - floor["B"] + low_rank
    assert adapted["deep"] <= temporaries(compiled("deep", hand_flattened, stacked=True))
