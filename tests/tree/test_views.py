"""Labels and masks for optax, the two halves of a Linen tree that holds both, and counts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict, freeze

from jlora import (
    LoraConfig,
    TargetError,
    combine_params,
    count_params,
    init_lora,
    lora_labels,
    lora_mask,
    merge_params,
    split_params,
)
from tests.reference import as64, assert_close, random_adapter, random_array, randomize, reference_delta


def linen_tree(rng: np.random.Generator) -> dict[str, Any]:
    """A Linen tree with adapters beside a kernel and an embedding, and one that stands alone."""
    return {
        "embed": {"embedding": random_array(rng, (13, 5)), "lora": random_adapter(rng, (13, 2), (2, 5))},
        "block": {
            "query": {
                "lora": random_adapter(rng, (5, 2), (2, 3, 7)),
                "kernel": random_array(rng, (5, 3, 7)),
                "bias": random_array(rng, (3, 7)),
            },
            "norm": {"scale": random_array(rng, (5,))},
        },
        "extra": {"LoRADenseAdapter_0": random_adapter(rng, (5, 2), (2, 11))},
        "head": {"kernel": random_array(rng, (5, 11))},
    }


ADAPTERS = {"embed/lora", "block/query/lora", "extra/LoRADenseAdapter_0"}
MAKE = {"dict": lambda tree: tree, "frozen": freeze}


def by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def identities(tree: Any) -> dict[str, int]:
    return {path: id(leaf) for path, leaf in by_path(tree).items()}


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize(("mark", "adapter", "other"), [(lora_labels, "lora", "frozen"), (lora_mask, True, False)])
def test_marks_tell_every_a_and_b_from_the_rest(rng, mark, adapter, other, make):
    tree = MAKE[make](linen_tree(rng))
    marks = mark(tree)
    assert jax.tree.structure(marks) == jax.tree.structure(tree)
    assert by_path(marks) == {p: adapter if p.rpartition("/")[0] in ADAPTERS else other for p in by_path(tree)}


@pytest.mark.parametrize("mark", [lora_labels, lora_mask])
def test_marks_of_adapters_alone_and_of_shapes(rng, mark):
    params = {"layers": [{"kernel": random_array(rng, (5, 7)), "bias": random_array(rng, (7,))}]}
    adapters = init_lora(None, params, LoraConfig(rank=2))
    yes = jax.tree.leaves(mark({"A": adapters["layers"][0]["kernel"]["A"], "B": jnp.ones((2, 7))}))[0]
    assert mark(adapters) == {"layers": [{"kernel": {"A": yes, "B": yes}, "bias": None}]}
    assert mark(jax.eval_shape(lambda: adapters)) == mark(adapters)
    assert yes not in jax.tree.leaves(mark(params))


@pytest.mark.parametrize(
    "tree",
    [
        {"A": (5, 2)},
        {"A": (5, 2), "B": (2, 7), "C": (3,)},
        {"A": {"kernel": (5, 2)}, "B": {"kernel": (2, 7)}},
        {"lora": {"kernel": (5, 7)}},
    ],
)
def test_only_a_mapping_of_exactly_the_arrays_a_and_b_is_an_adapter(rng, tree):
    arrays = jax.tree.map(lambda sizes: random_array(rng, sizes), tree, is_leaf=lambda node: isinstance(node, tuple))
    assert not any(jax.tree.leaves(lora_mask(arrays)))
    assert identities(split_params(arrays)[0]) == identities(arrays)


@pytest.mark.parametrize("make", MAKE)
def test_split_puts_each_adapter_at_its_weight_and_combine_brings_it_back(rng, make):
    tree = MAKE[make](linen_tree(rng))
    base, adapters = split_params(tree)
    kept = {p: i for p, i in identities(tree).items() if p.rpartition("/")[0] not in ADAPTERS}
    assert identities(base) == kept
    assert {path.rpartition("/")[0] for path in by_path(adapters)} == {
        "embed/embedding",
        "block/query/kernel",
        "extra/LoRADenseAdapter_0",
    }
    assert adapters["block"]["query"]["kernel"]["A"] is tree["block"]["query"]["lora"]["A"]
    assert adapters["block"]["norm"]["scale"] is None
    assert {type(half) for half in (base, adapters)} == {type(tree)}

    both = combine_params(base, adapters)
    assert jax.tree.structure(both) == jax.tree.structure(tree)
    assert identities(both) == identities(tree)


def test_split_and_combine_change_nothing_they_are_given(rng):
    tree = linen_tree(rng)
    before = identities(tree)
    base, adapters = split_params(tree)
    halves = identities(base), identities(adapters)
    combine_params(base, adapters)
    assert identities(tree) == before
    assert (identities(base), identities(adapters)) == halves


@pytest.mark.parametrize("make", MAKE)
def test_the_halves_of_a_linen_tree_are_what_merge_takes(rng, make):
    tree = linen_tree(rng)
    del tree["extra"]
    base, adapters = split_params(MAKE[make](tree))
    merged = merge_params(base, adapters, LoraConfig(rank=2, alpha=3))
    query = tree["block"]["query"]
    assert_close(merged["block"]["query"]["kernel"], as64(query["kernel"]) + reference_delta(query["lora"], 3))
    assert isinstance(merged, FrozenDict) == (make == "frozen")


@pytest.mark.parametrize("make", MAKE)
def test_combine_puts_made_adapters_under_lora(rng, make):
    base = MAKE[make]({"up": {"kernel": random_array(rng, (5, 7)), "bias": random_array(rng, (7,))}})
    adapters = init_lora(None, base, LoraConfig(rank=2))
    both = combine_params(base, adapters)
    assert {path: leaf.shape for path, leaf in by_path(both).items()} == {
        "up/bias": (7,),
        "up/kernel": (5, 7),
        "up/lora/A": (5, 2),
        "up/lora/B": (2, 7),
    }
    assert both["up"]["lora"]["A"] is adapters["up"]["kernel"]["A"]


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize(
    ("weights", "places"),
    [
        (["kernel"], ["lora"]),
        (["w"], ["lora/w"]),
        (["w", "v"], ["lora/w", "lora/v"]),
        (["kernel", "w"], ["lora/kernel", "lora/w"]),
        (["embedding", "kernel"], ["lora/embedding", "lora/kernel"]),
        (["embedding"], ["lora/embedding"]),
        (["A", "B"], ["lora/A", "lora/B"]),
    ],
    ids=str,
)
def test_adapters_of_other_weights_and_of_several_stand_under_their_names(rng, weights, places, make):
    names = ("kernel", "embedding", "w", "v", "A", "B", "bias")
    base = {"m": {name: random_array(rng, (5, 7)) for name in names}}
    made = {"m": {name: random_adapter(rng, (5, 2), (2, 7)) if name in weights else None for name in names}}
    both = combine_params(MAKE[make](base), MAKE[make](made))
    found = set(by_path(both)) - set(by_path(base))
    assert found == {f"m/{place}/{part}" for place in places for part in "AB"}
    assert [identities(half) for half in split_params(both)] == [identities(base), identities(made)]


def test_an_adapter_alone_is_all_adapter(rng):
    adapter = random_adapter(rng, (5, 2), (2, 7))
    base, adapters = split_params(adapter)
    assert count_params(base) == 0
    assert identities(adapters) == identities(adapter)
    assert identities(combine_params(base, adapters)) == identities(adapter)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"l": {"w": "adapter"}}, r"l/w: no place for an adapter: the base has a 'lora' beside the weight already"),
        ({"m": "adapter"}, r"m: no place for an adapter: the base has a module there, and no weight"),
        ({"m": {"kernel": 3}}, r"m/kernel: found int, wanted an adapter \{'A', 'B'\} or None"),
        ({"m": {"kernel": {"A": 3}}}, r"m/kernel"),
        ({"m": {"kernel": {"deep": "adapter"}}}, r"m/kernel"),
        ({"n": {"kernel": "adapter"}}, r"n/kernel: no place for an adapter: the base has nothing there"),
    ],
    ids=["taken", "module", "number", "half", "below", "foreign"],
)
def test_adapters_without_a_place_are_refused(rng, adapters, message):
    weights = {"kernel": random_array(rng, (5, 7)), "bias": random_array(rng, (7,))}
    base = {"m": weights, "l": {"w": random_array(rng, (5, 7)), "lora": random_array(rng, (3,))}}
    made = jax.tree.map(lambda leaf: random_adapter(rng, (5, 2), (2, 7)) if leaf == "adapter" else leaf, adapters)
    with pytest.raises(TargetError, match=message):
        combine_params(base, made)


@pytest.mark.parametrize("make", MAKE)
def test_counts_are_of_scalars(rng, make):
    tree = MAKE[make](linen_tree(rng))
    base, adapters = split_params(tree)
    wanted_base, wanted_adapters = 13 * 5 + 5 * 3 * 7 + 3 * 7 + 5 + 5 * 11, 2 * (13 + 5 + 5 + 21 + 5 + 11)
    assert (count_params(base), count_params(adapters)) == (wanted_base, wanted_adapters)
    assert count_params(tree) == wanted_base + wanted_adapters
    assert count_params(jax.eval_shape(lambda: tree)) == count_params(tree)


@pytest.mark.parametrize(("tree", "wanted"), [({}, 0), (None, 0), ([jnp.float32(1), 2.0], 2), (np.zeros((0, 5)), 0)])
def test_counts_of_trees_with_little_in_them(tree, wanted):
    assert count_params(tree) == wanted


def test_counts_do_not_overflow():
    assert count_params([jax.ShapeDtypeStruct((2**20, 2**20), jnp.bfloat16)] * 2) == 2**41


@pytest.mark.parametrize("make", MAKE)
def test_partition_leaves_the_base_bitwise_unchanged(rng, make):
    tree = MAKE[make](linen_tree(rng))
    start = jax.tree.map(np.asarray, tree)
    x, y = random_array(rng, (17, 5)), random_array(rng, (17, 3, 7))
    optimizer = optax.partition(
        {"lora": optax.adamw(1e-2, weight_decay=0.1), "frozen": optax.set_to_zero()}, lora_labels
    )

    def loss(tree: Any) -> jax.Array:
        query = tree["block"]["query"]
        hidden = jnp.einsum("nd,dr->nr", x * tree["block"]["norm"]["scale"], query["lora"]["A"])
        update = jnp.einsum("nr,rhk->nhk", hidden, query["lora"]["B"])
        rest = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves((tree["embed"], tree["extra"], tree["head"])))
        return jnp.mean((jnp.einsum("nd,dhk->nhk", x, query["kernel"]) + query["bias"] + update - y) ** 2) + rest

    @jax.jit
    def step(tree: Any, state: Any) -> Any:
        updates, state = optimizer.update(jax.grad(loss)(tree), state, tree)
        return optax.apply_updates(tree, updates), state

    state = optimizer.init(tree)
    for _ in range(10):
        tree, state = step(tree, state)
    for path, leaf in by_path(tree).items():
        changed = not np.array_equal(leaf, by_path(start)[path])
        assert changed == (path.rpartition("/")[0] in ADAPTERS), path


def test_the_optimizer_of_adapters_alone_has_no_state_for_the_base(rng):
    params = {"up": {"kernel": random_array(rng, (5, 7)), "bias": random_array(rng, (7,))}}
    adapters = randomize(rng, init_lora(None, params, LoraConfig(rank=2)))
    state = optax.adamw(1e-2).init(adapters)
    assert count_params(state) == 2 * count_params(adapters) + 1
