"""The table of how a function uses its adapted weights."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jlora import CostModel, LoraConfig, TargetError, explain


def model(params, tokens):
    x = params["embed"][tokens]

    def layer(x, p):
        return x + jnp.tanh(x @ p["up"]) @ p["down"], None

    x, _ = lax.scan(layer, x, params["layers"])
    x = x @ jnp.sin(params["mix"])
    return x @ params["embed"].T


TABLE = """
path         shape  used by        at                  axes  computed                                 FLOPs  + adapter     bytes  + adapter
───────────  ─────  ─────────────  ──────────────────  ────  ──────────────────────────────────────  ──────  ─────────  ────────  ─────────
embed        11x7   gather         test_explain.py:{}  io    factored: rows of A, times B                 0        280     308 B      144 B
embed        7x11   dot_general    test_explain.py:{}  io    factored                                1.54 k        720
layers/down  5x7    3 dot_general  test_explain.py:{}  io    factored                                 2.1 k     1.44 k     420 B      288 B
layers/up    7x5    3 dot_general  test_explain.py:{}  io    factored                                 2.1 k     1.44 k     420 B      288 B
mix          7x7    sin            test_explain.py:{}        merged: it is not linear in the weight       0        196     196 B      112 B
named               nothing                                                                                                 60 B       64 B
───────────  ─────  ─────────────  ──────────────────  ────  ──────────────────────────────────────  ──────  ─────────  ────────  ─────────
5 weights                                                                                            5.74 k     4.08 k  1.37 KiB      896 B

left out  shape  because
────────  ─────  ───────────────────────────────────────────────────────
order     7x7    dtype int32 is not floating, nothing can be added to it
unused    13x17  the function never uses it
"""  # noqa: E501
CONFIG = LoraConfig(rank=2)
FACTORED = CostModel(merge_from=float("inf"))
FIRST = inspect.getsourcelines(model)[1]


def shape(*sizes: int, dtype: Any = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def params_of(dtype: Any = "float32") -> Any:
    sizes = {
        "embed": (11, 7),
        "layers": {"up": (3, 7, 5), "down": (3, 5, 7)},
        "mix": (7, 7),
        "unused": (13, 17),
        "norm": (7,),
    }
    return jax.tree.map(lambda s: shape(*s, dtype=dtype), sizes, is_leaf=lambda s: isinstance(s, tuple))


TOKENS = shape(2, 5, dtype="int32")


def test_the_whole_table():
    config = CONFIG.replace(target_modules=("**", "named"))
    params = params_of() | {"named": shape(3, 5), "order": shape(7, 7, dtype="int32")}
    found = explain(model, config, params, TOKENS, cost_model=FACTORED)
    wanted = TABLE.format(*(FIRST + line for line in (1, 8, 4, 4, 7)))
    assert str(found) == repr(found) == wanted.strip("\n")


def test_a_row_for_every_use_in_the_order_of_the_program():
    found = explain(model, CONFIG, params_of(), TOKENS, cost_model=FACTORED)
    assert [(use.path, use.primitive, use.roles, use.factored, use.times) for use in found.uses] == [
        ("embed", "gather", "io", True, 1),
        ("layers/up", "dot_general", "io", True, 3),
        ("layers/down", "dot_general", "io", True, 3),
        ("mix", "sin", "", False, 1),
        ("embed", "dot_general", "io", True, 1),
    ]
    assert all(use.source.startswith(f"{__file__}:") for use in found.uses)
    assert dict(found.config.factorizations) == {"embed": "io", "layers/down": "bio", "layers/up": "bio"}


# einsum of x and the weight, their sizes, FLOPs of the base and of the adapter at rank 2
PRODUCTS = {
    "dense": ("td,df->tf", (11, 5), (5, 7), 2 * 11 * 5 * 7, 2 * 11 * 2 * (5 + 7)),
    "transposed": ("td,fd->tf", (11, 5), (7, 5), 2 * 11 * 5 * 7, 2 * 11 * 2 * (5 + 7)),
    "heads": ("btd,dhk->bthk", (3, 11, 5), (5, 2, 7), 2 * 33 * 5 * 14, 2 * 33 * 2 * (5 + 14)),
    "experts": ("etd,edf->etf", (3, 11, 5), (3, 5, 7), 2 * 33 * 5 * 7, 2 * 33 * 2 * (5 + 7)),
    "every expert": ("td,edf->tef", (11, 5), (3, 5, 7), 2 * 11 * 5 * 21, 2 * 11 * 2 * (5 + 21)),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_flops_and_bytes_are_those_counted_by_hand(case):
    equation, x, weight, base, adapter = PRODUCTS[case]
    params, x = {"w": shape(*weight)}, shape(*x)
    found = explain(lambda p, x: jnp.einsum(equation, x, p["w"]), CONFIG, params, x, cost_model=FACTORED)
    (use,) = found.uses
    assert (use.base_flops, use.adapter_flops, use.factored) == (base, adapter, True)
    sizes = dict(zip(equation.partition("->")[0].split(",")[1], weight, strict=True))
    batch = sizes["e"] if case == "experts" else 1
    sides = {"dense": 12, "transposed": 12, "heads": 19, "experts": 12, "every expert": 26}[case]
    assert found.adapter_bytes == {"w": 4 * batch * 2 * sides}
    assert found.base_bytes == {"w": 4 * batch * base // (2 * x.shape[-2] * (3 if len(x.shape) == 3 else 1)) // 1}


def test_flops_of_a_convolution():
    def fn(p, x):
        return lax.conv_general_dilated(x, p["w"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    (use,) = explain(fn, CONFIG, {"w": shape(3, 2, 5, 7)}, shape(2, 11, 13, 5), cost_model=CostModel(99)).uses
    places = 2 * 6 * 13
    assert (use.roles, use.base_flops) == ("iiio", 2 * places * 30 * 7)
    assert use.adapter_flops == 2 * places * 2 * (30 + 7)


def test_dtypes_count_in_the_bytes():
    found = explain(model, CONFIG.replace(dtype="float32"), params_of("bfloat16"), TOKENS)
    assert found.base_bytes["embed"] == 2 * 77
    assert found.adapter_bytes["embed"] == 4 * 36


def test_scans_in_scans_multiply():
    def fn(p, x):
        def outer(x, stack):
            return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0], None

        return lax.fori_loop(0, 2, lambda _, x: lax.scan(outer, x, p["w"])[0], x)

    (use,) = explain(fn, CONFIG, {"w": shape(5, 3, 7, 7)}, shape(2, 7)).uses
    assert (use.times, use.roles, use.base_flops) == (2 * 5 * 3, "io", 30 * 2 * 2 * 49)


def test_a_while_loop_counts_as_one_step():
    def fn(p, x):
        return lax.while_loop(lambda x: x.sum() < 3, lambda x: x @ p["w"], x)

    (use,) = explain(fn, CONFIG, {"w": shape(7, 7)}, shape(2, 7)).uses
    assert (use.times, use.base_flops) == (1, 2 * 2 * 49)


@pytest.mark.parametrize(
    ("merge_from", "merged"),
    [(0.0, {"up", "down", "embed"}), (1.5, {"down"}), (2.1, set()), (float("inf"), set())],
)
def test_the_cost_model_chooses(merge_from, merged):
    found = explain(model, CONFIG, params_of(), TOKENS, cost_model=CostModel(merge_from))
    products = [use for use in found.uses if use.primitive == "dot_general"]
    assert {use.path.rpartition("/")[2] for use in products if not use.factored} == merged
    for use in products:
        assert use.why == ("" if use.factored else "A@B costs less than (x@A)@B here")
        assert use.factored or use.adapter_flops == use.times * 2 * 2 * use.shape[0] * use.shape[1]


def test_small_dtypes_are_never_merged_by_choice():
    found = explain(model, CONFIG, params_of("bfloat16"), TOKENS, cost_model=CostModel(0.0))
    assert all(use.factored for use in found.uses if use.primitive == "dot_general")


def test_html_is_escaped():
    found = explain(lambda p, x: x @ p["<b>&"], CONFIG, {"<b>&": shape(5, 7)}, shape(3, 5))
    text = found._repr_html_()
    assert "<td>&lt;b&gt;&amp;</td>" in text
    assert "<b>" not in text
    assert text.count("<tr>") == 3


def test_keywords_and_static_arguments_reach_the_function():
    def fn(p, x, kind, *, flag):
        assert (kind, flag) == ("deep", True)
        return x @ p["w"]

    assert len(explain(fn, CONFIG, {"w": shape(5, 7)}, shape(3, 5), "deep", flag=True).uses) == 1


def test_arrays_say_the_same_as_shapes():
    arrays = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (params_of(), TOKENS))
    assert str(explain(model, CONFIG, *arrays)) == str(explain(model, CONFIG, params_of(), TOKENS))


def test_what_does_not_fit_is_an_error():
    with pytest.raises(TargetError, match=r"^target_modules: 'layer/up' matches nothing; nearest paths: layers/up"):
        explain(model, CONFIG.replace(target_modules="layer/up"), params_of(), TOKENS)


LAYERS, WIDTH, HIDDEN, VOCABULARY = 80, 8192, 28672, 128256


def llama(params, tokens):
    def layer(x, p):
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
        q = q.reshape(*q.shape[:2], 8, 8, 128)
        shares = jax.nn.softmax(jnp.einsum("btgik,bsgk->bgits", q, k))
        mixed = jnp.einsum("bgits,bsgk->btgik", shares, v).reshape(*x.shape[:2], 64, 128)
        x = x + jnp.einsum("bthk,hkd->btd", mixed, p["o"])
        return x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"] * p["scale"], None

    x, _ = lax.scan(jax.checkpoint(layer), params["embed"][tokens], params["layers"])
    return x @ params["head"]


def test_a_model_of_seventy_billion_is_explained_without_its_arrays():
    layers = {
        "q": (WIDTH, 64, 128),
        "k": (WIDTH, 8, 128),
        "v": (WIDTH, 8, 128),
        "o": (64, 128, WIDTH),
        "scale": (WIDTH,),
    }
    layers |= {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    params = {
        "embed": shape(VOCABULARY, WIDTH, dtype="bfloat16"),
        "head": shape(WIDTH, VOCABULARY, dtype="bfloat16"),
        "layers": {name: shape(LAYERS, *sizes, dtype="bfloat16") for name, sizes in layers.items()},
    }
    before = {id(array) for array in jax.live_arrays()}
    found = explain(llama, LoraConfig(rank=16), params, shape(4, 4096, dtype="int32"))
    assert sum(array.nbytes for array in jax.live_arrays() if id(array) not in before) < 4096
    assert sum(found.base_bytes.values()) == 2 * (
        2 * VOCABULARY * WIDTH + LAYERS * WIDTH * (2 * WIDTH + 2 * 1024 + 3 * HIDDEN)
    )
    assert dict(found.config.factorizations) == {
        "embed": "io",
        "head": "io",
        **{f"layers/{name}": "bioo" for name in "qkv"},
        "layers/o": "biio",
        **{f"layers/{name}": "bio" for name in ("gate", "up", "down")},
    }
    assert found.config.exclude_modules == ("layers/scale",)
    by_path = {use.path: use for use in found.uses}
    rows = 4 * 4096
    assert by_path["layers/up"].base_flops == 80 * 2 * rows * WIDTH * HIDDEN
    assert by_path["layers/up"].adapter_flops == 80 * 2 * rows * 16 * (WIDTH + HIDDEN)
    assert all(use.factored and use.times == (80 if "/" in use.path else 1) for use in found.uses)
