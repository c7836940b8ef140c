"""Where A and B lie: along their weight's axes as it does, over eight devices in a process of their own."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import LoraConfig, TargetError
from jlora.train import init_state, make_train_step
from tests.reference import as64, assert_close
from tests.storage.devices import run_with_devices

CONFIG = LoraConfig(
    rank=3, alpha=6, target_modules=("**",), factorizations={"experts": "bio", "heads": "oio", "turned": "oi"}
)
SHAPES = {
    "up/kernel": (16, 24),
    "down/kernel": (24, 16),
    "experts": (8, 16, 24),
    "heads": (8, 16, 4),
    "turned": (8, 24),
}
LAYOUTS = {  # the spec of each weight, and those of its A and B
    "fsdp": {
        "up/kernel": (P("d", None), P("d", None), P(None, None)),
        "down/kernel": (P(("d", "m")), P(("d", "m"), None), P(None, None)),
        "experts": (P(None, "d"), P(None, "d", None), P(None, None, None)),
        "heads": (P(None, "d"), P("d", None), P(None, None, None)),
        "turned": (P("m", "d"), P("d", None), P(None, "m")),
    },
    "tensor": {
        "up/kernel": (P(None, "m"), P(None, None), P(None, "m")),
        "down/kernel": (P("m", None), P("m", None), P(None, None)),
        "experts": (P(None, None, "m"), P(None, None, None), P(None, None, "m")),
        "heads": (P("d", None, "m"), P(None, None), P(None, "d", "m")),
        "turned": (P(("m", "d"), None), P(None, None), P(None, ("m", "d"))),
    },
    "expert": {
        "up/kernel": (P(), P(None, None), P(None, None)),
        "down/kernel": (P("d", "m"), P("d", None), P(None, "m")),
        "experts": (P("d", None, "m"), P("d", None, None), P("d", None, "m")),
        "heads": (P("m", "d"), P("d", None), P(None, "m", None)),
        "turned": (P("m"), P(None, None), P(None, "m")),
    },
}
MOVES = re.compile(r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)(?:-start)?\(")


def mesh_of(kind: Any = AxisType.Auto) -> Any:
    return jax.make_mesh((4, 2), ("d", "m"), axis_types=(kind, kind))


def tree_of(leaf_of: Any) -> Any:
    leaves = {path: leaf_of(path) for path in SHAPES}
    up, down = leaves.pop("up/kernel"), leaves.pop("down/kernel")
    return {"up": {"kernel": up}, "down": {"kernel": down}, **leaves}


def weights() -> Any:
    rng = np.random.default_rng(3)
    return tree_of(lambda path: rng.standard_normal(SHAPES[path]).astype(np.float32))


def shardings_of(layout: str, mesh: Any) -> Any:
    return tree_of(lambda path: NamedSharding(mesh, LAYOUTS[layout][path][0]))


def wanted_of(layout: str, mesh: Any) -> Any:
    specs = LAYOUTS[layout]
    return tree_of(lambda path: {name: NamedSharding(mesh, specs[path][at]) for name, at in (("A", 1), ("B", 2))})


def check(found: Any, wanted: Any) -> None:
    """The shardings of arrays, or those of a tree of shardings, are the wanted ones."""
    for (path, leaf), sharding in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        own = leaf if isinstance(leaf, jax.sharding.Sharding) else leaf.sharding
        assert own.is_equivalent_to(sharding, len(sharding.spec)), (path, own, sharding)


def same(found: Any, wanted: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def close_by_ulps(found: Any, wanted: Any) -> None:
    """Under jit XLA fuses the products of the draw, and rounds otherwise than they do one by one."""
    np.testing.assert_array_max_ulp(found, wanted, 2)


def init(key: Any, params: Any) -> Any:
    return jlora.init_lora(key, params, CONFIG)


def follows_the_weights(_: Path) -> None:
    key = jax.random.key(5)
    plain = init(key, weights())
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of(kind)
        for layout in LAYOUTS:
            spread, wanted = jax.device_put(weights(), shardings_of(layout, mesh)), wanted_of(layout, mesh)
            adapters = jlora.init_lora(key, spread, CONFIG)
            check(adapters, wanted)
            same(adapters, plain)
            optimizer_state = optax.adam(0.1).init(adapters)
            check(optimizer_state[0].mu, wanted)
            shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding), spread)
            check(jlora.init_lora(key, shapes, CONFIG), wanted)
            bare = jax.eval_shape(weights)
            for shardings in (
                jlora.adapter_shardings(spread, CONFIG),
                jlora.adapter_shardings(shapes, CONFIG),
                jlora.adapter_shardings(bare, CONFIG, shardings=shardings_of(layout, mesh)),
                jlora.adapter_shardings(spread, CONFIG, adapters=plain),
            ):
                check(shardings, wanted)
            made = jax.jit(init, out_shardings=shardings)(key, spread)
            check(made, wanted)
            jax.tree.map(close_by_ulps, made, plain)
            check(jlora.merge_params(spread, adapters, CONFIG), shardings_of(layout, mesh))


def explicit_axes_are_followed_under_jit(_: Path) -> None:
    mesh = mesh_of(AxisType.Explicit)
    key = jax.random.key(5)
    plain = init(key, weights())
    with jax.sharding.use_mesh(mesh) if not hasattr(jax, "set_mesh") else jax.set_mesh(mesh):
        for layout in LAYOUTS:
            spread = jax.device_put(weights(), shardings_of(layout, mesh))
            made = jax.jit(init)(key, spread)
            check(made, wanted_of(layout, mesh))
            jax.tree.map(close_by_ulps, made, plain)


def other_weights(_: Path) -> None:
    """Weights that say no axes, or nothing."""
    mesh, key, config = mesh_of(), jax.random.key(5), LoraConfig(rank=2)
    array = np.ones((16, 24), np.float32)
    here, there = jax.devices()[0], jax.devices()[3]

    def made(weight: Any) -> Any:
        adapter = jlora.init_lora(key, {"kernel": weight}, config)["kernel"]
        assert adapter["A"].sharding == adapter["B"].sharding
        assert adapter["A"].committed == adapter["B"].committed
        return adapter["A"]

    for weight in (array, jnp.asarray(array), jax.ShapeDtypeStruct(array.shape, array.dtype)):
        assert made(weight).devices() == {here}
        assert not made(weight).committed
        assert jlora.adapter_shardings({"kernel": weight}, config) == {"kernel": {"A": None, "B": None}}
    assert made(jax.device_put(array, there)).devices() == {there}
    one = SingleDeviceSharding(there)
    assert made(jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=one)).devices() == {there}
    replicated = jax.device_put(array, NamedSharding(mesh, P()))
    assert made(replicated).is_fully_replicated
    assert len(made(replicated).devices()) == 8
    on_host = jax.device_put(array, NamedSharding(mesh, P("d"), memory_kind="unpinned_host"))
    in_memory = NamedSharding(mesh, P("d")).memory_kind or here.default_memory().kind
    assert made_a(on_host, key, config).sharding.memory_kind in (None, in_memory)
    keys = jax.random.split(key, 3)
    spread = {"kernel": jax.device_put(array, NamedSharding(mesh, P("d", "m")))}
    stacked = jax.vmap(lambda key: jlora.init_lora(key, spread, config))(keys)["kernel"]
    same(stacked["A"][1], jlora.init_lora(keys[1], spread, config)["kernel"]["A"])


def made_a(weight: Any, key: Any, config: LoraConfig) -> Any:
    return jlora.init_lora(key, {"kernel": weight}, config)["kernel"]["A"]


def boxes_and_other_parts(folder: Path) -> None:
    mesh, rng = mesh_of(), np.random.default_rng(1)
    sharding = NamedSharding(mesh, P("d", None, "m"))
    weight = jax.device_put(rng.standard_normal((8, 16, 24)).astype(np.float32), sharding)
    params = {"experts": nn.Partitioned(weight, names=("expert", "embed", "ff")), "bias": jnp.zeros(24)}
    config = LoraConfig(rank=2, target_modules="experts", factorizations={"experts": "bio"})
    adapters = jlora.init_lora(jax.random.key(0), params, config)
    specs = {"A": P("d", None, None), "B": P("d", None, "m")}
    found = jlora.adapter_shardings(params, config)
    assert jax.tree.structure(found) == jax.tree.structure(adapters)
    for name, spec in specs.items():
        assert adapters["experts"][name].value.sharding.spec == spec
        assert found["experts"][name].value.spec == spec
    parts = nn.unbox(adapters)["experts"] | {
        "magnitude": rng.uniform(1, 2, (8, 24)).astype(np.float32),
        "value": np.asarray(weight),
        "offset": np.ones_like(weight),
    }
    everything = {"experts": parts}
    wanted = specs | {"magnitude": P("d", "m"), "value": sharding.spec, "offset": sharding.spec}
    plain = {"experts": weight}
    found = jlora.adapter_shardings(plain, config, adapters=everything)["experts"]
    assert {name: sharding.spec for name, sharding in found.items()} == wanted
    jlora.save_adapters(folder / "saved", everything, config)
    loaded, _ = jlora.load_adapters(folder / "saved", params=plain)
    assert {name: part.sharding.spec for name, part in loaded["experts"].items()} == wanted
    same(loaded["experts"], parts)
    loaded, _, _ = jlora.load_fitting_adapters(folder / "saved", plain)
    assert {name: part.sharding.spec for name, part in loaded["experts"].items()} == wanted
    loaded, _ = jlora.load_adapters(folder / "saved")
    assert all(not part.committed for part in loaded["experts"].values())


def model(params: Any, x: Any) -> Any:
    hidden = jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]
    routed = jnp.einsum("td,edf->etf", hidden, params["experts"])
    return jnp.tanh(routed) @ params["turned"].T


def the_step_gathers_no_more_weights(_: Path) -> None:
    mesh, rng = mesh_of(), np.random.default_rng(2)
    # few tokens, so that no weight is merged
    x = jax.device_put(rng.standard_normal((20, 16)).astype(np.float32), NamedSharding(mesh, P("d", None)))
    config = CONFIG.replace(factorizations={"experts": "bio", "turned": "oi"}, exclude_modules=("heads",))
    adapted = jlora.lora(model, config)
    optimizer = optax.adam(0.01)

    def loss(adapters: Any, params: Any, x: Any, key: Any) -> Any:
        return jnp.mean(adapted(params, adapters, x) ** 2)

    def base_loss(base: Any, x: Any) -> Any:
        return jnp.mean(model(base, x) ** 2)

    for layout in LAYOUTS:
        params = jax.device_put(weights(), shardings_of(layout, mesh))
        adapters = jlora.init_lora(jax.random.key(0), params, config)
        state = init_state(adapters, optimizer)
        step = make_train_step(loss, optimizer)
        own = moved(jax.jit(jax.grad(base_loss)).lower(params, x).compile().as_text())
        with_adapters = moved(step.lower(state, params, x).compile().as_text())
        assert not with_adapters - own, (layout, with_adapters, own)
        host = weights()
        pulled = jax.tree.map(lambda part: part + 0.1, jlora.init_lora(jax.random.key(0), host, config))
        spread = jax.tree.map(lambda part: part + 0.1, adapters)
        by_adapters = jax.jit(jax.grad(loss), out_shardings=jlora.adapter_shardings(params, config))
        got = by_adapters(spread, params, x, None)
        wanted = jax.grad(loss)(pulled, host, np.asarray(x), None)
        jax.tree.map(lambda a, b: assert_close(a, as64(b)), got, wanted)
        for tree in (state.trained, state.opt_state[0].mu, got):
            check(tree, jlora.adapter_shardings(params, config))


def moved(text: str) -> Counter:
    """The shapes that a program moves between devices, without those that have an axis of tokens or of the rank."""
    found = [tuple(map(int, shape.split(","))) for shape in MOVES.findall(text) if shape]
    return Counter(shape for shape in found if not any(size % 5 == 0 or size == 3 for size in shape))


@pytest.mark.parametrize(
    "function",
    [
        "follows_the_weights",
        "explicit_axes_are_followed_under_jit",
        "other_weights",
        "boxes_and_other_parts",
        "the_step_gathers_no_more_weights",
    ],
)
def test_over_eight_devices(function: str, tmp_path: Path) -> None:
    run_with_devices("tests.tree.test_shardings", function, tmp_path)


def test_shardings_that_do_not_fit() -> None:
    params = {"up": {"kernel": jnp.ones((5, 7)), "bias": jnp.ones(7)}}
    with pytest.raises(TargetError, match="no prefix of params"):
        jlora.adapter_shardings(params, LoraConfig(rank=2), shardings={"down": None})
    adapter = {"A": jnp.ones((5, 2)), "B": jnp.ones((2, 7))}
    with pytest.raises(TargetError, match="down/kernel: found no leaf of params"):
        jlora.adapter_shardings(params, LoraConfig(rank=2), adapters={"down": {"kernel": adapter}})
    with pytest.raises(TargetError, match=r"up/kernel: A .* does not have the rank 3"):
        jlora.adapter_shardings(params, LoraConfig(rank=3), adapters={"up": {"kernel": adapter}})
    with pytest.raises(TargetError, match="up: found ndarray"):
        jlora.adapter_shardings(params, LoraConfig(rank=2), adapters={"up": np.ones(3)})
