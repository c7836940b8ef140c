"""A layer that is jitted and called for many weights is one compiled function, which knows whose weights it has."""

import functools
import re
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jlora import AdapterError, JloraWarning, LoraConfig, init_lora, lora
from jlora.transform import _compiled
from tests.marks import some
from tests.reference import random_array, randomize

CONFIG = LoraConfig(rank=2, alpha=4)
DROPPING = CONFIG.replace(dropout=0.5)
FEW, MANY = 3, 24


def layer(w, x):
    return x + jnp.tanh(x @ w["up"]) @ w["down"]


def repeated(fn):
    return lambda w, x: lax.scan(lambda x, _: (fn(w, x), None), x, None, length=2)[0]


product = jax.jit(lambda w, x: x @ w)
averaged = jax.jit(lambda w: (w["up"] + w["down"].T) / 2)
turned = jax.jit(lambda w: w.T)
LAYERS: dict[str, Callable[..., Any]] = {
    "jit": jax.jit(layer),
    "jit in jit": jax.jit(lambda w, x: x + product(w["down"].T + w["up"], jnp.tanh(x)) @ w["down"]),
    "jit in scan in jit": jax.jit(repeated(jax.jit(layer))),
    "jit in cond in jit": jax.jit(lambda w, x: lax.cond(x.sum() > 0, jax.jit(layer), lambda w, x: x, w, x)),
    "checkpoint of jit": jax.checkpoint(jax.jit(layer)),
    "jit of checkpoint": jax.jit(jax.checkpoint(layer)),
    "jit of moves": lambda w, x: x + x @ averaged(w) @ w["down"],
    "merged": jax.jit(lambda w, x: x + jnp.tanh(x @ jnp.sin(w["up"])) @ w["down"]),
}


def network(one: Callable[..., Any]) -> Callable[..., Any]:
    return lambda layers, x: functools.reduce(lambda x, w: one(w, x), layers, x)


def primals(count: int, width: int = 16) -> tuple[Any, Any, Any]:
    params = [{"up": jnp.ones((width, 24)), "down": jnp.ones((24, width))} for _ in range(count)]
    return params, init_lora(None, params, CONFIG), jnp.ones((5, width))


def text(model: Callable[..., Any], *arguments: Any, grad: bool = False) -> str:
    """The program that XLA gets, of the sum or of the gradient of it by the second argument."""
    total = lambda *arguments: model(*arguments).sum()  # noqa: E731
    return jax.jit(jax.value_and_grad(total, 1) if grad else total).lower(*arguments).as_text()


def functions(program: str) -> int:
    return len(re.findall(r"func\.func private @", program))


@pytest.mark.filterwarnings("ignore:no dropout for")
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("name", some({name: name for name in LAYERS}, 3))
def test_the_number_of_functions_does_not_depend_on_the_number_of_layers(name, grad, dropout):
    model = lora(network(LAYERS[name]), DROPPING)
    key = jax.random.key(0) if dropout else None
    keyed = lambda params, adapters, x: model(params, adapters, x, dropout_key=key)  # noqa: E731
    few, more = (functions(text(keyed, *primals(n), grad=grad)) for n in (FEW, MANY if name == "jit" else 5))
    assert few == more


def hand_written(params, adapters, x):
    @jax.jit
    def one(w, entry, x):
        a, b = (product(x, w["up"], entry["up"]) for product in (plain, low_rank))
        hidden = jnp.tanh(a + b)
        return x + plain(hidden, w["down"]) + low_rank(hidden, w["down"], entry["down"])

    def plain(x, w, _=None):
        return x @ w

    def low_rank(x, _, entry):
        return CONFIG.alpha / CONFIG.rank * ((x @ entry["A"]) @ entry["B"])

    for w, entry in zip(params, adapters, strict=True):
        x = one(w, entry, x)
    return x


@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
def test_the_program_is_not_much_longer_than_one_that_is_written_by_hand(grad):
    found, wanted = (text(fn, *primals(MANY), grad=grad) for fn in (lora(network(LAYERS["jit"]), CONFIG), hand_written))
    assert functions(found) == functions(wanted)
    assert len(found) <= 3 * len(wanted)


# What is said while it is traced, of the weights that it is traced for


def softmax(w, x):
    return x @ jax.nn.softmax(w)


HIDDEN: dict[str, Callable[..., Any]] = {
    "jit": jax.jit(softmax),
    "jit in jit": jax.jit(lambda w, x: 2 * jax.jit(softmax)(w.T, x)),
    "jit in scan in jit": jax.jit(repeated(jax.jit(softmax))),
    "jit of checkpoint of jit": jax.jit(jax.checkpoint(jax.jit(softmax))),
    "out of jit": lambda w, x: x @ jnp.sin(turned(w)),
}


def square(rng: np.random.Generator, names: str, size: int = 5) -> tuple[Any, Any]:
    """Params and adapters under these names, each of one letter."""
    params = {name: random_array(rng, (size, size)) for name in names}
    return params, randomize(rng, init_lora(None, params, CONFIG))


@pytest.mark.parametrize("name", some({name: name for name in HIDDEN}))
def test_strict_names_the_weight_at_hand(rng, name):
    """Whichever is traced; and the second one, where the first has no adapter."""
    params, adapters = square(rng, "ab")
    one = HIDDEN[name]
    for path in "ab":
        model = lora(lambda p, x, path=path: one(p[path], x), CONFIG, strict=True)
        with pytest.raises(AdapterError, match=rf"^{path}: \w+ at .*test_compiled_once\.py:"):
            model({path: params[path]}, {path: adapters[path]}, jnp.ones((3, 5)))
    plain = lora(lambda p, x: one(p["b"], one(p["a"], x)), CONFIG, strict=True)
    with pytest.raises(AdapterError, match=r"^b: "):
        plain(params, adapters | {"a": None}, jnp.ones((3, 5)))


def test_what_is_made_of_several_weights_is_named_by_all_of_them(rng):
    params, adapters = square(rng, "abcd")
    total = jax.jit(lambda one, other: one + other)
    taken = jax.jit(lambda w, x: x @ jnp.sin(w))

    def fn(p, x):
        return x @ total(p["a"], p["b"]) + taken(total(p["c"], p["d"]), x)

    with pytest.raises(AdapterError, match=r"^c with d: sin at "):
        lora(fn, CONFIG, strict=True)(params, adapters, jnp.ones((3, 5)))


@pytest.mark.parametrize("name", some({name: name for name in HIDDEN}))
def test_every_layer_without_dropout_is_named(rng, name):
    params, adapters = square(rng, "abcd")
    model = lora(lambda p, x: functools.reduce(lambda x, w: HIDDEN[name](p[w], x), "abc", x) @ p["d"], DROPPING)
    for rows in (3, 3, 7):  # traced, over what is compiled, and traced again
        with pytest.warns(JloraWarning, match="^no dropout for the adapters of a, b, c: ") as caught:
            model(params, adapters, jnp.ones((rows, 5)), dropout_key=jax.random.key(0))
        assert len(caught) == 1


def test_a_weight_at_another_place_of_the_same_function_is_another_one(rng):
    params, adapters = square(rng, "abcd")
    both = jax.jit(lambda one, other, x: x @ jnp.sin(one) @ other)
    model = lora(lambda p, x: both(p["c"], p["d"], both(p["a"], p["b"], x)), DROPPING)
    for _ in range(2):
        with pytest.warns(JloraWarning, match="^no dropout for the adapters of a: "):
            model(params, adapters | {"c": None}, jnp.ones((3, 5)), dropout_key=jax.random.key(0))


def test_a_weight_may_be_handed_in_twice(rng):
    params, adapters = square(rng, "a")
    both = jax.jit(lambda one, other, x: x @ one @ jnp.sin(other))
    model = lora(lambda p, x: both(p["a"], p["a"], x), DROPPING)
    with pytest.warns(JloraWarning, match="^no dropout for the adapters of a: "):
        model(params, adapters, jnp.ones((3, 5)), dropout_key=jax.random.key(0))


def test_threads_that_trace_the_same_function_name_their_own_weights(monkeypatch):
    """All of them are about to enter it when the first one does."""
    names, taken = "abcd", jax.jit(jax.jit(softmax))
    together = threading.Barrier(len(names))

    def renamed(*arguments, of_one=_compiled._renamed):
        together.wait(timeout=20)
        return of_one(*arguments)

    monkeypatch.setattr(_compiled, "_renamed", renamed)
    found: dict[str, str] = {}

    def traced(name: str, size: int) -> None:
        params, adapters = square(np.random.default_rng(0), name, size)
        try:
            lora(lambda p, x: taken(p[name], x), CONFIG, strict=True)(params, adapters, jnp.ones((3, size)))
        except AdapterError as error:
            found[name] = str(error).split(":")[0]

    threads = [threading.Thread(target=traced, args=(name, 3 + number)) for number, name in enumerate(names)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: name for name in names}


# Dropout


def masked(one: Callable[..., Any], names: str, key: int) -> dict[str, bytes]:
    """What the layers of these names return, each with the same weight, adapter and input."""
    weight, a, b = (random_array(np.random.default_rng(3), shape) for shape in ((5, 5), (5, 2), (2, 5)))
    params, adapters = dict.fromkeys(names, weight), {name: {"A": a, "B": b} for name in names}
    model = lora(lambda p, x: {name: one(p[name], x) for name in names}, DROPPING)
    found = model(params, adapters, jnp.ones((7, 5)), dropout_key=jax.random.key(key))
    return {name: np.asarray(y).tobytes() for name, y in found.items()}


def dropped() -> dict[str, Callable[..., Any]]:
    """Layers that nobody has traced yet."""
    one = jax.jit(lambda w, x: x @ w)
    return {
        "jit": one,
        "jit in jit": jax.jit(lambda w, x: one(w.T, x)),
        "jit in scan": repeated(one),
        "checkpoint of jit": jax.checkpoint(one),
    }


@pytest.mark.parametrize("name", some({name: name for name in dropped()}))
def test_every_layer_has_a_mask_of_its_own_and_the_same_one_again(name):
    one = dropped()[name]
    found = masked(one, "abc", 0)
    assert len(set(found.values())) == 3
    assert masked(one, "abc", 0) == masked(dropped()[name], "abc", 0) == found
    assert not set(masked(one, "abc", 1).values()) & set(found.values())


@pytest.mark.parametrize("name", some({name: name for name in dropped()}))
def test_the_only_layer_of_two_models_has_two_masks(name):
    found = {path: masked(dropped()[name], path, 0)[path] for path in "ab"}
    assert found["a"] != found["b"]
