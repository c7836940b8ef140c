"""What an error says to give the configuration, given as it stands, for paths that hold the characters of patterns."""

import ast
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jlora import JloraError, LoraConfig, init_lora, merge_params
from jlora.compose import resize
from jlora.interop.gemma import from_gemma
from jlora.interop.peft import write_peft

NAME = "up[0]*"
PATTERN = "up[[]0][*]"


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def pair(a: tuple[int, ...], b: tuple[int, ...], names: str = "AB") -> dict[str, np.ndarray]:
    return {names[0]: ones(*a), names[1]: ones(*b)}


def made(leaf: str, weight: np.ndarray, **own: Any) -> Callable[..., Any]:
    return lambda **given: init_lora(None, {NAME: {leaf: weight}}, LoraConfig(**({"rank": 2} | own | given)))


def shrunk(**given: Any) -> Any:
    return resize({NAME: pair((5, 3), (3, 7))}, LoraConfig(rank=3), 6, **given)


def shrunk_batches(**given: Any) -> Any:
    return resize({NAME: pair((2, 2, 2), (2, 2, 2))}, LoraConfig(rank=2, **given), 1)


def read(**given: Any) -> Any:
    return from_gemma({NAME: {"w": ones(5, 5, 3), "lora": pair((5, 2), (2, 5, 3), "ab")}}, **given)


@pytest.mark.parametrize(
    ("call", "path", "letters"),
    [
        (made("kernel", ones(5, 7), rank=6, target_modules=f"{PATTERN}/kernel"), f"{PATTERN}/kernel", None),
        (made("odd", ones(5, 7, 3), target_modules=f"{PATTERN}/odd"), f"{PATTERN}/odd", "ioo"),
        (made("bias", ones(5, 7), target_modules=f"{PATTERN}/bias"), f"{PATTERN}/bias", "io"),
        (shrunk, PATTERN, None),
        (shrunk_batches, PATTERN, "bio"),
        (read, f"{PATTERN}/w", "ioo"),
    ],
    ids=["rank", "letters", "bias", "resize", "batch axes", "names"],
)
def test_the_way_out_is_one(call: Callable[..., Any], path: str, letters: str | None) -> None:
    with pytest.raises(JloraError) as error:
        call()
    field, way_out = re.findall(r"(rank_pattern|factorizations)=(\{.*?\})", str(error.value))[0]
    given = ast.literal_eval(way_out)
    assert list(given) == [path]
    call(**{field: given if letters is None else {path: letters}})


def test_the_way_out_of_writing_peft(tmp_path) -> None:
    entry = {f"{NAME}.weight": pair((5, 2), (2, 7))}
    with pytest.raises(JloraError, match="the axes are not known") as error:
        write_peft(tmp_path / "a", entry, LoraConfig(rank=2))
    way_out = ast.literal_eval(re.findall(r"factorizations=(\{.*?\})", str(error.value))[0])
    write_peft(tmp_path / "a", entry, LoraConfig(rank=2, factorizations=way_out))


def test_the_way_out_of_a_tree_that_is_one_weight() -> None:
    weight = ones(5, 7)
    with pytest.raises(JloraError, match=re.escape("rank_pattern={'**': 5}")):
        init_lora(None, weight, LoraConfig(rank=6, factorizations={"**": "io"}))
    config = LoraConfig(rank=6, factorizations={"**": "io"}, rank_pattern={"**": 5})
    assert merge_params(weight, init_lora(None, weight, config), config).shape == (5, 7)
