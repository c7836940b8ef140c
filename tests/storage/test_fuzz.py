"""Damaged folders are loaded as they were, or refused; `python -m tests.fuzz` runs any number of them."""

from collections import Counter

import pytest

from jlora import DataError
from jlora.storage import load_adapters
from tests.fuzz import fuzz, load_own, make_own, seal_own


def test_damaged_folders():
    counts = fuzz(make_own, load_own, 1000, 0, seal=seal_own)
    assert counts.total() == 1000
    assert counts["refused"] > 750
    assert counts["loaded, sealed"] > 10


def test_sealing_gives_a_valid_folder(tmp_path):
    make_own(tmp_path, 0)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"alpha": 3.0', '"alpha": 4.0'))
    with pytest.raises(DataError, match="was changed after it was written"):
        load_adapters(tmp_path)
    seal_own(tmp_path)
    assert load_adapters(tmp_path)[1].alpha == 4


def test_every_byte_counts(tmp_path):
    make_own(tmp_path, 0)
    wanted, counts = load_own(tmp_path), Counter[str]()
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for position in range(0, len(whole), 7):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
            with pytest.raises(DataError):
                load_adapters(tmp_path)
            counts[path.name] += 1
        path.write_bytes(whole)
    assert load_own(tmp_path) == wanted
    assert min(counts.values()) > 50
