"""What `explain` says of lazy bases: where they become dense arrays that the program keeps."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jlora import LoraConfig
from jlora.transform import explain
from tests.lazy_bases import densified, packed
from tests.transform.test_lazy import ELSEWHERE, IN, LAYERS, PROGRAMS, ROWS, STACK, W, mapped, ones, scanned


def test_explain_is_that_of_the_dense_base_but_for_its_bytes():
    params, x = {"w": packed(1, *STACK)}, ones(ROWS, IN)

    def fn(params, x):
        return scanned(params, x) + params["w"].sum()

    found, wanted = (explain(fn, LoraConfig(rank=2), tree, x) for tree in (params, densified(params)))
    assert found.uses == wanted.uses
    assert [use.why for use in found.uses][1:] == ["it sums over axes of the weight"]
    assert found.base_bytes == {"w": LAYERS * (IN * IN + IN * 4)}


def scanned_elsewhere(params, x):
    stack = params["w"].transpose(1, 0, 2)
    return lax.scan(lambda _, w: (None, x @ w.T), None, stack)[1]


def chosen_by_branches(params, x):
    w = lax.cond(x[0, 0] > 0, lambda w: w, lambda w: 2 * w, params["w"])
    return x @ w


@jax.custom_jvp
def halved(w):
    return w / 2


@halved.defjvp
def _(primals, tangents):
    return halved(*primals), halved(*tangents)


def halved_first(params, x):
    return x @ halved(params["w"])


MAKES = "it makes a dense array of it"
LACKING = r"its packed arrays do not have the axis that is scanned \(batch_dims\)"
KEPT = {
    "concatenate": (PROGRAMS["concatenate"][0], W, "concatenate", MAKES),
    "add": (lambda params, x: x @ (params["w"] + 1.0), W, "add", MAKES),
    "select_n": (ELSEWHERE["chosen"][0], STACK, "select_n", MAKES),
    "shard_map": (mapped, W, "shard_map", "the axes of its packed arrays are not those that shard_map splits"),
    "scan": (scanned_elsewhere, STACK, "scan", LACKING),
    "cond": (chosen_by_branches, W, "cond", "a branch returns it"),
    "custom": (halved_first, W, "custom_jvp_call", "a function with a derivative of its own returns it"),
}


@pytest.mark.parametrize("name", KEPT)
def test_explain_says_where_the_base_alone_becomes_dense(name):
    fn, shape, primitive, why = KEPT[name]
    params, x = {"w": packed(1, *shape)}, ones(ROWS, IN)
    found = explain(fn, LoraConfig(rank=2), params, x)
    assert {(one.path, one.primitive) for one in found.unpacked} == {("w", primitive)}
    assert all(re.fullmatch(why, one.why) for one in found.unpacked)
    (place,) = {one.place for one in found.unpacked}
    table = str(found).split("\n\n")[-1].splitlines()
    assert re.fullmatch("dense from here on +shape +for +at +because", table[0])
    assert re.fullmatch(rf"w +(\d+x)+\d+ +{primitive} +test_lazy\w*.py:\d+ +{why}", table[2])
    assert f"<td>{primitive}</td><td>{place}</td>" in found._repr_html_()
    assert explain(fn, LoraConfig(rank=2), densified(params), x).unpacked == ()


@pytest.mark.parametrize("name", sorted(KEPT.keys() - {"select_n"} | {"carried", "returned"}))
def test_explain_says_so_of_a_base_without_an_adapter(name):
    fn, shape = (KEPT | ELSEWHERE)[name][:2]
    params = {"w": packed(1, *shape), "up": jnp.ones(W)}

    def both(params, x):
        w = params["w"] / 2 if name == "returned" else fn(params, x)
        return x @ params["up"], w

    found = explain(both, LoraConfig(rank=2, target_modules="up"), params, ones(ROWS, IN))
    wanted = {"carried": "scan", "returned": "return"}.get(name) or KEPT[name][2]
    assert {(one.path, one.primitive) for one in found.unpacked} == {("w", wanted)}


@pytest.mark.parametrize("name", sorted(PROGRAMS.keys() - {"concatenate"}))
def test_explain_says_nothing_where_it_is_dense_only_while_it_is_used(name):
    fn, shape, of_x = PROGRAMS[name]
    params, x = {"w": packed(1, *shape), "up": jnp.ones(W)}, ones(*of_x)
    assert explain(fn, LoraConfig(rank=2), params, x).unpacked == ()

    def both(params, x):
        return fn(params, x), jnp.ones((ROWS, IN)) @ params["up"]

    assert explain(both, LoraConfig(rank=2, target_modules="up"), params, x).unpacked == ()


@pytest.mark.parametrize("parts", [("value",), ("offset", "A", "B")], ids=["value", "offset"])
def test_explain_says_that_an_entry_makes_it_dense(parts):
    fn, (params, x) = PROGRAMS["product"][0], ({"w": packed(1, *W)}, ones(ROWS, IN))
    shapes = {"value": W, "offset": W, "A": (IN, 2), "B": (2, W[1])}
    entries = {"w": {part: jnp.ones(shapes[part]) for part in parts}}
    config = LoraConfig(rank=2, factorizations={"w": "io"})
    (found,) = explain(fn, config, params, x, entries=entries).unpacked
    assert (found.path, found.shape, found.why) == ("w", W, "its entry has a value or an offset")
    assert explain(fn, config, densified(params), x, entries=entries).unpacked == ()
