"""The patterns of ranks and alphas in PEFT's files: which modules they match, and which are refused."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.interop.peft import read_peft, write_peft
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
        "(a*)*",
        "(x|a*)+$",
        r"(\w+\s?)*",
        "(a{2,}){3,}",
        "((a+))+",
        "(a|a)*b",
        "([)]|a|ab)*c",
        ".*" * 9 + "b",
        "a?" * 60 + "b",
        "(a?){60}",
    ],
)
def test_patterns_that_take_forever(key: str, pattern: str, tmp_path: Path, rng: Rng) -> None:
    tensors = pair(rng, "a" * 60, 3, 5)
    folder = write_folder(tmp_path / "a", tensors, **{key: {pattern: 3}})
    refused(folder, "repeats a repetition or a choice, which can take forever to match")


@pytest.mark.parametrize("pattern", ["(", "[", "*", "(?P<x>a)(?P<x>b)", "\\", "a{9999999999}"])
def test_patterns_that_are_none(pattern: str, tmp_path: Path, rng: Rng) -> None:
    folder = write_folder(tmp_path / "a", pair(rng, "q", 3, 5), rank_pattern={pattern: 3})
    refused(folder, "a pattern of ranks or alphas is no regular expression")


def test_a_pattern_that_python_warns_of_is_read(tmp_path: Path, rng: Rng) -> None:
    write_folder(tmp_path, pair(rng, "up", 7, 5), rank_pattern={"[[]down": 3})
    assert read_peft(tmp_path)[1].rank == 2
