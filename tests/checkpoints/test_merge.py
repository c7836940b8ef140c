"""Adapters merged into checkpoints: every number against float64, every other byte the same."""

import json
from typing import Any

import numpy as np
import pytest

from jlora import DataError, LoraConfig
from jlora.checkpoints import _arithmetic, merge, unmerge
from jlora.disk import Checkpoint, TensorFile
from jlora.interop.peft import Row
from tests.checkpoints.make import (
    DTYPES,
    SIDE_FILES,
    assert_rounds_to,
    bits,
    factors,
    llama,
    peft_parts,
    product,
    random,
    read,
    write_checkpoint,
    write_file,
    write_llama,
    write_own,
    write_peft,
)

LAYOUTS = {
    "oi": (31, 29),
    "io": (29, 31),
    "oiii": (13, 7, 3, 5),
    "iiio": (3, 5, 7, 13),
    "boi": (5, 17, 13),
    "bio": (5, 13, 17),
    "ioo": (29, 3, 11),
    "oio": (7, 29, 5),
    "oib": (11, 13, 3),
    "ibo": (11, 3, 13),
    "obio": (3, 5, 11, 7),
}


def assert_merged(found: Any, base: Any, *deltas: Any) -> None:
    exact = base.astype(np.float64) + sum(deltas)
    assert_rounds_to(found, exact, np.abs(base.astype(np.float64)) + sum(np.max(np.abs(delta)) for delta in deltas))


@pytest.fixture(params=[None, 97], ids=["one block", "small blocks"])
def block(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(_arithmetic, "BLOCK", request.param)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype(tmp_path, rng, dtype, block):
    tensors, base, adapter = write_llama(tmp_path, rng, dtype)
    merged = merge(base, adapter, tmp_path / "out")
    found, parts = read(tmp_path / "out"), read(adapter / "adapter_model.safetensors")
    assert set(merged.changed) == {name for name in tensors if name.endswith("_proj.weight")}
    for name, weight in tensors.items():
        assert found[name].dtype == weight.dtype
        if name in merged.changed:
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            a, b = (parts[f"{key}{side}.weight"].astype(np.float64) for side in "AB")
            assert_merged(found[name], weight, 2.0 * (b @ a))
            assert np.any(found[name] != weight)
        else:
            assert found[name].tobytes() == weight.tobytes()


@pytest.mark.parametrize("roles", LAYOUTS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_order_of_axes(tmp_path, rng, roles, dtype, block):
    weight = random(rng, LAYOUTS[roles], DTYPES[dtype])
    base = write_checkpoint(tmp_path / "base", {"m.w": weight, "m.other": weight}, 1)
    entry = factors(rng, weight.shape, roles, 3)
    config = LoraConfig(rank=3, alpha=5, target_modules="m/w", factorizations={"m/w": roles})
    merge(base, write_own(tmp_path / "adapter", {"m/w": entry}, config), tmp_path / "out")
    assert_merged(read(tmp_path / "out")["m.w"], weight, product(entry, roles, 5 / 3))
    assert read(tmp_path / "out")["m.other"].tobytes() == weight.tobytes()


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_rank_and_alpha_patterns(tmp_path, rng, scaling):
    tensors = {f"layers.{i}.{name}.weight": random(rng, (23, 19)) for i in range(2) for name in "ab"}
    config = LoraConfig(
        rank=2,
        alpha=3,
        scaling=scaling,
        rank_pattern={"layers/1": 5},
        alpha_pattern={"**/b/weight": 7},
        factorizations={"**": "oi"},
    )
    entries = {}
    for name, weight in tensors.items():
        path = name.replace(".", "/")
        entries[path] = factors(rng, weight.shape, "oi", config.rank_of(path))
    base = write_checkpoint(tmp_path / "base", tensors)
    merge(base, write_own(tmp_path / "adapter", entries, config), tmp_path / "out")
    for name, found in read(tmp_path / "out").items():
        rank, alpha = 5 if "layers.1" in name else 2, 7 if ".b." in name else 3
        wanted = alpha / (rank if scaling == "standard" else np.sqrt(rank))
        assert_merged(found, tensors[name], product(entries[name.replace(".", "/")], "oi", wanted))


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
def test_several_adapters_with_weights(tmp_path, rng, dtype):
    tensors, base, first = write_llama(tmp_path, rng, DTYPES[dtype])
    second = write_peft(tmp_path / "second", peft_parts(rng, tensors, "up_proj", rank=5), r=5, lora_alpha=5)
    path = "model/layers/0/mlp/up_proj/weight"
    entry = factors(rng, (43, 31), "oi", 2)
    third = write_own(tmp_path / "third", {path: entry}, LoraConfig(rank=2, alpha=2, factorizations={"**": "oi"}))
    merged = merge(base, [first, second, third], tmp_path / "out", weights=[0.5, -1.25, 3])
    name = path.replace("/", ".")
    module = f"base_model.model.{name.removesuffix('.weight')}.lora_"
    deltas = [3 * product(entry, "oi", 1.0)]
    for folder, scaling in ((first, 0.5 * 2), (second, -1.25)):
        parts = {key: array.astype(np.float64) for key, array in read(folder / "adapter_model.safetensors").items()}
        deltas.append(scaling * (parts[f"{module}B.weight"] @ parts[f"{module}A.weight"]))
    assert len(merged.changed) == 6
    assert_merged(read(tmp_path / "out")[name], tensors[name], *deltas)


@pytest.mark.parametrize(
    ("roles", "shape"), [("oi", (31, 29)), ("io", (29, 31)), ("boi", (3, 17, 13)), ("ioo", (29, 3, 5))]
)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_magnitudes(tmp_path, rng, roles, shape, dtype, block):
    weight = random(rng, shape, DTYPES[dtype])
    entry = factors(rng, shape, roles, 3)
    outs = tuple(n for wanted in "bo" for n, role in zip(shape, roles, strict=True) if role == wanted)
    entry["magnitude"] = np.abs(random(rng, outs, std=0.3))
    base = write_checkpoint(tmp_path / "base", {"m.w": weight}, 1)
    config = LoraConfig(rank=3, alpha=5, factorizations={"**": roles})
    merge(base, write_own(tmp_path / "adapter", {"m/w": entry}, config), tmp_path / "out")
    total = weight.astype(np.float64) + product(entry, roles, 5 / 3)
    ins = tuple(axis for axis, role in enumerate(roles) if role == "i")
    factor = np.expand_dims(entry["magnitude"].astype(np.float64), ins) / np.sqrt(np.sum(total**2, ins, keepdims=True))
    assert_rounds_to(read(tmp_path / "out")["m.w"], total * factor, (np.abs(weight.astype(np.float64)) + 1) * factor)


def test_a_magnitude_in_pefts_format(tmp_path, rng):
    weight, magnitude = random(rng, (31, 29)), np.abs(random(rng, (31,)))
    base = write_checkpoint(tmp_path / "base", {"m.q.weight": weight}, 1)
    parts = peft_parts(rng, {"m.q.weight": weight}, "q")
    adapter = write_peft(tmp_path / "adapter", parts | {"m.q.lora_magnitude_vector": magnitude}, use_dora=True)
    merge(base, adapter, tmp_path / "out")
    a, b = (parts[f"m.q.lora_{side}.weight"].astype(np.float64) for side in "AB")
    total = weight + 2 * (b @ a)
    wanted = total * (magnitude / np.linalg.norm(total, axis=1))[:, None]
    assert_rounds_to(read(tmp_path / "out")["m.q.weight"], wanted, np.abs(wanted) + 1)


def test_a_magnitude_on_rows_of_zeros_leaves_zeros(tmp_path, rng):
    weight = random(rng, (7, 5))
    weight[2] = 0
    entry = {"A": np.zeros((5, 2), np.float32), "B": np.zeros((2, 7), np.float32), "magnitude": np.ones(7, np.float32)}
    base = write_checkpoint(tmp_path / "base", {"w": weight}, 1)
    adapter = write_own(tmp_path / "adapter", {"w": entry}, LoraConfig(rank=2, factorizations={"w": "oi"}))
    merge(base, adapter, tmp_path / "out")
    found = read(tmp_path / "out")["w"]
    assert not found[2].any()
    np.testing.assert_allclose(np.linalg.norm(np.delete(found, 2, 0), axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_values_and_offsets(tmp_path, rng, dtype, block):
    shapes = {"value": (13, 11), "offset": (13, 11), "scalar": (), "empty": (0, 5), "bias": (97,)}
    tensors = {name: random(rng, shape, np.float32).astype(DTYPES[dtype]) for name, shape in shapes.items()}
    value, more, bias = random(rng, (13, 11), DTYPES[dtype]), random(rng, (13, 11)), random(rng, (97,))
    entries = {
        "value": {"value": value},
        "offset": factors(rng, (13, 11), "oi", 2) | {"offset": more},
        "scalar": {"offset": np.float32(1.5).reshape(())},
        "empty": {"offset": np.zeros((0, 5), np.float32)},
        "bias": {"offset": bias},
    }
    config = LoraConfig(rank=2, alpha=3, target_modules="offset", factorizations={"offset": "oi"})
    base = write_checkpoint(tmp_path / "base", tensors)
    merge(base, write_own(tmp_path / "adapter", entries, config), tmp_path / "out")
    found = read(tmp_path / "out")
    assert found["value"].tobytes() == value.tobytes()
    assert_merged(
        found["offset"], tensors["offset"], product(entries["offset"], "oi", 1.5), 1.5 * more.astype(np.float64)
    )
    assert_merged(found["scalar"], tensors["scalar"], np.float64(2.25))
    assert_merged(found["bias"], tensors["bias"], 1.5 * bias.astype(np.float64))


@pytest.mark.parametrize("prefix", ["", "model."], ids=["same names", "a prefix lacks"])
@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")], ids=["Qwen", "Mixtral"])
def test_fused_experts_into_experts_one_by_one(tmp_path, rng, names, prefix):
    gate, up, down = names
    shapes = {gate: (13, 11), up: (13, 11), down: (11, 13)}
    tensors = {
        f"{prefix}layers.0.experts.{e}.{name}.weight": random(rng, shape, DTYPES["bf16"])
        for e in range(3)
        for name, shape in shapes.items()
    }
    fused = {"gate_up_proj": (3, 26, 11), "down_proj": (3, 11, 13)}
    entries = {f"layers/0/experts/{name}": factors(rng, shape, "boi", 2) for name, shape in fused.items()}
    config = LoraConfig(rank=2, alpha=3, factorizations={"**": "boi"})
    base = write_checkpoint(tmp_path / "base", tensors)
    merged = merge(base, write_own(tmp_path / "adapter", entries, config), tmp_path / "out")
    assert set(merged.changed) == set(tensors)
    whole = {path.rpartition("/")[2]: product(entry, "boi", 1.5) for path, entry in entries.items()}
    for name, found in read(tmp_path / "out").items():
        e, part = int(name.split(".")[-3]), name.split(".")[-2]
        at = {
            gate: ("gate_up_proj", slice(0, 13)),
            up: ("gate_up_proj", slice(13, 26)),
            down: ("down_proj", slice(None)),
        }
        key, rows = at[part]
        assert_merged(found, tensors[name], whole[key][e, rows])


PREFIXES = {
    "same": ("layers.0.q.weight", "layers/0/q/weight"),
    "dots": ("layers.0.q.weight", "layers.0.q.weight"),
    "slashes": ("layers/0/q/weight", "layers/0/q/weight"),
    "paths lack": ("model.layers.0.q.weight", "layers/0/q/weight"),
    "paths lack two": ("language_model.model.layers.0.q.weight", "layers/0/q/weight"),
    "names lack": ("layers.0.q.weight", "model/layers/0/q/weight"),
    "names lack two": ("layers.0.q.weight", "params/model/layers/0/q/weight"),
}


@pytest.mark.parametrize(("name", "path"), PREFIXES.values(), ids=PREFIXES)
def test_a_prefix_that_all_have_or_lack(tmp_path, rng, name, path):
    tensors = {name.replace("0", str(i)): random(rng, (7, 5)) for i in range(2)} | {"norm": random(rng, (5,))}
    entries = {path.replace("0", str(i)): factors(rng, (7, 5), "oi", 2) for i in range(2)}
    base = write_checkpoint(tmp_path / "base", tensors)
    config = LoraConfig(rank=2, alpha=2, factorizations={"**": "oi"})
    merge(base, write_own(tmp_path / "adapter", entries, config), tmp_path / "out")
    found = read(tmp_path / "out")
    for i in range(2):
        key, entry = name.replace("0", str(i)), entries[path.replace("0", str(i))]
        assert_merged(found[key], tensors[key], product(entry, "oi", 1.0))


def test_a_prefix_under_which_only_some_fit_does_not_win(tmp_path, rng):
    names = ["q.weight", "model.q.weight", "model.k.weight"]
    base = write_checkpoint(tmp_path / "base", {name: random(rng, (7, 5)) for name in names})
    entries = {f"{name}/weight": factors(rng, (7, 5), "oi", 2) for name in "qk"}
    adapter = write_own(tmp_path / "adapter", entries, LoraConfig(rank=2, factorizations={"**": "oi"}))
    assert merge(base, adapter, tmp_path / "out").changed == ("model.k.weight", "model.q.weight")


def test_what_is_not_changed_is_the_same_byte_for_byte(tmp_path, rng):
    _, base, adapter = write_llama(tmp_path, rng)
    for name in ("pytorch_model.bin", ".hidden"):
        (base / name).write_bytes(b"{}")
    (base / "jlora_merge.json").write_text(json.dumps({"command": "unmerge", "earlier": []}))
    (base / "onnx").mkdir()
    merged = merge(base, adapter, tmp_path / "out")
    left, right = bits(base), bits(tmp_path / "out")
    shards = set(Checkpoint(base).shards)
    assert set(right) == shards | set(SIDE_FILES) | {"config.json", "model.safetensors.index.json"}
    assert all(right[name] == left[name] for name in right if name not in shards)
    for shard in shards:
        with TensorFile(base / shard) as old, TensorFile(tmp_path / "out" / shard) as new:
            assert new.entries == old.entries
            assert new.metadata == old.metadata == {"format": "pt", "made by": "a test"}
            assert right[shard][: new.data_start] == left[shard][: old.data_start]
    assert merged.copied == len(Checkpoint(base).entries) - 6
    assert merged.size == sum(len(left[shard]) for shard in shards)
    assert (merged.resumed, merged.warnings) == (0, ())
    first, second, third = str(merged).splitlines()
    assert first == f"6 tensors changed ({merged.numbers:,} numbers) and 4 copied, 0.00 GB: {tmp_path / 'out'}"
    assert second.startswith("rounding leaves of the update a relative error of 0.0")
    assert third == "not copied: pytorch_model.bin"


def test_the_record_of_a_merge(tmp_path, rng):
    _, base, adapter = write_llama(tmp_path, rng)
    merge(base, adapter, tmp_path / "out", weights=[0.5], keep_residual=True)
    record = json.loads((tmp_path / "out" / "jlora_merge.json").read_text())
    assert (record["command"], record["names"], record["weights"]) == ("merge", ["adapter"], [0.5])
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize("as_file", [False, True], ids=["folder", "file"])
@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors"])
def test_one_file(tmp_path, rng, name, as_file):
    tensors = llama(rng)
    base = write_checkpoint(tmp_path / "base", tensors, 1)
    (base / "model.safetensors").rename(base / name)
    adapter = write_peft(tmp_path / "adapter", peft_parts(rng, tensors, "_proj"))
    merge(base / name if as_file else base, adapter, tmp_path / "out")
    assert len(read(tmp_path / "out")) == len(tensors)
    assert set(bits(tmp_path / "out")) == ({name} if as_file else {name, "config.json", *SIDE_FILES})


def test_links_are_followed(tmp_path, rng):
    _, base, adapter = write_llama(tmp_path, rng)
    merge(base, adapter, tmp_path / "plain")
    (tmp_path / "linked").mkdir()
    for file in base.iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    (tmp_path / "place").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "place")
    merge(tmp_path / "linked", adapter, tmp_path / "out")
    merge(tmp_path / "linked", adapter, tmp_path / "out", force=True)
    assert bits(tmp_path / "place") == bits(tmp_path / "plain")
    assert (tmp_path / "out").is_symlink()
    assert not any(file.is_symlink() for file in (tmp_path / "place").iterdir())


def test_progress_ends_at_the_size_of_the_checkpoint(tmp_path, rng):
    _, base, adapter = write_llama(tmp_path, rng)
    seen: list[tuple[int, int]] = []
    size = merge(base, adapter, tmp_path / "out", on_progress=lambda *done: seen.append(done)).size
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (size, size)


def test_an_order_in_the_file_that_is_not_by_name(tmp_path, rng):
    weights = {
        name: random(rng, (7, 5), dtype) for name, dtype in (("z", np.float64), ("a", np.float16), ("m", np.float32))
    }
    (tmp_path / "base").mkdir()
    write_file(tmp_path / "base" / "model.safetensors", weights | {"count": np.arange(3)})
    entries = {name: factors(rng, (7, 5), "oi", 2) for name in "za"}
    adapter = write_own(tmp_path / "adapter", entries, LoraConfig(rank=2, alpha=2, factorizations={"**": "oi"}))
    assert merge(tmp_path / "base", adapter, tmp_path / "out").changed == ("z", "a")
    found = read(tmp_path / "out")
    assert found["m"].tobytes() == weights["m"].tobytes()
    for name, entry in entries.items():
        assert_merged(found[name], weights[name], product(entry, "oi", 1.0))


def test_names_that_a_mapping_renames(tmp_path, rng):
    weight, entry = random(rng, (31, 29)), factors(rng, (31, 29), "oi", 2)
    base = write_checkpoint(tmp_path / "base", {"blocks.3.up.weight": weight}, 1)
    adapter = write_own(
        tmp_path / "adapter", {"layers.3.mlp.up": entry}, LoraConfig(rank=2, alpha=2, factorizations={"**": "oi"})
    )
    with pytest.raises(DataError, match=r"layers.3.mlp.up: the checkpoint has no such tensor"):
        merge(base, adapter, tmp_path / "out")
    rows = (Row("layers.{i}.mlp.{x}", "blocks.{i}.{x}.weight"),)
    merge(base, adapter, tmp_path / "out", mapping=rows)
    assert_rounds_to(read(tmp_path / "out")["blocks.3.up.weight"], weight + product(entry, "oi", 1.0), 1)
    unmerge(tmp_path / "out", adapter, tmp_path / "back", mapping=rows)
