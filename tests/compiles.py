"""`python -m tests.compiles --cases 1000 --seed 3`: XLA compiles the gradients of tiny products with adapters.

XLA has code generators of its own for small products, and one that meets what it does not know ends the process. So
every case is printed before it is compiled: the last line names the one.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora.linen import LoRADenseGeneralAdapter
from jlora.products import factored_product

NAMES = ("A", "B", "x", "w")
EXTRA = (3, 2)  # the sizes of the axes of two vmaps


@dataclasses.dataclass(frozen=True)
class Case:
    """A product of x with a weight and its adapter, and how it is differentiated.

    Attributes:
      face: what computes it.
      axes: the axes of x, of the weight and of the output: n (batch), t (rows), i (in) and o (out).
      sizes: of the axes, and of the rank r.
      wrap: what the product stands in.
      by: those of A, B, x and w that it is differentiated by.
      mapped: for each vmap those of A, B, x and w that have its axis.
      each: whether the vmaps are around the gradient, as for gradients of every example, or within it.
    """

    face: str
    axes: tuple[str, str, str]
    sizes: dict[str, int]
    wrap: str
    by: tuple[str, ...]
    mapped: tuple[tuple[str, ...], ...]
    each: bool

    def arguments(self) -> list[jax.ShapeDtypeStruct]:
        """A, B, x and w, with an axis in front for each vmap that they have."""
        x, w, _ = self.axes
        batch, ins, outs = ([c for c in w if c == role] for role in "nio")
        own = {"A": [*batch, *ins, "r"], "B": [*batch, "r", *outs], "x": x, "w": w}
        arguments = []
        for name in NAMES:
            extra = [size for size, names in zip(EXTRA, self.mapped, strict=False) if name in names]
            shape = (*extra, *(self.sizes[c] for c in own[name]))
            arguments.append(jax.ShapeDtypeStruct(shape, jnp.float32))
        return arguments

    def gradient(self) -> Callable[..., Any]:
        fn = WRAPS[self.wrap](FACES[self.face](self))
        product = fn if self.each else self._under_vmap(fn)

        def loss(*arguments: Any) -> Any:
            return jnp.sin(product(*arguments)).sum()

        gradient = jax.grad(loss, [NAMES.index(name) for name in self.by])
        return self._under_vmap(gradient) if self.each else gradient

    def _under_vmap(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        for names in reversed(self.mapped):
            fn = jax.vmap(fn, [0 if name in names else None for name in NAMES])
        return fn


def by_transform(case: Case) -> Callable[..., Any]:
    x_axes, w_axes, y_axes = case.axes
    roles = {"w": w_axes.replace("n", "b")}
    config = jlora.LoraConfig(rank=case.sizes["r"], alpha=3.0, target_modules="w", factorizations=roles)
    never = jlora.CostModel(merge_from=math.inf)
    model = jlora.lora(
        lambda params, x: jnp.einsum(f"{x_axes},{w_axes}->{y_axes}", x, params["w"]), config, cost_model=never
    )
    return lambda a, b, x, w: model({"w": w}, {"w": {"A": a, "B": b}}, x)


def by_product(case: Case) -> Callable[..., Any]:
    n = case.axes[1].count("n")
    return lambda a, b, x, w: factored_product(x, a, b, [n + 1], n, scale=3.0)


def by_layer(case: Case) -> Callable[..., Any]:
    n = case.axes[1].count("n")
    layer = LoRADenseGeneralAdapter(case.sizes["r"], case.sizes["o"], axis=-1, batch_dims=range(n), alpha=3.0)
    return lambda a, b, x, w: layer.apply({"params": {"A": a, "B": b}}, x)


def in_scan(fn: Callable[..., Any]) -> Callable[..., Any]:
    def scanned(*arguments: Any) -> Any:
        return jax.lax.scan(lambda total, _: (total + fn(*arguments).sum(), None), jnp.zeros(()), None, 2)[0]

    return scanned


FACES = {"transform": by_transform, "product": by_product, "layer": by_layer}
WRAPS: dict[str, Callable[..., Any]] = {
    "nothing": lambda fn: fn,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": in_scan,
}


def random_case(rng: np.random.Generator) -> Case:
    def some(names: tuple[str, ...]) -> tuple[str, ...]:
        """One of the names at least."""
        chosen = tuple(name for name in names if rng.random() < 0.6)
        return chosen or (names[rng.integers(len(names))],)

    def order(axes: str) -> str:
        return "".join(rng.permutation(list(axes)))

    face = str(rng.choice(list(FACES)))
    batch = "n" * int(rng.random() < 0.5)
    axes = (batch + "ti", batch + "io", batch + "to")
    small = {"n": rng.integers(1, 4), "t": rng.integers(1, 7), "r": rng.integers(1, 4)}
    sizes = small | {"i": rng.integers(small["r"], 8), "o": rng.integers(small["r"], 8)}
    return Case(
        face,
        (order(axes[0]), order(axes[1]), order(axes[2])) if face == "transform" else axes,
        {axis: int(size) for axis, size in sizes.items()},
        str(rng.choice(list(WRAPS))),
        some(NAMES if face == "transform" else NAMES[:3]),
        tuple(some(NAMES) for _ in range(rng.integers(3))),
        bool(rng.random() < 0.5),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compiles the gradients of random small products with adapters.")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    for number in range(options.cases):
        case = random_case(rng)
        print(f"{number}: {case}", flush=True)
        jax.jit(case.gradient()).lower(*case.arguments()).compile()
    print(f"{options.cases:,} cases, seed {options.seed}: all compiled")


if __name__ == "__main__":
    main()
