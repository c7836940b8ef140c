"""What it costs to find the tensors of thousands of adapters, under whatever prefix they have."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jlora import DataError, LoraConfig
from jlora.checkpoints import _locate
from jlora.checkpoints._updates import changes_of
from tests.work import assert_linear

CONFIG = LoraConfig(rank=2, factorizations={"**": "io"})


def entries(names: list[str]) -> dict[str, Any]:
    return {name: {"A": np.ones((3, 2), np.float32), "B": np.ones((2, 5), np.float32)} for name in names}


def checkpoint(names: list[str]) -> Any:
    entries = {name: SimpleNamespace(shape=(3, 5), code="F32") for name in names}
    return SimpleNamespace(entries=entries, folder=Path("nowhere"))


CASES: dict[str, Callable[[int], tuple[list[str], list[str]]]] = {
    "none fits": lambda count: ([f"a.{i}.q" for i in range(count)], [f"m.{i}.k" for i in range(count)]),
    "one fits, under many prefixes": lambda count: (
        ["x.q", *(f"z{i}" for i in range(count))],
        [f"m{i}.x.q" for i in range(count)],
    ),
    "all but the last": lambda count: ([f"a.{i}.q" for i in range(count + 1)], [f"m.a.{i}.q" for i in range(count)]),
}


@pytest.mark.parametrize("case", CASES)
def test_names_that_do_not_fit(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_locate, "_SAMPLE", 10)

    def make(count: int) -> Callable[[], Any]:
        own, there = CASES[case](count)
        found, source = entries(own), checkpoint(there)

        def ask() -> None:
            with pytest.raises(DataError, match=r"^the adapters do not fit the checkpoint: "):
                changes_of(found, CONFIG, 1.0, source)

        return ask

    assert_linear(make, 120, most=10_000)
