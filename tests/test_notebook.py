"""The notebook runs from top to bottom, without its install cell, and its checks hold."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def executed(steps, tmp_path_factory):
    """The notebook after a run with so many steps, of the base and of the adapters; it has 300 itself."""
    depth = 4 if steps > 60 else 2
    cache = str(tmp_path_factory.mktemp("base"))
    model = f"digits.model(depth={depth}, steps={steps}, cache={cache!r})"
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", [])]
    folder = tmp_path_factory.mktemp("notebook")
    for cell in notebook.cells:
        cell.source = cell.source.replace("digits.model()", model)
        cell.source = cell.source.replace("steps = 300", f"steps = {steps}")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def printed(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.mark.parametrize("steps", [60], scope="module")
def test_the_adapted_model_is_better_than_the_base(executed):
    before, after = map(float, re.search(r"([\d.]+)% before, ([\d.]+)% after", printed(executed)).groups())
    assert before < 20
    assert after > 30


@pytest.mark.parametrize("steps", [60], scope="module")
def test_the_table_and_three_pictures_are_shown(executed):
    data = [output.get("data", {}) for cell in executed.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in shown for shown in data) == 3
    assert sum("block_0/attention/query/kernel" in shown.get("text/html", "") for shown in data) == 1


def test_it_has_an_install_cell_and_no_stale_outputs():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert any("%pip install" in cell.source and "install" in cell.metadata.get("tags", []) for cell in cells)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
