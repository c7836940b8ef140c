"""The models that are measured: plain JAX, each written once over `benchmarks.products`."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import optax

Params = Any


@dataclass(frozen=True)
class Workload:
    """A model, its data and its loss.

    Attributes:
      about: one line for people.
      init: key -> params.
      data: key -> inputs.
      body: (products, params, activations) -> outputs.
      loss: (outputs, labels) -> scalar.
      label: outputs of the base without adapters -> labels. The loss then depends on the adapters; with random labels
        and normalized outputs it hardly does, and could not tell a wrong form from a right one.
      targets: the patterns of the weights that are adapted.
      enter: (products, params, inputs) -> the activations, up to which the floor's backward pass goes.
      stacked: the path of the params that are stacked and scanned over, if any.
      unmatched: what it adapts besides matrices, such as "convolution", if anything.
      dtype: of all arrays when it is timed; the forms are checked in float32.
      asked: whether it is measured only where it is named: it takes a GPU.
    """

    about: str
    init: Callable[[jax.Array], Params]
    data: Callable[[jax.Array], jax.Array]
    body: Callable[[Any, Params, jax.Array], jax.Array]
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    targets: tuple[str, ...]
    label: Callable[[jax.Array], jax.Array] = lambda outputs: outputs
    enter: Callable[[Any, Params, jax.Array], jax.Array] = lambda products, params, inputs: inputs
    stacked: str | None = None
    unmatched: str | None = None
    dtype: Any = jnp.float32
    asked: bool = False

    def apply(self, products: Any, params: Params, inputs: jax.Array) -> jax.Array:
        return self.body(products, params, self.enter(products, params, inputs))


def squared_error(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean((outputs - labels) ** 2)


def cross_entropy(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


class Weights:
    """Random weights N(0, 1/in), each from a key of its own."""

    def __init__(self, key: jax.Array, *stack: int) -> None:
        self.keys: Iterator[jax.Array] = iter(jax.random.split(key, 256))
        self.stack = stack

    def __call__(self, *shape: int) -> jax.Array:
        return jax.random.normal(next(self.keys), (*self.stack, *shape)) / math.sqrt(math.prod(shape[:-1]))

    def norm(self, width: int, *, bias: bool = True) -> dict[str, jax.Array]:
        scale = {"scale": jnp.ones((*self.stack, width))}
        return {**scale, "bias": jnp.zeros((*self.stack, width))} if bias else scale


def layer_norm(norm: Params, x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * norm["scale"] + norm["bias"]


def rms_norm(norm: Params, x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * norm["scale"]


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention: q (batch, time, groups, heads of a group, head_dim), k and v without the heads of a group."""
    scores = jnp.einsum("bqghd,bkgd->bghqk", q, k) / math.sqrt(q.shape[-1])
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e30), axis=-1)
    return jnp.einsum("bghqk,bkgd->bqghd", weights, v).reshape(*q.shape[:2], -1)


def tokens(width: int, key: jax.Array, length: int = 256) -> jax.Array:
    return jax.random.normal(key, (4, length, width))


def best(outputs: jax.Array) -> jax.Array:
    return outputs.argmax(-1)


# A and B: a pre-LN transformer.


def transformer_params(layers: int, width: int, hidden: int, key: jax.Array) -> Params:
    weights = Weights(key)
    attention = ("query", "key", "value", "out")
    return {
        "layers": [
            {
                "attention_norm": weights.norm(width),
                "attention": {name: weights(width, width) for name in attention},
                "mlp_norm": weights.norm(width),
                "mlp": {"up": weights(width, hidden), "down": weights(hidden, width)},
            }
            for _ in range(layers)
        ],
        "norm": weights.norm(width),
    }


def transformer(heads: int, products: Any, params: Params, x: jax.Array) -> jax.Array:
    for layer in params["layers"]:
        attention, mlp = layer["attention"], layer["mlp"]
        h = layer_norm(layer["attention_norm"], x)
        q, k, v = (products.linear(h, attention[name]) for name in ("query", "key", "value"))
        split = (*x.shape[:2], heads, -1)
        y = attend(q.reshape(*x.shape[:2], heads, 1, -1), k.reshape(split), v.reshape(split))
        x = x + products.linear(y, attention["out"])
        h = products.linear(layer_norm(layer["mlp_norm"], x), mlp["up"])
        x = x + products.linear(jax.nn.gelu(h), mlp["down"])
    return layer_norm(params["norm"], x)


def transformer_workload(layers: int, width: int, hidden: int) -> Workload:
    return Workload(
        about=f"pre-LN transformer, {layers} layers, width {width}, hidden {hidden}, 8 heads, 4x256 tokens",
        init=partial(transformer_params, layers, width, hidden),
        data=partial(tokens, width),
        body=partial(transformer, 8),
        loss=squared_error,
        targets=("layers/*/attention", "layers/*/mlp"),
    )


# llama: grouped queries, stacked layers, scan and checkpoint.


def llama_params(layers: int, width: int, kv_width: int, hidden: int, key: jax.Array) -> Params:
    weights = Weights(key, layers)
    shapes = {
        "query": (width, width),
        "key": (width, kv_width),
        "value": (width, kv_width),
        "out": (width, width),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
    }
    norms = {name: weights.norm(width, bias=False) for name in ("attention_norm", "mlp_norm")}
    layer = {**norms, **{name: weights(*shape) for name, shape in shapes.items()}}
    return {"layers": layer, "norm": {"scale": jnp.ones(width)}}


def rotary(x: jax.Array) -> jax.Array:
    """Rotates halves of head_dim by the position; x (batch, time, heads, head_dim)."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * 10000.0 ** (-jnp.arange(half) / half)
    cos, sin = (wave(angles)[:, None, :].astype(x.dtype) for wave in (jnp.cos, jnp.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def llama_block(head_dim: int, products: Any, layer: Params, x: jax.Array) -> jax.Array:
    h = rms_norm(layer["attention_norm"], x)
    q, k, v = (
        products.linear(h, layer[name]).reshape(*x.shape[:2], -1, head_dim) for name in ("query", "key", "value")
    )
    groups = k.shape[2]
    q = rotary(q).reshape(*x.shape[:2], groups, -1, head_dim)
    x = x + products.linear(attend(q, rotary(k), v), layer["out"])
    h = rms_norm(layer["mlp_norm"], x)
    h = jax.nn.silu(products.linear(h, layer["gate"])) * products.linear(h, layer["up"])
    return x + products.linear(h, layer["down"])


def llama(head_dim: int, products: Any, params: Params, x: jax.Array) -> jax.Array:
    return rms_norm(params["norm"], products.scan(partial(llama_block, head_dim), x, params["layers"]))


def llama_workload(about: str, layers: int, width: int, kv_width: int, hidden: int, **fields: Any) -> Workload:
    return Workload(
        about=f"{layers} scanned and checkpointed Llama blocks, width {width}, hidden {hidden}, {about}",
        init=partial(llama_params, layers, width, kv_width, hidden),
        loss=squared_error,
        targets=tuple(f"layers/{name}" for name in ("query", "key", "value", "out", "gate", "up", "down")),
        stacked="layers",
        **fields,
    )


# conv: a residual net with strides, NHWC.


def conv_params(widths: tuple[int, ...], classes: int, key: jax.Array) -> Params:
    weights = Weights(key)
    stages = [
        {
            "norm": weights.norm(before),
            "first": {"kernel": weights(3, 3, before, after)},
            "second": {"kernel": weights(3, 3, after, after)},
            "shortcut": {"kernel": weights(1, 1, before, after)},
        }
        for before, after in pairwise(widths)
    ]
    return {
        "stem": {"kernel": weights(3, 3, 3, widths[0])},
        "stages": stages,
        "norm": weights.norm(widths[-1]),
        "head": {"kernel": weights(widths[-1], classes)},
    }


def conv_net(products: Any, params: Params, x: jax.Array) -> jax.Array:
    x = products.conv(x, params["stem"]["kernel"])
    for stage in params["stages"]:
        h = jax.nn.relu(layer_norm(stage["norm"], x))
        shortcut = products.conv(h, stage["shortcut"]["kernel"], 2)
        h = jax.nn.relu(products.conv(h, stage["first"]["kernel"], 2))
        x = shortcut + products.conv(h, stage["second"]["kernel"])
    return products.linear(layer_norm(params["norm"], x).mean((1, 2)), params["head"]["kernel"])


def images(batch: int, size: int, key: jax.Array) -> jax.Array:
    return jax.random.normal(key, (batch, size, size, 3))


# embed: a bag of words, a big table that is also the head.


def embed_params(vocabulary: int, width: int, hidden: int, key: jax.Array) -> Params:
    weights = Weights(key)
    table = jax.random.normal(next(weights.keys), (vocabulary, width))
    return {"table": {"embedding": table}, "up": weights(width, hidden), "down": weights(hidden, width)}


def embed_rows(products: Any, params: Params, ids: jax.Array) -> jax.Array:
    return products.take(params["table"]["embedding"], ids)


def embed_body(products: Any, params: Params, rows: jax.Array) -> jax.Array:
    x = rows.mean(1)
    h = jax.nn.gelu(products.linear(x, params["up"]))
    return products.project(x + products.linear(h, params["down"]), params["table"]["embedding"])


def words(batch: int, length: int, vocabulary: int, key: jax.Array) -> jax.Array:
    return jax.random.randint(key, (batch, length), 0, vocabulary)


WORKLOADS = {
    "A": transformer_workload(layers=4, width=512, hidden=2048),
    "B": transformer_workload(layers=2, width=1024, hidden=4096),
    "llama": llama_workload(
        "8 heads in 2 groups, 4x256 tokens",
        *(4, 512, 128, 1408),
        data=partial(tokens, 512),
        body=partial(llama, 64),
    ),
    "conv": Workload(
        about="residual net of 3x3 convolutions, widths 32 to 256, stride 2, NHWC, 16 images of 64x64",
        init=partial(conv_params, (32, 64, 128, 256), 10),
        data=partial(images, 16, 64),
        body=conv_net,
        loss=cross_entropy,
        label=best,
        targets=("**/kernel",),
        unmatched="convolution",
    ),
    "embed": Workload(
        about="bag of 16 words, table of 32768x256 tied to the head, MLP of 1024, batch 256",
        init=partial(embed_params, 32768, 256, 1024),
        data=partial(words, 256, 16, 32768),
        body=embed_body,
        loss=cross_entropy,
        label=best,
        targets=("table/embedding", "up", "down"),
        enter=embed_rows,
        unmatched="lookup in a table",
    ),
    "wide": llama_workload(
        "32 heads in 8 groups, 4x2048 tokens, bfloat16, for a GPU",
        *(8, 4096, 1024, 11008),
        data=partial(tokens, 4096, length=2048),
        body=partial(llama, 128),
        dtype=jnp.bfloat16,
        asked=True,
    ),
}
