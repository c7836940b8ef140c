"""Adapters that reach nothing: on whose weights nothing that the function returns depends."""

import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jlora import AdapterError, JloraWarning, LoraConfig, init_lora, lora, merge_params
from jlora.adapter import is_entry
from tests.reference import as64, assert_close, random_array, randomize

CONFIG = LoraConfig(rank=2, alpha=3)


def passed(wrap: Callable[..., Any]) -> Callable[..., Any]:
    """A function that hands both weights to what `wrap` makes of one that reads a alone."""
    return lambda p, x: wrap(lambda a, b, x: jnp.tanh(x @ a))(p["a"], p["b"], x)


def scanned(body):
    return lambda a, b, x: lax.scan(lambda x, _: (body(a, b, x), None), x, None, length=3)[0]


def stacked(body):
    return lambda a, b, x: lax.scan(lambda x, ab: (body(*ab, x), None), x, jax.tree.map(lambda w: w[None], (a, b)))[0]


def carried(body):
    """The loop hands b on, beside what it makes of a."""
    return lambda a, b, x: lax.fori_loop(0, 3, lambda _, c: (body(a, c[1], c[0]), c[1]), (x, b))[0]


def later_carried(body):
    """What the loop reads in one step it has carried there in two others."""

    def fn(a, b, x):
        def step(carry, _):
            x, one, two, three = carry
            return (body(one, b, x), two, three, three), None

        return lax.scan(step, (x, jnp.eye(5), jnp.eye(5), a), None, length=3)[0][0]

    return fn


def counted(body):
    """The condition of the loop reads a alone, and the result is x."""
    return lambda a, b, x: lax.while_loop(lambda s: s[1] < a.sum() + 3, lambda s: (s[0] * 2, s[1] + 1), (x, 0.0))[0]


def branched(body):
    return lambda a, b, x: lax.cond(x.sum() > 0, lambda a, b, x: body(a, b, x), lambda a, b, x: x, a, b, x)


def own_vjp(body):
    fn = jax.custom_vjp(body)
    fn.defvjp(lambda a, b, x: (body(a, b, x), (a, b, x)), lambda r, g: tuple(map(jnp.zeros_like, r)))
    return fn


def own_jvp(body):
    fn = jax.custom_jvp(body)
    fn.defjvp(lambda primals, tangents: (body(*primals), tangents[2]))
    return fn


def sharded(body):
    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))
    spec = PartitionSpec()
    return jax.shard_map(body, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec)


def dropped(body):
    """b is used, and nobody looks at what comes out."""

    def fn(a, b, x):
        return [body(a, b, x), (x @ b).sum()][0]

    return fn


def shapes_only(body):
    return lambda a, b, x: body(a, b, x) * b.shape[0] * (b.ndim + b.dtype.itemsize)


PASSING = {
    "plain": lambda body: body,
    "jit": jax.jit,
    "jit in jit": lambda body: jax.jit(jax.jit(body)),
    "scan": scanned,
    "stacks": stacked,
    "carried": carried,
    "carried later": later_carried,
    "condition": counted,
    "cond": branched,
    "checkpoint": jax.checkpoint,
    "custom_vjp": own_vjp,
    "custom_jvp": own_jvp,
    "vmap": lambda body: lambda a, b, x: jax.vmap(lambda x: body(a, b, x))(x),
    "shard_map": sharded,
    "dropped": dropped,
    "shapes": shapes_only,
    "jit of a dropped one": lambda body: jax.jit(dropped(body)),
}


def made(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    params = {name: random_array(rng, (5, 5)) for name in "ab"}
    return params, randomize(rng, init_lora(None, params, CONFIG)), random_array(rng, (11, 5))


@pytest.mark.parametrize("name", PASSING)
def test_a_weight_that_is_only_passed_on_is_told_of(rng, name):
    params, adapters, x = made(rng)
    fn = passed(PASSING[name])
    wanted = "^the adapters of b reach nothing: what <lambda> returns does not depend on these params.*exclude_modules$"
    with pytest.warns(JloraWarning, match=wanted) as caught:
        y = lora(fn, CONFIG)(params, adapters, x)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.raises(AdapterError, match=wanted):
        lora(fn, CONFIG, strict=True)(params, adapters, x)
    without = lora(fn, CONFIG.replace(exclude_modules="b"))(params, adapters | {"b": None}, x)
    np.testing.assert_array_equal(y, without)


USED = {
    "returned": lambda p, x: (x @ p["a"], p["b"]),
    "returned by a jit": lambda p, x: jax.jit(lambda a, b, x: (x @ a, b))(p["a"], p["b"], x),
    "merged": lambda p, x: x @ p["a"] + jnp.sin(p["b"]).sum(),
    "gradient only": lambda p, x: jax.grad(lambda x: (x @ p["a"] @ p["b"]).sum())(x),
    "in a branch": lambda p, x: lax.cond(x.sum() > 0, lambda: x @ p["a"], lambda: x @ p["b"]),
    "in a condition": lambda p, x: lax.while_loop(lambda s: s.sum() < p["b"].sum(), lambda s: s + 50, x @ p["a"]),
    "in a scan": lambda p, x: lax.scan(lambda x, _: (x @ p["a"], x @ p["b"]), x, None, length=2)[1],
}


@pytest.mark.parametrize("name", USED)
def test_a_weight_on_which_something_depends_is_not(rng, name):
    params, adapters, x = made(rng)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(lora(USED[name], CONFIG), params, adapters, x)


def test_an_effect_is_a_use(rng, capsys):
    params, adapters, x = made(rng)

    def fn(p, x):
        jax.debug.callback(lambda b: print(float(b)), p["b"].sum())
        return x @ p["a"]

    jax.block_until_ready(lora(fn, CONFIG)(params, adapters, x))
    jax.effects_barrier()
    assert float(capsys.readouterr().out) == pytest.approx(float(merged_sum(params, adapters)), rel=1e-4)


def merged_sum(params, adapters):
    update = np.asarray(adapters["b"]["A"]) @ np.asarray(adapters["b"]["B"]) * 1.5
    return (np.asarray(params["b"]) + update).sum()


def test_weights_that_a_function_holds_itself_are_told_of_once_for_each_trace(rng):
    params, adapters, x = made(rng)
    fn = jax.jit(lora(lambda p, x: x @ params["a"] @ params["b"], CONFIG))
    for rows, told in ((11, 1), (11, 0), (3, 1)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fn(params, adapters, x[:rows])
        assert [warning.category for warning in caught] == [JloraWarning] * told
        for warning in caught:
            assert re.match(r"the adapters of a, b reach nothing: .* bound model or a closure", str(warning.message))


def test_a_second_trace_over_the_same_compiled_function_tells_again(rng):
    params, adapters, x = made(rng)
    fn = lora(passed(jax.jit), CONFIG)
    for _ in range(2):
        with pytest.warns(JloraWarning, match="^the adapters of b reach nothing"):
            fn(params, adapters, x)


@pytest.mark.parametrize(
    "entry",
    [
        {"value": (5, 5)},
        {"offset": (5, 5)},
        {"A": (5, 2), "B": (2, 5), "magnitude": (5,)},
    ],
    ids="+".join,
)
def test_other_entries_are_told_of_too(rng, entry):
    params, adapters, x = made(rng)
    adapters["b"] = {part: random_array(rng, shape) for part, shape in entry.items()}
    assert is_entry(adapters["b"])
    with pytest.warns(JloraWarning, match="^the adapters of b reach nothing"):
        lora(lambda p, x: x @ p["a"], CONFIG)(params, adapters, x)


@pytest.mark.parametrize("strict", [False, True])
def test_a_function_that_is_a_part_may_leave_adapters_aside(rng, strict):
    params, adapters, x = made(rng)
    found = lora(lambda p, x: x @ p["a"], CONFIG, partial=True, strict=strict)(params, adapters, x)
    whole = lora(lambda p, x: (x @ p["a"], x @ p["b"]), CONFIG, strict=strict)(params, adapters, x)
    np.testing.assert_array_equal(found, whole[0])


def test_many_paths_are_counted_and_cut(rng):
    params = {f"w{n:02}": random_array(rng, (5, 5)) for n in range(15)}
    adapters = init_lora(None, params, CONFIG)
    with pytest.warns(JloraWarning, match=r"w07 and 7 more reach nothing"):
        lora(lambda p, x: x, CONFIG)(params, adapters, jnp.ones(3))


# Dropout where a weight is merged

DROPPING = CONFIG.replace(dropout=0.5)


def softmax_of_b(p, x):
    return x @ p["a"] @ jax.nn.softmax(p["b"])


def many_softmaxes(p, x):
    for n in range(3):
        x = jax.jit(lambda b, x: lax.scan(lambda x, _: (x @ jnp.sin(b), None), x, None, length=2)[0])(p["b"], x) + n
    return x @ p["a"]


MERGING = {
    "softmax": softmax_of_b,
    "jit, scan": many_softmaxes,
    "custom_vjp": lambda p, x: own_vjp(lambda b, _, x: jnp.sin(x @ b))(p["b"], 1.0, x) @ p["a"],
    "checkpoint": lambda p, x: jax.checkpoint(lambda b, x: x @ jnp.sin(b))(p["b"], x) @ p["a"],
    "returned": lambda p, x: (x @ p["a"], p["b"]),
}


@pytest.mark.parametrize("name", MERGING)
def test_a_weight_that_is_merged_has_no_dropout_and_that_is_said(rng, name):
    params, adapters, x = made(rng)
    model = lora(MERGING[name], DROPPING)
    for _ in range(2):  # the second time over what jit has compiled
        with pytest.warns(JloraWarning, match=r"^no dropout for the adapters of b: the weights are merged") as caught:
            model(params, adapters, x, dropout_key=jax.random.key(0))
        assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(params, adapters, x)
        lora(MERGING[name], CONFIG)(params, adapters, x, dropout_key=jax.random.key(0))


SUMS = {
    "plain": lambda p, x: x @ jnp.sin(p["a"] + p["b"]),
    "in a jit": lambda p, x: jax.jit(lambda a, b, x: x @ jnp.sin(a + b))(p["a"], p["b"], x),
    "into a jit": lambda p, x: jax.jit(lambda w, x: x @ jnp.sin(w))(p["a"] + p["b"], x),
    "stacked": lambda p, x: (x @ jnp.sin(jnp.stack([p["a"], p["b"]]))).sum(0),
}


@pytest.mark.parametrize("name", SUMS)
def test_every_weight_of_what_is_merged_as_one_is_named(rng, name):
    params, adapters, x = made(rng)
    model = lora(SUMS[name], DROPPING)
    for _ in range(2):  # the second time over what jit has compiled
        with pytest.warns(
            JloraWarning, match=r"^no dropout for the adapters of a, b: the weights are merged"
        ) as caught:
            model(params, adapters, x, dropout_key=jax.random.key(0))
        assert len(caught) == 1


def test_under_a_magnitude_the_input_of_the_adapter_alone_is_dropped(rng):
    params, adapters, x = made(rng)
    adapters = {"a": None, "b": adapters["b"] | {"magnitude": random_array(rng, (5,))}}
    config = DROPPING.replace(target_modules="b")
    plain = {"a": None, "b": {name: adapters["b"][name] for name in "AB"}}
    key = jax.random.key(0)
    found, dropped, merged = (
        lora(lambda p, x: x @ p["b"], config)(params, tree, x, dropout_key=k)
        for tree, k in ((adapters, key), (plain, key), (adapters, None))
    )
    total = as64(merge_params(params, plain, config)["b"])
    gain = as64(adapters["b"]["magnitude"]) / np.linalg.norm(total, axis=0)
    assert_close(found, as64(dropped) * gain)
    assert not np.allclose(found, merged)


def test_a_merge_that_was_chosen_for_its_cost_is_factored_where_there_is_a_key(rng):
    """Many rows: merged without a key, and with one factored, so that there is dropout."""
    params, adapters, _ = made(rng)
    model = lora(lambda p, x: x @ p["a"] @ p["b"], DROPPING)
    x = random_array(rng, (101, 5))
    keys = map(jax.random.key, range(2))
    assert not np.allclose(*(model(params, adapters, x, dropout_key=key) for key in keys))


def test_the_warning_is_one_line_in_a_terminal(rng):
    params, adapters, x = made(rng)
    shown = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: shown.write(f"{message}\n")
        lora(lambda p, x: x @ p["a"], CONFIG)(params, adapters, x)
    assert re.fullmatch(r"the adapters of b reach nothing: .*\n", shown.getvalue())
