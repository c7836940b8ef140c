"""How weights split into axes, and the products that follow, against loops and np.einsum in float64."""

import math
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jlora.contraction import Factorization, canonical, factorization_from_shapes, split_batch_axes
from jlora.errors import AdapterError
from jlora.products import common_dtype, contract, dense_delta, factored_einsum, factored_product
from tests.reference import as64, assert_close, random_adapter, random_array, reference_delta

SPLITS = [  # roles, weight, A, B, smaller side, canonical
    ("io", (3, 5), (3, 2), (2, 5), 3, True),
    ("oi", (3, 5), (5, 2), (2, 3), 3, False),
    ("ioo", (3, 5, 7), (3, 2), (2, 5, 7), 3, True),
    ("iio", (3, 5, 7), (3, 5, 2), (2, 7), 7, True),
    ("oio", (3, 5, 7), (5, 2), (2, 3, 7), 5, False),
    ("bio", (3, 5, 7), (3, 5, 2), (3, 2, 7), 5, True),
    ("iob", (3, 5, 7), (7, 3, 2), (7, 2, 5), 3, False),
    ("iiio", (3, 5, 7, 11), (3, 5, 7, 2), (2, 11), 11, True),
    ("bioo", (3, 5, 7, 11), (3, 5, 2), (3, 2, 7, 11), 5, True),
    ("obibi", (3, 5, 7, 11, 13), (5, 11, 7, 13, 2), (5, 11, 2, 3), 3, False),
]


def exactly(message):
    return f"^{re.escape(message)}$"


def reference_dense(a, b, roles):
    """A@B in the order of the weight's axes, as a loop over the rank and the batch."""
    delta = reference_delta({"A": a, "B": b}, alpha=a.shape[-1], batch=roles.count("b"))
    order = sorted(range(len(roles)), key=lambda axis: "bio".index(roles[axis]))
    return delta.transpose(np.argsort(order))


@st.composite
def weights(draw, in_order=False):
    roles = draw(st.permutations("io" + draw(st.text("bio", max_size=3))))
    roles = "".join(sorted(roles, key="bio".index) if in_order else roles)
    shape = draw(st.tuples(*[st.integers(1, 4)] * len(roles)))
    return roles, shape, draw(st.integers(1, 3))


@pytest.mark.parametrize(("roles", "shape", "a_shape", "b_shape", "side", "ordered"), SPLITS)
def test_factorization_of_known_weights(roles, shape, a_shape, b_shape, side, ordered):
    split = Factorization(roles)
    assert split.adapter_shapes(shape, rank=2) == (a_shape, b_shape)
    assert split.max_rank(shape) == side
    assert split.is_canonical is ordered


def test_axes_and_sizes_follow_the_order_of_the_weight():
    split = Factorization("obibi")
    assert [split.axes(role) for role in "bio"] == [(1, 3), (2, 4), (0,)]
    assert [split.sizes((3, 5, 7, 11, 13), role) for role in "bio"] == [(5, 11), (7, 13), (3,)]


@pytest.mark.parametrize("roles", ["", "i", "o", "b", "bi", "bo", "io ", "IO", "ixo", "i,o", None, 2, ["i", "o"]])
def test_bad_roles_are_refused(roles):
    message = (
        f"factorization {roles!r}: wanted one letter per axis of the weight, b (batch), i (in) or o (out), "
        "with at least one i and one o, such as 'io', 'ioo' or 'bio'"
    )
    with pytest.raises(AdapterError, match=exactly(message)):
        Factorization(roles)


@pytest.mark.parametrize("shape", [(), (3,), (3, 5, 7)])
def test_a_weight_with_another_number_of_axes_is_refused(shape):
    message = exactly(f"factorization 'io' is for weights of 2 axes; found shape {shape}")
    split = Factorization("io")
    for method, args in ((split.sizes, "b"), (split.adapter_shapes, (2,)), (split.max_rank, ())):
        with pytest.raises(AdapterError, match=message):
            method(shape, *args)


@hypothesis.given(weights())
def test_adapter_shapes_multiply_out_to_the_weight(weight):
    roles, shape, rank = weight
    a_shape, b_shape = Factorization(roles).adapter_shapes(shape, rank)
    batch = math.prod(size for size, role in zip(shape, roles, strict=True) if role == "b")
    assert math.prod(a_shape) * math.prod(b_shape) == math.prod(shape) * batch * rank**2
    assert a_shape[-1] == b_shape[roles.count("b")] == rank
    assert len(a_shape) + len(b_shape) == len(shape) + roles.count("b") + 2


@hypothesis.given(weights())
def test_dense_delta_is_in_the_order_of_the_weight(weight):
    roles, shape, rank = weight
    adapter = random_adapter(np.random.default_rng(3), *Factorization(roles).adapter_shapes(shape, rank))
    found = dense_delta(adapter["A"], adapter["B"], Factorization(roles))
    assert found.shape == shape
    assert_close(found, reference_dense(adapter["A"], adapter["B"], roles))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dense_delta_is_formed_in_float32(rng, dtype):
    adapter = random_adapter(rng, (3, 11, 5), (3, 5, 7), dtype)
    found = dense_delta(adapter["A"], adapter["B"], Factorization("bio"))
    assert found.dtype == jnp.float32
    assert_close(found, reference_dense(adapter["A"], adapter["B"], "bio"))


@hypothesis.given(weights(in_order=True))
def test_shapes_recover_a_canonical_factorization(weight):
    roles, shape, rank = weight
    split = Factorization(roles)
    assert split == canonical(*map(roles.count, "bio"))
    assert factorization_from_shapes(shape, *split.adapter_shapes(shape, rank)) == split


@pytest.mark.parametrize(("roles", "shape", "a_shape", "b_shape", "side", "ordered"), SPLITS)
def test_shapes_recover_every_order_but_a_transposed_matrix(roles, shape, a_shape, b_shape, side, ordered):
    if roles == "oi":
        with pytest.raises(AdapterError, match="do not fit the weight"):
            factorization_from_shapes(shape, a_shape, b_shape)
    else:
        assert factorization_from_shapes(shape, a_shape, b_shape) == Factorization(roles)


@pytest.mark.parametrize(
    ("shape", "a_shape", "b_shape"),
    [
        ((3, 5), (3, 2), (2, 7)),
        ((3, 5), (3, 2), (3, 5)),
        ((3, 5, 7), (3, 5, 2), (5, 2, 7)),
        ((3, 5, 7), (3, 2), (2, 7)),
        ((3, 5), (), ()),
        ((), (3, 2), (2, 5)),
    ],
)
def test_shapes_that_do_not_fit_the_weight_are_refused(shape, a_shape, b_shape):
    message = (
        f"A {a_shape} and B {b_shape} do not fit the weight {shape}: "
        "wanted A (*batch, *in, r) and B (*batch, r, *out) with the weight's axes in the order batch, in, out"
    )
    with pytest.raises(AdapterError, match=exactly(message)):
        factorization_from_shapes(shape, a_shape, b_shape)


def test_shapes_that_fit_the_weight_in_several_ways_are_refused():
    message = "A (3, 2) and B (2, 7, 3) fit the weight (7, 3, 3) in several ways: oio, ooi; give the factorization"
    with pytest.raises(AdapterError, match=exactly(message)):
        factorization_from_shapes((7, 3, 3), (3, 2), (2, 7, 3))


@pytest.mark.parametrize(
    ("a_shape", "b_shape", "batch"),
    [((3, 2), (2, 5), 0), ((3, 5, 2), (3, 2, 7), 1), ((3, 5, 7, 2), (3, 5, 2, 11), 2), ((3, 5, 2), (2, 7, 11), 0)],
)
def test_batch_axes_are_read_off_the_shapes(a_shape, b_shape, batch):
    assert split_batch_axes(a_shape, b_shape) == split_batch_axes(a_shape, b_shape, batch) == batch


def test_ambiguous_batch_axes_need_batch_dims():
    message = "A (2, 5, 2) and B (2, 2, 7) can be read with 0 or 1 batch axes; pass batch_dims= to say"
    with pytest.raises(AdapterError, match=exactly(message)):
        split_batch_axes((2, 5, 2), (2, 2, 7))
    assert [split_batch_axes((2, 5, 2), (2, 2, 7), n) for n in (0, 1)] == [0, 1]


@pytest.mark.parametrize(
    ("a_shape", "b_shape", "batch_dims"),
    [((3, 2), (5, 7), None), ((3, 5, 2), (7, 2, 5), None), ((2,), (2,), None), ((), (), None), ((3, 2), (2, 5), 1)],
)
def test_adapters_whose_shapes_do_not_fit_are_refused(a_shape, b_shape, batch_dims):
    message = (
        f"A {a_shape} and B {b_shape} do not fit: wanted A (*batch, *in, r) and B (*batch, r, *out) "
        "with the same r and batch axes" + ("" if batch_dims is None else f" and {batch_dims} batch axes")
    )
    with pytest.raises(AdapterError, match=exactly(message)):
        split_batch_axes(a_shape, b_shape, batch_dims)


PRODUCTS = [  # x, axis, batch_dims
    ((3, 5), (1,), 0),
    ((3, 5), (0,), 0),
    ((3, 5, 7), (2,), 0),
    ((3, 5, 7), (1,), 0),
    ((3, 5, 7), (1, 2), 0),
    ((3, 5, 7), (0, 2), 0),
    ((3, 5, 7), (2, 0), 0),
    ((5,), (0,), 0),
    ((3, 5), (1, 0), 0),
    ((3, 5, 7), (2,), 1),
    ((3, 5, 7), (1,), 1),
    ((3, 5), (1,), 1),
    ((3, 5, 7), (2,), 2),
    ((3, 5, 7, 11), (3, 1), 1),
    ((2, 3, 5, 7, 11), (2, 4), 2),
    ((0, 5), (1,), 0),
    ((0, 5, 3), (1,), 0),
    ((3, 0, 5), (2,), 1),
]
products = pytest.mark.parametrize(("x_shape", "axis", "batch_dims"), PRODUCTS)


def lettered(x_shape, axis, batch_dims, outs=(17, 19), rank=2):
    """One letter per axis of x, A, B, the weight and the output, and the shapes of A, B and the weight."""
    x = "abcde"[: len(x_shape)]
    batch, ins = x[:batch_dims], "".join(x[d] for d in axis)
    y = "".join(c for c in x if c not in ins) + "yz"
    sizes = dict(zip(x + "yzr", (*x_shape, *outs, rank), strict=True))
    names = {"x": x, "a": batch + ins + "r", "b": batch + "ryz", "w": batch + ins + "yz", "y": y}
    return names, *(tuple(sizes[c] for c in names[part]) for part in "abw")


@products
@pytest.mark.parametrize("scale", [None, 0.3, "traced"])
def test_factored_product_is_the_einsum_of_x_a_and_b(rng, x_shape, axis, batch_dims, scale):
    names, a_shape, b_shape, _ = lettered(x_shape, axis, batch_dims)
    x, a, b = (random_array(rng, shape) for shape in (x_shape, a_shape, b_shape))
    if scale == "traced":
        found = jax.jit(lambda s: factored_product(x, a, b, axis, batch_dims, scale=s))(0.3)
    else:
        found = factored_product(x, a, b, axis, batch_dims, scale=scale)
    wanted = np.einsum(f"{names['x']},{names['a']},{names['b']}->{names['y']}", as64(x), as64(a), as64(b))
    assert found.dtype == jnp.float32
    assert_close(found, wanted if scale is None else 0.3 * wanted)


@products
def test_gradients_of_factored_product_are_einsums(rng, x_shape, axis, batch_dims):
    names, a_shape, b_shape, _ = lettered(x_shape, axis, batch_dims)
    x, a, b = (random_array(rng, shape) for shape in (x_shape, a_shape, b_shape))
    y, vjp = jax.vjp(jax.jit(lambda x, a, b: factored_product(x, a, b, axis, batch_dims, scale=0.3)), x, a, b)
    arrays = {"x": x, "a": a, "b": b, "y": random_array(rng, y.shape)}
    for part, found in zip("xab", vjp(arrays["y"]), strict=True):
        others = [name for name in arrays if name != part]
        equation = ",".join(names[name] for name in others) + "->" + names[part]
        assert_close(found, 0.3 * np.einsum(equation, *(as64(arrays[name]) for name in others)))


@products
def test_contract_is_the_einsum_of_x_and_the_weight(rng, x_shape, axis, batch_dims):
    names, _, _, w_shape = lettered(x_shape, axis, batch_dims)
    x, w = random_array(rng, x_shape), random_array(rng, w_shape)
    wanted = np.einsum(f"{names['x']},{names['w']}->{names['y']}", as64(x), as64(w))
    assert_close(contract(x, w, axis, batch_dims), wanted)


def sizes_built(jaxpr):
    """The size of every array that a jaxpr computes, those of inner jaxprs too."""
    for eqn in jaxpr.eqns:
        yield from (math.prod(out.aval.shape) for out in eqn.outvars)
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sizes_built(inner)


@pytest.mark.parametrize(
    ("x_shape", "axis", "batch_dims"),
    [((2, 3, 31), (2,), 0), ((3, 31, 2), (1,), 0), ((5, 2, 7), (0, 2), 0), ((3, 2, 31), (2,), 1)],
)
def test_factored_product_never_builds_an_array_of_the_size_of_the_weight(x_shape, axis, batch_dims):
    _, a_shape, b_shape, w_shape = lettered(x_shape, axis, batch_dims)
    x, a, b = (jnp.ones(shape) for shape in (x_shape, a_shape, b_shape))

    def factored(x, a, b):
        return factored_product(x, a, b, axis, batch_dims, scale=0.3)

    def merged(x, a, b):
        roles = canonical(batch_dims, len(axis), 2)
        return contract(x, dense_delta(a, b, roles), axis, batch_dims)

    def largest(f):
        return max(sizes_built(jax.make_jaxpr(f)(x, a, b).jaxpr))

    dense = math.prod(w_shape)
    assert largest(merged) == dense
    assert largest(factored) < dense
    for argnums in (0, (0, 1, 2)):
        assert largest(jax.grad(lambda *args: jnp.sum(factored(*args) ** 2), argnums)) < dense


EQUATIONS = [  # equation, x, weight, roles
    ("bd,dk->bk", (3, 5), (5, 7), "io"),
    ("td,kd->tk", (3, 5), (7, 5), "oi"),
    ("i,io->o", (5,), (5, 7), "io"),
    ("b t d, d k -> b t k", (2, 3, 5), (5, 7), "io"),
    ("btd,dhk->bthk", (2, 3, 5), (5, 7, 11), "ioo"),
    ("BTD,NDH->BTNH", (2, 3, 5), (7, 5, 11), "oio"),
    ("BTNH,NHD->BTD", (2, 3, 5, 7), (5, 7, 11), "iio"),
    ("abd,dc->abc", (2, 3, 5), (5, 7), "io"),
    ("...d,dk->...k", (2, 3, 5), (5, 7), "io"),
    ("...d,dk->...k", (5,), (5, 7), "io"),
    ("...hk,dhk->...d", (2, 3, 5, 7), (11, 5, 7), "oii"),
    ("...ad,dk->a...k", (2, 3, 5, 7), (7, 11), "io"),
    ("ebd,edf->ebf", (2, 3, 5), (2, 5, 7), "bio"),
    ("bed,dfe->bef", (3, 2, 5), (5, 7, 2), "iob"),
    ("gebd,edgf->gebf", (2, 3, 5, 7), (3, 7, 2, 11), "bibo"),
    ("bi,io->b", (3, 5), (5, 7), "io"),
    ("bi,oip->bp", (3, 5), (7, 5, 11), "oio"),
    ("bti,io->bo", (2, 3, 5), (5, 7), "io"),
    ("bti,oip->p", (2, 3, 5), (7, 5, 11), "oio"),
    ("bd,dk->kb", (3, 5), (5, 7), "io"),
    ("btd,dhk->hbkt", (2, 3, 5), (5, 7, 11), "ioo"),
    ("...td,...dk->...tk", (2, 3, 5), (2, 5, 7), "bio"),
    ("...td,...dk->...tk", (2, 3, 5, 7), (3, 7, 11), "bio"),
    ("...td,...dk->...tk", (2, 3, 5), (1, 5, 7), "bio"),
    ("td,...dk->...tk", (3, 5), (2, 5, 7), "oio"),
    ("dt,...d->...t", (5, 3), (2, 7, 5), "ooi"),
]


@pytest.mark.parametrize(("equation", "x_shape", "w_shape", "roles"), EQUATIONS)
def test_a_factored_einsum_is_the_einsum_of_the_dense_delta(rng, equation, x_shape, w_shape, roles):
    einsum = factored_einsum(equation, len(x_shape), len(w_shape))
    assert einsum.factorization == Factorization(roles)
    x = random_array(rng, x_shape)
    adapter = random_adapter(rng, *einsum.factorization.adapter_shapes(w_shape, 2))
    found = jax.jit(einsum.product)(x, adapter["A"], adapter["B"], scale=0.5)
    assert_close(found, 0.5 * np.einsum(equation, as64(x), reference_dense(adapter["A"], adapter["B"], roles)))


CANNOT = "einsum {!r} cannot be factored: "
SIDES = "needs an axis that is contracted with the input and an axis that only the weight has"
NO_SIDE = CANNOT + "the weight {!r} " + SIDES
OPERANDS = "einsum {!r}: wanted two operands and '->', as in 'btd,dhk->bthk'"
REFUSED = [  # equation, axes of x, axes of the weight, message
    ("i,o->io", 1, 1, NO_SIDE.format("i,o->io", "o")),
    ("bd,d->b", 2, 1, NO_SIDE.format("bd,d->b", "d")),
    ("bd,bd->bd", 2, 2, NO_SIDE.format("bd,bd->bd", "bd")),
    ("bdd,dk->bk", 3, 2, CANNOT.format("bdd,dk->bk") + "'bdd' repeats a letter"),
    ("bd,ddk->bk", 2, 3, CANNOT.format("bd,ddk->bk") + "'ddk' repeats a letter"),
    ("bd,dk->bkk", 2, 2, CANNOT.format("bd,dk->bkk") + "'bkk' repeats a letter"),
    ("bd->b", 2, 2, OPERANDS.format("bd->b")),
    ("bd,dk,kl->bl", 2, 2, OPERANDS.format("bd,dk,kl->bl")),
    ("bd,dk", 2, 2, OPERANDS.format("bd,dk")),
    ("", 2, 2, OPERANDS.format("")),
    ("bd,dk->bk", 3, 2, "einsum 'bd,dk->bk': the input 'bd' does not have 3 axes"),
    ("bd,dk->bk", 2, 3, "einsum 'bd,dk->bk': the weight 'dk' does not have 3 axes"),
    ("...btd,dk->btk", 2, 2, "einsum '...btd,dk->btk': the input '...btd' does not have 2 axes"),
    ("bd,dk->bkz", 2, 2, "einsum 'bd,dk->bkz': the output has ['z'], which no operand has"),
]


@pytest.mark.parametrize(("equation", "x_ndim", "weight_ndim", "message"), REFUSED)
def test_einsums_that_cannot_be_factored_are_refused(equation, x_ndim, weight_ndim, message):
    with pytest.raises(AdapterError, match=exactly(message)):
        factored_einsum(equation, x_ndim, weight_ndim)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_meets_others_in_float32(dtype):
    assert common_dtype(dtype, jnp.float32) == jnp.float32
    assert common_dtype(dtype, jnp.bfloat16) == jnp.float32
    assert common_dtype(dtype, dtype) == jnp.dtype(dtype)
