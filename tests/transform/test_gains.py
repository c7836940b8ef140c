"""`lora` of weights with a magnitude (DoRA): factored, with the value and the gradients of the formula."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.contraction import Factorization
from tests.marks import some
from tests.reference import x64
from tests.transform.test_places import PLACES
from tests.transform.test_primitives import (
    FACTORED,
    MERGED,
    PROGRAMS,
    SMALL,
    arguments,
    assert_trees_close,
    cast,
    config_of,
    dense,
    derivatives,
    of_params,
)

# What is factored without a magnitude, and has to merge a weight with one.
MERGED_FOR_IT = {
    "sums, of which it scales one term": [
        "w plus a scalar",
        "w plus a scalar of x",
        "w minus a matrix",
        "w plus a vector, spread",
        "w + w.T",
        "add_any",
        "w.at[].add",
        "a cond returns w",
    ],
    "axes of it and others are contracted": ["experts contracted", "transpose"],
    "parts with norms of their own, along an axis that is contracted": ["concatenate in axes", "select_n"],
    "numbers that are filled in": ["pad", "pad a batch, and inside", "ids out of bounds, filled"],
    "functions with a derivative of their own": ["a custom_jvp returns w", "a custom_vjp returns w"],
}


def with_magnitude(program: Any, primals: Any, rng: np.random.Generator) -> Any:
    params, adapters, x = primals
    split = Factorization(program.roles)
    shape = split.sizes(program.weight, "b") + split.sizes(program.weight, "o")
    magnitude = (1 + rng.random(shape)).astype(jnp.bfloat16).astype(np.float64)
    return params, {"w": adapters["w"] | {"magnitude": magnitude}}, x


def reference(program: Any) -> Any:
    """The function of the weight that the formula gives, the norm a constant to gradients."""
    split = Factorization(program.roles)

    def fn(params: Any, adapters: Any, x: Any) -> Any:
        entry = adapters["w"]
        total = params["w"] + dense({name: entry[name] for name in "AB"}, program.roles)
        norm = jax.lax.stop_gradient(jnp.sqrt(jnp.sum(total**2, split.axes("i"))))
        gain = split.out_like(entry["magnitude"]) / norm
        return program.fn(total * jnp.expand_dims(gain, split.axes("i")), x)

    return fn


# The norm that a weight is divided by takes its magnitude away: its gradient is zero but for rounding.
TOLD = [program for program in PROGRAMS.values() if program.name != "weight norm"]


@pytest.mark.parametrize("program", some({program.name: program for program in TOLD}, 3))
def test_values_and_derivatives_are_those_of_the_formula(rng, program):
    config, wanted_fn = config_of(program), reference(program)
    is_strict = program.factored and program.name not in itertools.chain(*MERGED_FOR_IT.values())
    factored = jlora.lora(of_params(program.fn), config, strict=is_strict, cost_model=FACTORED)
    merging = jlora.lora(of_params(program.fn), config, cost_model=MERGED)

    def everything(primals: Any, tangents: Any) -> Any:
        small = {dtype: factored(*cast(primals, dtype, "float32")) for dtype in SMALL}
        chosen = derivatives(merging, primals, tangents, "grad") if is_strict else {}
        return [derivatives(fn, primals, tangents, program.modes) for fn in (wanted_fn, factored)], chosen, small

    with x64():
        primals = with_magnitude(program, arguments(program, rng), rng)
        tangents = with_magnitude(program, arguments(program, rng), rng)
        (wanted, found), chosen, small = jax.jit(everything)(primals, tangents)
    assert_trees_close(found, wanted, program.tolerance)
    assert_trees_close(chosen, {name: wanted[name] for name in chosen}, program.tolerance)
    for dtype, tolerance in SMALL.items():
        wide = jax.tree.map(lambda y: np.asarray(y, np.float64), small[dtype])
        assert_trees_close(wide, wanted["value"], tolerance)


CASES = [(place, name) for name in ("matmul", "tied table") for place in PLACES if name in PLACES[place].names]


@pytest.mark.parametrize(("place", "name"), some(CASES, 3))
def test_in_every_place(rng, place, name):
    place = PLACES[place]
    program = place.program(PROGRAMS[name])
    fns = reference(program), jlora.lora(of_params(program.fn), config_of(program), cost_model=FACTORED)
    with x64():
        primals, tangents = (with_magnitude(program, arguments(program, rng), rng) for _ in range(2))
        wanted, found = jax.jit(lambda *args: [derivatives(fn, *args, place.modes) for fn in fns])(primals, tangents)
    assert_trees_close(found, wanted, program.tolerance)
