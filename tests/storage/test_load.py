"""Adapters loaded for a params tree: the structure, the report, strictness, and where the arrays are placed."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora import DataError, LoraConfig, TargetError, init_lora, merge_params
from jlora.storage import (
    LoadReport,
    Misfit,
    load_adapters,
    load_arrays,
    load_fitting_adapters,
    load_on_host,
    save_adapters,
)
from tests.reference import as64, assert_close, random_array, randomize, reference_delta
from tests.storage.devices import run_with_devices
from tests.storage.trees import assert_same, entry, random

P = PartitionSpec


def model(rng: np.random.Generator) -> Any:
    """Params whose attention kernels cannot be factored by their shapes alone, a list and a bias."""
    return {
        "embed": {"embedding": random_array(rng, (13, 5))},
        "layers": [{"kernel": random_array(rng, (5, 7)), "bias": random_array(rng, (7,))} for _ in range(2)],
        "odd": {"kernel": random_array(rng, (3, 5, 7))},
    }


CONFIG = LoraConfig(rank=2, alpha=3, target_modules=("layers", "odd"), factorizations={"odd": "iio"})


def saved(folder: Path, rng: np.random.Generator, config: LoraConfig = CONFIG) -> tuple[Any, Any]:
    params = model(rng)
    adapters = randomize(rng, init_lora(jax.random.key(0), params, config))
    save_adapters(folder, adapters, config)
    return params, adapters


def test_adapters_that_fit(tmp_path, rng):
    params, adapters = saved(tmp_path, rng)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    for like in (params, shapes, jax.tree.map(lambda leaf: leaf.astype(jnp.int8), params)):
        loaded, config, report = load_fitting_adapters(tmp_path, like)
        assert_same(loaded, adapters)
        assert config == CONFIG
        assert report.fits
        assert report.matched == ("layers/0/kernel", "layers/1/kernel", "odd/kernel")
        assert str(report) == "3 of 3 adapters fit the params"
        assert_same(load_adapters(tmp_path, params=like)[0], adapters)


def test_loaded_adapters_merge(tmp_path, rng):
    params, adapters = saved(tmp_path, rng)
    loaded, config = load_adapters(tmp_path, params=params)
    weight = params["layers"][1]["kernel"]
    wanted = as64(weight) + reference_delta(adapters["layers"][1]["kernel"], alpha=3)
    assert_close(merge_params(params, loaded, config)["layers"][1]["kernel"], wanted)


def test_a_factorization_that_only_the_adapters_show(tmp_path, rng):
    params, adapters = saved(tmp_path, rng)
    save_adapters(tmp_path, adapters, CONFIG.replace(factorizations={}))
    assert_same(load_adapters(tmp_path, params=params)[0], adapters)


def test_every_problem_at_once(tmp_path, rng):
    adapters = {
        "layers": [{"kernel": entry(rng, (5, 2), (2, 11)), "bias": None}],
        "od": {"kernel": entry(rng)},
        "embed": {"embedding": entry(rng, (13, 2), (2, 5))},
    }
    save_adapters(
        tmp_path, adapters, LoraConfig(rank=2, target_modules=("layers", "em*", "od*"), factorizations={"od*": "iio"})
    )
    params = model(rng)
    loaded, _, report = load_fitting_adapters(tmp_path, params)
    assert report == LoadReport(
        matched=("embed/embedding",),
        missing=("layers/1/kernel", "odd/kernel"),
        unexpected=("od/kernel",),
        wrong_shape=(Misfit("layers/0/kernel", "A (5, 2), B (2, 11)", "A (5, 2), B (2, 7) for the weight (5, 7)"),),
        leaves=(
            "embed/embedding",
            "layers/0/bias",
            "layers/0/kernel",
            "layers/1/bias",
            "layers/1/kernel",
            "odd/kernel",
        ),
    )
    assert not report.fits
    nothing = {"kernel": None, "bias": None}
    assert_same(loaded, {"embed": adapters["embed"], "layers": [nothing, nothing], "odd": {"kernel": None}})
    with pytest.raises(DataError, match="1 of 3 adapters fit the params") as caught:
        load_adapters(tmp_path, params=params)
    assert str(caught.value).split("\n  ")[1:] == [
        "missing: layers/1/kernel: the configuration adapts it",
        "missing: odd/kernel: the configuration adapts it",
        "unexpected: od/kernel: nearest paths: odd/kernel, layers/1/kernel, layers/0/kernel",
        "wrong shape: layers/0/kernel: found A (5, 2), B (2, 11), wanted A (5, 2), B (2, 7) for the weight (5, 7)",
    ]


def test_params_of_another_model(tmp_path, rng):
    saved(tmp_path, rng)
    params = {"decoder": {"kernel": jnp.ones((5, 7))}}
    with pytest.raises(DataError, match=r"configuration: .*problems:\n  target_modules: 'layers' matches nothing"):
        load_adapters(tmp_path, params=params)
    loaded, _, report = load_fitting_adapters(tmp_path, params)
    assert loaded == {"decoder": {"kernel": None}}
    assert len(report.unexpected) == 3
    assert "target_modules: 'odd' matches nothing" in report.unfit


def test_a_long_report_is_shortened(tmp_path, rng):
    save_adapters(tmp_path, {f"w{i}": entry(rng) for i in range(40)}, LoraConfig(rank=2))
    report = load_adapters(tmp_path, params={"v": jnp.ones((5, 7))}, strict=False)[2]
    assert len(str(report).splitlines()) == 15
    assert "and 28 more" in str(report)
    assert len(report.unexpected) == 40


def test_other_parts_of_entries(tmp_path, rng):
    params = {"w": {"kernel": jnp.ones((5, 7)), "bias": jnp.ones(7)}}
    adapters = {
        "w": {"kernel": {**entry(rng), "magnitude": random(rng, (7,))}, "bias": {"offset": random(rng, (7,))}},
    }
    save_adapters(tmp_path, adapters, LoraConfig(rank=2))
    assert_same(load_adapters(tmp_path, params=params)[0], adapters)
    wrong = {"w": {"kernel": jnp.ones((5, 7)), "bias": jnp.ones(3)}}
    report = load_fitting_adapters(tmp_path, wrong)[2]
    assert report.wrong_shape == (Misfit("w/bias", "offset (7,)", "parts for the weight (3,)"),)
    adapters["w"]["kernel"]["magnitude"] = random(rng, (5,))
    save_adapters(tmp_path, adapters, LoraConfig(rank=2))
    with pytest.raises(DataError, match=r"wrong shape: w/kernel: found A \(5, 2\), B \(2, 7\), magnitude \(5,\)"):
        load_adapters(tmp_path, params=params)


def test_one_path_twice(tmp_path, rng):
    save_adapters(tmp_path, {"a/b": entry(rng), "a": {"b": entry(rng)}}, LoraConfig(rank=2))
    with pytest.raises(DataError, match="2 adapters have the path 'a/b': load without params"):
        load_adapters(tmp_path, params={"a/b": jnp.ones((5, 7))})
    save_adapters(tmp_path, {"a/b": entry(rng)}, LoraConfig(rank=2))
    with pytest.raises(TargetError, match="two leaves of the tree have the path 'a/b'"):
        load_adapters(tmp_path, params={"a/b": jnp.ones((5, 7)), "a": {"b": jnp.ones((5, 7))}})


def test_a_tree_that_is_one_weight(tmp_path, rng):
    adapters = entry(rng)
    save_adapters(tmp_path, adapters, LoraConfig(rank=2))
    assert_same(load_adapters(tmp_path, params=jnp.ones((5, 7)))[0], adapters)


def test_the_state_of_an_nnx_model(tmp_path):
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.up = nnx.Linear(5, 7, rngs=rngs)

    params = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    config = LoraConfig(rank=2, target_modules="up")
    adapters = init_lora(jax.random.key(0), params, config)
    save_adapters(tmp_path, adapters, config)
    loaded, _ = load_adapters(tmp_path, params=params)
    assert isinstance(loaded, nnx.State)
    assert jax.tree.structure(loaded) == jax.tree.structure(adapters)
    assert_same(jax.tree.leaves(loaded), jax.tree.leaves(adapters))
    kernel = adapters["up"]["kernel"]
    value = kernel.get_value() if hasattr(kernel, "get_value") else kernel.value  # Flax 0.11
    assert_same(load_adapters(tmp_path)[0]["up"], {"kernel": {"value": value}, "bias": {"value": None}})


def test_placed_on_a_device(tmp_path, rng):
    saved(tmp_path, rng)
    (device,) = jax.devices()
    assert not any(leaf.committed for leaf in jax.tree.leaves(load_adapters(tmp_path)[0]))
    loaded, _ = load_adapters(tmp_path, sharding=jax.sharding.SingleDeviceSharding(device))
    assert all(leaf.committed for leaf in jax.tree.leaves(loaded))
    with pytest.raises(DataError, match="cannot be placed with this sharding"):
        load_adapters(tmp_path, sharding={"layers": None})


def over_eight_devices(folder: Path) -> None:
    """Sharded arrays are saved, and loaded whole or onto another sharding."""
    rng = np.random.default_rng(3)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("d", "m"))
    adapters = {"w": entry(rng, (16, 2), (2, 8), jnp.bfloat16), "v": [None, entry(rng, (8, 2), (2, 24))]}
    place = {"A": NamedSharding(mesh, P("d")), "B": NamedSharding(mesh, P("m", "d"))}
    save_adapters(folder, {"w": jax.device_put(adapters["w"], place), "v": adapters["v"]}, LoraConfig(rank=2))
    assert_same(load_adapters(folder)[0], adapters)
    whole, columns = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "m"))
    params = {"w": jnp.ones((16, 8)), "v": [jnp.ones(3), jnp.ones((8, 24))]}
    for like in (None, params):
        loaded, _ = load_adapters(folder, params=like, sharding={"w": columns, "v": [None, place]})
        assert_same(loaded, adapters)
        assert loaded["w"]["A"].sharding == columns
        assert loaded["v"][1]["B"].sharding == place["B"]
        loaded, _ = load_adapters(folder, params=like, sharding=whole)
        assert_same(loaded, adapters)
        assert {leaf.sharding for leaf in jax.tree.leaves(loaded)} == {whole}
    uneven = NamedSharding(mesh, P(None, ("d", "m")))
    with pytest.raises(DataError, match="cannot be placed with this sharding"):
        load_adapters(folder, sharding=uneven)


def test_over_eight_devices(tmp_path):
    run_with_devices(__name__, "over_eight_devices", tmp_path)


def test_arrays_that_are_read_when_asked_for(tmp_path):
    adapters = {"a": [{"A": np.ones((3, 2)), "B": np.ones((2, 5))}], "b": None}
    save_adapters(tmp_path, adapters, LoraConfig(rank=2))
    entries, config = load_arrays(tmp_path)
    assert (list(entries), config.rank) == (["a/0"], 2)
    assert np.asarray(entries["a/0"]["A"]).dtype == np.float64  # which load_adapters would not narrow


def test_one_adapter_too_many_is_an_error_where_all_others_fit(tmp_path):
    entry = {"A": np.ones((5, 2), np.float32), "B": np.ones((2, 7), np.float32)}
    save_adapters(tmp_path, {"up": entry, "more": entry}, LoraConfig(rank=2))
    params = {"up": np.zeros((5, 7), np.float32)}
    with pytest.raises(DataError, match="1 of 2 adapters fit the params\n  unexpected: more"):
        load_adapters(tmp_path, params=params)
    loaded, _, report = load_fitting_adapters(tmp_path, params)
    assert report.unexpected == ("more",)
    assert not report.fits
    assert loaded.keys() == {"up"}


def test_on_the_host_all_is_as_it_was_saved(tmp_path, rng):
    wide = {"A": rng.normal(size=(5, 2)), "B": rng.normal(size=(2, 7))}
    narrow = jax.tree.map(lambda part: np.asarray(part, jnp.bfloat16), wide)
    adapters = {"b": [wide, None], "a": (narrow, {"c": wide})}
    config = LoraConfig(rank=2, alpha=3)
    save_adapters(tmp_path, adapters, config)
    found, known = load_on_host(tmp_path)
    assert known == config
    assert jax.tree.structure(found) == jax.tree.structure(adapters)
    for part, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(adapters), strict=True):
        assert isinstance(part, np.ndarray)
        assert part.dtype == wanted.dtype
        np.testing.assert_array_equal(part, wanted)
