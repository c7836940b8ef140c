"""Params with the names of gemma.peft and of qwix: against NumPy, and against the libraries where these are there."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze, meta

import jlora
from jlora import DataError
from jlora.interop._beside import nest
from jlora.interop.gemma import from_gemma
from jlora.interop.qwix import from_qwix
from jlora.paths import leaves_by_path
from tests.reference import as64, assert_close, random_array, randomize

# The weight's shape, a's and b's, the factorization, and the delta as an einsum of a and b in the weight's axes.
GEMMA = {
    "dense": ("kernel", (5, 7), (5, 2), (2, 7), "io", "ir,ro->io"),
    "square": ("kernel", (5, 5), (5, 2), (2, 5), "io", "ir,ro->io"),
    "query": ("kernel", (11, 3, 5), (11, 2), (2, 3, 5), "ioo", "ir,rhd->ihd"),
    "out": ("kernel", (3, 5, 11), (3, 5, 2), (2, 11), "iio", "hdr,ro->hdo"),
    "batched": ("kernel", (3, 5, 7), (3, 5, 2), (3, 2, 7), "bio", "bir,bro->bio"),
    "q_einsum": ("w", (3, 11, 5), (11, 2), (2, 3, 5), "oio", "ir,rhd->hid"),
    "kv_einsum": ("w", (2, 3, 11, 5), (11, 7), (7, 2, 3, 5), "ooio", "ir,rkhd->khid"),
    "batch_of_einsum": ("w", (3, 5, 11), (3, 5, 2), (2, 11), "iio", "hdr,ro->hdo"),
    "scanned": ("w", (13, 3, 11, 5), (13, 11, 2), (13, 2, 3, 5), "boio", "lir,lrhd->lhid"),
}
QWIX = {
    **{name: case for name, case in GEMMA.items() if name not in ("query", "out")},
    "flat_query": ("kernel", (11, 3, 5), (11, 2), (2, 15), "ioo", "ir,rhd->ihd"),
    "flat_out": ("kernel", (3, 5, 15), (15, 2), (2, 15), "iio", "hdr,ro->hdo"),
    "flat_batched": ("kernel", (3, 5, 7, 11), (3, 35, 2), (3, 2, 11), "biio", "bidr,bro->bido"),
    "conv": ("kernel", (3, 2, 7, 7), (3, 2, 7, 5), (5, 7), "iiio", "xyir,ro->xyio"),
    "param": ("table", (7, 7), (7, 2), (2, 7), "io", "ir,ro->io"),
}


def unflattened(part: Any, shape: tuple[int, ...], equation: str, where: int) -> np.ndarray:
    """a or b in float64, with the axes that the equation gives it."""
    operands, out = equation.split("->")
    sizes = dict(zip(out, shape, strict=True)) | {"r": part.shape[-1] if where == 0 else part.size}
    letters = operands.split(",")[where]
    sizes["r"] = part.size // int(np.prod([sizes[c] for c in letters if c != "r"]))
    return as64(part).reshape([sizes[c] for c in letters])


def made(rng: np.random.Generator, cases: dict[str, Any], put: Callable[..., None]) -> tuple[Any, Any]:
    """The params of all cases, and the weights after the merge in float64 by path with scale 1."""
    params: dict[str, Any] = {"final": {"scale": random_array(rng, (5,))}}
    deltas = {}
    for module, (weight, shape, a_shape, b_shape, _, equation) in cases.items():
        w, a, b = (random_array(rng, size) for size in (shape, a_shape, b_shape))
        params[module] = {weight: w, "bias": random_array(rng, (3,))}
        put(params[module], weight, a, b)
        parts = [unflattened(part, shape, equation, at) for at, part in enumerate((a, b))]
        deltas[f"{module}/{weight}"] = (as64(w), np.einsum(equation, *parts), a_shape[-1])
    return params, deltas


def put_gemma(module: dict[str, Any], weight: str, a: Any, b: Any) -> None:
    if weight == "kernel":
        module["lora"] = {"a": a, "b": b}
    else:
        module["_LoRAEinsum_0"] = {"lora": {"a": a, "b": b}}


def put_qwix(module: dict[str, Any], weight: str, a: Any, b: Any) -> None:
    module |= {f"{weight}_lora_a": a, f"{weight}_lora_b": b}


def check(found: Any, deltas: Any, scale: Callable[[int], float], cases: dict[str, Any]) -> None:
    base, adapters, config = found
    merged = leaves_by_path(jlora.merge_params(base, adapters, config))
    for path, (weight, delta, rank) in deltas.items():
        assert_close(merged[path], weight + scale(rank) * delta)
    assert jlora.count_params(base) == sum(leaf.size for leaf in merged.values())
    shown = {target.path: target.factorization.roles for target in jlora.summary(base, adapters, config).targets}
    assert shown == {f"{module}/{case[0]}": case[4] for module, case in cases.items()}
    assert config.rank_of("dense/kernel") == 2
    assert set(jlora.tree.find_targets(base, config)) == set(deltas)


def test_gemma(rng):
    params, deltas = made(rng, GEMMA, put_gemma)
    check(from_gemma(params), deltas, lambda rank: 1.0, GEMMA)


def test_qwix(rng):
    params, deltas = made(rng, QWIX, put_qwix)
    check(from_qwix(params, alpha=7), deltas, lambda rank: 7 / rank, QWIX)


@pytest.mark.parametrize("separator", ["/", "."])
def test_flat_names(rng, separator):
    params, deltas = made(rng, GEMMA, put_gemma)
    flat = {path.replace("/", separator): leaf for path, leaf in leaves_by_path(params).items()}
    check(from_gemma(flat), deltas, lambda rank: 1.0, GEMMA)


def test_frozen_dicts_variables_and_boxes(rng):
    params, deltas = made(rng, QWIX, put_qwix)
    boxed = jax.tree.map(lambda leaf: meta.Partitioned(leaf, (None,) * leaf.ndim), params)
    base, adapters, config = from_qwix({"params": freeze(boxed)}, alpha=7)
    merged = leaves_by_path(jlora.merge_params(base, adapters, config))
    for path, (weight, delta, rank) in deltas.items():
        assert_close(merged[f"params/{path}"], weight + 7 / rank * delta)


def test_nnx_state(rng):
    params, deltas = made(rng, QWIX, put_qwix)
    state = nnx.State(jax.tree.map(nnx.Param, params))
    check(from_qwix(state, alpha=7), deltas, lambda rank: 7 / rank, QWIX)


def test_two_einsums_of_one_module(rng):
    """What gm.nn.LoRA makes of the feed-forward layer of a Gemma model."""
    shapes = {"gating_einsum": ((2, 13, 7), (7, 3), (3, 2, 13)), "linear": ((13, 7), (13, 3), (3, 7))}
    module: dict[str, Any] = {}
    for name, (shape, a, b) in shapes.items():
        module[name] = random_array(rng, shape)
        module[f"_LoRAEinsum_{name}"] = {"lora": {"a": random_array(rng, a), "b": random_array(rng, b)}}
    base, adapters, config = from_gemma({"mlp": module})
    assert base["mlp"].keys() == adapters["mlp"].keys() == shapes.keys()
    merged = jlora.merge_params(base, adapters, config)["mlp"]
    for name, equation in (("gating_einsum", "ir,rgo->goi"), ("linear", "ir,ro->io")):
        lora = module[f"_LoRAEinsum_{name}"]["lora"]
        assert_close(merged[name], as64(module[name]) + np.einsum(equation, as64(lora["a"]), as64(lora["b"])))


def test_dtypes_are_kept_and_arrays_are_not_copied(rng):
    a, b = (np.asarray(rng.standard_normal(shape), ml_dtypes.bfloat16) for shape in ((5, 2), (2, 7)))
    kernel = np.zeros((5, 7), np.float32)
    base, adapters, _ = from_qwix({"kernel": kernel, "kernel_lora_a": a, "kernel_lora_b": b}, alpha=1)
    assert base["kernel"] is kernel
    assert adapters["kernel"]["A"] is a
    assert adapters["kernel"]["B"] is b


def test_shapes_instead_of_arrays(rng):
    params, _ = made(rng, QWIX, put_qwix)
    shapes = jax.eval_shape(lambda: params)
    _, adapters, config = from_qwix(shapes, alpha=7)
    _, wanted, same = from_qwix(jax.tree.map(jnp.asarray, params), alpha=7)
    assert jax.tree.map(jnp.shape, adapters) == jax.tree.map(jnp.shape, wanted)
    assert config == same


def test_alpha_by_pattern(rng):
    params, deltas = made(rng, QWIX, put_qwix)
    base, adapters, config = from_qwix(params, alpha={"flat_*": 3, "**": 7})
    merged = leaves_by_path(jlora.merge_params(base, adapters, config))
    for path, (weight, delta, rank) in deltas.items():
        assert_close(merged[path], weight + (3 if path.startswith("flat") else 7) / rank * delta)


def lora(a: tuple[int, ...], b: tuple[int, ...]) -> dict[str, Any]:
    return {"a": np.ones(a), "b": np.ones(b)}


AMBIGUOUS = {"q": {"w": np.zeros((5, 5, 3)), "lora": {"a": np.ones((5, 2)), "b": np.ones((2, 5, 3))}}}


def test_a_weight_that_can_be_read_in_two_ways():
    wanted = r"q/w: lora a \(5, 2\) and b \(2, 5, 3\) do not fit the weight \(5, 5, 3\) in one way, but in several: "
    with pytest.raises(DataError, match=wanted + r"ioo, oio; pass factorizations={'q/w': '...'}"):
        from_gemma(AMBIGUOUS)
    for roles in ("ioo", "oio"):
        assert dict(from_gemma(AMBIGUOUS, factorizations={"**/w": roles})[2].factorizations) == {"q/w": roles}


def test_the_kernel_of_an_einsum_may_have_any_order():
    module = {"kernel": AMBIGUOUS["q"]["w"], "lora": AMBIGUOUS["q"]["lora"]}
    assert dict(from_gemma({"q": module})[2].factorizations) == {"q/kernel": "ioo"}
    with pytest.raises(DataError, match=r"Einsum_0/kernel: .* in several: ioo, oio"):
        from_gemma({"Einsum_0": module})


@pytest.mark.parametrize(
    "params",
    [
        {"Einsum_0": {"kernel": np.ones((5, 5)), "lora": lora((5, 2), (2, 5))}},
        {"x": {"w": np.ones((5, 5)), "_LoRAEinsum_0": {"lora": lora((5, 2), (2, 5))}}},
    ],
)
def test_so_may_a_square_one(params):
    with pytest.raises(DataError, match=r"(Einsum_0/kernel|x/w): .* in several: io, oi"):
        from_gemma(params)


def test_a_transposed_weight_is_read_as_one(rng):
    params = {"w": random_array(rng, (5, 7)), "lora": {"a": random_array(rng, (7, 2)), "b": random_array(rng, (2, 5))}}
    merged = jlora.merge_params(*from_gemma(params))["w"]
    assert_close(merged, as64(params["w"]) + (as64(params["lora"]["a"]) @ as64(params["lora"]["b"])).T)


def test_axes_of_size_one_are_no_two_ways():
    params = {"w": np.zeros((5, 1, 7)), "w_lora_a": np.ones((5, 2)), "w_lora_b": np.ones((2, 7))}
    assert from_qwix(params, alpha=1)[1]["w"]["A"].shape[0] == 5


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        (
            {"x": {"lora": lora((5, 2), (2, 7))}},
            "x/lora/a: no weight beside it; pass the params of the base and of LoRA",
        ),
        ({"x": {"kernel": np.ones((5, 7)), "lora": {"a": np.ones((5, 2))}}}, "x/lora/a: stands without its b"),
        (
            {"x": {"kernel": np.ones((5, 7)), "lora": lora((7, 2), (2, 11))}},
            r"x/kernel: lora a \(7, 2\) and b \(2, 11\) do",
        ),
        ({"x": {"kernel": np.ones((5, 7)), "lora": lora((5, 2), (3, 7))}}, r"x/kernel: lora a .* \(5, 7\)$"),
        (
            {"x": {"u": np.ones((5, 7)), "v": np.ones((5, 7)), "lora": lora((5, 2), (2, 7))}},
            "x/lora/a: several weights beside it: x/u, x/v",
        ),
        ({"x": {"kernel": np.ones((5, 7))}}, "no params of gemma.peft LoRA among 1 leaves"),
        (
            {
                "x": {
                    "w": np.ones((5, 7)),
                    "lora": lora((5, 2), (2, 7)),
                    "_LoRAEinsum_0": {"lora": lora((5, 2), (2, 7))},
                }
            },
            "x/_LoRAEinsum_0/lora/a: a second LoRA of x/w",
        ),
        ({"x": [1]}, "no params of gemma.peft LoRA among 1 leaves"),
        ([1], "params: found list, wanted nested or flat mappings"),
        ({"x/lora": np.ones(2), "x/lora/a": np.ones(2)}, "x/lora: a leaf and a module at once"),
    ],
)
def test_what_cannot_be_mapped_from_gemma(params, wanted):
    with pytest.raises(DataError, match=wanted):
        from_gemma(params)


def test_all_problems_are_named_at_once():
    params = {f"x{i}": {"lora": lora((5, 2), (2, 7))} for i in range(15)}
    with pytest.raises(DataError, match=r"(?s)gemma.peft: 15 problems:\n  x0/lora/a: .*x11/lora/a.*\n  and 3 more$"):
        from_gemma(params)


def test_what_cannot_be_mapped_from_qwix():
    class WithAux:
        shape, ndim = (5, 7), 2

    parts = {"kernel_lora_a": np.ones((5, 2)), "kernel_lora_b": np.ones((2, 7))}
    with pytest.raises(DataError, match="kernel: found WithAux, wanted an array; dequantize the weight first"):
        from_qwix({"kernel": WithAux(), **parts}, alpha=1)
    whole = {"kernel": np.ones((5, 7)), **parts}
    with pytest.raises(DataError, match=r"kernel: no pattern of alpha matches it \(other\)"):
        from_qwix(whole, alpha={"other": 1})
    with pytest.raises(DataError, match="factorization 'oi': io would"):
        from_qwix(whole, alpha=1, factorizations={"kernel": "oi"})
    with pytest.raises(
        DataError, match="factorizations: 'kernels' matches nothing that is adapted; nearest paths: kernel"
    ):
        from_qwix(whole, alpha=1, factorizations={"kernels": "io"})
    with pytest.raises(DataError, match="kernel_lora_b: stands without its a"):
        from_qwix({"kernel": np.ones((5, 7)), "kernel_lora_b": np.ones((2, 7))}, alpha=1)


def test_nest():
    assert nest({"a/b.c": 1, "a/d": 2}) == {"a": {"b.c": 1, "d": 2}}
    with pytest.raises(DataError, match="a: a leaf and a module at once"):
        nest({"a.b": 1, "a": 2})


class Model(nn.Module):
    """Dense, DenseGeneral both ways and a convolution, and layers that one library alone adapts."""

    more: tuple[Callable[[jax.Array], jax.Array], ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(11)(x)
        x = nn.DenseGeneral((3, 5))(nn.gelu(x))
        x = nn.DenseGeneral(7, axis=(-2, -1))(nn.gelu(x))
        x = nn.DenseGeneral(13, axis=-1, batch_dims=(0,))(x)
        for layer in self.more:
            x = layer(x)
        return nn.Dense(2)(x)


def compared(
    rng: np.random.Generator, model: nn.Module, adapted: nn.Module, read: Callable[[Any], Any], inputs: jax.Array
) -> Any:
    """The library's output with random params is that of the plain model with the merged ones."""
    params = randomize(rng, adapted.init(jax.random.key(0), inputs)["params"], 0.3)
    base, adapters, config = read(params)
    wanted = adapted.apply({"params": params}, inputs)
    plain = model.apply({"params": base}, inputs)
    found = model.apply({"params": jlora.merge_params(base, adapters, config)}, inputs)
    assert float(jnp.max(jnp.abs(wanted - plain))) > 0.1
    scale = float(jnp.max(jnp.abs(wanted)))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * max(scale, 1.0))
    return base


@pytest.mark.filterwarnings("ignore")
def test_the_output_of_gemma(rng):
    peft = pytest.importorskip("gemma.peft", exc_type=ImportError)
    wrapped = {nn.Dense: peft.LoRADense, nn.DenseGeneral: peft.LoRADenseGeneral, nn.Einsum: peft.LoRAEinsum}

    class Adapted(nn.Module):
        model: nn.Module

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.scope is not None:
                nn.share_scope(self, self.model)

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            def replace(module: Any) -> Any:
                make = wrapped.get(type(module))
                return module if make is None else make(rank=2, wrapped=module, dtype=jnp.float32)

            with peft.ModuleInterceptor(replace):
                return self.model(x)

    model = Model(more=(nn.Einsum((3, 13, 5), "btd,hdk->bthk"), nn.Einsum((3, 5, 17), "bthk,hkd->bthd"), jnp.sin))
    inputs = random_array(rng, (2, 4, 7))
    base = compared(rng, model, Adapted(model), from_gemma, inputs)
    assert len(jax.tree.leaves(base)) == 14


@pytest.mark.filterwarnings("ignore")
def test_the_output_of_the_lora_of_a_gemma_model(rng):
    pytest.importorskip("gemma.peft", exc_type=ImportError)
    lora_module = pytest.importorskip("gemma.gm.nn._lora", exc_type=ImportError)
    layers = pytest.importorskip("gemma.gm.nn._layers", exc_type=ImportError)
    modules = pytest.importorskip("gemma.gm.nn._modules", exc_type=ImportError)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = layers.Einsum(shape=(3, 7, 5), name="q_einsum")("BTD,NDH->BTNH", x)
            x = layers.Einsum(shape=(3, 5, 7), name="attn_vec_einsum")("BTNH,NHD->BTD", x)
            return modules.FeedForward(features=7, hidden_dim=11, transpose_gating_einsum=True, name="mlp")(x)

    adapted = lora_module.LoRA(rank=2, model=Block(), dtype=jnp.float32)
    base = compared(rng, Block(), adapted, from_gemma, random_array(rng, (2, 4, 7)))
    assert len(jax.tree.leaves(base)) == 4


@pytest.mark.filterwarnings("ignore")
def test_the_output_of_qwix_on_linen(rng):
    qwix = pytest.importorskip("qwix")
    model = Model(more=(nn.Conv(17, (3,)), jnp.sin, nn.Conv(17, (3,))))
    adapted = qwix.apply_lora_to_model(model, qwix.LoraProvider(module_path=".*", rank=3, alpha=5.0))
    base = compared(rng, model, adapted, lambda params: from_qwix(params, alpha=5.0), random_array(rng, (2, 4, 7)))
    assert len(jax.tree.leaves(base)) == 14


@pytest.mark.filterwarnings("ignore")
def test_the_output_of_qwix_on_nnx(rng):
    qwix = pytest.importorskip("qwix")

    class Network(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.first = nnx.Einsum("btd,hdk->bthk", (3, 7, 5), (3, 5), rngs=rngs)
            self.second = nnx.LinearGeneral((3, 5), 11, axis=(-2, -1), rngs=rngs)
            self.third = nnx.Linear(11, 13, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.third(jnp.sin(self.second(jnp.sin(self.first(x)))))

    inputs = random_array(rng, (2, 4, 7))
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=5.0)
    adapted = qwix.apply_lora_to_model(Network(), provider, inputs, rngs=nnx.Rngs(1))
    nnx.update(adapted, randomize(rng, nnx.state(adapted, nnx.Param), 0.3))
    base, adapters, config = from_qwix(nnx.state(adapted, nnx.Param), alpha=5.0)
    plain = Network()
    state = nnx.state(plain, nnx.Param)
    nnx.replace_by_pure_dict(state, jlora.merge_params(base, adapters, config))
    nnx.update(plain, state)
    np.testing.assert_allclose(plain(inputs), adapted(inputs), rtol=0, atol=1e-5)
    assert dict(config.factorizations) == {"first/kernel": "oio", "second/kernel": "iio"}
