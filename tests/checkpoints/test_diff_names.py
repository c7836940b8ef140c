"""`diff` of adapters and checkpoints whose names differ."""

import numpy as np
import pytest

from jlora import LoraConfig
from jlora.adapter import is_entry
from jlora.checkpoints import diff
from jlora.cli import main
from jlora.errors import DataError
from jlora.interop.peft import Row
from jlora.paths import leaves_by_path
from jlora.storage import load_on_host
from tests.checkpoints.make import factors, peft_parts, random, write_checkpoint, write_own, write_peft

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
    with pytest.raises(DataError, match=r"fit several parts.*\(--base\) or a mapping"):
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


def test_by_the_base_names_meet_that_nothing_else_leads_to_each_other(tmp_path, rng):
    """A text model by itself against the whole model, whose names on the disk are a third kind."""
    settings = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    weights = {f"language_model.model.{UP}.weight": (13, 7), f"language_model.model.{DOWN}.weight": (7, 13)}
    weights["language_model.model.layers.1.mlp.up_proj.weight"] = (13, 7)
    base = write_checkpoint(tmp_path / "base", {n: random(rng, s) for n, s in weights.items()}, **settings)
    one, other = adapters(tmp_path, rng, [lambda n: f"model.{n}", lambda n: f"trained.model.language_model.{n}"])
    assert diff(one, other, base=base).is_identical
    with pytest.raises(DataError, match="a base says which weights adapters are for"):
        diff(base, base, base=base)
    third = write_peft(tmp_path / "third", peft_parts(rng, {"other.0.up_proj.weight": np.zeros((13, 7))}, "up_proj"))
    with pytest.raises(DataError, match=r"third: the adapters do not fit the checkpoint: other.*no such tensor"):
        diff(one, third, base=base)
    assert main(["diff", str(one), str(other), "--base", str(base)]) == 0


def test_by_the_base_a_part_of_several_is_found(tmp_path, rng):
    one, _ = adapters(tmp_path, rng, [lambda n: n, lambda n: n])
    both = {f"{part}.{n}.weight": np.zeros((7, 7)) for part in ("encoder", "decoder") for n in (UP, DOWN)}
    other = write_peft(tmp_path / "other", peft_parts(rng, both, UP, DOWN))
    sizes = {"encoder": ((7, 7), (7, 7)), "decoder": ((13, 7), (7, 13))}
    weights = {
        f"{part}.{name}.weight": random(rng, shape)
        for part, shapes in sizes.items()
        for name, shape in zip((UP, DOWN), shapes, strict=True)
    }
    base = write_checkpoint(tmp_path / "base", weights)
    counts = diff(one, other, base=base).counts()
    assert counts == {"identical": 0, "changed": 2, "only left": 0, "only right": 2}


ARRAYS = {"gate_up_proj": (3, 10, 7), "down_proj": (3, 7, 5)}
AT = "model.layers.0.mlp.experts"


def experts(tmp_path, rng, names, form, prefix=""):
    """An adapter of experts in one array, and the same one by one."""
    stacks = {name: factors(rng, shape, "boi", 2) for name, shape in ARRAYS.items()}
    config = LoraConfig(rank=2, alpha=3, factorizations={"**": "boi"}, alpha_pattern={f"{AT}.down_proj": 5})
    array = write_own(tmp_path / "array", {f"{AT}.{name}": entry for name, entry in stacks.items()}, config)
    single, alphas = {}, {}
    for array_name, own in names.items():
        for expert in range(3):
            for part, name in enumerate(own):
                path = form.format(at=prefix + AT, expert=expert, name=name)
                a, b = stacks[array_name]["A"][expert], stacks[array_name]["B"][expert]
                width = b.shape[1] // len(own)
                single[path] = {"A": a, "B": b[:, part * width : (part + 1) * width]}
                alphas |= {path: 5} if array_name == "down_proj" else {}
    config = LoraConfig(rank=2, alpha=3, factorizations={"**": "oi"}, alpha_pattern=alphas)
    return array, write_own(tmp_path / "single", single, config)


@pytest.mark.parametrize("prefix", ["", "base."])
@pytest.mark.parametrize(
    ("names", "form"),
    [
        ((("gate_proj", "up_proj"), ("down_proj",)), "{at}.{expert}.{name}.weight"),
        ((("w1", "w3"), ("w2",)), "{at}.{expert}.{name}.weight"),
        ((("gate_up_proj",), ("down_proj",)), "{at}.{name}s.{expert}.weight"),
    ],
)
def test_experts_in_one_array_and_one_by_one(tmp_path, rng, names, form, prefix):
    array, single = experts(tmp_path, rng, dict(zip(ARRAYS, names, strict=True)), form, prefix)
    for left, right in ((array, single), (single, array)):
        found = diff(left, right)
        assert found.is_identical
        assert len(found.entries) == 3 * (len(names[0]) + 1)
        assert {entry.alphas for entry in found.entries} == {(3.0, 3.0), (5.0, 5.0)}
    of_base = write_checkpoint(tmp_path / "base", {f"{AT}.{n}": random(rng, shape) for n, shape in ARRAYS.items()})
    assert diff(array, single, base=of_base).is_identical
    assert len(diff(array, array, base=of_base).entries) == 2
    if len(names[0]) == 2:
        one_by_one = {
            f"{AT}.{expert}.{name}.weight": random(rng, (7, 5) if array_name == "down_proj" else (5, 7))
            for expert in range(3)
            for array_name, own in zip(ARRAYS, names, strict=True)
            for name in own
        }
        by_one = write_checkpoint(tmp_path / "by one", one_by_one)
        assert diff(array, single, base=by_one).is_identical
        assert len(diff(array, array, base=by_one).entries) == 2


def test_one_expert_that_differs(tmp_path, rng):
    names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    array, single = experts(tmp_path, rng, names, "{at}.{expert}.{name}.weight")
    entries, config = load_on_host(single)
    changed = {path: dict(entry) for path, entry in leaves_by_path(entries, is_leaf=is_entry).items()}
    path = next(path for path in changed if "1.up_proj" in path)
    changed[path]["B"] = changed[path]["B"] + 1
    del changed[next(path for path in changed if "2.up_proj" in path)]
    other = write_own(
        tmp_path / "other", {p: {k: np.asarray(v) for k, v in e.items()} for p, e in changed.items()}, config
    )
    found = diff(array, other)
    assert found.counts() == {"identical": 7, "changed": 1, "only left": 1, "only right": 0}
