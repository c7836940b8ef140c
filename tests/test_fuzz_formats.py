"""Damaged files of every kind that is read are read or refused; `python -m tests.fuzz` runs any number of them."""

import pytest

from tests.fuzz import FORMATS, fuzz


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"own"}))
def test_damaged_folders(name):
    make, load, _ = FORMATS[name]
    cases = 100 if name == "record" else 200  # a record is read beside a whole checkpoint
    counts = fuzz(make, load, cases, 0)
    assert counts.total() == cases
    assert counts["refused"] > cases / 6
    assert counts["loaded"]
