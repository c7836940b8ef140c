"""The adapters alone: the low-rank product of every layer that can be adapted, without the base."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import AdapterError, ConfigError
from jlora.linen import (
    AInit,
    LoRAConvAdapter,
    LoRADenseAdapter,
    LoRADenseGeneralAdapter,
    LoRAEinsumAdapter,
    LoRAEmbedAdapter,
)
from tests.reference import as64, assert_close, random_array, randomize, reference_delta

RANK = 2


@dataclasses.dataclass(frozen=True)
class General:
    """A DenseGeneral, and the einsum of x, A and B that it is."""

    x_shape: tuple[int, ...]
    features: Any
    axis: Any
    einsum: str
    batch_dims: Any = ()

    def adapter(self, **options):
        return LoRADenseGeneralAdapter(RANK, self.features, self.axis, self.batch_dims, **options)

    def base(self):
        return nn.DenseGeneral(self.features, self.axis, self.batch_dims, use_bias=False)

    @property
    def delta(self):
        """The einsum of A and B that is the kernel: batch, in, out."""
        _, a, b = self.einsum.split("->")[0].split(",")
        return f"{a},{b}->{a.replace('r', '')}{b[b.index('r') + 1 :]}"


@dataclasses.dataclass(frozen=True)
class Equation:
    """An einsum with a weight, and the one of x, A and B that it becomes."""

    x_shape: tuple[int, ...]
    shape: tuple[int, ...]
    equation: str
    einsum: str
    delta: str

    def adapter(self, **options):
        return LoRAEinsumAdapter(RANK, self.shape, self.equation, **options)

    def base(self):
        return nn.Einsum(self.shape, self.equation, use_bias=False)


GENERAL = {
    "last axis": General((13, 11, 5), 7, -1, "abi,ir,ro->abo"),
    "one vector": General((5,), 7, -1, "i,ir,ro->o"),
    "no rows": General((0, 5), 7, -1, "ai,ir,ro->ao"),
    "heads": General((13, 11, 5), (3, 7), -1, "abi,ir,rop->abop"),
    "lists": General((13, 5), [3, 7], [-1], "ai,ir,rop->aop"),
    "numpy sizes": General((13, 5), np.int64(7), np.int64(-1), "ai,ir,ro->ao"),
    "heads to features": General((13, 3, 7), 11, (-2, -1), "aij,ijr,ro->ao"),
    "first axis": General((5, 13, 11), 7, 0, "iab,ir,ro->abo"),
    "middle axis": General((13, 5, 11), 7, -2, "aib,ir,ro->abo"),
    "gap": General((13, 5, 11, 3), (2, 7), (1, -1), "aibj,ijr,rop->abop"),
    "gap from the first": General((5, 13, 3), 7, (0, 2), "iaj,ijr,ro->ao"),
    "axes in another order": General((13, 5, 3), 7, (2, 1), "aij,ijr,ro->ao"),
    "negative axes in another order": General((13, 5, 11, 3), 7, (-1, 1), "aibj,ijr,ro->abo"),
    "every axis": General((5, 3), 11, (0, 1), "ij,ijr,ro->o"),
    "experts": General((3, 13, 5), 7, -1, "eai,eir,ero->eao", (0,)),
    "experts, axis in the middle": General((3, 5, 13), (7, 2), 1, "eia,eir,erop->eaop", (0,)),
    "experts, axes in another order": General((3, 5, 13, 7), 11, (3, 1), "eiaj,eijr,ero->eao", (0,)),
    "two batch axes and a gap": General((2, 3, 5, 13, 7), 11, (2, 4), "efiaj,efijr,efro->efao", (0, 1)),
    "batch axes in another order": General((2, 3, 13, 5), 7, -1, "efai,efir,efro->efao", (1, 0)),
    "one batch axis, a number": General((3, 13, 5), 7, -1, "eai,eir,ero->eao", 0),
}
EQUATIONS = {
    "matrix": Equation((13, 11, 5), (5, 7), "abc,cd->abd", "abc,cr,rd->abd", "cr,rd->cd"),
    "blanks": Equation((13, 5), (5, 7), " a b, b c -> a c ", "ab,br,rc->ac", "br,rc->bc"),
    "heads": Equation((13, 11, 5), (3, 5, 7), "BTD,NDH->BTNH", "BTD,Dr,rNH->BTNH", "Dr,rNH->NDH"),
    "heads to features": Equation((13, 11, 3, 7), (3, 7, 5), "BTNH,NHD->BTD", "BTNH,NHr,rD->BTD", "NHr,rD->NHD"),
    "out axes apart": Equation((13, 11, 5), (3, 5, 7), "BTF,NFH->BNTH", "BTF,Fr,rNH->BNTH", "Fr,rNH->NFH"),
    "out axes swapped": Equation((13, 5), (3, 5, 7), "BF,NFH->HBN", "BF,Fr,rNH->HBN", "Fr,rNH->NFH"),
    "in axes swapped": Equation((13, 3, 5), (5, 7, 3), "abc,cdb->ad", "abc,cbr,rd->ad", "cbr,rd->cdb"),
    "experts": Equation((3, 13, 5), (3, 5, 7), "EBD,EDF->EBF", "EBD,EDr,ErF->EBF", "EDr,ErF->EDF"),
    "experts in the middle": Equation((13, 3, 5), (5, 3, 7), "BED,DEF->BEF", "BED,EDr,ErF->BEF", "EDr,ErF->DEF"),
    "letters of the rank": Equation((13, 5), (5, 7), "ar,rb->ab", "ai,ir,ro->ao", "ir,ro->io"),
    "ellipsis": Equation((13, 11, 5), (5, 7), "...d,df->...f", "abd,dr,rf->abf", "dr,rf->df"),
    "ellipsis inside": Equation((2, 13, 11, 5), (5, 7), "B...D,DF->B...F", "bijD,Dr,rF->bijF", "Dr,rF->DF"),
    "ellipsis in both": Equation((3, 13, 5), (3, 5, 7), "...bi,...io->...bo", "ebi,eir,ero->ebo", "eir,ero->eio"),
    "longer ellipsis": Equation((13, 3, 5), (3, 5, 7), "...i,...io->...o", "aei,eir,ero->aeo", "eir,ero->eio"),
    "ellipsis of the weight": Equation((13, 5), (3, 5, 7), "bi,...io->...bo", "bi,ir,reo->ebo", "ir,reo->eio"),
    "summed in the weight": Equation((13, 5), (5, 3, 7), "ab,bcd->ad", "ab,br,rcd->ad", "br,rcd->bcd"),
    "summed in the input": Equation((13, 5, 3), (5, 7), "abc,bd->ad", "abc,br,rd->ad", "br,rd->bd"),
    "summed experts": Equation((3, 13, 5), (3, 5, 7), "eai,eio->ao", "eai,eir,ro->ao", "eir,ro->eio"),
    "a number": Equation((13, 5), (5, 7), "ab,bc->", "ab,br,rc->", "br,rc->bc"),
}
CASES = GENERAL | EQUATIONS
two_cases = pytest.mark.parametrize("case", [GENERAL["gap"], EQUATIONS["heads"]], ids=["general", "einsum"])
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def drawn(rng, layer, *args):
    """The variables of a layer with A and B random."""
    return randomize(rng, shapes_of(layer, *args))


def shapes_of(layer, *args):
    return jax.eval_shape(layer.init, jax.random.key(0), *args)


def equations(jaxpr):
    """Every equation of a jaxpr, those within its calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


# ---------------------------------------------------------------- the product


@every_case
def test_output_is_the_product_of_x_a_and_b(case, rng):
    x = random_array(rng, case.x_shape)
    variables = drawn(rng, case.adapter(), x)
    a, b = (as64(variables["params"][name]) for name in "AB")
    assert_close(case.adapter().apply(variables, x), np.einsum(case.einsum, as64(x), a, b))


@every_case
def test_output_is_that_of_flaxs_layer_with_the_dense_delta(case, rng):
    x = random_array(rng, case.x_shape)
    layer, base = case.adapter(alpha=3.0), case.base()
    variables = drawn(rng, layer, x)
    delta = 1.5 * np.einsum(case.delta, *(as64(variables["params"][name]) for name in "AB"))
    assert shapes_of(base, x)["params"]["kernel"].shape == delta.shape
    wanted = base.apply({"params": {"kernel": jnp.asarray(delta, jnp.float32)}}, x)
    assert_close(layer.apply(variables, x), as64(wanted), factor=2)


@every_case
def test_parameters_are_a_and_b_of_the_equations_shapes_and_nothing_else(case):
    x = jnp.ones(case.x_shape)
    letters, a, b = case.einsum.split("->")[0].split(",")
    kernel = shapes_of(case.base(), x)["params"]["kernel"]
    sizes = dict(zip(letters + case.delta.split("->")[1], x.shape + kernel.shape, strict=True)) | {"r": RANK}
    shapes = {"A": tuple(sizes[c] for c in a), "B": tuple(sizes[c] for c in b)}
    assert jax.tree.map(jnp.shape, shapes_of(case.adapter(), x)) == {"params": shapes}


@every_case
def test_no_dense_delta_is_built_forward_or_backward(case, rng):
    x = random_array(rng, case.x_shape)
    layer = case.adapter()
    variables = drawn(rng, layer, x)
    size = math.prod(shapes_of(case.base(), x)["params"]["kernel"].shape)
    backward = jax.grad(lambda *arguments: jnp.sum(jnp.sin(layer.apply(*arguments))), (0, 1))
    assert size not in (x.size, jax.eval_shape(layer.apply, variables, x).size)
    for function in (layer.apply, backward):
        computed = [out for eqn in equations(jax.make_jaxpr(function)(variables, x).jaxpr) for out in eqn.outvars]
        assert size not in {math.prod(out.aval.shape) for out in computed}


@pytest.mark.parametrize(("alpha", "scaling"), [(None, 1.0), (3.0, 1.5), (-1, -0.5), (0, 0.0)])
@two_cases
def test_scaling_is_alpha_over_rank_and_1_without_alpha(case, alpha, scaling, rng):
    x = random_array(rng, case.x_shape)
    variables = drawn(rng, case.adapter(), x)
    once = as64(case.adapter().apply(variables, x))
    assert_close(case.adapter(alpha=alpha).apply(variables, x), scaling * once)


def test_dense_is_dense_general_over_the_last_axis(rng):
    x = random_array(rng, (13, 11, 5))
    variables = drawn(rng, LoRADenseAdapter(RANK, 7), x)
    general = LoRADenseGeneralAdapter(RANK, 7).apply(variables, x)
    np.testing.assert_array_equal(LoRADenseAdapter(RANK, 7).apply(variables, x), general)


def test_the_equation_may_be_given_in_the_call(rng):
    x = random_array(rng, (13, 11, 5))
    case = EQUATIONS["heads"]
    layer, late = case.adapter(), LoRAEinsumAdapter(RANK, case.shape)
    variables = drawn(rng, layer, x)
    late_variables = late.init(jax.random.key(0), x, case.equation)
    assert jax.tree.map(jnp.shape, late_variables) == jax.tree.map(jnp.shape, variables)
    np.testing.assert_array_equal(late.apply(variables, x, case.equation), layer.apply(variables, x))


@pytest.mark.parametrize("groups", [1, 3])
def test_convolution_is_that_of_flax_with_the_dense_delta(groups, rng):
    x = random_array(rng, (2, 11, 13, 6))
    conv = nn.Conv(9, (3, 5), (2, 1), "VALID", feature_group_count=groups, use_bias=False)
    layer = LoRAConvAdapter(RANK, conv=conv, alpha=3.0)
    variables = drawn(rng, layer, x)
    adapter = variables["params"]
    shapes = {"A": (3, 5, 6 // groups, RANK), "B": (RANK, 9)}
    assert jax.tree.map(jnp.shape, variables) == {"params": shapes}
    kernel = jnp.asarray(reference_delta(adapter, 3.0), jnp.float32)
    assert_close(layer.apply(variables, x), as64(conv.apply({"params": {"kernel": kernel}}, x)), factor=2)


def test_embedding_is_the_rows_of_the_delta_and_attend_its_product(rng):
    layer = LoRAEmbedAdapter(RANK, 11, 5, alpha=3.0)
    indices, query = jnp.array([[3, 10, 0], [7, 3, 3]]), random_array(rng, (13, 5))
    variables = drawn(rng, layer, indices)
    assert jax.tree.map(jnp.shape, variables) == {"params": {"A": (11, RANK), "B": (RANK, 5)}}
    delta = reference_delta(variables["params"], 3.0)
    assert_close(layer.apply(variables, indices), delta[np.asarray(indices)])
    assert_close(layer.apply(variables, query, method="attend"), as64(query) @ delta.T)


# ---------------------------------------------------------------- dtypes and initializers


@pytest.mark.parametrize(
    ("x_dtype", "param_dtype", "dtype", "wanted"),
    [
        ("float32", "float32", None, "float32"),
        ("bfloat16", "float32", None, "float32"),
        ("float32", "float16", None, "float32"),
        ("bfloat16", "bfloat16", None, "bfloat16"),
        ("float32", "float32", "bfloat16", "bfloat16"),
        ("bfloat16", "bfloat16", "float32", "float32"),
        ("int32", "float32", None, "float32"),
    ],
)
@two_cases
def test_dtype_is_that_of_the_computation_and_param_dtype_of_a_and_b(case, x_dtype, param_dtype, dtype, wanted, rng):
    x = random_array(rng, case.x_shape, std=3.0).astype(x_dtype)
    layer = case.adapter(dtype=dtype, param_dtype=jnp.dtype(param_dtype), alpha=3.0)
    variables = drawn(rng, layer, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(param_dtype)}
    found = layer.apply(variables, x)
    assert found.dtype == wanted
    assert_close(found, 1.5 * np.einsum(case.einsum, as64(x), *(as64(variables["params"][name]) for name in "AB")))


@two_cases
def test_precision_reaches_every_product(case):
    x = jnp.ones(case.x_shape)
    layer = case.adapter(precision="highest")
    variables = layer.init(jax.random.key(0), x)
    found = [eqn for eqn in equations(jax.make_jaxpr(layer.apply)(variables, x).jaxpr) if "precision" in eqn.params]
    highest = jax.lax.Precision.HIGHEST
    assert [eqn.params["precision"] for eqn in found] == [(highest, highest)] * 2


@two_cases
def test_a_begins_small_and_b_at_zero(case, key):
    layer, x = case.adapter(param_dtype=jnp.bfloat16), jnp.ones(case.x_shape)
    output, variables = layer.init_with_output(key, x)
    a, b = (variables["params"][name] for name in "AB")
    assert a.dtype == b.dtype == jnp.bfloat16
    assert 0.003 < np.std(as64(a)) < 0.03
    assert not np.any(as64(b))
    assert not np.any(as64(output))


@two_cases
def test_initializers_make_a_and_b(case, key):
    layer = case.adapter(a_init=nn.initializers.constant(3.0), b_init=nn.initializers.constant(5.0))
    params = layer.init(key, jnp.ones(case.x_shape))["params"]
    assert (set(np.ravel(params["A"])), set(np.ravel(params["B"]))) == ({3.0}, {5.0})


@pytest.mark.parametrize("name", ["experts", "two batch axes and a gap"])
def test_batch_axes_do_not_count_to_the_fan_in_of_a(name, key):
    case = GENERAL[name]
    layer = case.adapter(a_init=AInit("kaiming_uniform"))
    a = as64(layer.init(key, jnp.ones(case.x_shape))["params"]["A"])
    batch = len(case.batch_dims)
    bound = 1 / math.sqrt(math.prod(a.shape[batch:-1]))
    assert 0.8 * bound < np.max(np.abs(a)) <= bound
    assert len(np.unique(a)) == a.size


# ---------------------------------------------------------------- dropout

RATE = 0.25
IDENTITIES = {
    "dense": (LoRADenseAdapter(5, 5, dropout=RATE), (4000, 5), "__call__"),
    "einsum": (LoRAEinsumAdapter(5, (5, 5), "ai,io->ao", dropout=RATE), (4000, 5), "__call__"),
    "conv": (LoRAConvAdapter(5, conv=nn.Conv(5, (1,)), dropout=RATE), (4000, 5), "__call__"),
    "attend": (LoRAEmbedAdapter(5, 5, 5, dropout=RATE), (4000, 5), "attend"),
}


def passed(name, x, *rngs):
    """What is left of x after the dropout of an adapter that is the identity."""
    layer, _, method = IDENTITIES[name]
    a = jnp.eye(5)[None] if name == "conv" else jnp.eye(5)
    variables = {"params": {"A": a, "B": jnp.eye(5)}}
    return layer.apply(variables, x, method=method, rngs=dict(zip(["dropout"], rngs, strict=False)))


@pytest.mark.parametrize("name", IDENTITIES)
def test_dropout_drops_or_rescales_the_input_and_keeps_its_mean(name, rng, key):
    x = 2 + random_array(rng, IDENTITIES[name][1])
    found = as64(passed(name, x, key))
    np.testing.assert_allclose(found[found != 0], as64(x)[found != 0] / (1 - RATE), rtol=1e-6)
    dropped = np.mean(found == 0)
    assert abs(dropped - RATE) < 5 * math.sqrt(RATE * (1 - RATE) / x.size)
    assert abs(np.mean(found) - np.mean(as64(x))) < 5 * np.std(found) / math.sqrt(x.size)


@pytest.mark.parametrize("name", IDENTITIES)
def test_dropout_follows_its_rng_and_is_off_without_one(name, rng, key):
    x = 2 + random_array(rng, (21, 5))
    np.testing.assert_array_equal(passed(name, x), x)
    np.testing.assert_array_equal(passed(name, x, key), passed(name, x, key))
    assert np.any(passed(name, x, key) != passed(name, x, jax.random.key(8)))


def test_indices_of_an_embedding_are_not_dropped(rng, key):
    layer, indices = LoRAEmbedAdapter(RANK, 11, 5, dropout=0.9), jnp.arange(11)
    variables = drawn(rng, layer, indices)
    found = layer.apply(variables, indices, rngs={"dropout": key})
    np.testing.assert_array_equal(found, layer.apply(variables, indices))


# ---------------------------------------------------------------- errors

X = (3, 13, 5)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (LoRADenseAdapter(6, 7), r"rank 6 is larger than the smaller side 5 of \(5, 7\)"),
        (LoRADenseAdapter(3, 2), r"rank 3 is larger than the smaller side 2 of \(5, 2\)"),
        (LoRAEinsumAdapter(6, (3, 5, 7), "eai,eio->eao"), r"rank 6 is larger than the smaller side 5 of \(3, 5, 7\)"),
        (LoRAConvAdapter(8, conv=nn.Conv(7, (2,))), r"rank 8 is larger than the smaller side 7 of \(2, 5, 7\)"),
        (LoRADenseGeneralAdapter(1, 7, 3), "axis 3: wanted different axes of an input of 3 axes"),
        (LoRADenseGeneralAdapter(1, 7, -4), "axis -4: wanted different axes of an input of 3 axes"),
        (LoRADenseGeneralAdapter(1, 7, (1, -2)), r"axis \(1, -2\): wanted different axes of an input of 3 axes"),
        (LoRADenseGeneralAdapter(1, 7, -1, (1,)), r"batch_dims \(1,\): wanted consecutive leading axes from 0"),
        (LoRADenseGeneralAdapter(1, 7, -1, (0, 2)), r"batch_dims \(0, 2\): wanted consecutive leading axes from 0"),
        (LoRADenseGeneralAdapter(1, 7, 0, (0,)), r"batch_dims \(0,\): wanted .*, apart from axis 0"),
        (LoRADenseGeneralAdapter(1, ()), "with at least one i and one o"),
        (LoRADenseGeneralAdapter(1, 7, ()), "with at least one i and one o"),
        (LoRAEinsumAdapter(1, (5, 7)), "einsum_str: wanted it once, in the constructor or in the call"),
        (LoRAEinsumAdapter(1, (5, 7), "abi,io"), "einsum 'abi,io': wanted two operands and '->'"),
        (LoRAEinsumAdapter(1, (5, 7), "abi,io,o->abo"), "einsum 'abi,io,o->abo': wanted two operands"),
        (LoRAEinsumAdapter(1, (5, 7), "ai,io->ao"), "the input 'ai' does not have 3 axes"),
        (LoRAEinsumAdapter(1, (5, 7), "abi,eio->abo"), "the weight 'eio' does not have 2 axes"),
        (LoRAEinsumAdapter(1, (5, 7), "abi,io->abx"), r"the output has \['x'\], which no operand has"),
        (LoRAEinsumAdapter(1, (5, 5), "abi,ii->ab"), "cannot be factored: 'ii' repeats a letter"),
        (LoRAEinsumAdapter(1, (13, 5), "abi,bi->abi"), "cannot be factored: the weight 'bi' needs an axis"),
        (LoRAEinsumAdapter(1, (5, 7), "abi,cd->abcd"), "cannot be factored: the weight 'cd' needs an axis"),
        (LoRAConvAdapter(1, conv=nn.Conv(7, (2,), mask=np.ones((2, 5, 7)))), "a convolution with a mask"),
    ],
)
def test_what_cannot_be_factored_is_refused(layer, message, key):
    with pytest.raises(AdapterError, match=message):
        layer.init(key, jnp.ones(X))


def test_an_equation_given_twice_is_refused(key):
    with pytest.raises(AdapterError, match="wanted it once, in the constructor or in the call"):
        LoRAEinsumAdapter(1, (5, 7), "abi,io->abo").init(key, jnp.ones(X), "abi,io->abo")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank = 0: wanted a whole number of at least 1"),
        ({"rank": 2.0}, "rank = 2.0: wanted a whole number"),
        ({"rank": 1, "dropout": 1.0}, "dropout = 1.0: wanted 0 <= dropout < 1"),
        ({"rank": 1, "dropout": -0.1}, "dropout = -0.1: wanted 0 <= dropout < 1"),
        ({"rank": 1, "a_init": AInit("zeros")}, "init = 'zeros': wanted one of 'gaussian'"),
    ],
)
def test_settings_that_are_not_allowed_are_refused(options, message, key):
    with pytest.raises(ConfigError, match=message):
        LoRADenseAdapter(features=7, **options).init(key, jnp.ones(X))
