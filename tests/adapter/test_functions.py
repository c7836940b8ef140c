"""The functions on one adapter and on a pytree of adapters, against NumPy in float64."""

import collections
import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import (
    AdapterError,
    ConfigError,
    Factorization,
    init_lora_adapter,
    is_adapter,
    lora_delta,
    lora_linear,
    lora_singular_values,
    merge_lora_weight,
    tree_lora_delta,
    unmerge_lora_weight,
)
from tests.reference import as64, assert_close, random_adapter, random_array, reference_delta

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Case:
    """A weight with its axes in the order batch, in, out."""

    roles: str
    shape: tuple[int, ...]
    rank: int

    def sizes(self, role):
        return tuple(size for size, found in zip(self.shape, self.roles, strict=True) if found == role)

    @property
    def batch(self):
        return self.roles.count("b")

    @property
    def adapter_shapes(self):
        return (*self.sizes("b"), *self.sizes("i"), self.rank), (*self.sizes("b"), self.rank, *self.sizes("o"))

    def adapter(self, rng, dtype="float32"):
        return random_adapter(rng, *self.adapter_shapes, dtype)


CASES = [
    Case("io", (5, 7), 2),
    Case("io", (7, 5), 1),
    Case("bbio", (3, 11, 5, 7), 2),
    Case("ioo", (5, 7, 11), 2),
    Case("iio", (5, 7, 11), 2),
    Case("biioo", (3, 5, 7, 11, 13), 2),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.roles}-r{case.rank}")


def reference_linear(case, x, weight, adapter, alpha):
    ins, ndim, lead = len(case.sizes("i")), len(case.shape), np.ndim(x) - case.batch - len(case.sizes("i"))
    batch, rest = list(range(case.batch)), list(range(ndim, ndim + lead))
    outs = list(range(case.batch + ins, ndim))
    dense = as64(weight) + reference_delta(adapter, alpha, case.batch)
    x_axes = batch + rest + list(range(case.batch, case.batch + ins))
    return np.einsum(as64(x), x_axes, dense, list(range(ndim)), batch + rest + outs)


# ---------------------------------------------------------------- init


ORDERS = [
    *((case.roles, case.shape, case.rank, case.adapter_shapes) for case in CASES),
    (None, (5, 7), 2, ((5, 2), (2, 7))),
    ("oi", (5, 7), 2, ((7, 2), (2, 5))),
    ("oio", (5, 7, 11), 2, ((7, 2), (2, 5, 11))),
    (Factorization("obi"), (5, 7, 11), 2, ((7, 11, 2), (7, 2, 5))),
]


@pytest.mark.parametrize(("factorization", "shape", "rank", "wanted"), ORDERS)
def test_init_has_the_shapes_of_the_factorization(factorization, shape, rank, wanted, key):
    weight = jax.ShapeDtypeStruct(shape, jnp.float32)
    found = jax.eval_shape(lambda key: init_lora_adapter(key, weight, rank, factorization=factorization), key)
    assert (found["A"].shape, found["B"].shape) == wanted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("std", [0.01, 0.3])
def test_init_is_gaussian_with_std_one_hundredth_unless_asked_otherwise(std, dtype, key):
    options = {} if std == 0.01 else {"init_std": std, "init": "gaussian"}
    a = as64(init_lora_adapter(key, jnp.ones((499, 101), dtype), 97, **options)["A"])
    assert abs(a.mean()) < 4 * std / math.sqrt(a.size)
    assert a.std() == pytest.approx(std, rel=0.02)
    assert np.mean(np.abs(a) < std) == pytest.approx(0.6827, abs=0.01)


@pytest.mark.parametrize("roles", ["io", "biio"])
def test_kaiming_uniform_init_fills_its_bound_of_one_over_the_root_of_in(roles, key):
    shape = (3, 7, 13, 17)[-len(roles) :]
    a = as64(init_lora_adapter(key, jnp.ones(shape), 13, factorization=roles, init="kaiming_uniform")["A"])
    bound = 1 / math.sqrt(math.prod(size for size, role in zip(shape, roles, strict=True) if role == "i"))
    assert 0.95 * bound < np.abs(a).max() <= bound * (1 + 1e-6)
    assert a.min() < -0.95 * bound
    assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize("rank", [11, 97])
def test_normal_init_has_a_std_of_one_over_rank(rank, key):
    a = as64(init_lora_adapter(key, jnp.ones((499, 101)), rank, init="normal")["A"])
    assert a.std() == pytest.approx(1 / rank, rel=0.03)
    assert np.mean(np.abs(a) < 1 / rank) == pytest.approx(0.6827, abs=0.02)


@pytest.mark.parametrize("init", ["gaussian", "kaiming_uniform", "normal"])
def test_init_depends_on_the_key_alone(init, key):
    first, again, other = (
        init_lora_adapter(k, weight, 2, init=init)["A"]
        for k, weight in ((key, jnp.ones((5, 7))), (key, jnp.zeros((5, 7))), (jax.random.key(8), jnp.ones((5, 7))))
    )
    np.testing.assert_array_equal(first, again)
    assert np.all(first != other)


@pytest.mark.parametrize("init", ["gaussian", "kaiming_uniform", "normal"])
@pytest.mark.parametrize(
    ("weight", "given"), [*((dtype, None) for dtype in DTYPES), ("bfloat16", "float32"), ("int8", "bfloat16")]
)
def test_init_is_random_a_and_zero_b_in_the_dtype_of_the_weight_unless_given(weight, given, init, key):
    with jax.numpy_dtype_promotion("strict"):
        adapter = init_lora_adapter(key, jnp.ones((5, 7), weight), 2, dtype=given, init=init)
    assert is_adapter(adapter)
    assert np.all(as64(adapter["A"]) != 0)
    assert not np.any(as64(adapter["B"]))
    assert {part.dtype.name for part in adapter.values()} == {given or weight}


# ---------------------------------------------------------------- values


@every_case
def test_delta_is_the_scaled_product_with_alpha_one_unless_given(case, rng):
    adapter = case.adapter(rng)
    assert_close(lora_delta(adapter), reference_delta(adapter, 1.0, case.batch))
    assert_close(lora_delta(adapter, -3.0), reference_delta(adapter, -3.0, case.batch))


@every_case
@pytest.mark.parametrize("leading", [(), (17, 2), (0,)])
def test_linear_is_x_times_the_merged_weight_for_any_leading_axes(case, leading, rng):
    adapter, weight = case.adapter(rng), random_array(rng, case.shape)
    x = random_array(rng, (*case.sizes("b"), *leading, *case.sizes("i")))
    assert_close(lora_linear(x, weight, adapter, 3.0), reference_linear(case, x, weight, adapter, 3.0))


@every_case
def test_merge_adds_the_delta_and_unmerge_subtracts_it(case, rng):
    adapter, weight = case.adapter(rng), random_array(rng, case.shape)
    delta = reference_delta(adapter, 3.0, case.batch)
    for named in (None, case.roles):
        assert_close(merge_lora_weight(weight, adapter, 3.0, factorization=named), as64(weight) + delta)
        assert_close(unmerge_lora_weight(weight, adapter, 3.0, factorization=named), as64(weight) - delta)


@every_case
def test_singular_values_are_those_of_the_dense_delta(case, rng):
    adapter = case.adapter(rng)
    dense = reference_delta(adapter, -3.0, case.batch).reshape(*case.sizes("b"), math.prod(case.sizes("i")), -1)
    assert_close(lora_singular_values(adapter, -3.0), np.linalg.svd(dense, compute_uv=False)[..., : case.rank])


@pytest.mark.parametrize("function", [lora_delta, lora_singular_values])
@pytest.mark.parametrize("batch", [0, 1])
def test_batch_dims_says_how_to_read_shapes_that_fit_in_two_ways(function, batch, rng):
    adapter = random_adapter(rng, (2, 2, 2), (2, 2, 3))
    found = function(adapter, 3.0, batch_dims=batch)
    delta = reference_delta(adapter, 3.0, batch)
    matrix = delta.reshape((2, 2, 3) if batch else (4, 6))
    assert_close(found, delta if function is lora_delta else np.linalg.svd(matrix, compute_uv=False)[..., :2])


@pytest.mark.parametrize(("roles", "wanted"), [("oi", "io->oi"), ("oio", "iop->oip"), ("ooi", "iop->opi")])
@pytest.mark.parametrize(("function", "sign"), [(merge_lora_weight, 1), (unmerge_lora_weight, -1)])
def test_merge_follows_another_order_of_axes(function, sign, roles, wanted, rng):
    split = Factorization(roles)
    weight = random_array(rng, (7, 5, 11)[: len(roles)])
    adapter = random_adapter(rng, *split.adapter_shapes(weight.shape, 2))
    delta = np.einsum(wanted, reference_delta(adapter, 3.0))
    for factorization in (roles, split):
        assert_close(function(weight, adapter, 3.0, factorization=factorization), as64(weight) + sign * delta)


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("adapter_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("function", "sign"), [(merge_lora_weight, 1), (unmerge_lora_weight, -1)])
def test_merge_is_a_float32_sum_rounded_once(function, sign, dtype, adapter_dtype, jit, rng):
    # Values of eight bits at rank 2: each product is exact and the sum of two rounds once, in whichever order.
    adapter = jax.tree.map(lambda part: part.astype(adapter_dtype), random_adapter(rng, (53, 2), (2, 59), "bfloat16"))
    weight = random_array(rng, (53, 59), dtype)
    a, b = (np.asarray(adapter[name], np.float32) for name in "AB")
    delta = a[:, :1] * b[:1] + a[:, 1:] * b[1:]
    wanted = (np.asarray(weight, np.float32) + np.float32(sign * 2) * delta).astype(weight.dtype)
    with jax.numpy_dtype_promotion("strict"):
        found = (jax.jit(function) if jit else function)(weight, adapter, 4.0)
    assert found.dtype == weight.dtype
    np.testing.assert_array_equal(np.asarray(found), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unmerge_undoes_merge_to_the_precision_of_the_weight(dtype, rng):
    weight, adapter = random_array(rng, (5, 7), dtype), random_adapter(rng, (5, 2), (2, 7), dtype)
    merged = merge_lora_weight(weight, adapter, 3.0)
    assert np.any(as64(merged) != as64(weight))
    scale = np.abs(as64(merged)).max() / np.abs(as64(weight)).max()
    assert_close(unmerge_lora_weight(merged, adapter, 3.0), as64(weight), factor=scale)


@pytest.mark.parametrize(
    ("base", "adapted"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")]
)
def test_an_adapter_of_another_dtype_leaves_the_base_its_dtype(base, adapted, rng):
    weight, x = random_array(rng, (5, 7), base), random_array(rng, (11, 5), base)
    adapter = random_adapter(rng, (5, 2), (2, 7), adapted)
    dense = as64(weight) + reference_delta(adapter, 3.0)
    with jax.numpy_dtype_promotion("strict"):
        merged, y = merge_lora_weight(weight, adapter, 3.0), lora_linear(x, weight, adapter, 3.0)
        delta = lora_delta(adapter, 3.0)
    assert (merged.dtype, y.dtype, delta.dtype) == (base, base, adapted)
    assert_close(merged, dense)
    assert_close(y, as64(x) @ dense)


# ---------------------------------------------------------------- trees

Pair = collections.namedtuple("Pair", ["left", "right"])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    query: object
    norm: object


CONTAINERS = {
    "bare": lambda first, second: first,
    "dict": lambda first, second: {"up": first, "down": second, "norm": None},
    "list": lambda first, second: [first, None, second],
    "tuple": lambda first, second: (first, (second, None)),
    "namedtuple": lambda first, second: Pair(first, {"deep": second}),
    "dataclass": lambda first, second: Block(Block(first, None), second),
    "layers named A and B": lambda first, second: {"A": first, "B": second},
    "none": lambda first, second: {"norm": None},
    "empty": lambda first, second: {},
}


def two_adapters(rng):
    return random_adapter(rng, (5, 2), (2, 7)), random_adapter(rng, (3, 7, 2), (3, 2, 11))


@pytest.mark.parametrize("build", CONTAINERS.values(), ids=CONTAINERS)
def test_tree_delta_replaces_each_adapter_and_keeps_the_rest(build, rng):
    first, second = two_adapters(rng)
    found = tree_lora_delta(build(first, second), 3.0)
    wanted = build(reference_delta(first, 3.0), reference_delta(second, 3.0, batch=1))
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(assert_close, found, wanted)


def test_tree_delta_takes_whole_what_is_leaf_marks(rng):
    first, second = two_adapters(rng)
    lists = {name: np.asarray(part).tolist() for name, part in first.items()}
    found = tree_lora_delta({"up": lists, "down": second}, 3.0, is_leaf=lambda node: node is lists)
    assert_close(found["up"], reference_delta(first, 3.0))
    assert_close(found["down"], reference_delta(second, 3.0, batch=1))


# ---------------------------------------------------------------- errors


def _ones(*shape, dtype="float32"):
    return jnp.ones(shape, dtype)


def _adapter(a=(5, 2), b=(2, 7)):
    return {"A": _ones(*a), "B": _ones(*b)}


def _init(shape=(5, 7), rank=2, dtype="float32", **options):
    return init_lora_adapter(jax.random.key(0), _ones(*shape, dtype=dtype), rank, **options)


_TREE = {"up": [_adapter(), None]}
ERRORS = {
    "rank 0": (lambda: _init(rank=0), "rank = 0: wanted a whole number of at least 1"),
    "rank of a fraction": (lambda: _init(rank=1.5), "rank = 1.5: wanted a whole number of at least 1"),
    "rank too large": (lambda: _init(rank=6), "rank 6 is larger than the smaller side 5 of the weight (5, 7)"),
    "rank too large for the matrix of the batch": (
        lambda: _init((11, 5, 7), 6, factorization="bio"),
        "rank 6 is larger than the smaller side 5 of the weight (11, 5, 7)",
    ),
    "three axes": (lambda: _init((3, 5, 7)), "shape (3, 5, 7) has not two axes: pass factorization="),
    "wrong factorization": (lambda: _init((3, 5, 7), factorization="io"), "is for weights of 2 axes; found shape (3, "),
    "unknown role": (lambda: _init(factorization="ix"), "factorization 'ix': wanted one letter per axis"),
    "unknown init": (lambda: _init(init="kaiming"), "init = 'kaiming': wanted one of 'gaussian', 'kaiming_uniform'"),
    "negative std": (lambda: _init(init_std=-1.0), "init_std = -1.0: wanted a finite number of at least 0"),
    "integer weight at init": (lambda: _init(dtype="int8"), "dtype int8 of the adapter of a weight (5, 7)"),
    "an array": (lambda: lora_delta(_ones(5, 7)), "found ArrayImpl: wanted an adapter, {'A': (in, r), 'B': (r, out)}"),
    "other keys": (lambda: lora_delta({"A": 1, "down": 2}), "found a mapping of ['A', 'down']: wanted an adapter"),
    "two ranks": (lambda: lora_delta(_adapter(b=(3, 7))), "A (5, 2) and B (3, 7) do not fit: wanted A (*batch"),
    "two batches": (lambda: lora_delta(_adapter((3, 5, 2), (11, 2, 7))), "A (3, 5, 2) and B (11, 2, 7) do not fit"),
    "wrong batch_dims": (lambda: lora_delta(_adapter(), batch_dims=1), "with the same r and batch axes and 1 batch"),
    "ambiguous batch": (
        lambda: lora_delta(_adapter((2, 2, 2), (2, 2, 3))),
        "A (2, 2, 2) and B (2, 2, 3) can be read with 0 or 1 batch axes; pass batch_dims=",
    ),
    "merge of a misfit": (lambda: merge_lora_weight(_ones(7, 5), _adapter()), "do not fit the weight (7, 5)"),
    "merge with the wrong order": (
        lambda: merge_lora_weight(_ones(5, 7), _adapter(), factorization="oi"),
        "with factorization 'oi': wanted A (7, 2) and B (2, 5)",
    ),
    "merge of an order not given": (
        lambda: merge_lora_weight(_ones(7, 5, 11), _adapter(b=(2, 7, 11))),
        "has the axes 'oio': wanted the order batch, in, out; transpose the weight, or pass factorization='oio'",
    ),
    "merge in several ways": (
        lambda: merge_lora_weight(_ones(7, 5, 5), _adapter(b=(2, 7, 5))),
        "fit the weight (7, 5, 5) in several ways: oio, ooi; give the factorization",
    ),
    "merge into integers": (
        lambda: merge_lora_weight(_ones(5, 7, dtype="int8"), _adapter()),
        "a weight of dtype int8: wanted a floating dtype; cast or dequantize it first",
    ),
    "x of another width": (
        lambda: lora_linear(_ones(3, 7), _ones(5, 7), _adapter()),
        "x (3, 7) does not fit the weight (5, 7): wanted (..., 5)",
    ),
    "x of another batch": (
        lambda: lora_linear(_ones(11, 13, 5), _ones(3, 5, 7), _adapter((3, 5, 2), (3, 2, 7))),
        "x (11, 13, 5) does not fit the weight (3, 5, 7): wanted (3, ..., 5)",
    ),
    "alpha of an axis": (lambda: lora_delta(_adapter(), _ones(3)), "alpha of shape (3,): wanted a number or a scalar"),
    "alpha without a branch": (
        lambda: tree_lora_delta(_TREE, {"down": 1.0}),
        "alpha is no prefix of the adapters: found PyTreeDef({'down': *}), wanted a prefix of PyTreeDef({'up': [*",
    ),
    "alpha too short": (lambda: tree_lora_delta(_TREE, {"up": [1.0]}), "found PyTreeDef({'up': [*]}), wanted a prefix"),
    "alpha inside an adapter": (
        lambda: tree_lora_delta(_TREE, {"up": [{"A": 1.0, "B": 1.0}, None]}),
        "alpha is no prefix of the adapters: found PyTreeDef({'up': [{'A': *, 'B': *}, None]})",
    ),
    "alpha of an axis in a tree": (lambda: tree_lora_delta(_TREE, {"up": [_ones(3), None]}), "at up/0: alpha of shape"),
    "a leaf of a tree": (lambda: tree_lora_delta({"up": [_adapter(), _ones(2)]}), "at up/1: found ArrayImpl: wanted"),
    "half an adapter in a tree": (lambda: tree_lora_delta({"up": [{"A": _ones(5, 2)}]}), "at up/0/A: found ArrayImpl"),
    "a misfit in a tree": (lambda: tree_lora_delta(Block(None, _adapter(b=(3, 7)))), "at norm: A (5, 2) and B (3, 7)"),
    "an array as a tree": (lambda: tree_lora_delta(_ones(5)), "at the root: found ArrayImpl: wanted an adapter"),
}
_CONFIG_ERRORS = ("rank 0", "rank of a fraction", "unknown init", "negative std")


@pytest.mark.parametrize("name", ERRORS)
def test_a_call_that_cannot_be_right_says_what_was_found_and_wanted(name):
    call, message = ERRORS[name]
    with pytest.raises(ConfigError if name in _CONFIG_ERRORS else AdapterError, match=re.escape(message)):
        call()
