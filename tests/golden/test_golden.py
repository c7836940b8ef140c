"""What each release wrote is read as it was meant: adapters, residuals of merges, journals of stopped ones."""

import json
import os
import shutil
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

import jlora
from jlora import LoraConfig, checkpoints, load_adapters
from jlora.adapter import is_entry
from jlora.disk import Checkpoint
from jlora.paths import leaves_by_path
from jlora.storage import read_metadata
from tests.golden import ADAPTERS, BASE, EXPECTED, MACHINE, MERGED, PARTIAL, TO_MERGE

HERE = Path(__file__).parent
VERSIONS = sorted(path.parent.name for path in HERE.glob(f"*/{EXPECTED}"))

pytestmark = pytest.mark.parametrize("version", VERSIONS)


def expected(version):
    return json.loads((HERE / version / EXPECTED).read_text(encoding="utf-8"))


def assert_holds(array, wanted):
    assert (array.dtype.name, list(array.shape)) == (wanted["dtype"], wanted["shape"])
    assert np.asarray(array).astype(float).ravel().tolist() == wanted["values"]


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_adapters(version):
    adapters, config = load_adapters(HERE / version / ADAPTERS)
    wanted = expected(version)
    entries = leaves_by_path(adapters, is_leaf=is_entry)
    assert entries.keys() == wanted["entries"].keys()
    for path, parts in wanted["entries"].items():
        assert entries[path].keys() == parts.keys()
        for name, part in parts.items():
            assert_holds(entries[path][name], part)
    assert config == LoraConfig.from_dict(wanted["config"])
    assert json.loads(json.dumps(config.to_dict())).items() >= wanted["config"].items()
    assert read_metadata(HERE / version / ADAPTERS) == wanted["metadata"]


def test_the_structure_of_adapters(version):
    adapters, _ = load_adapters(HERE / version / ADAPTERS)
    assert type(adapters["layers"]) is list
    assert type(adapters["experts"]) is tuple
    assert adapters["experts"][1] is None
    assert adapters["layers"][0]["bias"] is None
    assert len(jax.tree.leaves(adapters)) == sum(map(len, expected(version)["entries"].values()))


def test_a_merge_is_taken_back_to_the_bit(version, tmp_path):
    folder = HERE / version
    merged = Checkpoint(folder / MERGED)
    for name, wanted in expected(version)["merged"].items():
        assert_holds(merged.read(name), wanted)
    done = checkpoints.unmerge(folder / MERGED, folder / TO_MERGE, tmp_path / "back")
    assert done.exact
    assert shards(tmp_path / "back") == shards(folder / BASE)


def test_a_merge_today_has_the_same_bits(version, tmp_path):
    folder = HERE / version
    checkpoints.merge(folder / BASE, folder / TO_MERGE, tmp_path / "merged")
    assert shards(tmp_path / "merged") == shards(folder / MERGED)


def test_a_merge_that_was_stopped_goes_on(version, tmp_path):
    base = tmp_path / BASE
    for name in (BASE, TO_MERGE):
        shutil.copytree(HERE / version / name, tmp_path / name)
    place = tmp_path / ".out.0123456789abcdef.jlora"
    shutil.copytree(HERE / version / PARTIAL, place)
    journal = json.loads((place / "journal.json").read_bytes())
    for shard, (_, time) in journal["job"]["source"].items():  # a copy has other times
        os.utime(base / shard, ns=(time, time))
    journal["files"] = Checkpoint(base).identities  # and is another file
    (place / "journal.json").write_text(json.dumps(journal), encoding="utf-8")
    with mock.patch(MACHINE, return_value=journal["machine"]):
        done = checkpoints.merge(base, tmp_path / TO_MERGE, tmp_path / "out", keep_residual=True)
    assert done.resumed == len(journal["done"]) == 1
    assert not place.exists()
    found = {path.relative_to(tmp_path / "out"): path.read_bytes() for path in (tmp_path / "out").rglob("*.weight")}
    wanted = HERE / version / MERGED
    assert found == {path.relative_to(wanted): path.read_bytes() for path in wanted.rglob("*.weight")}
    assert shards(tmp_path / "out") == shards(wanted)


def test_this_version_has_its_files(version):
    assert jlora.__version__ in VERSIONS
    assert sum(path.stat().st_size for path in (HERE / version).rglob("*") if path.is_file()) < 50_000
