"""What thousands of patterns and paths cost: as many steps as there are of them, or an error before they are taken."""

import re
from collections.abc import Callable
from typing import Any

import jax
import pytest

import jlora
from jlora import ConfigError, LoraConfig, TargetError, paths
from jlora.tree import bind, find_targets
from tests.work import assert_linear

KERNEL = jax.ShapeDtypeStruct((3, 5), "float32")
ENTRY = {"A": jax.ShapeDtypeStruct((3, 2), "float32"), "B": jax.ShapeDtypeStruct((2, 5), "float32")}


def tree(count: int, leaf: Any = KERNEL, name: str = "layer") -> dict[str, Any]:
    return {f"{name}{i}": {"kernel": leaf} for i in range(count)}


def names(count: int, text: str = "layer{}") -> tuple[str, ...]:
    return tuple(text.format(i) for i in range(count))


def refused(call: Callable[[], Any], what: str) -> None:
    with pytest.raises(jlora.JloraError, match=what):
        call()


@pytest.mark.parametrize("field", ["target_modules", "rank_pattern", "alpha_pattern", "factorizations"])
@pytest.mark.parametrize("text", ["layer{}", "layer{}/kernel"])
def test_a_path_for_each_weight(field: str, text: str) -> None:
    value = {"target_modules": None, "factorizations": "io"}.get(field, 2)

    def make(count: int) -> Callable[[], Any]:
        patterns = names(count, text)
        config = LoraConfig(rank=2, **{field: dict.fromkeys(patterns, value) if value else patterns})
        params = tree(count)
        return lambda: find_targets(params, config)

    assert_linear(make)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
@pytest.mark.parametrize("text", ["lier{}", "layer{}/bias"])
def test_paths_that_match_nothing(field: str, text: str) -> None:
    def make(count: int) -> Callable[[], Any]:
        patterns = names(count, text)
        config = LoraConfig(rank=2, **{field: dict.fromkeys(patterns, 2) if field == "rank_pattern" else patterns})
        params = tree(count)
        return lambda: refused(lambda: find_targets(params, config), f"{field}: '{text.format(0)}' matches nothing")

    assert_linear(make, most=5000)


def test_adapters_of_another_tree() -> None:
    def make(count: int) -> Callable[[], Any]:
        adapters, params = tree(count, ENTRY), tree(count, name="other")
        return lambda: refused(
            lambda: bind(params, adapters, LoraConfig(rank=2)), "layer0/kernel: an adapter where params has"
        )

    assert_linear(make, most=5000)


def test_each_glob_is_compared_with_each_path_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[str, str]] = []
    matched_depths = paths.matched_depths
    monkeypatch.setattr(paths, "matched_depths", lambda *pair: compared.append(pair) or matched_depths(*pair))
    config = LoraConfig(rank=2, target_modules=names(30, "*ayer{}"))
    assert len(find_targets(tree(30), config)) == 30
    assert len(compared) == len(set(compared)) + 30 == 30 * 30 + 30  # again where a leaf may be named
    find_targets(tree(30), config)
    assert len(compared) == 30 * 30 + 2 * 30


@pytest.mark.parametrize(("globs", "leaves"), [(100_000, 3), (10_001, 1), (5_000, 1_001)])
def test_too_many_globs_are_refused_before_they_are_compared(
    globs: int, leaves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "matched_depths", lambda *_: pytest.fail("compared"))
    config = LoraConfig(rank=2, target_modules=names(globs, "*ayer{}"))
    message = (
        f"{globs:,} patterns with wildcards for {leaves:,} paths: wanted 10,000 at most, and 5,000,000 comparisons; "
        "of paths without wildcards there may be any number"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        find_targets(tree(leaves), config)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        bind(tree(leaves), tree(leaves, ENTRY), config)


def test_a_glob_that_matches_nothing_is_told_among_thousands_of_paths() -> None:
    config = LoraConfig(rank=2, target_modules=(*names(300, "lier{}"), "*ier1"))
    with pytest.raises(TargetError, match=r"^301 problems:\n  target_modules: 'lier0' matches nothing; nearest paths"):
        find_targets(tree(300), config)
