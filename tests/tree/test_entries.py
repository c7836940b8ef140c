"""Which leaves are trained: every part of an entry of the adapters, and never a module that only looks like one."""

import contextlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze

import jlora
from jlora import (
    ConfigError,
    JloraWarning,
    LoraConfig,
    TargetError,
    combine_params,
    lora_labels,
    lora_mask,
    split_params,
)
from jlora.interop.peft import NESTED, read_peft
from tests.interop.files import embedding_pair, pair, write_folder
from tests.reference import random_adapter, random_array

CONFIG = LoraConfig(rank=2, alpha=3, target_modules="up")


def weights(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "embed": {"embedding": random_array(rng, (13, 5))},
        "up": {"kernel": random_array(rng, (5, 7)), "bias": random_array(rng, (7,))},
        "norm": {"scale": random_array(rng, (7,)), "bias": random_array(rng, (7,))},
        "down": {"kernel": random_array(rng, (7, 3))},
    }


def entries(rng: np.random.Generator) -> dict[str, Any]:
    """Every kind of entry: DoRA, an offset, whole values, A and B; and weights without one."""
    dora = {**random_adapter(rng, (5, 2), (2, 7)), "magnitude": random_array(rng, (7,))}
    return {
        "embed": {"embedding": random_adapter(rng, (13, 2), (2, 5))},
        "up": {"kernel": dora, "bias": {"offset": random_array(rng, (7,))}},
        "norm": {"scale": {"value": random_array(rng, (7,))}, "bias": None},
        "down": {"kernel": {"value": random_array(rng, (7, 3))}},
    }


def leaves(tree: Any) -> dict[str, Any]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


def same(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def model(params: Any, tokens: Any) -> Any:
    h = params["embed"]["embedding"][tokens] @ params["up"]["kernel"] + params["up"]["bias"]
    h = jnp.tanh(h) * params["norm"]["scale"] + params["norm"]["bias"]
    return h @ params["down"]["kernel"]


# ---------------------------------------------------------------- every kind of entry


@pytest.mark.parametrize("make", [dict, freeze], ids=["dict", "frozen"])
def test_every_part_of_every_entry_is_trained(rng, make):
    params, adapters = make(weights(rng)), make(entries(rng))
    assert set(jax.tree.leaves(lora_labels(adapters))) == {"lora"}
    assert all(jax.tree.leaves(lora_mask(adapters)))
    both = combine_params(params, adapters)
    marks = leaves(lora_labels(both))
    assert {path for path, mark in marks.items() if mark == "frozen"} == set(leaves(params))
    assert leaves(lora_mask(both)) == {path: mark == "lora" for path, mark in marks.items()}
    for tree in (adapters, both):
        same(lora_labels(tree, params), lora_labels(tree))
        assert jax.tree.structure(lora_labels(tree)) == jax.tree.structure(tree)
        parts = leaves(lora_labels(tree, by="part"))
        assert {path: mark for path, mark in parts.items() if mark == "frozen"} == {
            path: mark for path, mark in leaves(lora_labels(tree)).items() if mark == "frozen"
        }
        assert all(path.endswith(f"/{mark}") for path, mark in parts.items() if mark != "frozen")
        assert set(parts.values()) - {"frozen"} == {"A", "B", "magnitude", "offset", "value"}
    with pytest.raises(ConfigError, match="by = 'parts': wanted one of 'tree', 'part'"):
        lora_labels(adapters, by="parts")


@pytest.mark.parametrize("make", [dict, freeze], ids=["dict", "frozen"])
def test_a_linen_tree_carries_every_kind_of_entry(rng, make):
    params, adapters = make(weights(rng)), make(entries(rng))
    both = combine_params(params, adapters)
    assert set(leaves(both)) - set(leaves(params)) == {
        "embed/lora/A",
        "embed/lora/B",
        "up/lora/kernel/A",
        "up/lora/kernel/B",
        "up/lora/kernel/magnitude",
        "up/lora/bias/offset",
        "norm/lora/scale/value",
        "down/lora/value",
    }
    for halves in (split_params(both), split_params(both, params)):
        same(halves[0], params)
        same(halves[1], adapters)
        same(combine_params(*halves), both)


def of_peft(rng: np.random.Generator, folder: Any) -> Any:
    """DoRA, an embedding, and a whole module, as PEFT writes them, and a base that they fit."""
    tensors = pair(rng, "m.up", 7, 5) | pair(rng, "m.down", 3, 7) | embedding_pair(rng, "m.embed", 13, 5)
    for name, size in (("up", 7), ("down", 3), ("embed", 5)):
        tensors[f"m.{name}.lora_magnitude_vector"] = rng.uniform(0.5, 2, size).astype("float32")
    tensors["m.norm.weight"] = rng.standard_normal(7).astype("float32")
    params = {
        "embed": {"weight": random_array(rng, (13, 5))},
        "up": {"weight": random_array(rng, (7, 5))},
        "norm": {"weight": random_array(rng, (7,))},
        "down": {"weight": random_array(rng, (3, 7)), "bias": random_array(rng, (3,))},
    }
    write_folder(folder, tensors, target_modules=["up", "down", "embed"], modules_to_save=["norm"])
    adapters, config = read_peft(folder, NESTED, params={"m": params})
    return {"m": params}, adapters, config


def torch_model(params: Any, tokens: Any) -> Any:
    p = params["m"]
    h = jnp.tanh(p["embed"]["weight"][tokens] @ p["up"]["weight"].T) * p["norm"]["weight"]
    return h @ p["down"]["weight"].T + p["down"]["bias"]


def trained(tree: Any, labels: Any, loss: Any) -> Any:
    """Three steps of the README's recipe."""
    optimizer = optax.partition({"lora": optax.adamw(1e-2, weight_decay=0.1), "frozen": optax.set_to_zero()}, labels)

    @jax.jit
    def step(tree: Any, state: Any) -> Any:
        updates, state = optimizer.update(jax.grad(loss)(tree), state, tree)
        return optax.apply_updates(tree, updates), state

    state = optimizer.init(tree)
    for _ in range(3):
        tree, state = step(tree, state)
    return tree


def moved(before: Any, after: Any) -> set[str]:
    return {path for path, leaf in leaves(after).items() if not np.array_equal(leaf, leaves(before)[path])}


def test_what_peft_trained_goes_on_training(rng, tmp_path):
    params, adapters, config = of_peft(rng, tmp_path / "a")
    assert {path.rpartition("/")[2] for path in leaves(adapters)} == {"A", "B", "magnitude", "value"}
    tokens, call = jnp.arange(8), jlora.lora(torch_model, config)
    after = trained(adapters, lora_labels(adapters), lambda adapters: call(params, adapters, tokens).var())
    assert moved(adapters, after) == set(leaves(adapters))

    both = combine_params(params, adapters)
    same(split_params(both), (params, adapters))
    after = trained(both, lora_labels(both), lambda both: call(*split_params(both), tokens).var())
    assert moved(both, after) == set(leaves(both)) - set(leaves(params))


def test_the_halves_of_a_tree_with_every_kind_are_what_merging_takes(rng):
    params, adapters = weights(rng), entries(rng)
    config = LoraConfig(rank=2, alpha=3, target_modules="**")
    halves = split_params(combine_params(params, adapters))
    same(jlora.merge_params(*halves, config), jlora.merge_params(params, adapters, config))


# ---------------------------------------------------------------- modules that look like adapters


SHAPES = {
    "square": ((5, 5), (5, 1)),
    "vector": ((5, 5), (5,)),
    "low rank": ((7, 3), (3, 7)),
    "batched": ((2, 7, 3), (2, 3, 7)),
}


def state_space(rng: np.random.Generator, kind: str) -> dict[str, Any]:
    a, b = SHAPES[kind]
    return {"A": random_array(rng, a), "B": random_array(rng, b)}


@contextlib.contextmanager
def told(expected: bool) -> Any:
    """Whether a warning tells of A and B in `mix/ssm`."""
    if expected:
        with pytest.warns(JloraWarning, match=r"^A and B of mix/ssm are frozen as weights of the base; if they are"):
            yield
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("make", [dict, freeze], ids=["dict", "frozen"])
def test_a_module_with_weights_named_a_and_b_is_of_the_base(rng, kind, make):
    params = make({**weights(rng), "mix": {"ssm": state_space(rng, kind)}})
    adapters = make({**entries(rng), "mix": {"ssm": {"A": None, "B": None}}})
    both = combine_params(params, adapters)
    with told(kind in ("low rank", "batched")):
        labels = lora_labels(both)
    with told(False):
        same(lora_labels(both, params), labels)
        same(lora_labels(both, jax.eval_shape(lambda: params)), labels)
    assert {path for path, label in leaves(labels).items() if label == "frozen"} == set(leaves(params))
    for halves in (split_params(both), split_params(both, params)):
        same(halves, (params, adapters))


@pytest.mark.parametrize("kind", SHAPES)
def test_the_base_of_a_state_space_model_does_not_move(rng, kind):
    params = {**weights(rng), "mix": {"ssm": state_space(rng, kind)}}
    adapters = jlora.init_lora(None, params, CONFIG)
    both = combine_params(params, adapters)

    def loss(both: Any) -> Any:
        base, adapters = split_params(both, params)
        ssm = base["mix"]["ssm"]
        return jlora.lora(model, CONFIG)(base, adapters, jnp.arange(8)).var() + ssm["A"].sum() * ssm["B"].sum()

    with told(kind in ("low rank", "batched")):
        labels = lora_labels(both)
    assert moved(both, trained(both, labels, loss)) == {"up/lora/A", "up/lora/B"}


@pytest.mark.parametrize("kind", ["square", "low rank"])
def test_adapters_of_weights_named_a_and_b(rng, kind):
    """A itself is adapted; also where no other weight is in the tree."""
    config = LoraConfig(rank=1, target_modules="**/A")
    for others in (weights(rng), {}):
        params = {**others, "ssm": state_space(rng, kind)}
        adapters = jlora.init_lora(None, params, config)
        both = combine_params(params, adapters)
        for tree in (both, adapters):
            labels = leaves(lora_labels(tree))
            assert {path for path, label in labels.items() if label == "lora"} == set(leaves(tree)) - set(
                leaves(params)
            )
        assert set(leaves(both)) - set(leaves(params)) == {"ssm/lora/A/A", "ssm/lora/A/B"}
        same(split_params(both), (params, adapters))


@pytest.mark.parametrize("name", ["LoRADenseAdapter_0", "lora", "q_lora", "Adapter", "adapters"])
def test_an_adapter_module_is_known_by_its_name(rng, name):
    tree = {**weights(rng), "mix": {name: random_adapter(rng, (5, 2), (2, 7))}}
    with told(False):
        labels = leaves(lora_labels(tree))
    assert {path for path, label in labels.items() if label == "lora"} == {f"mix/{name}/A", f"mix/{name}/B"}
    base, adapters = split_params(tree)
    assert set(leaves(adapters)) == {f"mix/{name}/A", f"mix/{name}/B"}
    same(combine_params(base, adapters), tree)


def test_an_adapter_module_with_a_name_of_its_own_is_known_by_the_base(rng):
    tree = {**weights(rng), "mix": {"ssm": random_adapter(rng, (5, 2), (2, 7))}}
    with told(True):
        assert "lora" not in jax.tree.leaves(lora_labels(tree))
    with told(False):
        assert leaves(lora_mask(tree, weights(rng))) == {path: "mix" in path for path in leaves(tree)}
    base, adapters = split_params(tree, weights(rng))
    assert base == {**weights_of(tree), "mix": {}}
    same(adapters["mix"], tree["mix"])
    same(combine_params(base, adapters), tree)


def weights_of(tree: Any) -> Any:
    return {name: node for name, node in tree.items() if name != "mix"}


def test_a_tree_of_params_beside_adapters_says_which_are_which(rng):
    params, adapters = weights(rng), entries(rng)
    for names in (("params", "adapters"), ("base", "lora")):
        tree = dict(zip(names, (params, adapters), strict=True))
        assert leaves(lora_mask(tree)) == {path: path.startswith(names[1]) for path in leaves(tree)}


@pytest.mark.parametrize("mark", [lora_labels, lora_mask, split_params])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"new": {"kernel": np.ones((5, 7))}}, r"^new/kernel: neither a leaf of the base nor part of an adapter$"),
        ({"up": {"A": np.ones((5, 2))}}, r"^up/A: neither a leaf of the base nor part of an adapter$"),
        ({"half": {"value": np.ones(3), "offset": np.ones(3)}}, r"^half/offset: neither a leaf of the base nor part"),
    ],
    ids=["foreign", "half", "partly"],
)
def test_a_leaf_that_the_base_does_not_know_is_refused(rng, mark, change, message):
    base = {**weights(rng), "half": {"value": np.ones(3)}}
    with pytest.raises(TargetError, match=message):
        mark({**base, **change}, base)


def test_an_adapter_in_a_list_has_no_place_in_a_linen_tree(rng):
    tree = {
        "layers": [{"kernel": random_array(rng, (5, 7)), "lora": random_adapter(rng, (5, 2), (2, 7))}],
        "x": jnp.ones(3),
    }
    with pytest.raises(TargetError, match=r"^layers/0/lora: found an adapter in a list, wanted a tree of dicts$"):
        split_params(tree)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"up": {"gone": {"value": np.ones(3)}}}, r"up/gone: no place for an adapter: the base has nothing there"),
        ({"up": {"offset": np.ones(3)}}, r"up: no place for an adapter: the base has a module there"),
    ],
)
def test_other_entries_need_a_leaf(rng, adapters, message):
    with pytest.raises(TargetError, match=message):
        combine_params(weights(rng), adapters)
