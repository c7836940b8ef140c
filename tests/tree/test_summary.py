"""The table of what is adapted, in a terminal and in a notebook."""

import io
import xml.etree.ElementTree as ElementTree
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import rich.console
from flax.core import freeze

from jlora import LoraConfig, TargetError, count_params, init_lora, summary

HEADER = ["path", "shape", "factorization", "rank", "alpha", "parameters", "share"]
CONFIG = LoraConfig(rank=2, alpha=3, exclude_modules="table", rank_pattern={"embed": 5}, alpha_pattern={"head": 0.5})
ROWS = [
    ["embed/embedding", "1301x7", "io", "5", "3", "6,540", "66.01%"],
    ["head/kernel", "7x11", "io", "2", "0.5", "36", "0.36%"],
    ["layers/query/kernel", "2x7x3x5", "bioo", "2", "3", "88", "0.89%"],
]
SUM = ["3 weights of 9,907 parameters", "6,664", "67.27%"]


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


PARAMS = {
    "embed": {"embedding": shape(1301, 7)},
    "head": {"kernel": shape(7, 11), "bias": shape(11)},
    "layers": {"query": {"kernel": shape(2, 7, 3, 5), "bias": shape(2, 3, 5)}},
    "norm": {"scale": shape(7)},
    "table": shape(3, 5, 31),
}


def made(params: Any, config: LoraConfig = CONFIG) -> Any:
    return summary(params, init_lora(None, params, config), config)


def one(path: str) -> Any:
    return made({path: shape(5, 7)}, LoraConfig(rank=2))


def cells_of_text(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.strip(" ─━")]
    return [[cell for cell in line.split("  ") if cell.strip()] for line in lines]


def cells_of_html(markup: str) -> list[list[str]]:
    return [[cell.text or "" for cell in row] for row in ElementTree.fromstring(markup).iter("tr")]


def test_the_sum_is_of_the_whole_tree():
    wanted = (1301 * 7) + (7 * 11 + 11) + (2 * 7 * 3 * 5 + 2 * 3 * 5) + 7 + (3 * 5 * 31)
    assert made(PARAMS).total == wanted == 9907


@pytest.mark.parametrize("make", [dict, freeze])
def test_text_has_a_row_for_each_adapted_weight_and_one_for_the_sum(make):
    table = [[cell.strip() for cell in row] for row in cells_of_text(str(made(make(PARAMS))))]
    assert table == [HEADER, *ROWS, SUM]


def test_html_has_the_same_cells():
    head, *rows, total = cells_of_html(made(PARAMS)._repr_html_())
    assert [head, *rows] == [HEADER, *ROWS]
    assert [cell for cell in total if cell] == SUM
    assert len(total) == len(HEADER)


def test_text_is_plain_and_aligned_and_the_repr_too():
    table = made(PARAMS)
    text = str(table)
    assert repr(table) == text
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())
    ends = {line.rindex("%") for line in text.splitlines() if "%" in line}
    assert len(ends) == 1


def test_a_rich_console_shows_the_table():
    console = rich.console.Console(file=io.StringIO(), width=160)
    console.print(made(PARAMS))
    assert [[cell.strip() for cell in row] for row in cells_of_text(console.file.getvalue())] == [HEADER, *ROWS, SUM]


def test_print_works_in_a_notebook(monkeypatch):
    wanted = str(made(PARAMS))
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    assert str(made(PARAMS)) == wanted


def test_numbers_are_those_of_the_adapters():
    table = made(PARAMS)
    adapters = init_lora(None, PARAMS, CONFIG)
    assert sum(table.parameters) == count_params(adapters)
    assert table.total == count_params(PARAMS)
    assert [target.path for target in table.targets] == [row[0] for row in ROWS]


def test_the_factorization_of_the_configuration_is_shown():
    table = made({"w": shape(3, 5, 7)}, LoraConfig(rank=2, factorizations={"w": "oio"}))
    assert table.rows()[0][:4] == ("w", "3x5x7", "oio", "2")


def test_one_weight_is_not_called_weights():
    assert "1 weight of 35 parameters" in str(one("kernel"))


@pytest.mark.parametrize("params", [PARAMS, {}])
def test_without_adapters_a_pattern_has_no_effect(params):
    with pytest.raises(TargetError, match=r"target_modules: '.*' (adapts|matches) nothing"):
        summary(params, {}, CONFIG)


ODD = ["<b>&'\"</b>", "[bold]w[/bold]", "[/w]", "w[0]", ":apple:", "wört/日本", "a  b", "back\\[slash]"]


@pytest.mark.parametrize("path", ODD)
def test_odd_characters_are_shown_as_they_are(path):
    table = one(path)
    assert path in str(table)
    assert cells_of_html(table._repr_html_())[1][0] == path


def test_html_is_escaped():
    markup = one("<script>alert('x')</script>")._repr_html_()
    assert "<script" not in markup
    assert "&lt;script&gt;" in markup


@pytest.mark.parametrize("length", [100, 300, 1000])
def test_wide_paths_are_not_cut(length):
    path = "/".join(["module"] * (length // 7) + ["kernel"])
    table = one(path)
    assert path in str(table)
    assert "…" not in str(table)
    assert path in table._repr_html_()


def test_large_numbers_have_separators():
    table = made({"kernel": shape(100_003, 7_919)}, LoraConfig(rank=4))
    assert table.rows()[0][5:] == ("431,688", "0.05%")
    assert "1 weight of 791,923,757 parameters" in str(table)


def test_adapters_that_do_not_fit_are_refused():
    adapters = init_lora(None, PARAMS, CONFIG)
    with pytest.raises(TargetError, match=r"head/kernel: A \(7, 2\) does not have the rank 3"):
        summary(PARAMS, adapters, CONFIG.replace(rank=3))
