"""What is said where a weight cannot be factored, and where params, adapters and configuration do not fit."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jlora import AdapterError, ConfigError, CostModel, LoraConfig, TargetError, init_lora, lora
from tests.reference import random_array, randomize

LINES = Path(__file__).read_text().splitlines()
CONFIG = LoraConfig(rank=2, alpha=3)
MOVED = "what it makes of the weight is no product of factors"
NONLINEAR = "it is not linear in the weight"
ELEMENTS = "which weight it takes differs from element to element"
ARGUMENTS = "what it meets depends on the arguments of the function, or on arrays that it closes over"
APART = "the weights split into in and out axes in different ways"
WIDE = "the ranks together are no smaller than the weight"
SPREAD = "a scalar of the weight is spread over another operand"
WITHIN = "a part of it is replaced by an adapted weight"
CARRIED = "the program returns or carries the weight itself"
TWO = "the other side of the product is an adapted weight too"
ROWS = "a lookup with a batch of tables"
BATCHES = "it contracts no in or out axis of the adapter; with what it contracts as an in axis it is factored"
KERNEL = "the weight is not the kernel of the convolution"


def line_of(marker: str) -> int:
    """The number of the line of this file that ends with a comment."""
    (number,) = (number for number, line in enumerate(LINES, 1) if line.endswith(f"# {marker}"))
    return number


def directly(p, x):
    return x @ jnp.sin(p["w"])  # directly


def in_jit(p, x):
    @jax.jit
    def inner(w, x):
        return x @ jnp.sin(w)  # jit

    return inner(p["w"], x)


def in_nested_jit(p, x):
    @jax.jit
    def inner(w, x):
        return jax.jit(lambda w, x: x @ jnp.sin(w))(w, x)  # nested jit

    return inner(p["w"], x)


def in_scan(p, x):
    def body(x, w):
        return x + (x @ jnp.sin(w)).sum(), None  # scan

    return lax.scan(body, x, jnp.stack([p["w"]]))[0] if "stack" not in p else lax.scan(body, x, p["stack"])[0]


def in_cond(p, x):
    def one(w, x):
        return x @ w

    def other(w, x):
        return x @ jnp.sin(w)  # cond

    return lax.cond(x.sum() > 0, one, other, p["w"], x)


def in_while(p, x):
    def body(state):
        step, x = state
        return step + 1, x + jnp.sin(p["w"]).sum()  # while

    return lax.while_loop(lambda state: state[0] < 2, body, (0, x))[1]


def in_checkpoint(p, x):
    @jax.checkpoint
    def inner(w, x):
        return x @ jnp.sin(w)  # checkpoint

    return inner(p["w"], x)


def in_vmap(p, x):
    return jax.vmap(lambda x: x @ jnp.sin(p["w"]))(x)  # vmap


def in_custom_jvp(p, x):
    @jax.custom_jvp
    def inner(w, x):
        return x @ jnp.sin(w)  # custom_jvp

    inner.defjvp(lambda primals, tangents: (inner(*primals), tangents[1] @ jnp.sin(primals[0])))
    return inner(p["w"], x)


def in_custom_vjp(p, x):
    @jax.custom_vjp
    def inner(w, x):
        return x @ jnp.sin(w)  # custom_vjp

    inner.defvjp(lambda w, x: (inner(w, x), (w, x)), lambda kept, g: kept)
    return inner(p["w"], x)


def in_grad(p, x):
    return jax.grad(lambda x: (x @ jnp.sin(p["w"])).sum())(x)  # grad


def in_a_helper(p, x):
    return x @ helper(p["w"])


def helper(w):
    return jnp.sin(w)  # helper


def over_the_batch_axis(p, x):
    return jnp.tensordot(x[:, :3], p["stack"], 1)  # batch axis


def selected(p, x):
    return x @ jnp.where(jnp.arange(7) > 2, p["w"], 0.0)  # selected


def concatenated(p, x):
    return x @ jnp.concatenate([p["w"], x], axis=1)  # concatenated


def added(p, x):
    return (x + p["w"][:, :5]) @ x  # added


def together(p, x):
    return x @ jnp.concatenate([p["w"][:, :4], p["v"].T[:, :4]])[:5]  # together


def across(p, x):
    cube = p["stack"][:, :3, :3]
    return x[:, :3] @ (cube + cube.T)  # across


def spread(p, x):
    return x @ (p["w"][0, 0] + jnp.zeros((5, 3)))  # spread


def within(p, x):
    return x @ jnp.zeros((5, 7)).at[:, 2:].add(p["w"][:, :5])  # within


def scaled(p, x):
    return x @ (p["w"] * jnp.sin(jnp.arange(35.0)).reshape(5, 7))  # scaled


def chosen(p, x):
    w = lax.cond(x.sum() > 0, lambda w, x: w, lambda w, x: jnp.tile(x, 2)[:, :7], p["w"], x)  # chosen
    return x @ w


def carried(p, x):
    decayed = lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, 0.5 * c[1]), (0, p["w"]))[1]  # carried
    return x @ decayed


def two_weights(p, x):
    return x @ (p["w"] @ p["v"])  # two weights


def along_an_axis(p, x):
    return x.sum() * jnp.take_along_axis(p["w"], jnp.array([[0], [2], [1], [1], [0]]), axis=1)  # along an axis


def as_the_image(p, x):
    numbers = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(p["w"][None], jnp.ones((1, 7, 2)), (1,), "SAME", dimension_numbers=numbers)  # image


# name of the line's comment: function, path, primitive, reason
UNFACTORED = {
    "directly": (directly, "w", "sin", NONLINEAR),
    "jit": (in_jit, "w", "sin", NONLINEAR),
    "nested jit": (in_nested_jit, "w", "sin", NONLINEAR),
    "scan": (in_scan, "stack", "sin", NONLINEAR),
    "cond": (in_cond, "w", "sin", NONLINEAR),
    "while": (in_while, "w", "sin", NONLINEAR),
    "checkpoint": (in_checkpoint, "w", "sin", NONLINEAR),
    "vmap": (in_vmap, "w", "sin", NONLINEAR),
    "custom_jvp": (in_custom_jvp, "w", "sin", NONLINEAR),
    "custom_vjp": (in_custom_vjp, "w", "sin", NONLINEAR),
    "grad": (in_grad, "w", "sin", NONLINEAR),
    "helper": (in_a_helper, "w", "sin", NONLINEAR),
    "selected": (selected, "w", "select_n", ELEMENTS),
    "concatenated": (concatenated, "w", "concatenate", ARGUMENTS),
    "added": (added, "w", "add", ARGUMENTS),
    "together": (together, "w", "concatenate", WIDE),
    "across": (across, "stack", "add", APART),
    "spread": (spread, "w", "add", SPREAD),
    "within": (within, "w", "scatter-add", WITHIN),
    "scaled": (scaled, "w", "mul", MOVED),
    "chosen": (chosen, "w", "cond", CARRIED),
    "carried": (carried, "w", "while", CARRIED),
    "two weights": (two_weights, "v", "dot_general", TWO),
    "along an axis": (along_an_axis, "w", "gather", ROWS),
    "batch axis": (over_the_batch_axis, "stack", "dot_general", BATCHES),
    "image": (as_the_image, "w", "conv_general_dilated", KERNEL),
}
SHAPES = {"w": (5, 7), "v": (7, 3), "stack": (3, 5, 7)}


def names_of(marker: str) -> tuple[str, ...]:
    """The params of a function."""
    return ("w", "v") if marker in ("two weights", "together") else (UNFACTORED[marker][1],)


def adapted_to(rng: np.random.Generator, *names: str, **fields: Any) -> tuple[Any, Any, LoraConfig]:
    """Params of these names, random adapters, and their configuration."""
    params = {name: random_array(rng, SHAPES[name]) for name in names}
    config = CONFIG.replace(factorizations={"stack": "bio"} if "stack" in names else {}, **fields)
    return params, randomize(rng, init_lora(jax.random.key(0), params, config)), config


@pytest.mark.parametrize("compiled", [False, True], ids=["traced", "compiled"])
@pytest.mark.parametrize("marker", UNFACTORED)
def test_strict_names_path_primitive_line_reason_and_the_way_out(rng, marker, compiled):
    fn, path, primitive, why = UNFACTORED[marker]
    params, adapters, config = adapted_to(rng, *names_of(marker))
    strict = lora(fn, config, strict=True)
    with pytest.raises(AdapterError) as caught:
        (jax.jit(strict) if compiled else strict)(params, adapters, random_array(rng, (5, 5)))
    place = rf"{re.escape(__file__)}:{line_of(marker)}(:\d+)?( \([^)]*\))?"
    out = "leave the weight out with exclude_modules, or allow merging with strict=False"
    wanted = f"{path}: {primitive} at {place} cannot be factored: {re.escape(why)}; {out}"
    assert re.fullmatch(wanted, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("marker", UNFACTORED)
def test_what_strict_refuses_is_otherwise_merged(rng, marker):
    fn, *_ = UNFACTORED[marker]
    params, adapters, config = adapted_to(rng, *names_of(marker))
    x = random_array(rng, (5, 5))
    merged = {
        name: weight + 1.5 * jnp.einsum("...ir,...ro->...io", adapters[name]["A"], adapters[name]["B"])
        for name, weight in params.items()
    }
    wanted = fn(merged, x)
    np.testing.assert_allclose(lora(fn, config)(params, adapters, x), wanted, atol=2e-5 * float(jnp.abs(wanted).max()))


RETURNED = {
    "alone": lambda p, x: p["w"],
    "beside": lambda p, x: {"y": x @ p["w"], "w": p["w"]},
    "moved": lambda p, x: p["w"].T,
    "out of jit": lambda p, x: jax.jit(lambda w: 2 * w)(p["w"]),
}


@pytest.mark.parametrize("case", RETURNED)
def test_strict_refuses_a_weight_that_is_returned(rng, case):
    params, adapters, config = adapted_to(rng, "w")
    x = random_array(rng, (3, 5))
    with pytest.raises(
        AdapterError, match=r"^w: the output of the function cannot be factored: it is the weight itself; "
    ):
        lora(RETURNED[case], config, strict=True)(params, adapters, x)
    merged = {"w": params["w"] + 1.5 * adapters["w"]["A"] @ adapters["w"]["B"]}
    found, wanted = lora(RETURNED[case], config)(params, adapters, x), RETURNED[case](merged, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, wanted)


def test_strict_takes_what_the_cost_model_merges(rng):
    params, adapters, config = adapted_to(rng, "w")
    x = random_array(rng, (3, 5))
    merging = lora(lambda p, x: x @ p["w"], config, strict=True, cost_model=CostModel(0.0))(params, adapters, x)
    factored = lora(lambda p, x: x @ p["w"], config, strict=True, cost_model=CostModel(float("inf")))(
        params, adapters, x
    )
    np.testing.assert_allclose(merging, factored, atol=1e-4)


def test_an_excluded_weight_is_none_of_strict(rng):
    params, adapters, config = adapted_to(rng, "w", "v", exclude_modules="v")
    y = lora(lambda p, x: x @ p["w"] @ jnp.sin(p["v"]), config, strict=True)(
        params, adapters, random_array(rng, (3, 5))
    )
    assert y.shape == (3, 3)


def pair(a: tuple[int, ...] = (5, 2), b: tuple[int, ...] = (2, 7)) -> dict[str, Any]:
    return {"A": jnp.ones(a), "B": jnp.ones(b)}


# adapters, fields of the configuration, error, what it says
MISUSES = {
    "no adapters": (
        {},
        {},
        TargetError,
        r"^target_modules: '\*\*' adapts nothing: .* without an adapter at hand \(v, w\)",
    ),
    "all None": ({"w": None, "v": None}, {}, TargetError, r"^target_modules: '\*\*' adapts nothing"),
    "None": (None, {}, TargetError, r"^target_modules: '\*\*' adapts nothing"),
    "one is missing": (
        {"w": pair()},
        {"target_modules": ("w", "v")},
        TargetError,
        r"^target_modules: 'v' adapts nothing",
    ),
    "rank": (
        {"w": pair((5, 3), (3, 7))},
        {},
        TargetError,
        r"^w: A \(5, 3\) does not have the rank 2 of the configuration",
    ),
    "rank pattern": (
        {"w": pair()},
        {"rank_pattern": {"w": 3}},
        TargetError,
        r"^w: A \(5, 2\) does not have the rank 3",
    ),
    "path": ({"wv": pair()}, {}, TargetError, r"^wv: an adapter where params has no leaf; nearest paths: w, v"),
    "a level too deep": ({"w": {"k": pair()}}, {}, TargetError, r"^w/k: an adapter where params has no leaf"),
    "shape": (
        {"w": pair((5, 2), (2, 3))},
        {},
        TargetError,
        r"^w: A \(5, 2\) and B \(2, 3\) do not fit the weight \(5, 7\)",
    ),
    "given axes": (
        {"w": pair()},
        {"factorizations": {"w": "oi"}},
        TargetError,
        r"^w: .*wanted A \(7, 2\) and B \(2, 5\)",
    ),
    "no adapter": ({"w": jnp.ones((5, 7))}, {}, TargetError, r"^w: found \w+, wanted an adapter \{'A', 'B'\} or None"),
    "the input in their place": (jnp.ones((3, 5)), {}, TargetError, r"^adapters: found \w+, wanted an adapter"),
    "two problems": ({"w": jnp.ones(3), "u": pair()}, {}, TargetError, r"^2 problems:\n  .*\n  "),
    "unused pattern": (
        {"w": pair()},
        {"alpha_pattern": {"q": 3}},
        TargetError,
        r"^alpha_pattern: 'q' matches nothing that",
    ),
}


@pytest.mark.parametrize("case", MISUSES)
def test_params_adapters_and_configuration_that_do_not_fit(rng, case):
    adapters, fields, error, message = MISUSES[case]
    params = {name: random_array(rng, SHAPES[name]) for name in "wv"}
    with pytest.raises(error, match=message):
        lora(lambda p, x: x @ p["w"] @ p["v"], CONFIG.replace(**fields))(params, adapters, jnp.ones((3, 5)))


def test_a_weight_of_integers_has_no_room_for_an_update():
    params, adapters = {"w": jnp.ones((5, 7), jnp.int8)}, {"w": pair()}
    adapted = lora(lambda p, x: x @ (p["w"] * 0.1), CONFIG)
    with pytest.raises(TargetError, match=r"^w: dtype int8 is not floating; cast or dequantize the weight first$"):
        adapted(params, adapters, jnp.ones((3, 5)))


@pytest.mark.parametrize("config", [{"rank": 2}, None, "w", 8])
def test_what_is_no_configuration(rng, config):
    params, adapters, _ = adapted_to(rng, "w")
    with pytest.raises(ConfigError, match=f"^config: found {type(config).__name__}, wanted a LoraConfig"):
        lora(lambda p, x: x @ p["w"], config)(params, adapters, jnp.ones((3, 5)))


def test_without_a_dropout_key_there_is_no_dropout(rng):
    params, adapters, config = adapted_to(rng, "w", dropout=0.5)
    x = random_array(rng, (3, 5))
    plain, dropping = (lora(lambda p, x: x @ p["w"], c) for c in (config.replace(dropout=0.0), config))
    np.testing.assert_array_equal(dropping(params, adapters, x), plain(params, adapters, x))
    np.testing.assert_array_equal(plain(params, adapters, x, dropout_key=jax.random.key(0)), plain(params, adapters, x))
    assert not jnp.allclose(dropping(params, adapters, x, dropout_key=jax.random.key(0)), plain(params, adapters, x))


class OwnError(Exception):
    pass


def test_an_error_of_the_function_reaches_the_user_as_it_is(rng):
    params, adapters, config = adapted_to(rng, "w")
    own = OwnError("of mine")

    def fn(p, x):
        raise own

    with pytest.raises(OwnError) as caught:
        lora(fn, config)(params, adapters, jnp.ones((3, 5)))
    assert caught.value is own


def test_arguments_that_the_function_does_not_take(rng):
    params, adapters, config = adapted_to(rng, "w")
    adapted = lora(lambda p, x: x @ p["w"], config)
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        adapted(params, adapters, jnp.ones((3, 5)), y=3)
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'x'"):
        adapted(params, adapters)
    with pytest.raises(TypeError, match=r"dot_general|contract"):
        adapted(params, adapters, jnp.ones((3, 4)))
