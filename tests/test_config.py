"""The configuration: what it refuses, what it keeps, and that it comes back from every file as it was written."""

import copy
import dataclasses
import functools
import json
import math
import pickle
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jlora.config import INITS, KINDS, SCALINGS, LoraConfig, effective_alpha, read_mapping, write_mapping
from jlora.errors import ConfigError

FULL = {
    "kind": "xs",
    "rank": 3,
    "alpha": 2.5,
    "dropout": 0.25,
    "target_modules": ("encoder/**/query", "decoder/*"),
    "exclude_modules": ("**/bias",),
    "seed": 11,
    "scaling": "rslora",
    "init": "kaiming_uniform",
    "init_std": 0.5,
    "rank_pattern": {"encoder/**": 2, "**": 5},
    "alpha_pattern": {"decoder/**": 7.5},
    "dtype": "bfloat16",
    "factorizations": {"**/query": "ioo", "**/out/kernel": "iio"},
    "extras": {"peft": '{"r": 2}', "a//b": ""},
}
KNOWN = f"; known keys: {', '.join(FULL)}"


def exactly(message):
    return f"^{re.escape(message)}$"


PATTERN = "a path pattern such as 'encoder/**/query', no leading, trailing or double slash"
PATTERNS = "a path pattern or a list of them"
MAPPING = "a mapping from path patterns to values"
FINITE = "a finite number"
SCALING = "one of 'standard', 'rslora'"
INIT = "one of 'gaussian', 'kaiming_uniform', 'normal', 'pissa', 'olora', 'mica', 'orthogonal', 'custom'"
KIND = "one of 'lora', 'dora', 'vera', 'xs'"
DTYPE = "a floating dtype such as 'float32' or 'bfloat16', or None for float32"
ROLES = (
    "wanted one letter per axis of the weight, b (batch), i (in) or o (out), with at least one i and one o, "
    "such as 'io', 'ioo' or 'bio'"
)
WANTED = [  # field, what is wanted, values that are refused
    ("kind", KIND, [None, 3]),
    ("kind", f"{KIND} (did you mean 'vera'?)", ["Vera"]),
    ("rank", "a whole number of at least 1", [0, -1, 2.0, "8", True, None, np.float32(2)]),
    ("rank", "a whole number of at least 1", [np.array(2.5), np.array([3])]),
    ("alpha", FINITE, [math.nan, math.inf, -math.inf, "16", b"16", True, np.True_, None, 1j, [16]]),
    ("dropout", "0 <= dropout < 1", [1, 1.0, -0.1, math.nan, "0.1", None, False]),
    ("target_modules", PATTERNS, [3, None, {"a": 1}]),
    ("target_modules", PATTERN, ["", "/a", "a/", "a//b"]),
    ("target_modules", "at least one path pattern, such as '**/attention'", [()]),
    ("exclude_modules", PATTERNS, [3, None, {"a": 1}]),
    ("exclude_modules", PATTERN, ["", "/a", "a/", "a//b"]),
    ("seed", "a whole number of at least 0 and below 4294967296", [-1, 0.0, "0", True, None, 2**32]),
    ("scaling", SCALING, [None, 3, ["standard"]]),
    ("scaling", f"{SCALING} (did you mean 'rslora'?)", ["rs_lora"]),
    ("init", INIT, [None, 3]),
    ("init", f"{INIT} (did you mean 'kaiming_uniform'?)", ["kaiming", "Kaiming_uniform"]),
    ("init_std", "a finite number of at least 0", [-0.1, math.inf, math.nan, "1", True, None]),
    ("rank_pattern", MAPPING, [3, None, "a", [("a",)], ["ab"], {"a"}]),
    ("rank_pattern", "each pattern once", [[("a", 1), ("a", 2)]]),
    ("alpha_pattern", MAPPING, [3, None, "a", [("a",)]]),
    ("alpha_pattern", "each pattern once", [(("a", 1), ("b", 2), ("a", 1))]),
    ("dtype", DTYPE, ["int8", "complex64", "float31", "", 3, True, jnp.int32, bool, "f4,f4", "f,,", {"names": ["a"]}]),
    ("factorizations", MAPPING, [3, None, "io", [("a",)]]),
    ("factorizations", "each pattern once", [[("a", "io"), ("a", "oi")]]),
    ("extras", "a mapping from names to values", [3, None, "io", [("a",)]]),
    ("extras", "each name once", [[("a", "b"), ("a", "c")]]),
]
REFUSED = [
    ("alpha", 10**400, f"alpha = 1{'0' * 199}...: wanted {FINITE}"),
    *((field, value, f"{field} = {value!r}: wanted {wanted}") for field, wanted, bad in WANTED for value in bad),
    ("target_modules", ["a", 3], f"target_modules = 3: wanted {PATTERN}"),
    ("target_modules", [], "target_modules = (): wanted at least one path pattern, such as '**/attention'"),
    ("exclude_modules", ["a", "b/"], f"exclude_modules = 'b/': wanted {PATTERN}"),
    ("rank_pattern", {"a": 1, "/b": 2}, f"rank_pattern = '/b': wanted {PATTERN}"),
    ("rank_pattern", {3: 1}, f"rank_pattern = 3: wanted {PATTERN}"),
    ("rank_pattern", {"a": 0}, "rank_pattern['a'] = 0: wanted a whole number of at least 1"),
    ("rank_pattern", {"a": 2.5}, "rank_pattern['a'] = 2.5: wanted a whole number of at least 1"),
    ("alpha_pattern", {"": 1.0}, f"alpha_pattern = '': wanted {PATTERN}"),
    ("alpha_pattern", {"a": "1"}, "alpha_pattern['a'] = '1': wanted a finite number"),
    ("alpha_pattern", {"a": math.nan}, "alpha_pattern['a'] = nan: wanted a finite number"),
    ("factorizations", {"a//b": "io"}, f"factorizations = 'a//b': wanted {PATTERN}"),
    ("factorizations", {"a": "bi"}, f"factorizations['a']: factorization 'bi': {ROLES}"),
    ("extras", {"a": 3}, "extras['a'] = 3: wanted a string"),
    ("extras", {3: "a"}, "extras = 3: wanted a string"),
    ("factorizations", {"a": 3}, f"factorizations['a']: factorization 3: {ROLES}"),
]


@pytest.mark.parametrize(("field", "value", "message"), REFUSED, ids=[field for field, _, _ in REFUSED])
def test_a_value_that_is_not_allowed_is_refused(field, value, message):
    for build in (lambda **fields: LoraConfig(**fields), LoraConfig().replace, lambda **f: LoraConfig.from_dict(f)):
        with pytest.raises(ConfigError, match=exactly(message)):
            build(**{field: value})


def test_every_field_has_refused_values_and_a_value_other_than_its_default():
    fields = [field.name for field in dataclasses.fields(LoraConfig)]
    assert list(FULL) == fields
    assert {field for field, _, _ in REFUSED} == set(fields)
    assert all(getattr(LoraConfig(**FULL), name) != getattr(LoraConfig(), name) for name in fields)


@pytest.mark.parametrize(
    ("field", "value", "kept"),
    [
        ("rank", np.int64(4), 4),
        ("rank", np.array(4), 4),
        ("seed", np.uint32(7), 7),
        ("alpha", 32, 32.0),
        ("alpha", np.float32(0.5), 0.5),
        ("alpha", -1.0, -1.0),
        ("dropout", 0, 0.0),
        ("target_modules", "**/query", ("**/query",)),
        ("target_modules", ["a", "b"], ("a", "b")),
        ("rank_pattern", {"b": 2, "a": 3}, (("b", 2), ("a", 3))),
        ("rank_pattern", [["b", 2]], (("b", 2),)),
        ("alpha_pattern", {"a": 2}, (("a", 2.0),)),
        ("dtype", jnp.bfloat16, "bfloat16"),
        ("dtype", np.dtype("float16"), "float16"),
        ("dtype", "f4", "float32"),
    ],
)
def test_values_are_kept_as_plain_python(field, value, kept):
    found = getattr(LoraConfig(**{field: value}), field)
    assert found == kept
    assert type(found) is type(kept)


@pytest.mark.parametrize(("key", "hint"), [("rnk", "rank"), ("alhpa", "alpha"), ("target_module", "target_modules")])
def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path, key, hint):
    told = f"unknown key {key!r} (did you mean {hint!r}?){KNOWN}"
    with pytest.raises(ConfigError, match=exactly(f"LoraConfig: {told}")):
        LoraConfig(**{key: 1})
    with pytest.raises(ConfigError, match=exactly(f"LoraConfig: {told}")):
        LoraConfig.from_dict({"rank": 2, key: 1})
    with pytest.raises(ConfigError, match=exactly(f"LoraConfig.replace: {told}")):
        LoraConfig().replace(**{key: 1})
    for ending in ("toml", "json"):
        path = tmp_path / f"config.{ending}"
        write_mapping(path, {key: 1})
        with pytest.raises(ConfigError, match=exactly(f"{path}: LoraConfig: {told}")):
            LoraConfig.read(path)


def test_all_unknown_keys_are_named_at_once():
    message = "LoraConfig: unknown key 'rnk' (did you mean 'rank'?), 'sed' (did you mean 'seed'?)" + KNOWN
    with pytest.raises(ConfigError, match=exactly(message)):
        LoraConfig(rnk=1, alpha=2, sed=3)


@pytest.mark.parametrize("data", [None, 3, "rank", [("rank", 2)]])
def test_from_dict_refuses_what_is_no_mapping(data):
    message = f"LoraConfig = {data!r}: wanted a mapping of field names to values"
    with pytest.raises(ConfigError, match=exactly(message)):
        LoraConfig.from_dict(data)


paths = st.lists(
    st.sampled_from(["**", "*", "encoder", "[ab]?"])
    | st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), min_size=1, max_size=4),
    min_size=1,
    max_size=3,
).map("/".join)
finite = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
roles = st.text("bio", max_size=3).flatmap(lambda extra: st.permutations("io" + extra)).map("".join)
configs = st.builds(
    LoraConfig,
    kind=st.sampled_from(KINDS),
    rank=st.integers(1, 2**40),
    alpha=finite,
    dropout=st.floats(0, 1, exclude_max=True),
    target_modules=st.lists(paths, min_size=1, max_size=3),
    exclude_modules=st.lists(paths, max_size=3),
    seed=st.integers(0, 2**32),
    scaling=st.sampled_from(SCALINGS),
    init=st.sampled_from(INITS),
    init_std=st.floats(0, allow_infinity=False),
    rank_pattern=st.dictionaries(paths, st.integers(1, 99), max_size=3),
    alpha_pattern=st.dictionaries(paths, finite, max_size=3),
    dtype=st.sampled_from([None, "float32", "bfloat16", "float16", "float8_e4m3fn"]),
    factorizations=st.dictionaries(paths, roles, max_size=3),
    extras=st.dictionaries(texts, texts, max_size=3),
)


@hypothesis.given(configs)
@hypothesis.example(LoraConfig())
@hypothesis.example(LoraConfig(**FULL))
def test_a_config_comes_back_equal_from_every_form(tmp_path_factory, config):
    folder = tmp_path_factory.getbasetemp()
    for path in (folder / "config.toml", folder / "config.json"):
        config.write(str(path))
        assert LoraConfig.read(path) == config
    copies = [
        eval(repr(config), {"LoraConfig": LoraConfig}),
        LoraConfig.from_dict(config.to_dict()),
        pickle.loads(pickle.dumps(config)),
        copy.copy(config),
        copy.deepcopy(config),
        config.replace(),
    ]
    for found in copies:
        assert found == config
        assert hash(found) == hash(config)
        assert repr(found) == repr(config)


def test_repr_shows_what_differs_from_the_defaults():
    assert repr(LoraConfig()) == "LoraConfig()"
    config = LoraConfig(alpha=4, seed=0, rank_pattern={"**/query": 2})
    assert repr(config) == "LoraConfig(alpha=4.0, rank_pattern={'**/query': 2})"
    shown = ", ".join(f"{name}={value!r}" for name, value in FULL.items())
    assert repr(LoraConfig(**FULL)) == f"LoraConfig({shown})"


def test_to_dict_is_plain_data_of_every_field_but_a_dtype_of_none():
    plain = json.loads(json.dumps(FULL))
    assert LoraConfig(**FULL).to_dict() == plain
    assert all(type(value) is type(plain[name]) for name, value in LoraConfig(**FULL).to_dict().items())
    assert list(LoraConfig().to_dict()) == [name for name in FULL if name != "dtype"]


@pytest.mark.parametrize("field", FULL)
def test_configs_differ_where_one_field_does_and_replace_changes_it_alone(field):
    changed = LoraConfig().replace(**{field: FULL[field]})
    assert changed == LoraConfig(**{field: FULL[field]}) != LoraConfig()
    assert len({changed, LoraConfig(**{field: FULL[field]}), LoraConfig()}) == 2
    assert [name for name in FULL if getattr(changed, name) != getattr(LoraConfig(), name)] == [field]


def test_the_order_of_patterns_is_part_of_a_config():
    assert LoraConfig(rank_pattern={"a": 1, "b": 2}) != LoraConfig(rank_pattern={"b": 2, "a": 1})


def test_a_config_is_frozen_and_takes_keywords_only():
    config = LoraConfig()
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'rank'"):
        config.rank = 2
    with pytest.raises(TypeError, match="takes 1 positional argument but 2 were given"):
        LoraConfig(8)


def test_a_static_config_retraces_only_where_it_differs():
    traced = []

    @functools.partial(jax.jit, static_argnames="config")
    def scaled(x, config):
        traced.append(config)
        return x * config.alpha

    for config in (LoraConfig(**FULL), LoraConfig(**FULL), LoraConfig(**FULL).replace(alpha=4.0)):
        assert scaled(jnp.float32(3.0), config=config) == 3.0 * config.alpha
    assert traced == [LoraConfig(**FULL), LoraConfig(**FULL | {"alpha": 4.0})]


UNREADABLE = [  # name, contents, what is said after the path
    ("missing.toml", None, "cannot be read: No such file or directory"),
    ("folder.json", "a folder", "cannot be read: no regular file"),
    ("config.yaml", "rank: 2", "wanted a file that ends in .toml or .json"),
    ("config", None, "wanted a file that ends in .toml or .json"),
    ("config.TOML", "rank = 2", "wanted a file that ends in .toml or .json"),
    ("syntax.toml", "rank = ", "not valid TOML: Invalid value"),
    ("twice.toml", "rank = 2\nrank = 3", "not valid TOML: Cannot overwrite a value"),
    ("latin.toml", b"dtype = '\xe9'", "not valid TOML: 'utf-8' codec can't decode"),
    ("syntax.json", "{", "not valid JSON: Expecting property name"),
    ("empty.json", "", "is empty: wanted a table of field names and values, {} in JSON for none"),
    ("empty.toml", "", "is empty"),
    ("twice.json", '{"rank": 2, "rank": 3}', "not valid JSON: key 'rank' stands twice"),
    ("deep.json", '{"rank_pattern": {"a": 2, "b": 3, "b": 4}}', "not valid JSON: key 'b' stands twice"),
    ("list.json", "[2]", "wanted a table of field names and values, found list"),
    ("null.json", "null", "wanted a table of field names and values, found NoneType"),
    ("value.toml", "rank = 0", "rank = 0: wanted a whole number of at least 1"),
    ("value.json", '{"alpha": NaN}', "alpha = nan: wanted a finite number"),
    ("null_rank.json", '{"rank": null}', "rank = None: wanted a whole number of at least 1"),
]


@pytest.mark.parametrize(("name", "contents", "told"), UNREADABLE)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, contents, told):
    path = tmp_path / name
    if contents == "a folder":
        path.mkdir()
    elif contents is not None:
        path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{path}: {told}')}"):
        LoraConfig.read(path)


@pytest.mark.parametrize(("name", "contents"), [("c.toml", "\n"), ("c.toml", "# nothing"), ("c.json", "{}")])
def test_a_file_without_keys_is_the_defaults(tmp_path, name, contents):
    (tmp_path / name).write_text(contents)
    assert LoraConfig.read(tmp_path / name) == LoraConfig()


@pytest.mark.parametrize("name", ["config.yaml", "config"])
def test_a_file_of_another_ending_is_not_written(tmp_path, name):
    message = f"{tmp_path / name}: wanted a file that ends in .toml or .json"
    with pytest.raises(ConfigError, match=exactly(message)):
        LoraConfig().write(tmp_path / name)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("ending", ["toml", "json"])
def test_a_mapping_is_read_as_it_was_written(tmp_path, ending):
    data = {"a": 1, "b": {"d/e": [0.1, -2.0], "c": "é\n"}}
    write_mapping(tmp_path / f"data.{ending}", data)
    found = read_mapping(tmp_path / f"data.{ending}")
    assert found == data
    assert list(found["b"]) == ["d/e", "c"]


@pytest.mark.parametrize(
    ("path", "rank", "alpha"),
    [
        ("encoder/query/kernel", 2, 7.0),
        ("encoder/out/kernel", 3, 7.0),
        ("decoder/out/kernel", 5, 16.0),
        ("decoder/key/kernel", 8, 16.0),
    ],
)
def test_the_first_pattern_that_matches_wins(path, rank, alpha):
    config = LoraConfig(
        rank_pattern={"**/query": 2, "encoder/**": 3, "**/out/kernel": 5},
        alpha_pattern={"encoder": 7, "encoder/query": 9},
    )
    assert (config.rank_of(path), config.alpha_of(path)) == (rank, alpha)
    assert config.effective_alpha_of(path) == alpha
    assert config.replace(scaling="rslora").effective_alpha_of(path) / rank == pytest.approx(alpha / rank**0.5)


def test_effective_alpha_over_rank_is_the_scaling(rng):
    alpha, rank = rng.uniform(1, 32), 7
    assert effective_alpha(alpha, rank, "standard") / rank == pytest.approx(alpha / 7, rel=1e-15)
    assert effective_alpha(alpha, rank, "rslora") / rank == pytest.approx(alpha / 7**0.5, rel=1e-15)
    assert jax.jit(lambda a: effective_alpha(a, 4, "rslora"))(3.0) == 6.0
    with pytest.raises(ConfigError, match=exactly(f"scaling = 'rs': wanted {SCALING} (did you mean 'rslora'?)")):
        effective_alpha(alpha, rank, "rs")
