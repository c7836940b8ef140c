"""What PEFT writes, read and merged by jlora, beside what PEFT makes of it; and written back to the byte."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jlora
from jlora.adapter import is_entry
from jlora.interop.peft import FLAT, NESTED, is_peft_folder, read_peft, read_peft_arrays, write_peft
from jlora.paths import leaves_by_path
from tests.interop.models import CASES, adapted, base_of, merged_by_peft, nested, save
from tests.reference import as64, x64

FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Case -> (folder, base, merged by PEFT), each made once."""
    return {}


def of_case(written: dict[str, Any], name: str, tmp_path: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    if name not in written:
        base, live = adapted(CASES[name])
        written[name] = save(CASES[name], live, tmp_path / "adapter"), base, merged_by_peft(live)
    return written[name]


def widened(adapters: Any) -> Any:
    return jax.tree.map(lambda part: part.astype("float64"), adapters)


@pytest.mark.parametrize("name", CASES)
def test_merging_in_float64_gives_what_peft_gives(name: str, written: dict[str, Any], tmp_path: Path) -> None:
    folder, base, wanted = of_case(written, name, tmp_path)
    with x64():
        adapters, config = read_peft(folder, params=base)
        merged = jlora.merge_params(base, widened(adapters), config)
    assert set(merged) == set(wanted)
    changed = {key for key in base if not np.array_equal(base[key], wanted[key])}
    assert changed
    assert changed == {key for key, entry in adapters.items() if entry is not None} - unchanged(base, wanted, adapters)
    for key, value in wanted.items():
        np.testing.assert_allclose(as64(merged[key]), value, rtol=0, atol=1e-12 * np.abs(value).max(), err_msg=key)


def unchanged(base: dict[str, Any], wanted: dict[str, Any], adapters: dict[str, Any]) -> set[str]:
    """Weights that PEFT saved whole although they are as they were."""
    return {
        key
        for key, entry in adapters.items()
        if entry is not None and set(entry) == {"value"} and np.array_equal(base[key], wanted[key])
    }


@pytest.mark.parametrize("mapping", [FLAT, NESTED], ids=["flat", "nested"])
@pytest.mark.parametrize("name", CASES)
def test_peft_to_jlora_to_peft_is_the_same_to_the_byte(
    name: str, mapping: Any, written: dict[str, Any], tmp_path: Path
) -> None:
    folder, *_ = of_case(written, name, tmp_path)
    adapters, config = read_peft(folder, mapping)
    write_peft(tmp_path / "again", adapters, config, mapping)
    for file in FILES:
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()


def test_keys_of_a_later_peft_come_back(written: dict[str, Any], tmp_path: Path) -> None:
    folder, *_ = of_case(written, "llama", tmp_path)
    data = json.loads((folder / FILES[0]).read_text()) | {"use_tomorrow": False, "tomorrow": {"é": [1, None, 0.1]}}
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / FILES[0]).write_text(json.dumps(data))
    (tmp_path / "new" / FILES[1]).write_bytes((folder / FILES[1]).read_bytes())
    adapters, config = read_peft(tmp_path / "new")
    write_peft(tmp_path / "again", adapters, config)
    assert json.loads((tmp_path / "again" / FILES[0]).read_text()) == data
    assert (tmp_path / "again" / FILES[1]).read_bytes() == (folder / FILES[1]).read_bytes()


def test_another_alpha_is_written_for_every_module(written: dict[str, Any], tmp_path: Path) -> None:
    folder, base, _ = of_case(written, "llama", tmp_path)
    adapters, config = read_peft(folder)
    path = next(path for path, _ in config.alpha_pattern)
    changed = config.replace(alpha=3.5, alpha_pattern={path: 11})
    write_peft(tmp_path / "again", adapters, changed)
    _, found = read_peft(tmp_path / "again", params=base)
    paths = [path for path, entry in adapters.items() if "A" in entry]
    assert {path: found.effective_alpha_of(path) for path in paths} == {
        path: changed.effective_alpha_of(path) for path in paths
    }
    assert {path: found.rank_of(path) for path in paths} == {path: config.rank_of(path) for path in paths}
    kept = json.loads((folder / FILES[0]).read_text())
    data = json.loads((tmp_path / "again" / FILES[0]).read_text())
    assert all(
        kept[key] in (None, False, {}, 16, "megatron.core") for key in kept.keys() - data.keys() - {"peft_version"}
    )
    changed_keys = {key for key in data if kept[key] != data[key]}
    assert changed_keys == {"lora_alpha", "alpha_pattern", "rank_pattern", "init_lora_weights"}


@pytest.mark.parametrize("name", CASES)
def test_the_configuration_says_what_the_file_does(name: str, written: dict[str, Any], tmp_path: Path) -> None:
    folder, base, _ = of_case(written, name, tmp_path)
    data = json.loads((folder / FILES[0]).read_text())
    adapters, config = read_peft(folder)
    assert (config.rank, config.alpha, config.dropout) == (data["r"], data["lora_alpha"], data["lora_dropout"])
    assert config.scaling == ("rslora" if data["use_rslora"] else "standard")
    for path, entry in adapters.items():
        if "A" in entry:
            assert entry["A"].shape[-1] == config.rank_of(path)
            assert len(dict(config.factorizations)[path]) == base[path].ndim
    assert jlora.LoraConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("name", ["llama", "qwen3 moe", "conv dora"])
def test_params_give_the_structure(name: str, written: dict[str, Any], tmp_path: Path) -> None:
    folder, base, _ = of_case(written, name, tmp_path)
    shapes = jax.tree.map(lambda weight: jax.ShapeDtypeStruct(weight.shape, weight.dtype), nested(base))
    adapters, _ = read_peft(folder, NESTED, params=shapes)
    flat, _ = read_peft_arrays(folder, NESTED)
    leaves = leaves_by_path(adapters, is_leaf=is_entry)
    assert set(leaves) == set(flat)
    for path, entry in flat.items():
        assert all(np.array_equal(leaves[path][part], entry[part]) for part in entry)
    empty = jax.tree.map(lambda _: None, nested(base))
    assert jax.tree.structure(jax.tree.map(lambda _: None, adapters, is_leaf=is_entry)) == jax.tree.structure(empty)


def test_a_reduced_dtype_is_kept(written: dict[str, Any], tmp_path: Path) -> None:
    for name, dtype in (("llama bf16", "bfloat16"), ("llama fp16", "float16")):
        folder, *_ = of_case(written, name, tmp_path / dtype)
        assert {part.dtype.name for part in jax.tree.leaves(read_peft(folder)[0])} == {dtype}


def test_float64_needs_x64(tmp_path: Path) -> None:
    _, live = adapted(CASES["conv"])
    folder = save(CASES["conv"], live.double(), tmp_path / "adapter")
    assert is_peft_folder(folder)
    with pytest.raises(jlora.DataError, match=r"conv1.weight has the dtype float64: set jax_enable_x64"):
        read_peft(folder)
    assert {part.dtype.name for entry in read_peft_arrays(folder)[0].values() for part in entry.values()} == {"float64"}
    with x64():
        assert {part.dtype.name for part in jax.tree.leaves(read_peft(folder)[0])} == {"float64"}


def test_dora_can_be_merged_and_taken_out_with_a_residual(written: dict[str, Any], tmp_path: Path) -> None:
    folder, base, _ = of_case(written, "llama dora", tmp_path)
    params = {name: np.asarray(value, np.float32) for name, value in base.items()}
    adapters, config = read_peft(folder, params=params)
    merged, residual = jlora.merge_params(params, adapters, config, return_residual=True)
    back = jlora.unmerge_params(merged, adapters, config, residual=residual)
    assert all(np.array_equal(back[name], params[name]) for name in params)
    with pytest.raises(jlora.TargetError, match="cannot be taken out"):
        jlora.unmerge_params(merged, adapters, config)


def test_a_model_of_another_seed_is_another_base() -> None:
    """The references above are of random weights, not of what a model begins with."""
    one, other = base_of(CASES["llama"]), base_of(CASES["llama"], 1)
    assert not np.array_equal(one.lm_head.weight.detach(), other.lm_head.weight.detach())
