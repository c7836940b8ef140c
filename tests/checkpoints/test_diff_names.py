"""`diff` of adapters and checkpoints whose names differ."""

import numpy as np
import pytest

from jlora.checkpoints import diff
from jlora.errors import DataError
from jlora.interop.peft import Row
from tests.checkpoints.make import peft_parts, random, write_checkpoint, write_peft

UP, DOWN = "layers.0.mlp.up_proj", "layers.0.mlp.down_proj"


def adapters(tmp_path, rng, names, *, ranks=(3, 2)):
    """One adapter under several names, in folders 0, 1, ...: up and down of two ranks, by patterns on the names."""
    shapes = {UP: (13, 7), DOWN: (7, 13)}
    parts = [
        peft_parts(rng, {f"{module}.weight": np.zeros(shape)}, module, rank=rank)
        for (module, shape), rank in zip(shapes.items(), ranks, strict=True)
    ]
    folders = []
    for number, name in enumerate(names):
        own = {name(key): part for each in parts for key, part in each.items()}
        pattern = {"rank_pattern": {name(DOWN): ranks[1]}, "alpha_pattern": {name(DOWN): 5.0}}
        folders.append(write_peft(tmp_path / str(number), own, **pattern))
    return folders


@pytest.mark.parametrize(
    ("left", "right", "rows"),
    [
        (lambda n: n, lambda n: n, ()),
        (lambda n: n, lambda n: f"model.{n}", ()),
        (lambda n: f"model.{n}", lambda n: n, ()),
        (lambda n: f"a.wrap.{n}", lambda n: f"b.{n}", (Row("a.wrap.{x*}", "b.{x*}"),)),
        (
            lambda n: n.replace("up_proj", "fc1").replace("down_proj", "fc2"),
            lambda n: f"vit.encoder.{n}",
            (
                Row("{x*}.fc1.weight", "vit.encoder.{x*}.up_proj.weight"),
                Row("{x*}.fc2.weight", "vit.encoder.{x*}.down_proj.weight"),
            ),
        ),
    ],
)
def test_names_of_one_adapter(tmp_path, rng, left, right, rows):
    """Each side's scalings are those of its own names."""
    one, other = adapters(tmp_path, rng, [left, right])
    found = diff(one, other, mapping=rows)
    assert found.is_identical
    assert {entry.path.replace("/", ".") for entry in found.entries} == {f"{left(n)}.weight" for n in (UP, DOWN)}
    assert {entry.alphas for entry in found.entries} == {(6.0, 6.0), (5.0, 5.0)}


def test_what_has_no_counterpart_stays_alone(tmp_path, rng):
    one, _ = adapters(tmp_path, rng, [lambda n: n, lambda n: n])
    other = write_peft(tmp_path / "other", peft_parts(rng, {f"model.{UP}.weight": np.zeros((13, 7))}, UP))
    assert diff(one, other).counts() == {"identical": 0, "changed": 1, "only left": 1, "only right": 0}
    assert diff(other, one).counts() == {"identical": 0, "changed": 1, "only left": 0, "only right": 1}


def test_an_adapter_that_fits_two_parts_is_refused_and_a_mapping_says_which(tmp_path, rng):
    one, _ = adapters(tmp_path, rng, [lambda n: n, lambda n: n])
    both = {f"{part}.{n}.weight": np.zeros((7, 7)) for part in ("encoder", "decoder") for n in (UP, DOWN)}
    other = write_peft(tmp_path / "other", peft_parts(rng, both, UP, DOWN))
    with pytest.raises(DataError, match=r"fit several parts.*a mapping says which \(--mapping\)"):
        diff(one, other)
    counts = diff(one, other, mapping=(Row("layers.{x*}", "decoder.layers.{x*}"),)).counts()
    assert counts == {"identical": 0, "changed": 2, "only left": 0, "only right": 2}


def test_checkpoints(tmp_path, rng):
    up, down = random(rng, (5, 3)), random(rng, (3, 5))
    one = write_checkpoint(tmp_path / "one", {"a.up": up, "a.down": down, "a.x": up})
    other = write_checkpoint(tmp_path / "other", {"b.up": up, "b.down": down + 1, "a.x": up})
    counts = diff(one, other, mapping=(Row("a.{x*}", "b.{x*}"),)).counts()
    assert (counts["identical"], counts["changed"]) == (2, 1)
    assert (counts["only left"], counts["only right"]) == (0, 0)
    counts = diff(one, other).counts()
    assert (counts["identical"], counts["only left"], counts["only right"]) == (1, 2, 2)
