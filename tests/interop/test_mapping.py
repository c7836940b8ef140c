"""Mappings: where names of a Hugging Face model lie in a tree, how their axes lie there, and the way back."""

import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jlora
from jlora.interop.peft import FLAT, NESTED, Row, _mapping, read_peft, read_peft_arrays, write_peft
from jlora.paths import leaves_by_path
from tests.interop.files import delta, embedding_pair, experts_pair, pair, write_folder
from tests.reference import assert_close

Rng = np.random.Generator


def merged_with_zeros(folder: Path, shapes: dict[str, tuple[int, ...]], mapping: Any, **options: Any) -> dict[str, Any]:
    """The updates by path, as merging into zeros gives them, in float32."""
    params = {path: jnp.zeros(shape) for path, shape in shapes.items()}
    entries, config = read_peft_arrays(folder, mapping, params=params, **options)
    return jlora.merge_params(params, {path: entries.get(path) for path in params}, config)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def round_trip(folder: Path, mapping: Any) -> None:
    """Written back through the mapping, the tensors are the same to the byte."""
    adapters, config = read_peft(folder, mapping)
    write_peft(folder.parent / "again", adapters, config, mapping)
    again, first = files_of(folder.parent / "again"), files_of(folder)
    assert again["adapter_model.safetensors"] == first["adapter_model.safetensors"]
    assert again["adapter_config.json"] == first["adapter_config.json"]


# kind -> the axes of the Hugging Face weight, and how many of them may be split.
KINDS = {
    "linear": ((6, 10), 2),
    "conv1d": ((10, 6), 2),
    "embedding": ((15, 6), 2),
    "conv": ((6, 10, 3, 2), 0),
    "experts": ((3, 6, 10), 3),
    "experts_t": ((3, 10, 6), 3),
}


def tensors_of(rng: Rng, kind: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """The tensors of a file with one weight, the weight's name, and what the configuration says of it."""
    if kind == "embedding":
        return embedding_pair(rng, "m.e", 15, 6), "m.e.weight", {}
    if kind.startswith("experts"):
        return experts_pair(rng, "m.e", 3, 6, 10), "m.e.w", {"target_parameters": ["e.w"]}
    if kind == "conv":
        return pair(rng, "m.e", 6, (10, 3, 2)), "m.e.weight", {}
    return pair(rng, "m.e", 6, 10), "m.e.weight", {"fan_in_fan_out": kind == "conv1d"}


@st.composite
def layouts(draw: Any) -> tuple[str, tuple[int, ...] | None, tuple[int, ...] | None]:
    """A kind, and a reshape and a transpose that fit its weight."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    shape, splittable = KINDS[kind]
    sizes: list[int] = []
    for axis, size in enumerate(shape):
        factors = [n for n in range(1, size + 1) if size % n == 0]
        first = draw(st.sampled_from(factors)) if axis < splittable and draw(st.booleans()) else None
        sizes += [size] if first is None else [first, size // first]
    reshape = tuple(sizes) if draw(st.booleans()) or len(sizes) > len(shape) else None
    transpose = tuple(draw(st.permutations(range(len(sizes))))) if draw(st.booleans()) else None
    if reshape is not None and draw(st.booleans()):
        hidden = draw(st.integers(0, len(sizes) - 1))
        reshape = tuple(-1 if axis == hidden else n for axis, n in enumerate(sizes))
    if kind == "conv":
        reshape = None
    return kind, reshape, transpose


@settings(max_examples=40)
@given(layout=layouts(), seed=st.integers(0, 2**31), rs=st.booleans())
def test_a_delta_in_the_tree_is_the_delta_reshaped_and_transposed(layout: Any, seed: int, rs: bool) -> None:
    kind, reshape, transpose = layout
    tensors, name, fields = tensors_of(np.random.default_rng(seed), kind)
    wanted = delta(tensors, "m.e", kind, rs=rs)
    wanted = wanted if reshape is None else wanted.reshape(reshape)
    wanted = wanted if transpose is None else wanted.transpose(transpose)
    mapping = (Row(name, "tree/w", transpose=transpose, reshape=reshape),)
    with tempfile.TemporaryDirectory() as root:
        folder = write_folder(Path(root) / "first", tensors, use_rslora=rs, **fields)
        options = {"transposed_experts": kind == "experts_t"}
        found = merged_with_zeros(folder, {"tree/w": wanted.shape}, mapping, **options)
        assert_close(found["tree/w"], wanted)
        if kind != "experts_t":
            round_trip(folder, mapping)


@settings(max_examples=25)
@given(layout=layouts(), seed=st.integers(0, 2**31))
def test_magnitudes_follow_their_axes(layout: Any, seed: int) -> None:
    kind, reshape, transpose = layout
    if kind.startswith("experts"):
        return
    rng = np.random.default_rng(seed)
    tensors, name, fields = tensors_of(rng, kind)
    base = rng.standard_normal(KINDS[kind][0]).astype("float32")
    roles = {"linear": "oi", "conv1d": "io", "embedding": "io", "conv": "oiii"}[kind]
    outs = base.shape[roles.index("o")]
    magnitude = rng.uniform(0.5, 2, (1, outs, 1, 1) if kind == "conv" else (outs,)).astype("float32")
    tensors["m.e.lora_magnitude_vector"] = magnitude
    total = base + delta(tensors, "m.e", kind)
    axes = tuple(axis for axis, role in enumerate(roles) if role == "i")
    along = [1] * total.ndim
    along[roles.index("o")] = outs
    wanted = magnitude.astype("float64").reshape(along) * total / np.sqrt((total**2).sum(axes, keepdims=True))

    def placed(array: Any) -> Any:
        array = array if reshape is None else array.reshape(reshape)
        return array if transpose is None else array.transpose(transpose)

    mapping = (Row(name, "tree/w", transpose=transpose, reshape=reshape),)
    with tempfile.TemporaryDirectory() as root:
        folder = write_folder(Path(root) / "first", tensors, **fields)
        params = {"tree": {"w": jnp.asarray(placed(base))}}
        adapters, config = read_peft(folder, mapping, params=params)
        assert_close(jlora.merge_params(params, adapters, config)["tree"]["w"], placed(wanted))
        round_trip(folder, mapping)


def test_whole_tensors_and_biases_follow_their_row(tmp_path: Path, rng: Rng) -> None:
    weight, bias = rng.standard_normal((6, 10)).astype("float32"), rng.standard_normal(6).astype("float32")
    tensors = pair(rng, "q", 6, 10) | {"q.lora_B.bias": bias, "head.weight": weight}
    mapping = (
        Row("q.weight", "q/w", (2, 0, 1), (2, 3, -1)),
        Row("q.bias", "q/b", reshape=(2, 3)),
        Row("head.weight", "head/w", (1, 0)),
    )
    folder = write_folder(tmp_path / "first", tensors, lora_bias=True, modules_to_save=["head"])
    found = merged_with_zeros(folder, {"q/w": (10, 2, 3), "q/b": (2, 3), "head/w": (10, 6)}, mapping)
    assert_close(found["q/w"], delta(tensors, "q", "linear").reshape(2, 3, 10).transpose(2, 0, 1))
    assert_close(found["q/b"], 2.5 * bias.astype("float64").reshape(2, 3))
    assert_close(found["head/w"], weight.T.astype("float64"))
    round_trip(folder, mapping)


def test_a_whole_tensor_is_not_written_through_a_reshape(tmp_path: Path, rng: Rng) -> None:
    folder = write_folder(tmp_path / "a", {"q.weight": rng.standard_normal((6, 10)).astype("float32")})
    mapping = (Row("q.weight", "q/w", (2, 0, 1), (2, 3, -1)),)
    adapters, config = read_peft(folder, mapping)
    assert adapters["q"]["w"]["value"].shape == (10, 2, 3)
    with pytest.raises(jlora.DataError, match="q/w: the shape of a whole tensor is not known through the reshape"):
        write_peft(tmp_path / "b", adapters, config, mapping)
    assert not (tmp_path / "b").exists()


def test_a_convolution_in_the_layout_of_flax(tmp_path: Path, rng: Rng) -> None:
    tensors = pair(rng, "stem", 5, (3, 2, 7))
    mapping = (Row("{x*}.weight", "{x/}/kernel", (2, 3, 1, 0)),)
    folder = write_folder(tmp_path / "first", tensors)
    adapters, config = read_peft(folder, mapping)
    assert dict(config.factorizations) == {"stem/kernel": "iiio"}
    assert {name: part.shape for name, part in adapters["stem"]["kernel"].items()} == {"A": (2, 7, 3, 2), "B": (2, 5)}
    found = merged_with_zeros(folder, {"stem/kernel": (2, 7, 3, 5)}, mapping)
    assert_close(found["stem/kernel"], delta(tensors, "stem", "conv").transpose(2, 3, 1, 0))
    round_trip(folder, mapping)
    fresh = jlora.LoraConfig(rank=2, alpha=5, factorizations={"stem/kernel": "iiio"})
    write_peft(tmp_path / "fresh", adapters, fresh, mapping)
    written = files_of(tmp_path / "fresh")["adapter_model.safetensors"]
    assert written == files_of(folder)["adapter_model.safetensors"]


def test_a_convolution_is_not_written_through_a_reshape(tmp_path: Path, rng: Rng) -> None:
    mapping = (Row("stem.weight", "stem", reshape=(5, 3, 2, 2, 7)),)
    adapters, config = read_peft(write_folder(tmp_path / "a", pair(rng, "stem", 5, (6, 2, 7))), mapping)
    with pytest.raises(jlora.DataError, match=r"stem: a convolution is not written through the reshape of the row"):
        write_peft(tmp_path / "b", adapters, config, mapping)


def test_placeholders(tmp_path: Path, rng: Rng) -> None:
    """{x} is one segment, {x*} any number, {x/} the same with slashes; keys of the tree may hold dots."""
    names = ["enc.0.a.q", "enc.1.a.q", "dec.deep.er.1.k", "flat"]
    tensors = {key: value for name in names for key, value in pair(rng, name, 3, 5).items()}
    mapping = (
        Row("enc.{i}.a.{p}.weight", "{p}/layers_{i}/w"),
        Row("dec.{rest*}.weight", "decoder/{rest/}/w", (1, 0)),
        Row("{one}.weight", "top {one}"),
    )
    folder = write_folder(tmp_path / "first", tensors)
    adapters, _ = read_peft(folder, mapping)
    assert set(leaves_by_path(adapters, is_leaf=lambda node: "A" in node)) == {
        "q/layers_0/w",
        "q/layers_1/w",
        "decoder/deep/er/1/k/w",
        "top flat",
    }
    round_trip(folder, mapping)
    flat, _ = read_peft(folder, FLAT)
    assert set(flat) == {f"{name}.weight" for name in names}
    assert set(read_peft(folder, NESTED)[0]) == {"enc", "dec", "flat"}


def test_a_placeholder_that_stands_twice_is_the_same_twice(tmp_path: Path, rng: Rng) -> None:
    mapping = (Row("{x}.{x}.weight", "{x}"),)
    folder = write_folder(tmp_path / "a", pair(rng, "one.one", 3, 5))
    assert set(read_peft(folder, mapping)[0]) == {"one"}
    with pytest.raises(jlora.DataError, match=r"one.two.weight: no row of the mapping has this name"):
        read_peft(write_folder(tmp_path / "b", pair(rng, "one.two", 3, 5)), mapping)


STACKED = (
    Row("l.{i}.q.weight", "l/{i}/qkv", (1, 0), stack=((0, 3),)),
    Row("l.{i}.k.weight", "l/{i}/qkv", (1, 0), stack=((1, 3),)),
    Row("l.{i}.v.weight", "l/{i}/qkv", (1, 0), stack=((2, 3),)),
    Row("l.{i}.e.{e}.weight", "experts", stack=(("{i}", 2), ("{e}", 4))),
)


def test_stacks_with_holes(tmp_path: Path, rng: Rng) -> None:
    modules = ["l.0.q", "l.0.v", "l.1.e.0", "l.1.e.3", "l.0.e.2"]
    tensors = {key: value for name in modules for key, value in pair(rng, name, 3, 5).items()}
    folder = write_folder(tmp_path / "first", tensors)
    found = merged_with_zeros(folder, {"l/0/qkv": (3, 5, 3), "experts": (2, 4, 3, 5)}, STACKED)
    qkv, experts = np.zeros((3, 5, 3)), np.zeros((2, 4, 3, 5))
    qkv[0], qkv[2] = (delta(tensors, f"l.0.{name}", "linear").T for name in "qv")
    experts[1, 0], experts[1, 3], experts[0, 2] = (delta(tensors, name, "linear") for name in modules[2:])
    assert_close(found["l/0/qkv"], qkv)
    assert_close(found["experts"], experts)
    entries, config = read_peft_arrays(folder, STACKED)
    assert dict(config.factorizations) == {"l/0/qkv": "bio", "experts": "bboi"}
    assert not entries["experts"]["A"][0, 0].any()
    round_trip(folder, STACKED)


def test_a_stack_is_written_from_fresh_adapters(tmp_path: Path, rng: Rng) -> None:
    config = jlora.LoraConfig(rank=2, alpha=3, factorizations={"l/0/qkv": "bio"}, target_modules=("l",))
    entry = {"A": jnp.asarray(rng.standard_normal((3, 5, 2))), "B": jnp.asarray(rng.standard_normal((3, 2, 7)))}
    write_peft(tmp_path / "a", {"l": {"0": {"qkv": entry}}}, config, STACKED)
    flat, _ = read_peft(tmp_path / "a")
    assert set(flat) == {"l.0.q.weight", "l.0.k.weight", "l.0.v.weight"}
    for index, name in enumerate("qkv"):
        assert np.array_equal(flat[f"l.0.{name}.weight"]["A"], entry["A"][index])
        assert np.array_equal(flat[f"l.0.{name}.weight"]["B"], entry["B"][index])


@pytest.mark.parametrize("part", ["magnitude", "value"])
def test_a_hole_is_refused_where_zeros_are_no_hole(part: str, tmp_path: Path, rng: Rng) -> None:
    key = {"magnitude": "l.0.q.lora_magnitude_vector", "value": "l.0.q.base_layer.weight"}[part]
    shape = {"magnitude": (3,), "value": (3, 5)}[part]
    tensors = pair(rng, "l.0.q", 3, 5) | {key: np.ones(shape, "float32")}
    with pytest.raises(jlora.DataError, match=f"l/0/qkv: 2 of 3 weights of the stack have no {part}"):
        read_peft(write_folder(tmp_path / "a", tensors), STACKED)


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"out": 4}, {}),
        ({"rank": 3}, {"rank_pattern": {"v": 3}}),
        ({"dtype": "float16"}, {}),
        ({}, {"alpha_pattern": {"v": 1}}),
    ],
)
def test_pieces_of_a_stack_that_differ(change: Any, fields: Any, tmp_path: Path, rng: Rng) -> None:
    tensors = pair(rng, "l.0.q", 3, 5) | pair(rng, "l.0.v", **{"out": 3, "ins": 5} | change)
    with pytest.raises(jlora.DataError, match=r"l/0/qkv: l.0.q.weight, l.0.v.weight differ in rank, alpha, shape"):
        read_peft(write_folder(tmp_path / "a", tensors, **fields), STACKED)


def test_a_place_outside_of_a_stack(tmp_path: Path, rng: Rng) -> None:
    for name in ("l.2.e.0", "l.0.e.4", "l.x.e.0"):
        with pytest.raises(jlora.DataError, match=f"{name}.weight: no row of the mapping has this name"):
            read_peft(write_folder(tmp_path / "a", pair(rng, name, 3, 5)), STACKED)


def test_names_that_are_not_mapped_are_all_named(tmp_path: Path, rng: Rng) -> None:
    tensors = pair(rng, "a.q", 3, 5) | pair(rng, "a.k", 3, 5) | pair(rng, "b.q", 3, 5)
    folder = write_folder(tmp_path / "a", tensors)
    with pytest.raises(jlora.DataError) as caught:
        read_peft(folder, (Row("a.q.weight", "q"), Row("a.v.weight", "v")))
    text = str(caught.value)
    assert "2 problems" in text
    assert "a.k.weight: no row of the mapping has this name; nearest rows: a.v.weight" in text
    assert "b.q.weight: no row" in text


def test_unclear_mappings(tmp_path: Path, rng: Rng) -> None:
    folder = write_folder(tmp_path / "a", pair(rng, "a", 3, 5) | pair(rng, "b", 3, 5))
    with pytest.raises(jlora.DataError, match=r"a.weight: 2 rows map it: \{x\}.weight, a.weight"):
        read_peft(folder, (Row("{x}.weight", "{x}"), Row("a.weight", "other")))
    with pytest.raises(jlora.DataError, match=r"b.weight and a.weight both map to same"):
        read_peft(folder, (Row("a.weight", "same"), Row("b.weight", "same")))
    with pytest.raises(jlora.DataError, match=r"b.weight and a.weight both map to same \[1\]"):
        read_peft(folder, tuple(Row(f"{name}.weight", "same", stack=((1, 2),)) for name in "ab"))
    with pytest.raises(jlora.DataError, match="x/y: x is a leaf and a module at once"):
        read_peft(folder, (Row("a.weight", "x"), Row("b.weight", "x/y")))
    adapters, config = read_peft(folder)
    with pytest.raises(
        jlora.DataError, match=r"a.weight: no row of the mapping has this path; nearest rows: b.weight, zz"
    ):
        write_peft(tmp_path / "b", adapters, config, (Row("zz", "zz"), Row("b.weight", "b.weight")))
    with pytest.raises(jlora.DataError, match=r"a.weight: 2 rows map it to the place \[\]: a.weight, x.weight"):
        write_peft(tmp_path / "b", adapters, config, tuple(Row(n, "a.weight") for n in ("a.weight", "x.weight")))
    assert not (tmp_path / "b").exists()


def test_one_path_is_no_stack_and_a_weight(tmp_path: Path, rng: Rng) -> None:
    mapping = (Row("l.{e}.weight", "l", stack=(("{e}", 3),)), Row("l.all", "l"))
    adapters = {"l": {"A": jnp.ones((3, 5, 2)), "B": jnp.ones((3, 2, 7))}}
    config = jlora.LoraConfig(rank=2, factorizations={"l": "bio"})
    with pytest.raises(
        jlora.DataError, match=r"l: rows map it as stacks of other sizes: l.\{e\}.weight \[3\], l.all \[\]"
    ):
        write_peft(tmp_path / "a", adapters, config, mapping)
    folder = write_folder(tmp_path / "b", pair(rng, "l.0", 3, 5) | pair(rng, "all", 3, 5))
    with pytest.raises(jlora.DataError, match=r"l: rows map it as stacks of other sizes"):
        read_peft(folder, (mapping[0], Row("all.weight", "l")))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row("q.weight", "q", (0, 1, 2)), r"transpose \(0, 1, 2\) of the row q.weight does not fit a weight of 2 axes"),
        (
            Row("q.weight", "q", reshape=(7, -1)),
            r"reshape \(7, -1\) of the row q.weight does not fit a weight \(6, 10\)",
        ),
        (Row("q.weight", "q", reshape=(4, 15)), r"reshape \(4, 15\)"),
        (Row("q.weight", "q", reshape=(60,)), r"reshape \(60,\)"),
    ],
)
def test_rows_that_do_not_fit(row: Row, message: str, tmp_path: Path, rng: Rng) -> None:
    with pytest.raises(jlora.DataError, match=f"q.weight: {message}"):
        read_peft(write_folder(tmp_path / "a", pair(rng, "q", 6, 10)), (row,))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"transpose": (0, 0)}, r"transpose = \(0, 0\): wanted the axes 0, 1, \.\.\., each once"),
        ({"transpose": 3}, "transpose = 3: wanted whole numbers"),
        ({"transpose": (0, True)}, "wanted whole numbers"),
        ({"reshape": (-1, -1)}, r"reshape = \(-1, -1\): wanted sizes of at least 1, of which one may be -1"),
        ({"reshape": (0, -1)}, r"reshape = \(0, -1\)"),
        ({"reshape": (10**5000,)}, "reshape = tuple: wanted whole numbers"),
        ({"name": 3}, "wanted a name and a path, which are strings"),
        ({"name": ""}, "wanted a name and a path"),
        ({"name": "x" * 2000}, "a name and a path of more than 1,000 characters"),
        ({"name": "l.{1}.q"}, r"\{1\} is no name of a placeholder"),
        ({"name": "{x/}"}, r"\{x/\} stands in the name: it is for paths"),
        ({"name": "l.{i}.q"}, "name and path have other placeholders"),
        ({"path": "l/{i}/q"}, "name and path have other placeholders"),
        ({"name": "{i}.q", "path": "{i*}/q"}, "one segment here and for several there"),
        ({"name": "{a*}.{b*}.{c*}.{d*}", "path": "{a*}{b*}{c*}{d*}"}, "more than 3 placeholders for any number"),
        ({"stack": 3}, "stack = 3: wanted pairs"),
        ({"stack": ((0, 1, 2),)}, "wanted pairs of a place and the number of places"),
        ({"stack": (("{e}", 3),)}, r"stack: '\{e\}' is no placeholder of the name for one segment"),
        ({"stack": ((3, 2),)}, "a place is a placeholder, or a number below that of the places"),
        ({"stack": ((0, 10**9),)}, "wanted 1 to 100,000 places"),
        ({"stack": ((0, 1000), (0, 1000))}, "wanted 100,000 places at most"),
        ({"name": "l.{e}.q", "path": "l/{e}", "stack": (("{e}", 3),)}, "stands there once, and not in the path"),
    ],
)
def test_rows_that_are_none(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(jlora.DataError, match=f"^row .*{message}"):
        Row(**{"name": "q.weight", "path": "q"} | fields)


def test_axes_of_size_one_may_be_put_anywhere(tmp_path: Path, rng: Rng) -> None:
    tensors = pair(rng, "q", 6, 10)
    for reshape in ((1, 6, 10), (6, 1, 10), (6, 10, 1), (6, 1, 1, 10)):
        mapping = (Row("q.weight", "q", reshape=reshape),)
        folder = write_folder(tmp_path / str(reshape) / "first", tensors)
        found = merged_with_zeros(folder, {"q": reshape}, mapping)
        assert_close(found["q"], delta(tensors, "q", "linear").reshape(reshape))
        round_trip(folder, mapping)


def test_params_are_checked_all_at_once(tmp_path: Path, rng: Rng) -> None:
    tensors = {key: value for name in ("a", "b", "c") for key, value in pair(rng, name, 3, 5).items()}
    tensors |= {"n.weight": np.ones(4, "float32")}
    folder = write_folder(tmp_path / "a", tensors)
    params = {
        "a.weight": jnp.zeros((3, 5)),
        "b.weight": jnp.zeros((3, 7)),
        "n.weight": jnp.zeros(5),
        "cc": jnp.zeros(2),
    }
    with pytest.raises(jlora.DataError) as caught:
        read_peft(folder, params=params)
    text = str(caught.value)
    assert "3 problems" in text
    assert "b.weight: A (5, 2) does not fit the weight (3, 7)" in text
    assert "c.weight: params has no leaf there; nearest paths: " in text
    assert "n.weight: value (4,) does not fit the weight (5,)" in text


def test_params_may_be_lists_and_say_which_weights_are_transposed(tmp_path: Path, rng: Rng) -> None:
    tensors = pair(rng, "h.0.c", 3, 5) | pair(rng, "h.2.c", 3, 5)
    params = {
        "h": [{"c": {"weight": jnp.zeros((5, 3))}}, {}, {"c": {"weight": jnp.zeros((3, 5)), "bias": jnp.ones(3)}}]
    }
    adapters, config = read_peft(write_folder(tmp_path / "a", tensors), NESTED, params=params)
    assert isinstance(adapters["h"], list)
    assert adapters["h"][2]["c"]["bias"] is None
    assert dict(config.factorizations) == {"h/0/c/weight": "io", "h/2/c/weight": "oi"}
    merged = jlora.merge_params(params, adapters, config)
    assert_close(merged["h"][0]["c"]["weight"], delta(tensors, "h.0.c", "linear").T)
    assert_close(merged["h"][2]["c"]["weight"], delta(tensors, "h.2.c", "linear"))


def test_experts_are_transposed_where_the_model_says_so(tmp_path: Path, rng: Rng) -> None:
    tensors = experts_pair(rng, "m.e", 3, 7, 5)
    for named, roles in {"openai/gpt-oss-20b": "bio", "Qwen/Qwen3-30B-A3B": "boi"}.items():
        fields = {"base_model_name_or_path": named, "target_parameters": ["m.e.w"]}
        folder = write_folder(tmp_path / roles / "first", tensors, **fields)
        _, config = read_peft(folder)
        assert dict(config.factorizations) == {"m.e.w": roles}
        shape = (3, 5, 7) if roles == "bio" else (3, 7, 5)
        wanted = delta(tensors, "m.e", "experts_t" if roles == "bio" else "experts")
        assert_close(merged_with_zeros(folder, {"m.e.w": shape}, FLAT)["m.e.w"], wanted)
        round_trip(folder, FLAT)


def test_many_names_that_no_row_maps_are_told_soon(tmp_path: Path) -> None:
    names = {f"x.{i}.weight": i for i in range(20_000)}
    with pytest.raises(jlora.DataError, match=r"20,000 problems:\n(.*\n){12}  and 19,988 more$"):
        _mapping.places_of_names((Row("l.{i}.weight", "l/{i}"),), names)
