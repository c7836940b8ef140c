"""What the functions of a params tree do with a lazy base."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import LoraConfig
from tests.lazy_bases import Int8, densified, is_int8, packed
from tests.reference import randomize

IN, OUT = 5, 7
CONFIG = LoraConfig(rank=2, target_modules="w", factorizations={"w": "io"})
MESH = jax.make_mesh((1, 1), ("d", "m"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
ROWS = NamedSharding(MESH, P("d", "m"))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["numbers", "scale"], meta_fields=[])
class Placed(Int8):
    """It says where the weight lies."""

    @property
    def sharding(self):
        return self.numbers.sharding


def placed(*shape):
    base = packed(1, *shape)
    return Placed(jax.device_put(base.numbers, ROWS), base.scale)


@pytest.fixture
def params():
    return {"w": packed(1, IN, OUT), "other": packed(2, 3, 2)}


@pytest.fixture
def adapters(rng, params):
    return randomize(rng, jlora.init_lora(None, params, CONFIG))


def specs(tree):
    return jax.tree.map(lambda leaf: getattr(leaf, "sharding", leaf).spec, tree)


WANTED = {"A": P("d", None), "B": P(None, "m")}


def test_an_adapter_lies_where_the_base_says():
    params = {"w": placed(IN, OUT)}
    assert specs(jlora.init_lora(None, params, CONFIG)) == {"w": WANTED}
    assert specs(jlora.adapter_shardings(params, CONFIG)) == {"w": WANTED}
    assert jlora.adapter_shardings({"w": packed(1, IN, OUT)}, CONFIG) == {"w": {"A": None, "B": None}}


def test_shardings_that_are_given_are_those_of_the_weight(params):
    for given in (ROWS, {"w": ROWS, "other": None}):
        found = jlora.adapter_shardings(params, CONFIG, shardings=given)
        assert (specs(found["w"]), found["other"]) == (WANTED, None)


def test_a_residual_brings_the_dense_weight_back(params, adapters):
    merged, residual = jlora.merge_params_with_residual(params, adapters, CONFIG)
    back = jlora.unmerge_params(merged, adapters, CONFIG, residual=residual)
    np.testing.assert_array_equal(back["w"], params["w"].dense())
    assert merged["other"] is params["other"]


def test_a_tree_of_both_is_told_apart(params, adapters):
    both = jlora.combine_params(params, adapters)
    labels = jlora.lora_labels(both, base=params)
    assert labels["lora"] == {"w": {"A": "lora", "B": "lora"}}
    assert set(jax.tree.leaves({name: labels[name] for name in params})) == {"frozen"}
    base, again = jlora.split_params(both, base=params)
    assert all(is_int8(base[name]) for name in params)
    jax.tree.map(np.testing.assert_array_equal, (base, again), (params, adapters))


def test_files_fit_the_lazy_base_and_the_dense_one(params, adapters, tmp_path):
    jlora.save_adapters(tmp_path / "adapters", adapters, CONFIG)
    for base in (params, densified(params), {"w": placed(IN, OUT), "other": params["other"]}):
        found, config = jlora.load_adapters(tmp_path / "adapters", params=base)
        jax.tree.map(np.testing.assert_array_equal, found, adapters)
        assert config == CONFIG
    assert specs(found["w"]) == WANTED
