"""Which weights a configuration adapts and how: Flax's modules, patterns, overrides and every error."""

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora import LoraConfig, TargetError, init_lora
from jlora.tree import find_targets

STACK = 19


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def roles_of(params: Any, **fields: Any) -> dict[str, str]:
    targets = find_targets(params, LoraConfig(**{"rank": 1, **fields}))
    return {path: target.factorization.roles for path, target in targets.items()}


class Body(nn.Module):
    make: Callable[[], nn.Module]

    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        return x, self.make()(x)


STACKS = {"params": 0}, {"params": True}
WRAPPERS = {
    "plain": Body,
    "scan": nn.scan(Body, variable_axes=STACKS[0], split_rngs=STACKS[1], length=STACK),
    "vmap": nn.vmap(Body, variable_axes=STACKS[0], split_rngs=STACKS[1], in_axes=None, axis_size=STACK),
}


def params_of(cls: Any, fields: dict[str, Any], x: Any, wrapper: str, name: str | None) -> Any:
    module = WRAPPERS[wrapper](lambda: cls(**fields, name=name))
    return jax.eval_shape(module.init, jax.random.key(0), x, None)["params"]


IMAGE, CONV3 = (2, 17, 13, 5), (2, 7, 11, 13, 5)
# What a module of its own name is read as, what one of Flax's automatic name is, and both in a stack; ? is an error.
MODULES = [
    (nn.Dense, {"features": 7}, (3, 5), "io io bio bio"),
    (nn.Dense, {"features": 7, "use_bias": False}, (3, 5), "io io ? bio"),
    (nn.DenseGeneral, {"features": (7, 11)}, (2, 3, 5), "ioo ioo bioo bioo"),
    (nn.DenseGeneral, {"features": (7, 11), "use_bias": False}, (2, 3, 5), "? ? ? ?"),
    (nn.DenseGeneral, {"features": 7, "axis": (-2, -1)}, (2, 3, 5), "iio iio biio biio"),
    (nn.DenseGeneral, {"features": 7, "axis": (-2, -1), "use_bias": False}, (2, 3, 5), "? ? ? ?"),
    (nn.DenseGeneral, {"features": (7, 11), "axis": (1, 2)}, (2, 3, 5), "iioo iioo biioo biioo"),
    (nn.DenseGeneral, {"features": 7, "batch_dims": (0,)}, (2, 3, 5), "bio bio bbio bbio"),
    (nn.DenseGeneral, {"features": (7, 11), "batch_dims": (0, 1)}, (2, 3, 5), "bbioo bbioo bbbioo bbbioo"),
    (nn.DenseGeneral, {"features": 7, "use_bias": False}, (3, 5), "io io ? ?"),
    (nn.DenseGeneral, {"features": (5, 5)}, (3, 5), "? ? ? ?"),
    (nn.Conv, {"features": 7, "kernel_size": (3,)}, (2, 11, 5), "iio iio biio biio"),
    (nn.Conv, {"features": 7, "kernel_size": (3, 2)}, IMAGE, "iiio iiio biiio biiio"),
    (nn.Conv, {"features": 7, "kernel_size": (3, 2), "use_bias": False}, IMAGE, "? iiio ? iiiio"),
    (nn.Conv, {"features": 11, "kernel_size": (3, 2, 7)}, CONV3, "iiiio iiiio biiiio biiiio"),
    (nn.Conv, {"features": 11, "kernel_size": (3, 2, 7), "use_bias": False}, CONV3, "? iiiio ? iiiiio"),
    (nn.Conv, {"features": 22, "kernel_size": (3,), "feature_group_count": 2}, (2, 7, 10), "iio iio biio biio"),
    (nn.ConvTranspose, {"features": 7, "kernel_size": (3, 2)}, IMAGE, "iiio iiio biiio biiio"),
    (nn.ConvTranspose, {"features": 7, "kernel_size": (3,), "transpose_kernel": True}, (2, 11, 5), "? ? ? ?"),
    (nn.ConvLocal, {"features": 7, "kernel_size": (3,)}, (2, 11, 5), "bio bio bbio bbio"),
    (nn.Einsum, {"shape": (5, 7), "einsum_str": "abd,dk->abk"}, (2, 3, 5), "io io bio bio"),
    (nn.Einsum, {"shape": (5, 7), "einsum_str": "abd,dk->abk", "use_bias": False}, (2, 3, 5), "io io ? ?"),
    (nn.Einsum, {"shape": (5, 7, 11), "einsum_str": "abd,dhk->abhk"}, (2, 3, 5), "ioo ioo bioo bioo"),
    (nn.Einsum, {"shape": (5, 7, 11), "einsum_str": "abd,dhk->abhk", "use_bias": False}, (2, 3, 5), "? ? ? ?"),
    (nn.Einsum, {"shape": (3, 5, 7), "einsum_str": "and,ndk->ank"}, (2, 3, 5), "bio bio bbio bbio"),
    (nn.Einsum, {"shape": (5, 5, 5), "einsum_str": "ad,dhk->ahk"}, (3, 5), "? ? ? ?"),
]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("named", [True, False], ids=["named", "automatic"])
@pytest.mark.parametrize(
    ("cls", "fields", "x", "wanted"),
    MODULES,
    ids=[f"{cls.__name__}-" + "-".join(f"{v}" for v in fields.values()) for cls, fields, _, _ in MODULES],
)
def test_kernels_of_flax_modules_are_read_or_refused(cls, fields, x, wanted, named, wrapper):
    params = params_of(cls, fields, shape(*x), wrapper, "layer" if named else None)
    roles = wanted.split()[(not named) + 2 * (wrapper != "plain")]
    path = f"{'layer' if named else f'{cls.__name__}_0'}/kernel"
    if roles == "?":
        with pytest.raises(
            TargetError, match=rf"{path} \(.*fn= and args=\), or one letter per axis.*factorizations={{'{path}'"
        ):
            roles_of(params)
    else:
        assert roles_of(params) == {path: roles}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["layer", None], ids=["named", "automatic"])
def test_embedding_tables_are_read_as_vocabulary_in_features_out(name, wrapper):
    fields = {"num_embeddings": 13, "features": 5}
    params = params_of(nn.Embed, fields, jax.ShapeDtypeStruct((2, 3), jnp.int32), wrapper, name)
    assert roles_of(params) == {f"{name or 'Embed_0'}/embedding": "io" if wrapper == "plain" else "bio"}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("name", ["attention", None], ids=["named", "automatic"])
def test_attention_is_read_with_and_without_bias(name, use_bias, wrapper):
    fields = {"num_heads": 3, "qkv_features": 21, "out_features": 11, "use_bias": use_bias, "normalize_qk": True}
    params = params_of(nn.MultiHeadDotProductAttention, fields, shape(2, 13, 5), wrapper, name)
    prefix = name or "MultiHeadDotProductAttention_0"
    batch = "" if wrapper == "plain" else "b"
    wanted = {f"{prefix}/{part}/kernel": f"{batch}ioo" for part in ("key", "query", "value")}
    assert roles_of(params) == wanted | {f"{prefix}/out/kernel": f"{batch}iio"}


@pytest.mark.parametrize("changed", [{"query": (5, 2, 7)}, {"out": (3, 11, 5)}, {"value": (5, 21)}, {"key": None}])
def test_names_of_attention_say_nothing_where_the_heads_do_not_fit(changed):
    kernels = {"query": (5, 3, 7), "key": (5, 3, 7), "value": (5, 3, 7), "out": (3, 7, 5), **changed}
    with pytest.raises(TargetError, match=r"out/kernel .* can be read as ioo, iio"):
        roles_of({name: {"kernel": shape(*sizes)} for name, sizes in kernels.items() if sizes}, target_modules="out")


@pytest.mark.parametrize(
    ("module", "x"),
    [(nn.LayerNorm(), shape(2, 5)), (nn.GroupNorm(num_groups=5), shape(2, 5)), (nn.RMSNorm(), shape(2, 5))],
)
def test_norms_have_nothing_to_adapt(module, x):
    params = {"norm": jax.eval_shape(module.init, jax.random.key(0), x)["params"]}
    with pytest.raises(TargetError, match=r"'\*\*' adapts nothing: .* bias, a scale or a vector, .*\(norm/"):
        roles_of(params)


TREE = {
    "embed": {"embedding": shape(13, 5)},
    "layers": [
        {
            "attention": {
                "query": {"kernel": shape(5, 3, 7), "bias": shape(3, 7)},
                "out": {"kernel": shape(3, 7, 5), "bias": shape(5)},
            },
            "norm": {"scale": shape(5)},
            "up": {"kernel": shape(5, 11), "bias": shape(11)},
        }
        for _ in range(2)
    ],
    "head": {"kernel": shape(5, 2), "bias": shape(2)},
}
ALL = ["embed/embedding", "head/kernel"] + [
    f"layers/{i}/{path}/kernel" for i in range(2) for path in ("attention/out", "attention/query", "up")
]


@pytest.mark.parametrize(
    ("targets", "excluded", "wanted"),
    [
        ("**", (), r".*"),
        ("*", (), r".*"),
        ("layers", (), r"layers/.*"),
        ("layers/**", (), r"layers/.*"),
        ("layers/*/up", (), r"layers/./up/.*"),
        ("layers/?/up/kernel", (), r"layers/./up/.*"),
        ("layers/[1-9]", (), r"layers/1/.*"),
        ("layers/[!1]/**/kernel", (), r"layers/0/.*"),
        ("layers/**/attention", (), r"layers/./attention/.*"),
        ("**/attention/query", (), r".*/query/.*"),
        ("**/attention/*", (), r".*/attention/.*"),
        ("**/attention/**", (), r".*/attention/.*"),
        ("**/kernel", (), r".*/kernel"),
        ("**/layers/**/up/**/kernel", (), r".*/up/kernel"),
        ("**/embedding", (), r"embed/.*"),
        ("head/kernel", (), r"head/kernel"),
        ("**/query/bias", (), None),
        ("**/bias", (), None),
        ("**/norm/scale", (), None),
        (("head", "embed"), (), r"(head|embed)/.*"),
        ("**", "layers", r"(head|embed)/.*"),
        ("**", ("layers/0", "**/embedding"), r"(head|layers/1)/.*"),
        ("**", "**/attention/out/kernel", r"(?!.*/out/).*"),
        ("head", "head/bias", r"head/.*"),
    ],
)
def test_patterns_pick_weights_by_module_or_by_leaf(targets, excluded, wanted):
    if wanted is None:
        with pytest.raises(TargetError, match=re.escape(f"named by {targets!r}")):
            roles_of(TREE, target_modules=targets)
    else:
        found = roles_of(TREE, target_modules=targets, exclude_modules=excluded)
        assert set(found) == {path for path in ALL if re.fullmatch(wanted, path)}


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"target_modules": "hed"}, ["target_modules: 'hed' matches nothing; nearest paths: head"]),
        ({"target_modules": "Head/kernel"}, ["'Head/kernel' matches nothing; nearest paths: head/kernel"]),
        ({"target_modules": "head/kernel/A"}, ["'head/kernel/A' matches nothing; nearest paths: head/kernel"]),
        ({"target_modules": ("head", "**/norm")}, ["'**/norm' adapts nothing: ", "(layers/0/norm/scale"]),
        ({"exclude_modules": "layers/3"}, ["exclude_modules: 'layers/3' matches nothing; nearest paths: layers"]),
        ({"exclude_modules": "**"}, ["target_modules: '**' adapts nothing: what it matches is excluded"]),
        ({"target_modules": "head/bias"}, ["head/bias (2,), named by 'head/bias', has fewer than two axes"]),
        (
            {"target_modules": ("layers/0", "layers/1/attention/query/bias")},
            ["layers/1/attention/query/bias (3, 7), named by", "is a bias", "factorizations={'layers/1/attention/"],
        ),
        (
            {"target_modules": "head", "rank": 3},
            ["head/kernel (5, 2): rank 3 is larger than the smaller side 2; lower"],
        ),
        (
            {"target_modules": "head", "rank": 2, "rank_pattern": {"head": 4}},
            ["head/kernel (5, 2): rank 4 is larger than the smaller side 2", "rank_pattern={'head/kernel': 2}"],
        ),
        ({"rank_pattern": {"hea": 1}}, ["rank_pattern: 'hea' matches nothing that is adapted; nearest paths: head"]),
        ({"alpha_pattern": {"**/norm": 1}}, ["alpha_pattern: '**/norm' matches nothing that is adapted"]),
        ({"exclude_modules": "head", "alpha_pattern": {"head": 1}}, ["alpha_pattern: 'head' matches nothing that is"]),
        ({"factorizations": {"**/upp": "io"}}, ["factorizations: '**/upp' matches nothing that is adapted", "/up"]),
        (
            {"factorizations": {"head": "ioo"}},
            ["head/kernel (5, 2): the factorization 'ioo' given by 'head' has 3 axes"],
        ),
        (
            {"rank": 3, "target_modules": ("head", "nowhere", "embed/*"), "rank_pattern": {"x": 2}},
            ["3 problems:", "head/kernel (5, 2): rank 3", "'nowhere' matches nothing", "rank_pattern: 'x' matches"],
        ),
    ],
)
def test_configurations_that_do_not_fit_are_refused_with_paths_and_the_way_out(fields, messages):
    with pytest.raises(TargetError) as caught:
        roles_of(TREE, **fields)
    assert [text for text in messages if text not in str(caught.value)] == []


def test_many_problems_are_counted_and_cut():
    with pytest.raises(TargetError, match=r"(?s)^15 problems:.*m00/kernel.*and 3 more$") as caught:
        roles_of({f"m{i:02}": {"kernel": shape(2, 3, 5)} for i in range(15)}, target_modules="**/kernel")
    assert "m14" not in str(caught.value)


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(TargetError, match=r"two leaves .* path 'a/b'; rename"):
        roles_of({"a/b": shape(3, 5), "a": {"b": shape(3, 5)}})


@pytest.mark.parametrize(
    ("leaves", "fields", "wanted"),
    [
        ({"m/kernel": (3, 5, 7)}, {"factorizations": {"m/kernel": "oio"}}, {"m/kernel": "oio"}),
        ({"m/kernel": (3, 5, 7), "m/bias": (5, 7)}, {"factorizations": {"m": "bio"}}, {"m/kernel": "bio"}),
        ({"m/w": (3, 5, 7)}, {"factorizations": {"**/w": "iio"}}, {"m/w": "iio"}),
        ({"m/kernel": (5, 7)}, {"factorizations": {"**": "oi"}}, {"m/kernel": "oi"}),
        ({"m/kernel": (3, 5, 7)}, {"factorizations": {"m": "ioo", "**": "bio"}}, {"m/kernel": "ioo"}),
        ({"m/bias": (5, 7)}, {"factorizations": {"m/bias": "io"}}, {"m/bias": "io"}),
        ({"m/bias": (5, 7)}, {"factorizations": {"m/bias": "io"}, "target_modules": "m/bias"}, {"m/bias": "io"}),
    ],
)
def test_the_configuration_wins_over_the_rules(leaves, fields, wanted):
    assert roles_of({"m": {path[2:]: shape(*sizes) for path, sizes in leaves.items()}}, **fields) == wanted


@pytest.mark.parametrize(
    ("module", "kernel", "bias", "roles"),
    [
        ("Dense_0", (5, 5, 5), (5, 5), "bio"),
        ("Conv_3", (5, 5, 5, 5), (5,), "iiio"),
        ("Conv_0", (5,) * 4, (5, 5), "biio"),
    ],
)
def test_an_automatic_name_decides_where_sizes_are_equal(module, kernel, bias, roles):
    assert roles_of({module: {"kernel": shape(*kernel), "bias": shape(*bias)}}) == {f"{module}/kernel": roles}


def test_a_bare_weight_is_a_tree():
    assert roles_of(shape(5, 7)) == {"": "io"}


@flax.struct.dataclass
class Node:
    left: Any
    right: Any


CONTAINERS = {
    "dict": ({"left": {"0": shape(3, 5), "1": shape(7)}, "right": {"0": shape(2, 3)}}),
    "frozen": freeze({"left": {"0": shape(3, 5), "1": shape(7)}, "right": {"0": shape(2, 3)}}),
    "list": {"left": [shape(3, 5), shape(7)], "right": [shape(2, 3)]},
    "tuple": {"left": (shape(3, 5), shape(7)), "right": (shape(2, 3),)},
    "dataclass": Node([shape(3, 5), shape(7)], {0: shape(2, 3)}),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_gives_the_same_paths(container):
    assert roles_of(CONTAINERS[container]) == {"left/0": "io", "right/0": "io"}
    assert roles_of(CONTAINERS[container], target_modules="right") == {"right/0": "io"}


segments = st.sampled_from(["a", "b", "c", "kernel", "embed", "bias"])
sizes = st.sampled_from([(5, 7), (3, 2), (2, 5), (5,)])
trees = st.recursive(
    sizes.map(lambda s: np.zeros(s, np.float32)),
    lambda inner: st.dictionaries(segments, inner, min_size=1),
    max_leaves=8,
)
trees = trees.filter(lambda tree: isinstance(tree, dict))
patterns = st.lists(segments | st.sampled_from(["*", "**", "?", "k*", "[ab]"]), min_size=1, max_size=4).map("/".join)
SEGMENT = {"*": "[^/]*", "?": "[^/]", "k*": "k[^/]*", "[ab]": "[ab]"}


def flat(tree: Any, at: str = "") -> dict[str, tuple[int, ...]]:
    if not isinstance(tree, dict):
        return {at[1:]: tree.shape}
    return {path: found for name, node in tree.items() for path, found in flat(node, f"{at}/{name}").items()}


def matches(pattern: str, path: str) -> bool:
    """The whole path, by a regular expression over `/segment` each."""
    regex = "".join("(/[^/]+)*" if s == "**" else f"/{SEGMENT.get(s, s)}" for s in pattern.split("/"))
    return re.fullmatch(regex, f"/{path}" if path else "") is not None


def covers(pattern: str, path: str) -> bool:
    parts = path.split("/")
    return any(matches(pattern, "/".join(parts[:n])) for n in range(len(parts) + 1))


def slow_targets(shapes: dict[str, tuple[int, ...]], targets: list[str], excluded: list[str]) -> set[str] | None:
    """The adapted paths by the words of the specification, None where it asks for an error."""
    covered = [p for p in shapes if any(covers(t, p) for t in targets) and not any(covers(e, p) for e in excluded)]
    weights = {p for p in covered if len(shapes[p]) == 2 and p.split("/")[-1] not in ("bias", "scale")}
    named = {p for p in covered for t in targets if t.split("/")[-1] not in ("*", "**") and matches(t, p)}
    unused = [t for t in targets if not any(covers(t, p) for p in weights)]
    unused += [e for e in excluded if not any(covers(e, p) for p in shapes)]
    return None if unused or named - weights else weights


@st.composite
def patterns_of(draw: Any, tree: Any) -> str:
    """A path of the tree, or the start of one, some segments turned into wildcards; now and then any pattern."""
    if draw(st.integers(0, 7)) == 0:
        return draw(patterns)
    parts = draw(st.sampled_from(sorted(flat(tree)))).split("/")
    kept = parts[: draw(st.integers(1, len(parts)))]
    return "/".join(draw(st.sampled_from([part, part, "*", "**", "?", "[ab]"])) for part in kept)


@settings(max_examples=400)
@given(trees, st.data())
def test_targets_equal_a_slow_reference(tree, data):
    targets = data.draw(st.lists(patterns_of(tree), min_size=1, max_size=2))
    excluded = data.draw(st.lists(patterns_of(tree), max_size=1))
    wanted = slow_targets(flat(tree), targets, excluded)
    if wanted is None:
        with pytest.raises(TargetError):
            roles_of(tree, target_modules=targets, exclude_modules=excluded)
    else:
        found = set(roles_of(tree, target_modules=targets, exclude_modules=excluded))
        assert found == wanted
        assert not any(covers(pattern, path) for pattern in excluded for path in found)


@settings(max_examples=25)
@given(trees, st.data())
def test_another_target_never_changes_the_other_adapters(tree, data):
    weights = sorted(slow_targets(flat(tree), ["**"], []) or [])
    if len(weights) < 2:
        return
    few = data.draw(st.lists(st.sampled_from(weights), min_size=1, max_size=len(weights) - 1, unique=True))
    less, more = (init_lora(jax.random.key(3), tree, LoraConfig(rank=1, target_modules=t)) for t in (few, weights))
    kept = dict(jax.tree_util.tree_leaves_with_path(more))
    for path, leaf in jax.tree_util.tree_leaves_with_path(less):
        np.testing.assert_array_equal(leaf, kept[path])


@pytest.mark.parametrize(("scale", "wanted"), [((7,), "iiio"), ((3, 7), "biio"), (None, "iiio")])
def test_the_norm_beside_a_convolution_without_bias_shows_a_stack(scale, wanted):
    params = {"Conv_0": {"kernel": shape(3, 2, 5, 7)}}
    if scale is not None:
        params["BatchNorm_0"] = {"scale": shape(*scale)}
    assert roles_of(params) == {"Conv_0/kernel": wanted}


def test_what_is_added_with_broadcasting_is_no_weight():
    params = {"positions": shape(1, 11, 5), "token": shape(1, 1, 5), "up": {"kernel": shape(5, 7)}}
    assert roles_of(params) == {"up/kernel": "io"}
