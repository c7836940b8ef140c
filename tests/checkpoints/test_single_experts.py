"""Adapters of single experts, merged into checkpoints that keep all experts of a layer in one array."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jlora import LoraConfig
from jlora.checkpoints import inspect, merge, unmerge
from jlora.errors import DataError
from tests.checkpoints.make import factors, product, random, read, write_checkpoint, write_own
from tests.checkpoints.test_merge import assert_merged
from tests.interop.files import delta, pair, write_folder

EXPERTS, WIDTH, DIM = 3, 5, 7
AT = "model.layers.0.mlp.experts"


def base_of(tmp_path: Path, rng: Any, roles: str, dtype: Any = np.float32, **config: Any) -> Path:
    """Two arrays of experts (experts, out, in), or (experts, in, out), and a router."""
    shapes = {"gate_up_proj": (2 * WIDTH, DIM), "down_proj": (DIM, WIDTH)}
    tensors = {
        f"{AT}.{name}": random(rng, (EXPERTS, *(shape if roles == "boi" else shape[::-1])), dtype)
        for name, shape in shapes.items()
    }
    return write_checkpoint(
        tmp_path / "base", tensors | {"model.router.weight": random(rng, (3, DIM), dtype)}, 2, **config
    )


def as_matrices(array: np.ndarray, roles: str) -> np.ndarray:
    return array if roles == "boi" else array.swapaxes(1, 2)


@pytest.mark.parametrize("roles", ["boi", "bio"])
@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")], ids=["Qwen", "Mixtral"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_gate_up_and_down_of_some_experts(tmp_path, rng, names, roles, dtype):
    """Ranks and alphas differ; expert 1 has a gate alone; the router has an adapter of its own."""
    gate, up, down = names
    base = base_of(tmp_path, rng, roles, dtype)
    modules = {f"{AT}.0.{gate}": (WIDTH, DIM), f"{AT}.0.{up}": (WIDTH, DIM), f"{AT}.2.{up}": (WIDTH, DIM)}
    modules |= {f"{AT}.1.{gate}": (WIDTH, DIM), f"{AT}.2.{down}": (DIM, WIDTH), "model.router": (3, DIM)}
    odd = f"{AT}.2.{up}"
    tensors = {}
    for name, shape in modules.items():
        tensors |= pair(rng, name, *shape, rank=3 if name == odd else 2)
    fields = {"rank_pattern": {odd: 3}, "alpha_pattern": {f"{AT}.0.{gate}": 1.5}}
    adapter = write_folder(tmp_path / "adapter", tensors, **fields)
    done = merge(base, adapter, tmp_path / "out")
    assert set(done.changed) == {f"{AT}.gate_up_proj", f"{AT}.down_proj", "model.router.weight"}
    wanted = {
        name: np.zeros((EXPERTS, *shape)) for name, shape in {"gate_up": (2 * WIDTH, DIM), "down": (DIM, WIDTH)}.items()
    }

    def update(name: str) -> np.ndarray:
        alpha = 1.5 if name == f"{AT}.0.{gate}" else 5
        return np.asarray(delta(tensors, name, "linear", rank=3 if name == odd else 2, alpha=alpha))

    wanted["gate_up"][0, :WIDTH], wanted["gate_up"][0, WIDTH:] = update(f"{AT}.0.{gate}"), update(f"{AT}.0.{up}")
    wanted["gate_up"][1, :WIDTH], wanted["gate_up"][2, WIDTH:] = update(f"{AT}.1.{gate}"), update(odd)
    wanted["down"][2] = update(f"{AT}.2.{down}")
    for name, change in wanted.items():
        found, before = (read(folder)[f"{AT}.{name}_proj"] for folder in (tmp_path / "out", base))
        assert_merged(found, before, as_matrices(change, roles))
    assert_merged(
        read(tmp_path / "out")["model.router.weight"], read(base)["model.router.weight"], update("model.router")
    )
    unmerge(tmp_path / "out", adapter, tmp_path / "back")


@pytest.mark.parametrize("prefix", ["", "base."])
def test_the_names_of_unsloth(tmp_path, rng, prefix):
    """GPT-OSS: gate_up_projs.N is a Linear of the whole matrix, its array (experts, in, out)."""
    base = base_of(tmp_path, rng, "bio", model_type="gpt_oss")
    tensors = pair(rng, f"{prefix}{AT}.gate_up_projs.1", 2 * WIDTH, DIM) | pair(
        rng, f"{prefix}{AT}.down_projs.0", DIM, WIDTH
    )
    merge(base, write_folder(tmp_path / "adapter", tensors), tmp_path / "out")
    wanted = {"gate_up_proj": np.zeros((EXPERTS, DIM, 2 * WIDTH)), "down_proj": np.zeros((EXPERTS, WIDTH, DIM))}
    wanted["gate_up_proj"][1] = delta(tensors, f"{prefix}{AT}.gate_up_projs.1", "linear").T
    wanted["down_proj"][0] = delta(tensors, f"{prefix}{AT}.down_projs.0", "linear").T
    for name, change in wanted.items():
        assert_merged(read(tmp_path / "out")[f"{AT}.{name}"], read(base)[f"{AT}.{name}"], change)


def test_of_jloras_own(tmp_path, rng):
    base = base_of(tmp_path, rng, "boi")
    path = f"{AT.replace('.', '/')}/2/down_proj/weight"
    entry = factors(rng, (DIM, WIDTH), "oi", 2)
    config = LoraConfig(rank=2, alpha=3, factorizations={"**": "oi"})
    merge(base, write_own(tmp_path / "adapter", {path: entry}, config), tmp_path / "out")
    wanted = np.zeros((EXPERTS, DIM, WIDTH))
    wanted[2] = product(entry, "oi", 1.5)
    assert_merged(read(tmp_path / "out")[f"{AT}.down_proj"], read(base)[f"{AT}.down_proj"], wanted)


@pytest.mark.parametrize("transposed", [False, True])
def test_square_ones_want_to_be_told(tmp_path, rng, transposed):
    name = f"{AT}.down_proj"
    base = write_checkpoint(tmp_path / "base", {name: random(rng, (EXPERTS, DIM, DIM))}, 1, model_type="own")
    tensors = pair(rng, f"{AT}.1.down_proj", DIM, DIM)
    adapter = write_folder(tmp_path / "adapter", tensors)
    with pytest.raises(DataError, match=r"experts\.down_proj: the experts \(7, 7\) are square, .*--transposed-experts"):
        merge(base, adapter, tmp_path / "out")
    merge(base, adapter, tmp_path / "out", transposed_experts=transposed)
    wanted = np.zeros((EXPERTS, DIM, DIM))
    change = delta(tensors, f"{AT}.1.down_proj", "linear")
    wanted[1] = change.T if transposed else change
    assert_merged(read(tmp_path / "out")[name], read(base)[name], wanted)


def test_what_has_no_place_is_refused(tmp_path, rng):
    base = base_of(tmp_path, rng, "bio", model_type="gpt_oss")

    cases: list[tuple[str, dict[str, tuple[int, int]]]] = [
        (r"gate and up alternate in model\.layers\.0\.mlp\.experts\.gate_up_proj", {"0.gate_proj": (WIDTH, DIM)}),
        (r"experts\.down_proj \(3, 5, 7\) has no expert 3", {"down_projs.3": (DIM, WIDTH)}),
        (r"down_projs\.1\.weight: .*weight \(7, 5\)", {"down_projs.0": (DIM, WIDTH), "down_projs.1": (DIM, 4)}),
        (
            r"both .*1\.down_proj\.weight and .*down_projs\.1\.weight change it",
            dict.fromkeys(("1.down_proj", "down_projs.1"), (DIM, WIDTH)),
        ),
        (r"the checkpoint has no such tensor", {"0.middle_proj": (DIM, WIDTH)}),
    ]
    for number, (message, modules) in enumerate(cases):
        tensors = {}
        for name, shape in modules.items():
            tensors |= pair(rng, f"{AT}.{name}", *shape)
        adapter = write_folder(tmp_path / f"adapter {number}", tensors)
        with pytest.raises(DataError, match=message):
            merge(base, adapter, tmp_path / "out")


def test_what_is_more_than_a_and_b_is_refused(tmp_path, rng):
    base = base_of(tmp_path, rng, "boi")
    name = f"{AT}.1.down_proj"
    tensors = pair(rng, name, DIM, WIDTH) | {f"{name}.lora_magnitude_vector": np.ones(DIM, np.float32)}
    adapter = write_folder(tmp_path / "adapter", tensors)
    with pytest.raises(DataError, match=r"has a magnitude, which has no place in model.*, where the experts are one"):
        merge(base, adapter, tmp_path / "out")


def test_one_expert_and_all_of_them_are_refused(tmp_path, rng):
    base = base_of(tmp_path, rng, "boi")
    array, one = f"{AT}.down_proj", f"{AT}.1.down_proj.weight"
    entries = {array: factors(rng, (EXPERTS, DIM, WIDTH), "boi", 2), one: factors(rng, (DIM, WIDTH), "oi", 2)}
    config = LoraConfig(rank=2, factorizations={array: "boi", one: "oi"})
    adapter = write_own(tmp_path / "adapter", entries, config)
    with pytest.raises(DataError, match=r"experts\.down_proj: both .* change it"):
        merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("roles", ["boi", "bio"])
@pytest.mark.parametrize("prefix", ["", "base."])
def test_inspect_finds_them(tmp_path, rng, roles, prefix):
    """Each beside its own matrix of the array."""
    base = base_of(tmp_path, rng, roles)
    modules = {f"{prefix}{AT}.2.up_proj": (WIDTH, DIM), f"{prefix}{AT}.0.down_proj": (DIM, WIDTH)}
    tensors = {}
    for name, shape in modules.items():
        tensors |= pair(rng, name, *shape)
    found = inspect(write_folder(tmp_path / "adapter", tensors), base=base)
    arrays = {name: as_matrices(read(base)[f"{AT}.{name}"], roles) for name in ("gate_up_proj", "down_proj")}
    weights = {"up_proj": arrays["gate_up_proj"][2, WIDTH:], "down_proj": arrays["down_proj"][0]}
    sizes = {entry.path.replace("/", "."): entry.relative for entry in found.entries}
    assert sizes.keys() == {f"{name}.weight" for name in modules}
    for name in modules:
        weight = weights[name.rpartition(".")[2]].astype(np.float64)
        size = np.linalg.norm(delta(tensors, name, "linear")) / np.linalg.norm(weight)
        np.testing.assert_allclose(sizes[f"{name}.weight"], size, rtol=1e-5)
    assert found.total == sum(array.size for array in read(base).values())


def test_inspect_wants_to_be_told_of_square_ones_too(tmp_path, rng):
    base = write_checkpoint(tmp_path / "base", {f"{AT}.down_proj": random(rng, (EXPERTS, DIM, DIM))}, 1)
    adapter = write_folder(tmp_path / "adapter", pair(rng, f"{AT}.1.down_proj", DIM, DIM))
    (base / "config.json").write_text('{"model_type": "own"}')
    with pytest.raises(DataError, match=r"are square, .*--transposed-experts"):
        inspect(adapter, base=base)
    assert inspect(adapter, base=base, transposed_experts=True).entries[0].relative is not None
