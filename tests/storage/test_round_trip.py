"""What is saved comes back: structure, keys, shapes, dtypes, configuration and metadata, to the bit."""

import json
import typing
from collections import OrderedDict
from typing import Any, NamedTuple

import flax.struct
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax.core import freeze
from hypothesis import given

from jlora import LoraConfig
from jlora.storage import is_adapters_folder, load_adapters, read_metadata, save_adapters
from tests.reference import x64
from tests.storage.trees import assert_same, entry, random, small

DTYPES = [
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "int8",
    "uint32",
    "complex64",
]
TEXTS = st.text(st.characters(codec="utf-8"), max_size=6) | st.sampled_from(["", "/", "a/b", "..", "%2F", "[0]", "~2"])
NUMBERS = st.integers(-(2**63), 2**63 - 1)


@st.composite
def updates(draw: Any) -> dict[str, Any]:
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    dtype = jnp.dtype(draw(st.sampled_from(DTYPES)))
    batch = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    parts = entry(rng, (*batch, draw(st.integers(0, 4)), 2), (*batch, 2, draw(st.integers(0, 4))), dtype)
    if draw(st.booleans()):
        parts["magnitude"] = random(rng, (3,), dtype)
    if draw(st.booleans()):
        parts["offset"] = random(rng, (), dtype)
    return draw(st.sampled_from([parts, parts, {"value": random(rng, (3, 2), dtype)}]))


TREES = st.recursive(
    st.none() | updates(),
    lambda nodes: (
        st.lists(nodes, max_size=3)
        | st.lists(nodes, max_size=3).map(tuple)
        | st.dictionaries(TEXTS, nodes, max_size=3)
        | st.dictionaries(NUMBERS, nodes, max_size=3)
    ),
    max_leaves=8,
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda nodes: st.lists(nodes, max_size=3) | st.dictionaries(TEXTS, nodes, max_size=3),
    max_leaves=6,
)


@given(TREES, updates(), st.dictionaries(TEXTS, PLAIN, max_size=3))
def test_any_tree_comes_back(tmp_path_factory, tree, update, metadata):
    folder = tmp_path_factory.mktemp("any")
    config = LoraConfig(rank=2, alpha=0.1)
    save_adapters(folder, (tree, update), config, metadata=metadata)
    loaded, loaded_config = load_adapters(folder)
    assert_same(loaded, (tree, update))
    assert loaded_config == config
    assert read_metadata(folder) == metadata
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_every_finite_number_of_a_dtype_comes_back(tmp_path):
    for name in ("float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", "float8_e8m0fnu"):
        dtype = jnp.dtype(name)
        numbers = np.arange(2 ** (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}").view(dtype)
        with np.errstate(invalid="ignore"):
            value = numbers[np.isfinite(numbers)]
        save_adapters(tmp_path / name, {"w": {"value": value}}, LoraConfig())
        assert_same(load_adapters(tmp_path / name)[0], {"w": {"value": value}})


def test_two_entries_with_one_path(tmp_path, rng):
    adapters = {"a/b": entry(rng), "a": {"b": entry(rng), "b~2": entry(rng)}, "a/b~2": entry(rng)}
    save_adapters(tmp_path, adapters, LoraConfig(rank=2))
    assert_same(load_adapters(tmp_path)[0], adapters)


@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: {"": e}, lambda e: {"": {"": e}}, lambda e: {"A": {"B": e}}])
def test_odd_places_of_one_entry(tmp_path, rng, wrap):
    adapters = wrap(entry(rng))
    save_adapters(tmp_path, adapters, LoraConfig(rank=2))
    assert_same(load_adapters(tmp_path)[0], adapters)


class Pair(NamedTuple):
    up: Any
    down: Any


@flax.struct.dataclass
class Block:
    up: Any
    down: Any


CONTAINERS: dict[str, typing.Callable[[Any, Any], Any]] = {
    "frozen": lambda up, down: freeze({"up": up, "down": down}),
    "named tuple": Pair,
    "dataclass": Block,
    "ordered": lambda up, down: OrderedDict(up=up, down=down),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_other_nodes_are_saved_as_dicts_and_loaded_like_the_params(tmp_path, rng, kind):
    make = CONTAINERS[kind]
    entries = {"kernel": entry(rng), "bias": None}
    adapters = [make(entries, None)]
    save_adapters(tmp_path, adapters, LoraConfig(rank=2, target_modules="0/up"))
    assert_same(load_adapters(tmp_path)[0], [{"up": entries, "down": None}])
    params = [make({"kernel": np.ones((5, 7)), "bias": np.ones(7)}, np.ones((3, 3)))]
    loaded, _ = load_adapters(tmp_path, params=params)
    is_none = {"is_leaf": lambda node: node is None}
    assert jax.tree.structure(loaded, **is_none) == jax.tree.structure(adapters, **is_none)
    assert_same(jax.tree.leaves(loaded), jax.tree.leaves(adapters))


def test_the_order_of_patterns_comes_back(tmp_path, rng):
    ranks = {"z/**": 3, "a": 2, "**": 2}
    config = LoraConfig(rank=7, rank_pattern=ranks, extras={"z": "1", "a": "é\n\0"}, dtype="bfloat16", seed=2**32 - 1)
    save_adapters(tmp_path, {"z": {"w": entry(rng, (5, 3), (3, 7))}, "a": entry(rng)}, config)
    loaded = load_adapters(tmp_path)[1]
    assert loaded == config
    assert loaded.rank_pattern == tuple(ranks.items())


def test_arrays_in_any_layout(tmp_path, rng):
    a = np.asfortranarray(random(rng, (5, 3)))
    b = np.broadcast_to(random(rng, (1, 7)), (3, 7)).astype(">f4")
    save_adapters(tmp_path, {"w": {"A": a[:, ::-1], "B": b[::-1]}}, LoraConfig(rank=3))
    assert_same(load_adapters(tmp_path)[0], {"w": {"A": a[:, ::-1], "B": b[::-1].astype("<f4")}})


def test_the_files_are_readable_by_others(tmp_path, rng):
    adapters, config = small(rng)
    save_adapters(tmp_path, adapters, config, metadata={"steps": 3})
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(tensors) == ["down/kernel/A", "down/kernel/B", "up/kernel/A", "up/kernel/B"]
    assert_same(tensors["up/kernel/B"], adapters["up"]["kernel"]["B"])
    data = json.loads((tmp_path / "adapter_config.json").read_text())
    assert data == {"format": "jlora adapters", **config.to_dict(), "metadata": {"steps": 3}}


def test_arrays_of_jax_and_an_older_folder(tmp_path, rng):
    adapters, config = small(rng)
    folder = tmp_path / "new" / "folder"
    save_adapters(folder, jax.tree.map(jnp.asarray, adapters), config)
    assert_same(load_adapters(folder)[0], adapters)
    newer = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), adapters)
    save_adapters(str(folder), newer, config.replace(alpha=5))
    loaded, loaded_config = load_adapters(str(folder))
    assert_same(loaded, newer)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))
    assert loaded_config.alpha == 5
    assert is_adapters_folder(folder)
    assert not is_adapters_folder(tmp_path)


def test_saving_the_same_writes_the_same_bytes(tmp_path, rng):
    adapters, config = small(rng)
    for name in "ab":
        save_adapters(tmp_path / name, adapters, config)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_float64_under_x64(tmp_path, rng):
    adapters = {"w": entry(rng, dtype="float64")}
    save_adapters(tmp_path, adapters, LoraConfig(rank=2))
    with x64():
        assert_same(load_adapters(tmp_path)[0], adapters)
