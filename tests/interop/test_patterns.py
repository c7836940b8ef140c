"""The patterns of ranks and alphas in PEFT's files: which modules they match, and which are refused."""

import re
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.interop.peft import _patterns, read_peft, write_peft
from tests.interop.files import pair, write_folder

Rng = np.random.Generator


def refused(folder: Path, message: str) -> None:
    with pytest.raises(jlora.DataError, match=message) as caught:
        read_peft(folder)
    assert str(folder) in str(caught.value)


def test_paths_with_the_characters_of_patterns(tmp_path: Path, rng: Rng) -> None:
    tensors = pair(rng, "a[0]", 3, 5) | pair(rng, "a0", 3, 5) | pair(rng, "a*", 3, 5, 4)
    folder = write_folder(tmp_path / "first", tensors, rank_pattern={r"a\*": 4}, alpha_pattern={r"a\[0\]": 1.5})
    _, config = read_peft(folder)
    assert {name: config.rank_of(f"{name}.weight") for name in ("a[0]", "a0", "a*")} == {"a[0]": 2, "a0": 2, "a*": 4}
    assert {name: config.alpha_of(f"{name}.weight") for name in ("a[0]", "a0", "a*")} == {"a[0]": 1.5, "a0": 5, "a*": 5}
    adapters, config = read_peft(folder)
    write_peft(tmp_path / "again", adapters, config)
    for file in folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_the_first_pattern_that_matches_wins(tmp_path: Path, rng: Rng) -> None:
    """The first in the file, whose keys PEFT sorts."""
    ranks = {".*k": 5, "k": 6, r"l\.1\.q": 4, "q": 3, r"q|l\.1\.q": 7}
    modules = {"l.0.q": 3, "l.1.q": 4, "l.0.k": 5, "l.qq": 2, "q": 3}
    tensors = {key: value for name, rank in modules.items() for key, value in pair(rng, name, 3, 5, rank).items()}
    _, config = read_peft(write_folder(tmp_path / "a", tensors, rank_pattern=ranks))
    assert {name: config.rank_of(f"{name}.weight") for name in modules} == modules


def test_patterns_that_are_written_match_one_module_alone(tmp_path: Path, rng: Rng) -> None:
    ranks = {"q": 4, "z.q": 2, "a.q": 3, "a.z.q": 2, "a+q": 5, "aaq": 2}
    adapters = {
        f"{name}.weight": {
            "A": jnp.asarray(rng.standard_normal((5, rank))),
            "B": jnp.asarray(rng.standard_normal((rank, 3))),
        }
        for name, rank in ranks.items()
    }
    config = jlora.LoraConfig(
        rank=2,
        alpha=1,
        rank_pattern={f"{name}.weight": rank for name, rank in ranks.items()},
        alpha_pattern={"q.weight": 7},
        factorizations={"*": "oi"},
    )
    write_peft(tmp_path, adapters, config)
    _, found = read_peft(tmp_path)
    assert {name: found.rank_of(f"{name}.weight") for name in ranks} == ranks
    alphas = {name: found.alpha_of(f"{name}.weight") for name in ranks}
    assert alphas == {name: 7 if name == "q" else 1 for name in ranks}


@pytest.mark.parametrize(
    "pattern",
    [
        r"model\.layers\.(0|1|2|3|10|11)\.self_attn\.(q|k|v|o)_proj",
        r".*layers\.\d+\..*(q|k)_proj",
        r"[^.]+\.([0-9]+|x)\.q",
        r"(?:a\+[)*]*)?q",
    ],
)
def test_patterns_that_people_write(pattern: str, tmp_path: Path, rng: Rng) -> None:
    """They match as in PEFT: a whole name, or its end after a dot."""
    names = ["model.layers.11.self_attn.q_proj", "x.layers.7.mlp.k_proj", "a.3.q", "a.x.q", "q", "aq", "b.a+)*q"]
    tensors = {key: value for name in names for key, value in pair(rng, name, 3, 5).items()}
    _, config = read_peft(write_folder(tmp_path / "a", tensors, alpha_pattern={pattern: 3}))
    for name in names:
        wanted = 3 if re.match(rf"(.*\.)?({pattern})$", name) else 5
        assert config.alpha_of(f"{name}.weight") == wanted


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        "(x|a*)+$",
        r"(\w+\s?)*",
        "((a+))+",
        "(a|a)*b",
        "(a|a*)*b",
        "(a|a)(?#)*b",
        "([)]|a|ab)*c",
        ".*" * 9 + "b",
        "a?" * 60 + "b",
        "(a?){60}",
    ],
)
def test_patterns_with_many_ways_through_are_matched(key: str, pattern: str, tmp_path: Path, rng: Rng) -> None:
    """Where Python's matcher takes years for a name that does not match."""
    tensors = pair(rng, "a" * 60, 3, 5)
    _, config = read_peft(write_folder(tmp_path / "a", tensors, **{key: {pattern: 2}}))
    matched = not pattern.endswith(("b", "c"))
    assert config.alpha_of("a" * 60 + ".weight") == (2 if matched and key == "alpha_pattern" else 5)


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        (r"(a)\1", "a reference to a group"),
        ("(?x:(a|a) *)b", "flags"),
        ("(?<=a)b", "look-behind"),
        ("(?>a)b", "an atomic group"),
        ("(a{2,}){3000,}", "more than 5,000 states"),
        ("((a{500}){500}){500}", "more than 5,000 states"),
    ],
)
def test_patterns_that_are_not_matched(pattern: str, what: str, tmp_path: Path, rng: Rng) -> None:
    folder = write_folder(tmp_path / "a", pair(rng, "q", 3, 5), alpha_pattern={pattern: 3})
    refused(folder, f"the pattern .* has {what}, which jlora does not match; write it in another way")


def test_a_budget_for_all_patterns_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: Rng) -> None:
    tensors = {key: value for i in range(50) for key, value in pair(rng, f"model.layers.{i}.q", 3, 5).items()}
    folder = write_folder(tmp_path / "a", tensors, alpha_pattern={f"(a|b)*{i}.*x": 3 for i in range(20)})
    read_peft(folder)
    monkeypatch.setattr(_patterns, "MOST_STEPS", 10_000)
    refused(folder, "its patterns of ranks and alphas take more than 10,000 steps to match")


def test_a_pattern_for_each_of_many_modules(rng: Rng) -> None:
    """As jlora writes them, each with an anchor, and as people do, without one or with dots that stand for anything."""
    modules = [f"model.layers.{i}.self_attn.q_proj" for i in range(1000)]
    budget = _patterns.budget_of_patterns()
    for text in (r"^model\.layers\.{}\.self_attn\.q_proj", r"layers\.{}\.self_attn\.q_proj"):
        patterns = _patterns.Patterns({text.format(i): i for i in range(1000)}, budget)
        assert [patterns.value_of(module, None) for module in modules] == list(range(1000))
    dotted = _patterns.Patterns({f"layers.{i}.self_attn.q_proj": i for i in range(300)}, budget)
    assert [dotted.value_of(module, None) for module in modules[:400]] == [*range(300), *[None] * 100]


@hypothesis.given(
    st.lists(st.sampled_from(["q", "^q", r"a\.q", "a.q", r"^a\.q", "b.", ".*q", "q|k", "", r"\.", "k$"]), max_size=5),
    st.sampled_from(["q", "a.q", "b.a.q", "aq", "a-q", "x.a-q", "k", "b.", "q\n", "a\nq", "a.\n", "\n", ""]),
)
def test_the_first_pattern_that_matches_wins_in_every_form(texts: list[str], module: str) -> None:
    patterns = {text: number for number, text in enumerate(texts)}
    found = _patterns.Patterns(patterns, _patterns.budget_of_patterns()).value_of(module, None)
    assert found == next((n for text, n in patterns.items() if re.match(rf"(.*\.)?({text})$", module)), None)


def test_names_and_patterns_that_are_too_long(tmp_path: Path, rng: Rng) -> None:
    refused(
        write_folder(tmp_path / "a", pair(rng, "q", 3, 5), alpha_pattern={"a" * 2001: 3}),
        "a pattern of more than 2,000 characters: 'aaa",
    )
    refused(
        write_folder(tmp_path / "b", pair(rng, ".".join("a" * 2000), 3, 5), alpha_pattern={"a*": 3}),
        "a module's name of more than 2,000 characters: 'a.a",
    )


@pytest.mark.parametrize(("key", "pattern"), [("target_modules", "(a|a)*"), ("exclude_modules", "(a|a)*b")])
def test_slow_patterns_of_modules_are_matched_soon(key: str, pattern: str, tmp_path: Path, rng: Rng) -> None:
    folder = write_folder(tmp_path / "a", pair(rng, "a" * 60, 3, 5), **{key: pattern})
    assert set(read_peft(folder)[0]) == {"a" * 60 + ".weight"}


@pytest.mark.parametrize("pattern", ["(", "[", "*", "(?P<x>a)(?P<x>b)", "\\", "a{9999999999}"])
def test_patterns_that_are_none(pattern: str, tmp_path: Path, rng: Rng) -> None:
    folder = write_folder(tmp_path / "a", pair(rng, "q", 3, 5), rank_pattern={pattern: 3})
    refused(folder, "a pattern of ranks or alphas is no regular expression")


def test_a_pattern_that_python_warns_of_is_read(tmp_path: Path, rng: Rng) -> None:
    write_folder(tmp_path, pair(rng, "up", 7, 5), rank_pattern={"[[]down": 3})
    assert read_peft(tmp_path)[1].rank == 2
