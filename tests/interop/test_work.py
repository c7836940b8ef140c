"""What configurations and files of thousands of modules cost: as many steps as there are of them."""

from collections.abc import Callable
from typing import Any

import pytest

from jlora import DataError
from jlora.interop.peft._config import Scales
from jlora.interop.peft._keys import by_parent, entries_of, parameters_of
from jlora.interop.peft._targeted import Targeted
from tests.work import assert_linear


def modules(count: int) -> list[str]:
    return [f"model.layers.{i}.self_attn.q_proj" for i in range(count)]


CONFIGURATIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "target_modules": lambda count: {"target_modules": [name[6:] for name in modules(count)]},
    "exclude_modules": lambda count: {
        "target_modules": ["q_proj"],
        "exclude_modules": [f"x.{i}" for i in range(count)],
    },
    "modules_to_save": lambda count: {
        "target_modules": ["q_proj"],
        "modules_to_save": [f"x.{i}" for i in range(count)],
    },
    "layers_to_transform": lambda count: {"target_modules": ["q_proj"], "layers_to_transform": list(range(count))},
    "pattern": lambda count: {"target_modules": r".*(a|a)*.*q_proj"},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_which_modules_are_adapted(name: str) -> None:
    def make(count: int) -> Callable[[], Any]:
        data, found = CONFIGURATIONS[name](count), modules(count)

        def ask() -> None:
            targeted = Targeted(data)
            assert not any(targeted.why_not(module) for module in found)

        return ask

    assert_linear(make)


@pytest.mark.parametrize("text", [r"^model\.layers\.{}\.self_attn\.q_proj", r"layers\.{}\.self_attn\.q_proj"])
def test_a_pattern_for_each_module(text: str) -> None:
    def make(count: int) -> Callable[[], Any]:
        data = {"alpha_pattern": {text.format(i): i for i in range(count)}}

        def ask() -> None:
            scales = Scales(data)
            assert [scales.alpha_of(module) for module in modules(count)] == list(range(count))

        return ask

    assert_linear(make, most=3000)


def test_twenty_patterns_for_thousands_of_modules() -> None:
    """As many steps as the names have characters, once the states of the patterns are known."""

    def make(count: int) -> Callable[[], Any]:
        data = {"rank_pattern": {f"(a|a)(?#)*{i}.*(l|m)*x": 3 for i in range(20)}}

        def ask() -> None:
            scales = Scales(data)
            assert {scales.rank_of(module) for module in modules(count)} == {8}

        return ask

    assert_linear(make, 50, most=20 * 60 * 10)


def test_parameters_that_are_targeted() -> None:
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "experts.w1", "alone", "x.down_proj"]
    parents = by_parent(targets)
    assert parameters_of("model.0.mlp.experts", parents) == ["w1", "gate_up_proj", "down_proj"]
    assert parameters_of("experts", parents) == ["w1"]
    assert parameters_of("lexperts", parents) == []
    with pytest.raises(DataError, match="comes first is not known"):
        parameters_of("x", by_parent(["x.a", "x.down_proj"]))

    def make(count: int) -> Callable[[], Any]:
        keys = [f"base_model.model.{module}.lora_{part}.weight" for module in modules(count) for part in "AB"]
        wanted = [f"layers.{i}.self_attn.q_proj.w1" for i in range(count)]
        return lambda: entries_of(keys, wanted)

    assert_linear(make)


@pytest.mark.parametrize("count", [1, 3, 400])
def test_modules_that_are_saved_as_a_whole(count: int) -> None:
    """By a few names and by many, which are looked up in other ways."""
    data = {"target_modules": None, "modules_to_save": [*(f"x.{i}" for i in range(count)), "head.out"]}
    targeted = Targeted(data)
    for module, is_saved in {
        "x.0": True,
        "a.x.0.b": True,
        "a.head.out": True,
        "head.out.a": True,
        "head": False,
        "xx.0": False,
        "x.00": False,
        "head.a.out": False,
        "out": False,
    }.items():
        assert bool(targeted.why_not(module)) == is_saved, module
