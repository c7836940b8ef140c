"""Damaged folders of PEFT's and damaged checkpoints are read or refused; `python -m tests.fuzz` runs any number."""

import pytest

from tests.fuzz import FORMATS, fuzz


@pytest.mark.parametrize("name", ["peft", "checkpoint"])
def test_damaged_folders(name):
    make, load, _ = FORMATS[name]
    counts = fuzz(make, load, 500, 0)
    assert counts.total() == 500
    assert counts["refused"] > 150
    assert counts["loaded"] > 10
