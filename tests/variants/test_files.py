"""The small trees in a folder: what they take there, that they come back to the bit, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import DataError, LoraConfig, load_adapters, variants
from jlora.adapter import is_entry
from jlora.disk import CONFIG, TENSORS, TensorFile, write_tensors
from jlora.paths import leaves_by_path
from tests.reference import as64, random_array, randomize
from tests.variants.weights import ROLES, random_params

CONFIGS = {kind: LoraConfig(rank=3, alpha=5, kind=kind, factorizations=ROLES) for kind in variants.KINDS}


def trained_of(rng, kind, params):
    trained, frozen = variants.init(None, params, CONFIGS[kind])
    return randomize(rng, trained), frozen


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)


@pytest.mark.parametrize("kind", variants.KINDS)
@pytest.mark.parametrize("with_frozen", [True, False])
def test_a_tree_comes_back_to_the_bit(kind, with_frozen, rng, tmp_path):
    params = random_params(rng)
    trained, frozen = trained_of(rng, kind, params)
    variants.save(tmp_path, trained, frozen, params, CONFIGS[kind], with_frozen=with_frozen)
    again, pair, config = variants.load(tmp_path, params)
    assert_same((again, pair), (trained, frozen))
    made = variants.adapters(again, pair, params, config)
    assert_same(made, variants.adapters(trained, frozen, params, CONFIGS[kind]))
    assert (config.kind, config.alpha, dict(config.factorizations)) == (kind, 5, ROLES)


@pytest.mark.parametrize("kind", variants.KINDS)
def test_the_file_holds_what_is_trained_and_what_is_shared_once(kind, rng, tmp_path):
    params = random_params(rng)
    trained, frozen = trained_of(rng, kind, params)
    for with_frozen, held in ((True, (trained, frozen)), (False, trained)):
        variants.save(tmp_path, trained, frozen, params, CONFIGS[kind], with_frozen=with_frozen)
        with TensorFile(tmp_path / TENSORS) as file:
            size = sum(entry.stop - entry.start for entry in file.entries.values())
        assert size == 4 * jlora.count_params(held)
    if kind == "vera":
        assert jlora.count_params(frozen) == 3 * (13 + 11)


@pytest.mark.parametrize("kind", variants.KINDS)
def test_the_adapters_of_a_folder_are_those_of_the_tree(kind, rng, tmp_path):
    params = random_params(rng)
    trained, frozen = trained_of(rng, kind, params)
    variants.save(tmp_path, trained, frozen, params, CONFIGS[kind])
    entries, config = variants.load_expanded(tmp_path)
    assert config.kind == "lora"
    merged = jlora.merge_params(params, jax.tree.map(jnp.asarray, entries), config)
    made = variants.adapters(trained, frozen, params, CONFIGS[kind])
    wanted = jlora.merge_params(params, made, CONFIGS[kind])
    for path in params:
        np.testing.assert_allclose(as64(merged[path]), as64(wanted[path]), rtol=0, atol=2e-6)
    assert entries.keys() == leaves_by_path(made, is_leaf=is_entry).keys()


def test_a_part_of_a_tree_keeps_its_ranks_and_alphas(rng, tmp_path):
    params = {"a": {"kernel": random_array(rng, (5, 7))}, "b": {"kernel": random_array(rng, (7, 3))}}
    fields = {"rank_pattern": {"b": 1}, "alpha_pattern": {"a": 3}, "exclude_modules": ("c",)}
    config = LoraConfig(rank=2, kind="xs", **fields)
    params |= {"c": {"kernel": random_array(rng, (3, 5))}}
    trained, frozen = variants.init(None, params, config)
    assert sorted(trained) == ["a/kernel", "b/kernel"]
    variants.save(tmp_path, randomize(rng, trained), frozen, params, config)
    _, _, found = variants.load(tmp_path)
    for path in trained:
        assert found.rank_of(path) == config.rank_of(path)
        assert found.scaling_of(path) == config.scaling_of(path)


def test_a_pair_of_another_key_is_written_or_refused(rng, tmp_path):
    params = random_params(rng)
    trained, frozen = variants.init(jax.random.key(3), params, CONFIGS["vera"])
    with pytest.raises(DataError, match=r"does not follow from config.seed = 0.*with_frozen=True, or None as the key"):
        variants.save(tmp_path, trained, frozen, params, CONFIGS["vera"], with_frozen=False)
    assert not list(tmp_path.iterdir())
    variants.save(tmp_path, trained, frozen, params, CONFIGS["vera"])
    assert_same(variants.load(tmp_path)[1], frozen)


def test_factors_of_other_weights_are_refused(rng, tmp_path):
    params = random_params(rng)
    trained, frozen = variants.init(None, params, CONFIGS["xs"])
    variants.save(tmp_path, trained, frozen, params, CONFIGS["xs"], with_frozen=False)
    with pytest.raises(DataError, match="what is made again of these weights is not what it was trained with"):
        variants.load(tmp_path, random_params(rng))
    with pytest.raises(DataError, match="what is frozen was left out when it was saved: give params"):
        variants.load(tmp_path)
    with pytest.raises(DataError, match="left out when it was saved, and only its model can make it again"):
        variants.load_expanded(tmp_path)


def test_it_is_no_folder_of_adapters_and_says_what_it_is(rng, tmp_path):
    params = random_params(rng)
    variants.save(tmp_path, *trained_of(rng, "vera", params), params, CONFIGS["vera"])
    assert variants.is_variant_folder(tmp_path)
    with pytest.raises(DataError, match=r"what VeRA or LoRA-XS trains.*jlora.variants.load.*jlora convert"):
        load_adapters(tmp_path)


def test_arrays_that_are_not_finite_are_not_written(rng, tmp_path):
    params = random_params(rng)
    trained, frozen = trained_of(rng, "vera", params)
    trained["dense"]["b"] = trained["dense"]["b"].at[0].set(jnp.nan)
    with pytest.raises(DataError, match="trained/dense/b: holds a NaN or an infinity"):
        variants.save(tmp_path, trained, frozen, params, CONFIGS["vera"])


def _changed(path, change):
    data = json.loads((path / CONFIG).read_text())
    change(data)
    (path / CONFIG).write_text(json.dumps(data))


DAMAGES = {
    "the pair": (None, "what is frozen is not what it was when it was saved"),
    "a vector": (None, "what is trained is not what it was when it was saved"),
    "a name": (None, "the tensor 'other': wanted trained/... and frozen/..."),
    "shapes": (lambda data: data.update(shapes={"dense": [0]}), "shapes: wanted the shape of each weight"),
    "digest": (lambda data: data.pop("frozen_sha256"), "frozen_sha256: wanted the digest"),
    "format": (lambda data: data.update(format="x"), "does not name the format 'jlora variant'"),
    "kind": (lambda data: data.update(kind="lora"), "kind = 'lora': wanted vera or xs"),
    "rank": (lambda data: data.update(rank=0), "rank = 0: wanted a whole number"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(damage, rng, tmp_path):
    params = random_params(rng)
    variants.save(tmp_path, *trained_of(rng, "vera", params), params, CONFIGS["vera"])
    change, message = DAMAGES[damage]
    if change is not None:
        _changed(tmp_path, change)
    else:
        with TensorFile(tmp_path / TENSORS) as file:
            tensors = {name: file.read(name) for name in file.entries}
        name = {"a name": "other", "a vector": "trained/dense/b", "the pair": "frozen/A"}[damage]
        tensors[name] = tensors.get(name, np.ones(3)) + 1
        with (tmp_path / TENSORS).open("wb") as file:
            write_tensors(file, tensors, {"format": "jlora variant"})
    with pytest.raises(DataError, match=message):
        variants.load(tmp_path, params)
