"""Several weights, and params that are not adapted, joined to one weight before they are used."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name, print_saved_residuals

from jlora import AdapterError, LoraConfig, explain, init_lora, lora, resolve_config
from tests.reference import random_array
from tests.transform.test_primitives import FACTORED, MERGED, assert_trees_close, dense, derivatives, x64

RANK, ALPHA = 2, 3.0


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of params and x, the sizes of both, and the letters of every weight that is adapted.

    `left_out` are the params that are only added to activations; others without letters are vectors, or plain.
    """

    fn: Callable[[Any, Any], Any]
    sizes: dict[str, tuple[int, ...]]
    roles: dict[str, str]
    x: tuple[int, ...] = (7, 5)
    left_out: tuple[str, ...] = ()
    factored: bool = True
    only: tuple[str, ...] = ("**",)


def layers(p: Any, x: Any) -> Any:
    """A list of layers, stacked for a scan: a product with and one without an adapter in each."""
    stacks = {name: jnp.stack([p[f"{name}{n}"] for n in range(3)]) for name in ("up", "down")}
    return lax.scan(lambda c, w: (c + jnp.tanh(c @ w["up"]) @ w["down"], None), x, stacks)[0]


def tree_mapped(p: Any, x: Any) -> Any:
    stacked = jax.tree.map(lambda *ws: jnp.stack(ws), *(p["layers"]))
    return lax.scan(lambda c, w: (jnp.tanh(c @ w["w"] + w["b"]), None), x, stacked)[0]


def attention(p: Any, x: Any) -> Any:
    q, k, v = jnp.split(x @ jnp.concatenate([p["q"], p["k"], p["v"]], axis=1), 3, axis=1)
    return jax.nn.softmax(q @ k.T) @ v @ jnp.concatenate([p["o1"], p["o2"]], axis=0)


def positions(p: Any, x: Any) -> Any:
    """Positions and types are added to one another, and to the tokens."""
    return jnp.tanh((x + (p["position"] + p["type"])) @ p["w"]) + p["late"]


def token(p: Any, x: Any) -> Any:
    """One step of decoding: a row of a table, on its own."""
    row = jnp.take(p["table"], (x.sum() > 0).astype(jnp.int32) + 3, axis=0)
    return jnp.tanh((row * p["scale"]).reshape(1, 5) + p["bias"]) @ p["w"] + x


def named(p: Any, x: Any) -> Any:
    block = jax.checkpoint(
        lambda w, x: jnp.sin(checkpoint_name(jnp.sin(x) @ checkpoint_name(w, "weight"), "product")),
        policy=jax.checkpoint_policies.save_only_these_names("product"),
    )
    return block(p["w"], x)


def branches(p: Any, x: Any) -> Any:
    w = lax.cond(x[0, 0] > 0, lambda: p["w"], lambda: p["v"] + 1)
    return x @ w + x @ lax.cond(x[0, 0] < 0, lambda: p["w"], lambda: p["plain"])


CASES = {
    "a sum": Case(lambda p, x: x @ (p["w"] + p["v"]), {"w": (5, 11), "v": (5, 11)}, {"w": "io", "v": "io"}),
    "a difference": Case(lambda p, x: x @ (p["w"] - p["v"]).T, {"w": (11, 5), "v": (11, 5)}, {"w": "oi", "v": "oi"}),
    "a sum with what is not adapted": Case(
        lambda p, x: x @ (p["w"] + p["v"] - 0.5), {"w": (5, 11), "v": (5, 11)}, {"w": "io"}, only=("w",)
    ),
    "taken off what is not adapted": Case(
        lambda p, x: x @ (p["v"] - p["w"]), {"w": (5, 11), "v": (5, 11)}, {"w": "io"}, only=("w",)
    ),
    "a sum with a product": Case(
        lambda p, x: x @ (p["w"] + p["a"] @ p["b"]),
        {"w": (5, 11), "a": (5, 3), "b": (3, 11)},
        {"w": "io"},
        only=("w",),
    ),
    "a sum of axes of size 1": Case(
        lambda p, x: x @ (p["w"] + p["v"]), {"w": (5, 11), "v": (1, 11)}, {"w": "io"}, only=("w",)
    ),
    "a sum of stacks": Case(
        lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"] + p["v"])[0],
        {"w": (3, 5, 5), "v": (3, 5, 5)},
        {"w": "bio", "v": "bio"},
    ),
    "a sum in a scan": Case(
        lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ (w + p["v"])), None), x, p["w"])[0],
        {"w": (3, 5, 5), "v": (5, 5)},
        {"w": "bio"},
        only=("w",),
    ),
    "a sum in jit and checkpoint": Case(
        lambda p, x: jax.checkpoint(jax.jit(lambda w, v, x: jnp.sin(x @ (w + 2 * v))))(p["w"], p["v"], x),
        {"w": (5, 11), "v": (5, 11)},
        {"w": "io", "v": "io"},
    ),
    "a sum under vmap": Case(
        lambda p, x: jax.vmap(lambda w, x: x @ (w + p["v"]), (0, None))(p["w"], x),
        {"w": (3, 5, 11), "v": (5, 11)},
        {"w": "oio"},
        only=("w",),
    ),
    "layers": Case(
        layers,
        {f"{name}{n}": shape for name, shape in (("up", (5, 7)), ("down", (7, 5))) for n in range(3)},
        {f"{name}{n}": "io" for name in ("up", "down") for n in range(3)},
    ),
    "layers, some adapted": Case(
        layers,
        {f"{name}{n}": shape for name, shape in (("up", (5, 7)), ("down", (7, 5))) for n in range(3)},
        {"up0": "io", "up2": "io", "down1": "io"},
        only=("up0", "up2", "down1"),
    ),
    "attention": Case(
        attention,
        {"q": (17, 11), "k": (17, 11), "v": (17, 11), "o1": (5, 13), "o2": (6, 13)},
        {"q": "io", "k": "io", "v": "io", "o1": "io", "o2": "io"},
        (7, 17),
    ),
    "attention, some adapted": Case(
        attention,
        {"q": (17, 11), "k": (17, 11), "v": (17, 11), "o1": (5, 13), "o2": (6, 13)},
        {"q": "io", "v": "io", "o2": "io"},
        (7, 17),
        only=("q", "v", "o2"),
    ),
    "stacked heads": Case(
        lambda p, x: jnp.einsum("td,hdk->thk", x, jnp.stack([p["w"], p["v"].T, p["w"]])),
        {"w": (5, 7), "v": (7, 5)},
        {"w": "io", "v": "oi"},
    ),
    "scaled channels": Case(
        lambda p, x: x @ (p["w"] * p["out"]) @ (p["v"] / p["in"][:, None]),
        {"w": (5, 11), "v": (11, 3), "out": (11,), "in": (11,)},
        {"w": "io", "v": "io"},
    ),
    "one of two": Case(
        lambda p, x: x @ jnp.where(x[0, 0] > 0, p["w"], p["v"]) + x @ jnp.where(x[0, 0] < 0, p["w"], p["v"]),
        {"w": (5, 11), "v": (5, 11)},
        {"w": "io", "v": "io"},
    ),
    "branches": Case(branches, {"w": (5, 11), "v": (5, 11), "plain": (5, 11)}, {"w": "io", "v": "io"}, only=("w", "v")),
    "padded": Case(
        lambda p, x: x @ (jnp.pad(p["w"], ((0, 0), (0, 2))) + p["v"]),
        {"w": (5, 9), "v": (5, 11)},
        {"w": "io", "v": "io"},
    ),
    "named": Case(named, {"w": (5, 11)}, {"w": "io"}),
    "positions": Case(
        positions,
        {"w": (5, 11), "position": (7, 5), "type": (7, 5), "late": (7, 11)},
        {"w": "io"},
        left_out=("position", "type", "late"),
    ),
    "one token": Case(
        token,
        {"w": (5, 5), "table": (7, 5), "scale": (5,), "bias": (3, 5)},
        {"w": "io", "table": "io"},
        (3, 5),
        left_out=("bias",),
        factored=False,
    ),
    "twice the rows": Case(
        lambda p, x: x @ jnp.concatenate([p["w"], p["v"], p["u"]], 1),
        {"w": (5, 7), "v": (5, 7), "u": (5, 7)},
        {"w": "io", "v": "io", "u": "io"},
        factored=False,
    ),
}
every_case = pytest.mark.parametrize("name", CASES)


def made(rng: np.random.Generator, case: Case, dtype: Any = np.float64) -> tuple[Any, Any, Any]:
    params = {name: random_array(rng, shape, dtype) for name, shape in case.sizes.items()}
    shapes = jax.eval_shape(lambda: init_lora(None, params, config_of(case)))
    adapters = jax.tree.map(lambda shape: random_array(rng, shape.shape, dtype), shapes)
    return params, adapters, random_array(rng, case.x, dtype)


def config_of(case: Case) -> LoraConfig:
    return LoraConfig(rank=RANK, alpha=ALPHA, target_modules=tuple(case.roles), factorizations=case.roles)


def merged(case: Case) -> Callable[..., Any]:
    """The function at weights with the dense delta added."""

    def fn(params: Any, adapters: Any, x: Any) -> Any:
        deltas = {name: dense(adapters[name], roles) for name, roles in case.roles.items()}
        return case.fn(params | {name: params[name] + delta for name, delta in deltas.items()}, x)

    return fn


@every_case
def test_values_and_derivatives_are_those_of_the_dense_deltas(rng, name):
    case, config = CASES[name], config_of(CASES[name])
    fns = (
        merged(case),
        lora(case.fn, config, strict=case.factored, cost_model=FACTORED),
        lora(case.fn, config, cost_model=MERGED),
    )
    with x64():
        primals, tangents = made(rng, case), made(rng, case)
        wanted, *found = jax.jit(lambda *args: [derivatives(fn, *args) for fn in fns])(primals, tangents)
    for form in found:
        assert_trees_close(form, wanted, 1e-10)


@every_case
def test_bfloat16(rng, name):
    case = CASES[name]
    params, adapters, x = jax.tree.map(lambda array: np.float32(0.4) * np.asarray(array), made(rng, case, np.float32))
    half = jax.tree.map(lambda array: array.astype(jnp.bfloat16), (params, x))
    found = jax.jit(lora(case.fn, config_of(case), cost_model=FACTORED))(half[0], adapters, half[1])
    wide = jax.tree.map(lambda array: array.astype(np.float32), half)
    wanted = jax.jit(merged(case))(wide[0], adapters, wide[1])
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, rtol=0, atol=6e-2 * float(jnp.abs(wanted).max()))


@every_case
def test_letters_follow_from_the_use(rng, name):
    case = CASES[name]
    params, _, x = made(rng, case, np.float32)
    found = resolve_config(case.fn, LoraConfig(rank=1, target_modules=case.only), params, x)
    assert dict(found.factorizations) == case.roles
    plain = {path for path, size in case.sizes.items() if len(size) == 1 or path not in case.roles}
    assert set(case.left_out) <= set(found.exclude_modules) <= plain


@every_case
def test_explain_has_a_row_for_every_weight(rng, name):
    case = CASES[name]
    params, _, x = made(rng, case, np.float32)
    uses = explain(case.fn, config_of(case), params, x, cost_model=FACTORED).uses
    assert {use.path for use in uses} == set(case.roles)
    assert all(use.factored for use in uses) == case.factored
    assert all(use.factored or use.why for use in uses)


def test_the_cost_of_a_joined_weight_is_shared_out():
    shapes = {name: jax.ShapeDtypeStruct((17, 11), "float32") for name in "qkv"}
    x = jax.ShapeDtypeStruct((7, 17), "float32")
    config = LoraConfig(rank=2)
    uses = explain(
        lambda p, x: x @ jnp.concatenate([p["q"], p["k"], p["v"]], 1), config, shapes, x, cost_model=FACTORED
    ).uses
    assert [use.path for use in uses] == ["q", "k", "v"]
    assert sum(use.base_flops for use in uses) == 2 * 7 * 17 * 33
    assert sum(use.adapter_flops for use in uses) == 2 * 7 * 6 * (17 + 33)


def test_strict_names_all_the_weights_of_what_it_refuses():
    params = {name: jnp.ones((5, 7)) for name in "wv"}
    adapters = {name: {"A": jnp.ones((5, 2)), "B": jnp.ones((2, 7))} for name in "wv"}
    model = lora(lambda p, x: x @ jnp.tanh(p["w"] + p["v"]), LoraConfig(rank=2), strict=True)
    with pytest.raises(
        AdapterError, match=r"^w with v: tanh at .* cannot be factored: it is not linear in the weight; "
    ):
        model(params, adapters, jnp.ones((3, 5)))


def test_no_dense_delta_is_made_of_weights_that_are_joined(rng):
    """No array but the weights themselves, and what joins them, has their size."""
    case = CASES["layers"]
    params, adapters, x = made(rng, case, np.float32)
    program = jax.make_jaxpr(lora(case.fn, config_of(case), cost_model=FACTORED))(params, adapters, x)
    products = [eqn for eqn in equations(program.jaxpr) if eqn.primitive.name == "dot_general"]
    assert len(products) == 6
    assert all(eqn.outvars[0].aval.shape[0] == 7 for eqn in products)


def equations(jaxpr: Any) -> Any:
    for eqn in jaxpr.eqns:
        yield eqn
        for param in eqn.params.values():
            for inner in param if isinstance(param, tuple | list) else [param]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def saved(capsys: Any, fn: Callable[..., Any], *args: Any) -> set[str]:
    """The types of what `block` itself saves for the derivative."""
    print_saved_residuals(fn, *args)
    return {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("block)")}


@pytest.mark.parametrize("names", [("product",), ("weight",), ("product", "weight"), ()])
def test_a_policy_of_names_saves_what_it_saves_without_adapters(capsys, names):
    """A and B have the name of their weight."""

    def block(w: Any, x: Any) -> Any:
        return jnp.sin(checkpoint_name(jnp.sin(x) @ checkpoint_name(jnp.cos(w[0, 0]) * w, "weight"), "product")).sum()

    policy = jax.checkpoint_policies.save_only_these_names(*names)
    params, x = {"w": jnp.ones((5, 11))}, jnp.ones((7, 5))
    adapters = {"w": {"A": jnp.ones((5, 2)), "B": jnp.ones((2, 11))}}

    def fn(params: Any, x: Any) -> Any:
        return jax.checkpoint(block, policy=policy)(params["w"], x)

    model = lora(fn, LoraConfig(rank=2, factorizations={"w": "io"}), cost_model=FACTORED)
    base = {"product": {"f32[7,11]"}, "weight": {"f32[5,11]"}}
    adapted = base | {"weight": {"f32[5,11]", "f32[5,2]", "f32[11,2]"}}
    assert saved(capsys, fn, params, x) == set().union(*(base[name] for name in names))
    assert saved(capsys, model, params, adapters, x) == set().union(*(adapted[name] for name in names))
