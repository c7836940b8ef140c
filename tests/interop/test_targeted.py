"""What PEFT's configuration says is adapted, and what its tensors adapt."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora import DataError, LoraConfig
from jlora.interop.peft import read_peft, write_peft
from tests.interop.files import pair, write_folder

Rng = np.random.Generator
MAGNITUDE = {"m.0.q.lora_magnitude_vector": np.ones(3, "float32")}
BIAS = {"m.0.q.lora_B.bias": np.ones(3, "float32")}
CONTRADICTIONS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"use_dora": True}, {}, "m.0.q has no magnitude, use_dora is True$"),
    ({"use_dora": False}, MAGNITUDE, "m.0.q has a magnitude, use_dora is False$"),
    ({"lora_bias": False}, BIAS, r"m.0.q.lora_B.bias: lora_bias is False$"),
    ({"lora_bias": True, "use_dora": True}, MAGNITUDE | BIAS, "PEFT has no bias of a B beside DoRA$"),
    ({"target_modules": ["k", "0.q.x", "mq"]}, {}, "m.0.q has A and B, and is none of the modules that"),
    ({"target_modules": ".*k"}, {}, "m.0.q has A and B, and is none of the modules that"),
    ({"target_modules": "q"}, {}, "m.0.q has A and B, and is none of the modules that"),
    ({"exclude_modules": ["0.q"]}, {}, "m.0.q has A and B, and is none of the modules that"),
    ({"exclude_modules": "m.*"}, {}, "m.0.q has A and B, and is none of the modules that"),
    ({"modules_to_save": ["0"]}, {}, "m.0.q has A and B, and is none of the modules that"),
    ({"target_modules": ["q"], "layers_to_transform": [0]}, {}, "m.0.q has A and B, and is in none of layers"),
    ({}, {"m.0.q.weight": np.ones((3, 5), "float32")}, "m.0.q.weight: beside A and B PEFT calls it m.0.q.base_layer$"),
]


@pytest.mark.parametrize(("fields", "more", "message"), CONTRADICTIONS)
def test_tensors_that_the_configuration_does_not_name(
    fields: Any, more: Any, message: str, tmp_path: Path, rng: Rng
) -> None:
    with pytest.raises(DataError, match=message):
        read_peft(write_folder(tmp_path, pair(rng, "m.0.q", 3, 5) | more, **fields))


NAMED: list[dict[str, Any]] = [
    {"target_modules": ["q"]},
    {"target_modules": ["m.0.q"], "layers_to_transform": [7]},
    {"target_modules": r".*\.q"},
    {"target_modules": r"(?P<x>m)\.0\.(?<!v)q"},  # which jlora does not match
    {"target_modules": "all-linear"},
    {"exclude_modules": ["x", "m"]},
    {"exclude_modules": "m"},
]


@pytest.mark.parametrize("fields", NAMED)
def test_tensors_that_the_configuration_names(fields: Any, tmp_path: Path, rng: Rng) -> None:
    assert set(read_peft(write_folder(tmp_path, pair(rng, "m.0.q", 3, 5), **fields))[0]) == {"m.0.q.weight"}


@pytest.mark.parametrize(("layers", "read"), [(1, True), ([0, 1], True), (0, False), ([], True)])
def test_layers_to_transform(layers: Any, read: bool, tmp_path: Path, rng: Rng) -> None:
    tensors = pair(rng, "m.layers.1.experts.0.q", 3, 5)
    folder = write_folder(tmp_path / "a", tensors, target_modules=["q"], layers_to_transform=layers)
    if read:
        assert set(read_peft(folder)[0]) == {"m.layers.1.experts.0.q.weight"}
    else:
        with pytest.raises(
            DataError, match=r"m.layers.1.experts.0.q has A and B, and is in none of layers_to_transform$"
        ):
            read_peft(folder)


@pytest.mark.parametrize(
    ("lists", "layers", "read"),
    [
        ("layers", 1, True),
        ("layers", 0, False),  # the number of an expert
        ("experts", 0, True),
        (["h", "m.layers"], [1], True),
        (["h"], [1], False),
        (["layer."], [1], True),
        (["lay.*"], [7], True),  # a pattern, which is not checked
    ],
)
def test_layers_pattern(lists: Any, layers: Any, read: bool, tmp_path: Path, rng: Rng) -> None:
    fields = {"target_modules": ["q"], "layers_to_transform": layers, "layers_pattern": lists}
    folder = write_folder(tmp_path / "a", pair(rng, "m.layers.1.experts.0.q", 3, 5), **fields)
    if read:
        assert set(read_peft(folder)[0]) == {"m.layers.1.experts.0.q.weight"}
    else:
        with pytest.raises(DataError, match=r"experts.0.q has A and B, and is in none of layers_to_transform$"):
            read_peft(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": 5}, "target_modules = 5: wanted names of modules, or a regular expression"),
        ({"target_modules": "("}, r"target_modules is no regular expression: '\('"),
        ({"exclude_modules": [1]}, r"exclude_modules = \[1\]: wanted names"),
        ({"target_modules": []}, r"target_modules = \[\]: wanted names"),
        ({"modules_to_save": "norm"}, "modules_to_save = 'norm': wanted names of modules"),
        ({"bias": "x"}, "bias = 'x': wanted none, all or lora_only"),
        ({"layers_to_transform": "1"}, "layers_to_transform = '1': wanted the numbers of layers"),
        ({"layers_pattern": "h"}, "layers_pattern = 'h': wanted layers_to_transform beside it"),
        ({"target_modules": ".*", "layers_to_transform": 1}, "go with names as target_modules"),
        ({"alpha_pattern": None}, "alpha_pattern = None: wanted a mapping"),
    ],
)
def test_fields_that_peft_does_not_read(fields: Any, message: str, tmp_path: Path, rng: Rng) -> None:
    with pytest.raises(DataError, match=message):
        read_peft(write_folder(tmp_path, pair(rng, "m.0.q", 3, 5), **fields))


def test_other_modules_than_those_that_were_read_are_named(tmp_path: Path, rng: Rng) -> None:
    fields = {"target_modules": ["q"], "layers_to_transform": [1], "exclude_modules": ["k"]}
    adapters, config = read_peft(write_folder(tmp_path / "a", pair(rng, "m.layers.1.q", 3, 5), **fields))
    others = {f"m.layers.{name}.weight": entry for entry in adapters.values() for name in ("0.k", "1.q")}
    write_peft(tmp_path / "b", others, config.replace(target_modules="**", factorizations={"**": "oi"}))
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["target_modules"] == [
        "m.layers.0.k",
        "m.layers.1.q",
    ]
    assert read_peft(tmp_path / "b")[0].keys() == others.keys()


def test_what_peft_would_read_as_something_else_is_not_written(tmp_path: Path, rng: Rng) -> None:
    entry = read_peft(write_folder(tmp_path / "a", pair(rng, "q", 3, 5)))[0]["q.weight"]
    dora = {"k.weight": entry, "q.weight": entry | {"magnitude": np.ones(3, "float32")}}
    with pytest.raises(
        DataError, match=r"PEFT would read something else, or nothing: q.weight has .*k.weight has none"
    ):
        write_peft(tmp_path / "b", dora, LoraConfig(rank=2, factorizations={"**": "oi"}))
    assert not (tmp_path / "b").exists()
