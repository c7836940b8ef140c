"""Factorizations that follow from how a function uses its weights."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jlora import ConfigError, LoraConfig, TargetError, init_lora, lora, merge_params, resolve_config, summary
from tests.reference import as64, assert_close, random_array, randomize
from tests.transform.test_random_programs import axes_of, delta_of

CONFIG = LoraConfig(rank=2, alpha=3)
IDS = np.array([[3, 0, 5], [1, 6, 3]])
SOME = np.array([2, 0, 1, 1, 2])


def uses(equation: str) -> Callable[..., Any]:
    return lambda p, x: jnp.einsum(equation, x, p["w"])


def scanned(p, x):
    def layer(x, p):
        return jnp.tanh(x @ p["w"] * p["scale"] + p["b"]), None

    return lax.scan(layer, x, p)[0]


def looped(p, x):
    for n in range(p["w"].shape[0]):
        x = jnp.tanh(x @ p["w"][n])
    return x


def indexed(p, x):
    return lax.fori_loop(0, 3, lambda n, x: jnp.tanh(x @ p["w"][n]), x)


def taken(p, x):
    return lax.fori_loop(0, 3, lambda n, x: jnp.tanh(x @ jnp.take(p["w"], n, axis=0)), x)


def by_expert(p, x):
    return jnp.einsum("td,tdf->tf", x, p["w"][SOME])


def by_ragged(p, x):
    return lax.ragged_dot(x, p["w"], jnp.array([2, 3, 1]))


def convolved(spec: str, *, groups: int = 1) -> Callable[..., Any]:
    def fn(p, x):
        numbers = ("NHWC", spec, "NHWC")
        return lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    return fn


def tied_head_first(p, x):
    return (x @ p["w"].T).sum() + p["w"][IDS].sum(1)


def looked_up_times_another(p, x):
    return p["w"][IDS] @ x


def scores_of_its_own_rows(p, x):
    rows = p["w"][IDS]
    return jnp.einsum("bsd,btd->bst", rows, rows) + x.sum()


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of params {'w': ..., others} and x, and the letters that it gives w."""

    fn: Callable[..., Any]
    weight: tuple[int, ...]
    x: tuple[int, ...]
    roles: str
    others: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


CASES = {
    "dense": Case(uses("td,df->tf"), (5, 7), (11, 5), "io"),
    "out first": Case(uses("td,fd->tf"), (7, 5), (11, 5), "oi"),
    "weight first": Case(lambda p, x: p["w"] @ x, (5, 7), (7, 11), "oi"),
    "odd order": Case(uses("td,hdk->thk"), (3, 5, 2), (11, 5), "oio"),
    "in out in": Case(uses("thk,hdk->td"), (3, 7, 2), (11, 3, 2), "ioi"),
    "batch inside": Case(uses("etd,def->etf"), (5, 3, 7), (3, 11, 5), "ibo"),
    "batch last": Case(uses("etd,fde->etf"), (7, 5, 3), (3, 11, 5), "oib"),
    "two batch axes": Case(uses("abtd,adbf->abtf"), (2, 5, 3, 7), (2, 3, 11, 5), "bibo"),
    "square": Case(uses("td,df->tf"), (5, 5), (11, 5), "io"),
    "square out first": Case(uses("td,fd->tf"), (5, 5), (11, 5), "oi"),
    "cube": Case(uses("td,hdk->thk"), (5, 5, 5), (11, 5), "oio"),
    "scan": Case(scanned, (3, 5, 5), (11, 5), "bio", {"scale": (3, 5), "b": (3, 5)}),
    "map": Case(lambda p, x: lax.map(lambda w: x @ w, p["w"]), (3, 5, 7), (11, 5), "bio"),
    "vmap": Case(lambda p, x: jax.vmap(lambda w: x @ w, 1)(p["w"]), (5, 3, 7), (11, 5), "ioo"),
    "vmap over both": Case(lambda p, x: jax.vmap(jnp.matmul)(x, p["w"]), (3, 5, 7), (3, 11, 5), "bio"),
    "loop": Case(looped, (3, 5, 5), (11, 5), "bio"),
    "index": Case(indexed, (3, 5, 5), (11, 5), "bio"),
    "take": Case(taken, (3, 5, 5), (11, 5), "bio"),
    "experts": Case(by_expert, (3, 5, 7), (5, 5), "bio"),
    "ragged experts": Case(by_ragged, (3, 5, 7), (6, 5), "bio"),
    "every expert": Case(uses("td,edf->tef"), (3, 5, 7), (11, 5), "oio"),
    "HWIO": Case(convolved("HWIO"), (3, 2, 5, 7), (2, 11, 13, 5), "iiio"),
    "OIHW": Case(convolved("OIHW"), (7, 5, 3, 2), (2, 11, 13, 5), "oiii"),
    "IOHW": Case(convolved("IOHW"), (5, 7, 3, 2), (2, 11, 13, 5), "ioii"),
    "depthwise": Case(convolved("HWIO", groups=5), (3, 2, 1, 10), (2, 11, 13, 5), "iiio"),
    "embedding": Case(lambda p, x: p["w"][IDS] * x, (7, 5), (5,), "io"),
    "taken rows": Case(lambda p, x: jnp.take(p["w"], IDS, axis=0) * x, (7, 5), (5,), "io"),
    "taken columns": Case(lambda p, x: jnp.take(p["w"], IDS, axis=1).T * x, (5, 7), (5,), "oi"),
    "one hot": Case(lambda p, x: jax.nn.one_hot(IDS, 7) @ p["w"] * x, (7, 5), (5,), "io"),
    "tied, the head first": Case(tied_head_first, (7, 5), (11, 5), "io"),
    "looked up, times what is not adapted": Case(looked_up_times_another, (7, 5), (5, 3), "io"),
    "scores of its own rows": Case(scores_of_its_own_rows, (7, 5), (5,), "io"),
    "reshaped to a matrix": Case(lambda p, x: x @ p["w"].reshape(5, 6), (5, 2, 3), (11, 5), "ioo"),
    "reshaped in": Case(lambda p, x: x @ p["w"].reshape(6, 5), (2, 3, 5), (11, 6), "iio"),
    "reshaped to heads": Case(
        lambda p, x: jnp.einsum("td,dhk->thk", x, p["w"].reshape(5, 2, 3)), (5, 6), (11, 5), "io"
    ),
    "reshaped to a last axis of one": Case(
        lambda p, x: jnp.einsum("td,fd->tf", x, p["w"].reshape(7, 5, 1)[..., 0]), (7, 5), (11, 5), "oi"
    ),
    "reshaped from a last axis of one": Case(lambda p, x: x @ p["w"].reshape(7, 5).T, (7, 5, 1), (11, 5), "oib"),
    "split": Case(lambda p, x: sum(x @ w for w in jnp.split(p["w"], 3, 1)), (5, 21), (11, 5), "io"),
    "compiled": Case(jax.jit(uses("td,fd->tf")), (7, 5), (11, 5), "oi"),
    "rematerialized": Case(jax.checkpoint(uses("td,fd->tf")), (7, 5), (11, 5), "oi"),
    "cast and scaled": Case(lambda p, x: x @ (2 * p["w"].astype("float32")).T, (7, 5), (11, 5), "oi"),
    "added": Case(lambda p, x: (x + p["pos"][:11]) @ p["w"], (5, 7), (11, 5), "io", {"pos": (13, 5)}),
    "added with axes": Case(lambda p, x: (x + p["pos"]) @ p["w"], (5, 7), (2, 11, 5), "io", {"pos": (1, 11, 5)}),
    "multiplied by a vector": Case(lambda p, x: x * p["s"] @ p["w"], (5, 7), (2, 11, 5), "io", {"s": (1, 1, 5)}),
}
every_case = pytest.mark.parametrize("name", CASES)


def made(rng: np.random.Generator, case: Case) -> tuple[Any, Any]:
    sizes = {"w": case.weight} | case.others
    return {name: random_array(rng, shape) for name, shape in sizes.items()}, random_array(rng, case.x)


def resolved(case: Case, params: Any, x: Any) -> LoraConfig:
    return resolve_config(case.fn, CONFIG, params, x)


@every_case
def test_letters_follow_from_the_use(rng, name):
    case = CASES[name]
    params, x = made(rng, case)
    config = resolved(case, params, x)
    assert dict(config.factorizations) == {"w": case.roles}
    assert set(config.exclude_modules) == set(case.others)


@every_case
def test_shapes_say_the_same_as_arrays(rng, name):
    params, x = made(rng, CASES[name])
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (params, x))
    assert resolved(CASES[name], *shapes) == resolved(CASES[name], params, x)
    adapters = jax.eval_shape(lambda: init_lora(None, params, CONFIG, fn=CASES[name].fn, args=(x,)))
    assert set(adapters["w"]) == {"A", "B"}


IN_ORDER = {"square out first": "io", "cube": "ioo"}


@every_case
@pytest.mark.parametrize("written", [True, False], ids=["resolved", "unresolved"])
def test_lora_merge_and_summary_read_the_letters_alike(rng, name, written):
    """With the configuration that was given too: it is that of the adapters, but that sizes which fit in several ways
    are then read in the order in, out, by all of them."""
    case = CASES[name]
    read = case.roles if written else IN_ORDER.get(name, case.roles)
    params, x = made(rng, case)
    adapters = randomize(rng, init_lora(jax.random.key(1), params, CONFIG, fn=case.fn, args=(x,)))
    batch, ins, outs = ([case.weight[axis] for axis in axes] for axes in axes_of(case.roles))
    assert adapters["w"]["A"].shape == (*batch, *ins, 2)
    assert adapters["w"]["B"].shape == (*batch, 2, *outs)
    config = resolved(case, params, x) if written else CONFIG
    wanted = as64(params["w"]) + delta_of(adapters["w"], read, 3)
    assert [(t.path, t.factorization.roles) for t in summary(params, adapters, config).targets] == [("w", read)]
    merged = jax.jit(functools.partial(merge_params, config=config))(params, adapters)
    assert_close(merged["w"], wanted)
    dense = jax.jit(case.fn)(params | {"w": wanted.astype(np.float32)}, x)
    assert_close(jax.jit(lora(case.fn, config))(params, adapters, x), as64(dense), factor=10)


def test_a_named_weight_is_never_excluded():
    params = {"w": jax.ShapeDtypeStruct((5, 7), "float32"), "pos": jax.ShapeDtypeStruct((11, 5), "float32")}
    x = jax.ShapeDtypeStruct((11, 5), "float32")

    def fn(p, x):
        return (x + p["pos"]) @ p["w"]

    assert resolve_config(fn, CONFIG, params, x).exclude_modules == ("pos",)
    named = CONFIG.replace(target_modules=("w", "pos"))
    assert resolve_config(fn, named, params, x).exclude_modules == ()
    assert set(init_lora(None, params_of(params), named, fn=fn, args=(x,))["pos"]) == {"A", "B"}


def params_of(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes)


def test_given_factorizations_go_first():
    params, x = {"up": jnp.ones((5, 7)), "down": jnp.ones((7, 3))}, jnp.ones((11, 5))

    def fn(p, x):
        return x @ p["up"] @ p["down"]

    given = CONFIG.replace(factorizations={"up": "oi"})
    config = resolve_config(fn, given, params, x)
    assert list(config.factorizations) == [("up", "oi"), ("down", "io")]
    adapters = randomize(np.random.default_rng(3), init_lora(None, params, given, fn=fn, args=(x,)))
    assert adapters["up"]["A"].shape == (7, 2)
    merged = merge_params(params, adapters, config)
    np.testing.assert_allclose(lora(fn, config)(params, adapters, x), fn(merged, x), rtol=1e-4)
    everything = resolve_config(fn, CONFIG.replace(factorizations={"**": "oi"}), params, x)
    assert init_lora(None, params, everything)["down"]["A"].shape == (3, 2)


NAMES = ["a[0]*", "q?", "[!x]", "**", "*", "a.b", "layer 1", "[", "é"]


@pytest.mark.parametrize("name", NAMES)
def test_glob_characters_in_paths_survive(rng, name):
    params = {"other": random_array(rng, (5, 7)), name: {"w[1]": random_array(rng, (3, 7))}}
    x = random_array(rng, (2, 5))

    def fn(p, x):
        return x @ p["other"] @ p[name]["w[1]"].T

    config = resolve_config(fn, CONFIG, params, x)
    adapters = randomize(rng, init_lora(None, params, CONFIG, fn=fn, args=(x,)))
    found = {target.path: target.factorization.roles for target in summary(params, adapters, config).targets}
    assert found == {"other": "io", f"{name}/w[1]": "oi"}
    wanted = fn(merge_params(params, adapters, config), x)
    np.testing.assert_allclose(lora(fn, config, strict=True)(params, adapters, x), wanted, atol=1e-3)


def test_resolving_twice_changes_nothing(rng):
    params, x = made(rng, CASES["scan"])
    once = resolve_config(scanned, CONFIG, params, x)
    assert resolve_config(scanned, once, params, x) == once
    assert eval(repr(once), {"LoraConfig": LoraConfig}) == once


def test_targets_and_exclusions_hold(rng):
    params = {"up": random_array(rng, (5, 7)), "down": random_array(rng, (7, 3))}

    def fn(p, x):
        return x @ p["up"] @ p["down"]

    for fields in ({"target_modules": "up"}, {"exclude_modules": "down"}):
        config = resolve_config(fn, CONFIG.replace(**fields), params, jnp.ones((2, 5)))
        assert dict(config.factorizations) == {"up": "io"}
        assert init_lora(None, params, config)["down"] is None


def test_an_unused_weight_is_left_out_unless_it_is_named(rng):
    params = {"w": random_array(rng, (5, 7)), "unused": random_array(rng, (3, 2))}
    args = (random_array(rng, (2, 5)),)
    fn = uses("td,df->tf")
    config = resolve_config(fn, CONFIG, params, *args)
    assert (dict(config.factorizations), config.exclude_modules) == ({"w": "io"}, ("unused",))
    assert init_lora(None, params, CONFIG, fn=fn, args=args)["unused"] is None
    named = resolve_config(fn, CONFIG.replace(target_modules=("**", "unused")), params, *args)
    assert init_lora(None, params, named)["unused"]["A"].shape == (3, 2)
    given = CONFIG.replace(factorizations={"unused": "oi"})
    assert init_lora(None, params, given, fn=fn, args=args)["unused"]["A"].shape == (2, 2)


def test_patterns_that_match_nothing_are_errors(rng):
    params = {"w": random_array(rng, (5, 7))}
    with pytest.raises(TargetError, match=r"^target_modules: 'v' matches nothing; nearest paths: w"):
        init_lora(None, params, CONFIG.replace(target_modules="v"), fn=uses("td,df->tf"), args=(jnp.ones((2, 5)),))
    with pytest.raises(TargetError, match=r"w \(5, 7\): rank 6 is larger than the smaller side 5"):
        init_lora(None, params, CONFIG.replace(rank=6), fn=uses("td,df->tf"), args=(jnp.ones((2, 5)),))


def test_one_argument_in_place_of_a_tuple_is_refused():
    with pytest.raises(ConfigError, match=r"^args: found \w+, wanted a tuple of the arguments, such as \(x,\)$"):
        init_lora(None, {"w": jnp.ones((5, 7))}, CONFIG, fn=lambda p, x: x @ p["w"], args=jnp.ones((3, 5)))
