"""Files that PEFT wrote, kept beside what PEFT makes of them: read and written back where no torch is installed."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jlora
from jlora.interop.peft import FLAT, NESTED, Row, is_peft_folder, read_peft, write_peft
from tests.reference import as64

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.name for path in GOLDEN.iterdir() if (path / "adapter_config.json").exists())


def test_the_cases_are_there() -> None:
    assert len(CASES) >= 9
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 200_000
    assert json.loads((GOLDEN / "versions.json").read_text()).keys() == {"peft", "torch"}


@pytest.mark.parametrize("name", CASES)
def test_merging_gives_what_peft_gave(name: str) -> None:
    with np.load(GOLDEN / name / "expected.npz", allow_pickle=False) as expected:
        arrays = dict(expected)
    base = {key.removeprefix("base/"): value for key, value in arrays.items() if key.startswith("base/")}
    params = {key: np.asarray(value, np.float32) for key, value in base.items()}
    adapters, config = read_peft(GOLDEN / name, params=params)
    adapters = jax.tree.map(lambda part: part.astype("float32"), adapters)
    merged = jlora.merge_params(params, adapters, config)
    assert is_peft_folder(GOLDEN / name)
    for key, value in merged.items():
        wanted = arrays[f"merged/{key}"]
        assert not np.array_equal(wanted, base[key])
        np.testing.assert_allclose(as64(value), wanted, rtol=0, atol=1e-6 * np.abs(wanted).max(), err_msg=key)


@pytest.mark.parametrize("mapping", [FLAT, NESTED], ids=["flat", "nested"])
@pytest.mark.parametrize("name", CASES)
def test_written_back_to_the_byte(name: str, mapping: tuple[Row, ...], tmp_path: Path) -> None:
    write_peft(tmp_path, *read_peft(GOLDEN / name, mapping), mapping)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / file).read_bytes() == (GOLDEN / name / file).read_bytes()
