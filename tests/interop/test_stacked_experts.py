"""Experts in one parameter: which axis A lies on depends on PEFT's version and on the model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jlora
from jlora.checkpoints import combine, convert, merge, resize, unmerge
from jlora.cli import main
from jlora.disk import Checkpoint, write_tensors
from jlora.interop.peft import read_peft
from tests.interop.files import Rng, delta, experts_pair, pair, write_folder
from tests.interop.old_peft import install, run

# (version, the model keeps (experts, in, out)) -> what A and B mean; found by merging in each of these versions.
MEANING = {
    (None, False): "experts_t",
    (None, True): "experts_t",
    ("0.18.1", False): "experts_t",
    ("0.18.1", True): "experts_t",
    ("0.19.0", False): "experts_t",
    ("0.19.0", True): "experts",
    ("0.19.1", False): "experts",
    ("0.19.1", True): "experts_t",
    ("0.21.2", False): "experts",
    ("0.21.2", True): "experts_t",
    ("1.0.0.dev0@abc", False): "experts",
}
OPEN = r"experts \(5, 5\) are square, and nothing says .* give transposed_experts: --transposed-experts for"


def base_folder(folder: Path, tensors: dict[str, Any], **config: Any) -> Path:
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as file:
        write_tensors(file, tensors, {"format": "pt"})
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def adapter_folder(folder: Path, tensors: dict[str, Any], version: str | None = "0.21.2", **fields: Any) -> Path:
    fields |= {"target_parameters": ["experts.down_proj"], "peft_version": version}
    return write_folder(folder, tensors, base_model_name_or_path="/data/mine", **fields)


def made(tmp_path: Path, rng: Rng, shape: tuple[int, ...], kind: str, version: str | None, **config: Any) -> Any:
    """A base, an adapter whose A and B mean this kind of experts, and the merged weight in float64."""
    count, *sides = shape
    outs, ins = sides if kind == "experts" else sides[::-1]
    tensors = experts_pair(rng, "mlp.experts", count, outs, ins)
    weight = rng.standard_normal(shape).astype("float32")
    base = base_folder(tmp_path / "base", {"mlp.experts.down_proj": weight}, **config)
    return base, adapter_folder(tmp_path / "adapter", tensors, version), weight + delta(tensors, "mlp.experts", kind)


def merged(base: Path, adapter: Path, out: Path, **options: Any) -> Any:
    merge(base, adapter, out, **options)
    return Checkpoint(out).read("mlp.experts.down_proj")


@pytest.mark.parametrize("how", ["model_type", "option"])
@pytest.mark.parametrize(("version", "is_transposed"), MEANING)
def test_square_experts(version: str | None, is_transposed: bool, how: str, tmp_path: Path, rng: Rng) -> None:
    config = {"model_type": "gpt_oss" if is_transposed else "qwen3_moe"} if how == "model_type" else {}
    options = {} if config else {"transposed_experts": is_transposed}
    kind = MEANING[version, is_transposed]
    base, adapter, wanted = made(tmp_path, rng, (3, 5, 5), kind, version, **config)
    found = merged(base, adapter, tmp_path / "out", **options)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    unmerge(tmp_path / "out", adapter, tmp_path / "back", **options)
    there = Checkpoint(base).read("mlp.experts.down_proj")
    np.testing.assert_allclose(Checkpoint(tmp_path / "back").read("mlp.experts.down_proj"), there, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["experts", "experts_t"])
@pytest.mark.parametrize("version", [None, "0.18.0", "0.19.0", "0.21.2"])
def test_the_shape_decides_where_it_can(version: str | None, kind: str, tmp_path: Path, rng: Rng) -> None:
    base, adapter, wanted = made(tmp_path, rng, (3, 7, 5), kind, version)
    np.testing.assert_allclose(merged(base, adapter, tmp_path / "out"), wanted, rtol=0, atol=1e-5)
    params = {"mlp.experts.down_proj": Checkpoint(base).read("mlp.experts.down_proj")}
    adapters, config = read_peft(adapter, params=params)
    found = jlora.merge_params(params, adapters, config)["mlp.experts.down_proj"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", [{}, {"model_type": "somebodys_own"}])
def test_what_stays_open_is_asked(model: dict[str, Any], tmp_path: Path, rng: Rng, capsys: Any) -> None:
    base, adapter, wanted = made(tmp_path, rng, (3, 5, 5), "experts", "0.21.2", **model)
    with pytest.raises(jlora.DataError, match=OPEN):
        merge(base, adapter, tmp_path / "out")
    with pytest.raises(jlora.DataError, match=r"experts 5 x 5, and nothing says .* give transposed_experts"):
        read_peft(adapter)
    with pytest.raises(jlora.DataError, match="give transposed_experts"):
        convert(adapter, tmp_path / "own", "own")
    with pytest.raises(jlora.DataError, match="give transposed_experts"):
        resize(adapter, tmp_path / "own", 1, form="own")
    command = ["merge", str(base), str(adapter), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "--no-transposed-experts" in capsys.readouterr().err
    assert main([*command, "--no-transposed-experts"]) == 0
    np.testing.assert_allclose(Checkpoint(tmp_path / "out").read("mlp.experts.down_proj"), wanted, rtol=0, atol=1e-5)


def test_what_stays_open_may_be_resized_and_converted(tmp_path: Path, rng: Rng) -> None:
    """PEFT's files stay open; of jlora's own the configuration says it, and merging asks no more."""
    base, adapter, wanted = made(tmp_path, rng, (3, 5, 5), "experts_t", "0.21.2")
    resize(adapter, tmp_path / "again", 2)
    with pytest.raises(jlora.DataError, match=OPEN):
        merge(base, tmp_path / "again", tmp_path / "out")
    convert(adapter, tmp_path / "own", "own", transposed_experts=True)
    np.testing.assert_allclose(merged(base, tmp_path / "own", tmp_path / "out"), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["experts", "experts_t"])
def test_experts_one_by_one_on_the_disk(kind: str, tmp_path: Path, rng: Rng) -> None:
    """Both names at once: of two tensors one upon the other, and of one."""
    weights = {
        f"mlp.experts.{e}.{name}.weight": rng.standard_normal(shape).astype("float32")
        for e in range(3)
        for name, shape in {"w1": (5, 7), "w3": (5, 7), "w2": (7, 5)}.items()
    }
    shapes = {"gate_up_proj": (10, 7), "down_proj": (7, 5)}
    sides = {name: shape if kind == "experts" else shape[::-1] for name, shape in shapes.items()}
    inner = experts_pair(rng, "mlp.experts.base_layer", 3, *sides["gate_up_proj"])
    outer = experts_pair(rng, "mlp.experts", 3, *sides["down_proj"])
    version = "0.21.2" if kind == "experts" else "0.18.0"
    fields = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "peft_version": version}
    adapter = write_folder(tmp_path / "adapter", inner | outer, **fields)
    merge(base_folder(tmp_path / "base", weights), adapter, tmp_path / "out")
    found = Checkpoint(tmp_path / "out")
    gate_up, down = delta(inner, "mlp.experts.base_layer", kind), delta(outer, "mlp.experts", kind)
    for name, weight in weights.items():
        expert, part = int(name.split(".")[2]), name.split(".")[3]
        rows = {"w1": gate_up[expert, :5], "w3": gate_up[expert, 5:], "w2": down[expert]}[part]
        np.testing.assert_allclose(found.read(name), weight + rows, rtol=0, atol=1e-5)


def test_versions_that_differ_are_not_combined(tmp_path: Path, rng: Rng) -> None:
    tensors = experts_pair(rng, "mlp.experts", 3, 5, 5)
    folders = [adapter_folder(tmp_path / version, tensors, version) for version in ("0.18.0", "0.21.2")]
    with pytest.raises(jlora.JloraError, match="mlp/experts/down_proj"):
        combine(folders, tmp_path / "out", method="cat")


def test_a_version_matters_to_experts_alone(tmp_path: Path, rng: Rng) -> None:
    folder = write_folder(tmp_path / "adapter", pair(rng, "q", 3, 5), peft_version=3)
    assert len(read_peft(folder)[0]) == 1


def test_experts_of_several_shapes(tmp_path: Path, rng: Rng) -> None:
    shapes = {"mlp.experts.0.w2.weight": (7, 5), "mlp.experts.1.w2.weight": (7, 3), "mlp.experts.2.w2.weight": (7, 5)}
    base = base_folder(tmp_path / "base", {name: np.ones(shape, "float32") for name, shape in shapes.items()})
    adapter = adapter_folder(tmp_path / "adapter", experts_pair(rng, "mlp.experts", 3, 7, 5))
    with pytest.raises(jlora.DataError, match=r"experts\.1\.w2\.weight \(7, 3\): .* for experts of the shape \(7, 5\)"):
        merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("version", ["", "next", 3, [1], {}])
def test_versions_that_are_none(version: Any, tmp_path: Path, rng: Rng) -> None:
    adapter = adapter_folder(tmp_path / "adapter", experts_pair(rng, "mlp.experts", 3, 7, 5), version)
    if version in ("", {}):
        assert read_peft(adapter)[1].factorizations == (("mlp.experts.down_proj", "bio"),)
    else:
        with pytest.raises(jlora.DataError, match=r"peft_version = .*: wanted a version"):
            read_peft(adapter)


def compared_with_peft(folder: Path) -> None:
    """What jlora makes of the bases that the program has written is what PEFT made of them."""
    for own in sorted(folder.iterdir()):
        is_transposed = own.name.endswith("transposed")
        found = merged(own / "base", own / "adapter", own / "out", transposed_experts=is_transposed)
        wanted, before = np.load(own / "merged.npy"), Checkpoint(own / "base").read("mlp.experts.down_proj")
        assert np.abs(wanted - before).max() > 0.1
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5, err_msg=own.name)


def test_experts_of_the_installed_version(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    command = [sys.executable, "-W", "ignore", "-m", "tests.interop.experts_of_peft", str(tmp_path / "made")]
    subprocess.run(command, check=True, capture_output=True)
    compared_with_peft(tmp_path / "made")


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.18.0", "0.18.1", "0.19.0", "0.19.1", "0.20.0"])
def test_experts_of_older_versions(version: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    target = install(version, tmp_path)
    if target is None:
        pytest.skip(f"pip cannot install peft {version}")
    program = "import pathlib, sys; from tests.interop.experts_of_peft import write; write(pathlib.Path(sys.argv[1]))"
    run(target, program, str(tmp_path / "made"))
    shutil.rmtree(target)
    compared_with_peft(tmp_path / "made")
