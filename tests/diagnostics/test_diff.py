"""The difference of two trees of adapters against dense float64 references."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jlora import AdapterError, ConfigError, LoraConfig, TargetError
from jlora.diagnostics import EntryDifference, diff
from tests.reference import random_adapter, random_array, reference_delta

CONFIG = LoraConfig(rank=3, alpha=5)


def only(left: Any, right: Any, configs: tuple[LoraConfig, LoraConfig] = (CONFIG, CONFIG)) -> EntryDifference:
    (entry,) = diff(({"w": left}, configs[0]), ({"w": right}, configs[1])).entries
    return entry


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("left_shapes", "right_shapes", "batch"),
    [
        (((11, 3), (3, 7)), ((11, 2), (2, 7)), 0),
        (((5, 11, 3), (5, 3, 7)), ((5, 11, 2), (5, 2, 7)), 1),
        (((11, 3), (3, 5, 7)), ((11, 13), (13, 5, 7)), 0),
    ],
)
def test_distances_and_cosines(rng, dtype, left_shapes, right_shapes, batch):
    left, right = (random_adapter(rng, *shapes, dtype) for shapes in (left_shapes, right_shapes))
    other = right["A"].shape[-1]
    entry = only(left, right, (CONFIG, LoraConfig(rank=other, alpha=2)))
    d_left, d_right = reference_delta(left, 5, batch), reference_delta(right, 2, batch)
    norms = np.linalg.norm(d_left), np.linalg.norm(d_right)
    np.testing.assert_allclose(entry.norms, norms, rtol=1e-10)
    np.testing.assert_allclose(entry.distance, np.linalg.norm(d_left - d_right), rtol=1e-10)
    np.testing.assert_allclose(entry.cosine, np.vdot(d_left, d_right) / (norms[0] * norms[1]), atol=1e-10)
    assert (entry.status, entry.ranks, entry.alphas) == ("changed", (3, other), (5.0, 2.0))
    assert not entry.is_same_bytes


def test_a_small_difference_is_not_lost(rng):
    left = {"A": rng.standard_normal((11, 3)), "B": rng.standard_normal((3, 7))}
    right = left | {"B": left["B"] * (1 + 1e-9)}
    entry = only(left, right)
    np.testing.assert_allclose(entry.distance, 1e-9 * entry.norms[0], rtol=1e-4)


def test_the_same_delta_from_other_factors(rng):
    left = random_adapter(rng, (11, 3), (3, 7))
    right = {"A": 2 * left["A"], "B": left["B"] / 2}
    entry = only(left, right)
    assert (entry.status, entry.is_same_bytes) == ("changed", False)
    assert entry.distance < 1e-12
    assert entry.cosine == pytest.approx(1.0)


def test_identical(rng):
    left = random_adapter(rng, (11, 3), (3, 7))
    found = diff(({"w": left}, CONFIG), ({"w": {name: np.asarray(part) for name, part in left.items()}}, CONFIG))
    assert found.is_identical
    assert (found.entries[0].status, found.entries[0].distance) == ("identical", 0.0)
    assert found.config == ()


def test_the_same_bytes_with_another_scaling(rng):
    left = random_adapter(rng, (11, 3), (3, 7))
    found = diff(({"w": left}, CONFIG), ({"w": left}, CONFIG.replace(alpha=10, target_modules="w")))
    (entry,) = found.entries
    assert (entry.status, entry.is_same_bytes) == ("changed", True)
    np.testing.assert_allclose(entry.distance, entry.norms[0])
    assert found.config == (("alpha", 5.0, 10.0), ("target_modules", ("**",), ("w",)))
    assert "config.alpha: 5.0 in the left, 10.0 in the right" in str(found)
    assert "<li>config.alpha" in found._repr_html_()


def test_other_dtypes_are_no_identity(rng):
    left = random_adapter(rng, (11, 3), (3, 7), "bfloat16")
    entry = only(left, {name: part.astype(jnp.float32) for name, part in left.items()})
    assert (entry.status, entry.is_same_bytes) == ("changed", False)
    assert entry.distance < 1e-12


def test_other_sizes_and_zeros_have_no_cosine(rng):
    left = random_adapter(rng, (11, 3), (3, 7))
    entry = only(left, random_adapter(rng, (13, 3), (3, 7)))
    assert (entry.status, entry.distance, entry.cosine) == ("changed", None, None)
    entry = only(left, {"A": left["A"], "B": jnp.zeros((3, 7))})
    assert entry.cosine is None
    assert entry.distance == pytest.approx(entry.norms[0])


def test_nan_gives_nan_and_no_error(rng):
    left = random_adapter(rng, (11, 3), (3, 7))
    found = diff(({"w": left}, CONFIG), ({"w": left | {"B": left["B"].at[0, 0].set(jnp.nan)}}, CONFIG))
    assert np.isnan(found.entries[0].distance)
    assert "nan" in str(found)


def test_parts_beside_a_and_b(rng):
    value = random_array(rng, (5, 7))
    adapter = random_adapter(rng, (11, 3), (3, 7))
    left = {"a": {"value": value}, "b": {"value": value}, "c": adapter, "d": {"value": value}, "e": {"offset": value}}
    right = {
        "a": {"value": value.at[2, 3].add(0.25)},
        "b": {"value": value},
        "c": adapter | {"magnitude": value[0]},
        "d": {"value": value[:3]},
        "e": {"offset": value},
    }
    found = {entry.path: entry for entry in diff((left, CONFIG), (right, CONFIG)).entries}
    assert found["a"].parts[0] == ("value", pytest.approx(0.25, rel=1e-6))
    assert (found["b"].status, found["b"].parts) == ("identical", (("value", 0.0),))
    assert (found["c"].status, found["c"].parts) == ("changed", (("magnitude", None),))
    assert (found["c"].distance, found["c"].is_same_bytes) == (pytest.approx(0, abs=1e-12), False)
    assert found["d"].parts == (("value", None),)
    assert (found["e"].status, found["e"].alphas) == ("identical", (5.0, 5.0))


GOLDEN = """\
path       status       rank  alpha  |left|  |right|  |difference|   cosine
─────────  ──────────  ─────  ─────  ──────  ───────  ────────────  ───────
a          identical       2      4    6.93     6.93             0   1.0000
b          changed     2 | 1      4       2        4             6  -1.0000
c          only left       2      4    6.93        -             -        -
d          only right      2      4       -     6.93             -        -
─────────  ──────────  ─────  ─────  ──────  ───────  ────────────  ───────
4 entries                                                        6
1 identical, 1 changed, 1 only left, 1 only right
config.rank_pattern: () in the left, (('b', 1),) in the right"""


def test_the_table():
    ones = {"A": np.ones((3, 2)), "B": np.ones((2, 1))}
    left = {"a": ones, "b": {"A": np.ones((1, 2)), "B": np.full((2, 1), 0.5)}, "c": ones, "d": None}
    right = {"a": ones, "b": {"A": -np.ones((1, 1)), "B": np.ones((1, 1))}, "c": None, "d": ones}
    config = LoraConfig(rank=2, alpha=4)
    found = diff((left, config), (right, config.replace(rank_pattern={"b": 1})))
    assert found.counts() == {"identical": 1, "changed": 1, "only left": 1, "only right": 1}
    assert str(found) == repr(found) == GOLDEN
    assert "<li>1 identical, 1 changed, 1 only left, 1 only right</li>" in found._repr_html_()
    assert all(f"<td>{row.path}</td>" in found._repr_html_() for row in found.entries)


def test_what_is_no_pair(rng):
    adapters = {"w": random_adapter(rng, (11, 3), (3, 7))}
    with pytest.raises(AdapterError, match=r"left: found dict, wanted \(adapters, config\)"):
        diff(adapters, (adapters, CONFIG))
    with pytest.raises(ConfigError, match="config: found dict, wanted a LoraConfig"):
        diff((adapters, CONFIG), (adapters, {}))
    with pytest.raises(TargetError, match=r"right: w \(int\): wanted an adapter"):
        diff((adapters, CONFIG), ({"w": 1}, CONFIG))
