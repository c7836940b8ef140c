"""Params in boxes, as Flax's `nn.Partitioned` names their axes: adapters whose parts have names of their own."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import jlora
from jlora import Factorization, LoraConfig
from jlora.adapter import boxed_entry
from jlora.boxes import box_like, box_named, is_box, unboxed
from jlora.compose import extract, resize
from jlora.interop.peft import NESTED, read_peft, write_peft
from jlora.paths import leaves_by_path
from tests.reference import as64, assert_close, random_array, randomize, reference_delta

P = PartitionSpec
KERNEL = nn.initializers.lecun_normal()
CONFIG = LoraConfig(rank=2, alpha=3)


class Block(nn.Module):
    """A head for queries, and back."""

    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        heads = nn.with_logical_partitioning(KERNEL, ("embed", "heads", "kv"))
        h = nn.DenseGeneral((2, 7), kernel_init=heads, name="query")(x)
        back = nn.with_partitioning(KERNEL, ("heads", "kv", "embed"))
        bias = nn.with_partitioning(nn.initializers.normal(), ("embed",))
        return nn.DenseGeneral(5, axis=(-2, -1), kernel_init=back, bias_init=bias, name="out")(h), None


class Model(nn.Module):
    """A table, blocks in a scan that names its axis, and a head without boxes."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        table = nn.with_partitioning(nn.initializers.normal(), ("vocab", "embed"))
        x = nn.Embed(13, 5, embedding_init=table, name="embed")(tokens)
        split: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        blocks = nn.scan(Block, **split, length=3, metadata_params={nn.PARTITION_NAME: "layers"})
        return nn.Dense(11, name="head")(blocks(name="blocks")(x, None)[0])


TOKENS = jnp.arange(8).reshape(2, 4)
SPECS = {
    "embed/embedding": (P("vocab", None), P(None, "embed")),
    "blocks/query/kernel": (P("layers", "embed", None), P("layers", None, "heads", "kv")),
    "blocks/out/kernel": (P("layers", "heads", "kv", None), P("layers", None, "embed")),
    "head/kernel": (P(), P()),
}


def call(params: Any, tokens: Any) -> Any:
    return Model().apply({"params": params}, tokens)


def drawn(rng: np.random.Generator) -> tuple[Any, Any, LoraConfig]:
    """Params in boxes, random adapters, and their configuration."""
    params = jax.eval_shape(Model().init, jax.random.key(0), TOKENS)["params"]
    config = jlora.resolve_config(call, CONFIG, params, TOKENS)
    params = randomize(rng, params)
    return params, randomize(rng, jlora.init_lora(None, params, config)), config


def same(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def specs(tree: Any) -> dict[str, Any]:
    found = jax.tree_util.tree_leaves_with_path(nn.get_partition_spec(tree), is_leaf=lambda node: isinstance(node, P))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): spec for path, spec in found}


def test_each_part_names_the_axes_that_it_has_of_the_weight(rng):
    params, adapters, _ = drawn(rng)
    assert specs(adapters) == {f"{path}/{part}": SPECS[path]["AB".index(part)] for path in SPECS for part in "AB"}
    both = jlora.combine_params(params, adapters)
    found = specs(both)
    assert {path: spec for path, spec in found.items() if "/lora/" not in path} == specs(params)
    for path, (a, b) in SPECS.items():
        module = path.rpartition("/")[0]
        assert (found[f"{module}/lora/A"], found[f"{module}/lora/B"]) == (a, b)


def test_without_the_boxes_everything_is_the_same(rng):
    params, adapters, config = drawn(rng)
    plain, own = unboxed(params), unboxed(adapters)
    assert jlora.resolve_config(call, CONFIG, plain, TOKENS) == config
    same(unboxed(jlora.init_lora(None, params, config)), jlora.init_lora(None, plain, config))
    shapes = jax.eval_shape(lambda: params)
    made = jax.eval_shape(lambda: jlora.init_lora(None, shapes, config))
    assert jax.tree.structure(made) == jax.tree.structure(adapters)
    assert str(jlora.summary(params, adapters, config)) == str(jlora.summary(plain, own, config))
    explained, wanted = (str(jlora.explain(call, config, tree, TOKENS)) for tree in (params, plain))
    assert explained == wanted
    same(jlora.tree_lora_delta(adapters), jlora.tree_lora_delta(own))
    same(unboxed(jlora.merge_params(params, adapters, config)), jlora.merge_params(plain, own, config))
    y = jlora.lora(call, config, strict=True)(params, adapters, TOKENS)
    same(y, jlora.lora(call, config, strict=True)(plain, own, TOKENS))
    same(y, jlora.lora(call, config)(params, own, TOKENS))
    same(y, jlora.lora(call, config)(plain, adapters, TOKENS))


def test_the_function_gets_its_boxes_back_and_is_that_of_the_merged_params(rng):
    params, adapters, config = drawn(rng)

    def checked(given: Any, tokens: Any) -> Any:
        assert jax.tree.structure(given) == jax.tree.structure(params)
        return call(given, tokens)

    merged = jlora.merge_params(params, adapters, config)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    y = jlora.lora(checked, config)(params, adapters, TOKENS)
    assert_close(y, as64(call(merged, TOKENS)), factor=20)
    table, entry = params["embed"]["embedding"].value, unboxed(adapters)["embed"]["embedding"]
    assert_close(merged["embed"]["embedding"].value, as64(table) + reference_delta(entry, 3))


def test_merging_is_undone_in_the_boxes(rng):
    params, adapters, config = drawn(rng)
    merged, residual = jlora.merge_params(params, adapters, config, return_residual=True)
    same(jlora.unmerge_params(merged, adapters, config, residual=residual), params)
    jax.tree.map(lambda f, w: assert_close(f, as64(w)), jlora.unmerge_params(merged, adapters, config), params)


def test_gradients_come_in_the_boxes_of_the_adapters(rng):
    params, adapters, config = drawn(rng)
    loss = jax.jit(lambda adapters: jlora.lora(call, config)(params, adapters, TOKENS).var())
    grads = jax.grad(loss)(adapters)
    assert specs(grads) == specs(adapters)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(grads))


def test_a_linen_tree_holds_boxes_of_both(rng):
    params, adapters, _ = drawn(rng)
    both = jlora.combine_params(params, adapters)
    same(jlora.split_params(both), (params, adapters))
    same(jlora.split_params(both, unboxed(params)), (params, adapters))
    marks = jlora.lora_mask(both)
    assert jax.tree.structure(marks) == jax.tree.structure(both)
    assert sum(jax.tree.leaves(marks)) == 2 * len(SPECS)
    assert marks == jlora.lora_mask(both, params) == jlora.lora_mask(both, unboxed(params))
    assert all(jax.tree.leaves(jlora.lora_labels(adapters)))


def test_files_hold_arrays_and_the_params_say_the_boxes(rng, tmp_path):
    params, adapters, config = drawn(rng)
    jlora.save_adapters(tmp_path / "own", adapters, config)
    same(jlora.load_adapters(tmp_path / "own")[0], unboxed(adapters))
    same(jlora.load_adapters(tmp_path / "own", params=params)[0], adapters)
    found, _, report = jlora.load_adapters(tmp_path / "own", params={"embed": params["embed"]}, strict=False)
    assert report.matched == ("embed/embedding",)
    same(found, {"embed": adapters["embed"]})


def test_adapters_of_peft_come_in_boxes(rng, tmp_path):
    box = nn.Partitioned(random_array(rng, (7, 5)), ("out", "in"))
    params = {"up": {"weight": box, "bias": nn.Partitioned(random_array(rng, (7,)), ("out",))}}
    config = LoraConfig(rank=2, factorizations={"**": "oi"})
    write_peft(tmp_path / "peft", jlora.init_lora(None, params, config), config, NESTED)
    found, _ = read_peft(tmp_path / "peft", NESTED, params=params)
    assert specs(found) == {"up/weight/A": P("in", None), "up/weight/B": P(None, "out")}


def test_every_kind_of_part_has_names(rng):
    box = nn.Partitioned(jnp.ones((3, 5, 2, 7)), ("layers", "embed", "heads", "kv"))
    shapes = {"A": (3, 5, 2), "B": (3, 2, 2, 7), "magnitude": (3, 2, 7), "value": (3, 5, 2, 7), "offset": (3, 5, 2, 7)}
    parts = {name: jnp.ones(shape) for name, shape in shapes.items()}
    found = boxed_entry(box, parts, Factorization("bioo"))
    assert {name: part.names for name, part in found.items()} == {
        "A": ("layers", "embed", None),
        "B": ("layers", None, "heads", "kv"),
        "magnitude": ("layers", "heads", "kv"),
        "value": box.names,
        "offset": box.names,
    }
    assert boxed_entry(box, {"value": parts["value"]}, None)["value"].names == box.names


def test_extraction_and_resizing_take_boxes(rng):
    params, adapters, config = drawn(rng)
    tuned = jlora.merge_params(params, adapters, config)
    found, own, _ = extract(params, tuned, config)
    assert specs(found) == specs(adapters)
    again = jlora.merge_params(params, found, own)
    jax.tree.map(lambda f, w: assert_close(f, as64(w), factor=5), again, tuned)
    smaller, _ = resize(adapters, config, rank=1)
    same(smaller, resize(unboxed(adapters), config, rank=1)[0])


@pytest.mark.parametrize("where", ["box", "context"])
def test_a_mesh_keeps_the_weight_factored(rng, where):
    """Flax puts a sharding constraint on what it takes out of its box."""
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    box = nn.Partitioned(random_array(rng, (5, 7)), ("data", "model"), mesh=mesh if where == "box" else None)
    params = {"kernel": box}
    adapters = randomize(rng, jlora.init_lora(None, params, CONFIG))
    assert adapters["kernel"]["A"].mesh == box.mesh
    x = random_array(rng, (3, 5))
    dense = nn.Dense(7, use_bias=False, kernel_init=nn.with_partitioning(KERNEL, box.names, mesh=box.mesh))
    adapted = jax.jit(jlora.lora(lambda params, x: dense.apply({"params": params}, x), CONFIG, strict=True))
    if where == "box":
        y = adapted(params, adapters, x)
    else:
        with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh):
            y = adapted(params, adapters, x)
    delta = reference_delta(unboxed(adapters)["kernel"], 3)
    assert_close(y, as64(x) @ (as64(box.value) + delta), factor=2)


def test_boxes_are_told_from_other_nodes():
    box = nn.Partitioned(jnp.ones((2, 3)), ("a",))
    assert is_box(box)
    assert not any(map(is_box, [jnp.ones(2), {"unbox": 1}, None, "unbox", nn.Partitioned, [box]]))
    tree = {"x": [box, 3], "y": None}
    assert unboxed({"x": 1, "y": None}) == {"x": 1, "y": None}
    assert jax.tree.map(np.shape, unboxed(tree)) == {"x": [(2, 3), ()], "y": None}
    assert leaves_by_path(tree).keys() == {"x/0", "x/1"}
    nested = nn.Partitioned(nn.LogicallyPartitioned(jnp.ones(2), ("b",)), ("a",))
    assert unboxed(nested).shape == (2,)
    assert box_like(nested, 3) == nn.Partitioned(nn.LogicallyPartitioned(3, ("b",)), ("a",))
    assert box_like(jnp.ones(2), 3) == 3
    assert box_named(box, 3, (0, 1, None)).names == ("a", None, None)
    assert box_named(jnp.ones(2), 3, (0,)) == 3
