"""Damaged files of every kind that is read are read or refused; `python -m tests.fuzz` runs any number of them."""

import pytest

from tests.fuzz import FORMATS, fuzz


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"own"}))
def test_damaged_folders(name):
    make, load, _ = FORMATS[name]
    counts = fuzz(make, load, 300, 0)
    assert counts.total() == 300
    assert counts["refused"] > 50
    assert counts["loaded"]
