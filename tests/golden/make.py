"""Writes the golden files of the version at hand: python -m tests.golden.make

The folder `tests/golden/VERSION` holds adapters as `save_adapters` writes them, a checkpoint, what `merge` makes of
both with its residual, and what a merge leaves that was stopped after its first shard. `expected.json` says what they
hold, by the arrays that they were made of, not by what reads them. A and B are whole numbers over 8, so that no product
is rounded, and a sum once: every machine has the same bits.
"""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jlora import DataError, LoraConfig, __version__, save_adapters
from jlora.checkpoints import merge
from jlora.disk import write_tensors
from tests.golden import ADAPTERS, BASE, EXPECTED, MACHINE, MERGED, PARTIAL, TO_MERGE

HERE = Path(__file__).parent
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def numbers(seed: int, shape: tuple[int, ...], dtype: Any = "float32") -> np.ndarray[Any, Any]:
    """Whole numbers from -8 to 8, over 8, which every dtype of 8 bits and more holds."""
    rng = np.random.default_rng(seed)
    return (rng.integers(-8, 9, shape) / 8).astype(jnp.dtype(dtype))


def make_adapters(folder: Path) -> dict[str, Any]:
    """Every kind of entry, container and dtype; the arrays by path, and the configuration."""
    plain = {"A": numbers(1, (7, 2)), "B": numbers(2, (2, 5))}
    heads = {"A": numbers(3, (5, 3), "bfloat16"), "B": numbers(4, (3, 2, 4), "bfloat16")}
    dora = {"A": numbers(5, (5, 2), "float16"), "B": numbers(6, (2, 3), "float16"), "magnitude": numbers(7, (3,))}
    small = {"A": numbers(8, (3, 5, 1), "float8_e4m3fn"), "B": numbers(9, (3, 1, 2), "float8_e5m2")}
    mixed = {"value": numbers(10, (5, 3)), "offset": numbers(11, (5, 3)), "A": plain["A"][:5], "B": plain["B"][:, :3]}
    tree = {
        "embed": {"embedding": plain},
        "layers": [{"query": heads, "bias": None}, {"up/gate": dora}],
        "experts": (small, None),
        "norm": {"scale": {"value": numbers(12, (5,))}, "bias": {"offset": numbers(13, (5,))}},
        "é 1": mixed,
    }
    config = LoraConfig(
        rank=2,
        alpha=3,
        dropout=0.25,
        target_modules=("**",),
        scaling="rslora",
        rank_pattern={"layers/0/query": 3, "experts/0": 1},
        alpha_pattern={"embed/*": 0.5},
        factorizations={"layers/0/query": "ioo", "experts/0": "bio"},
        extras={"note": "kept"},
    )
    save_adapters(folder, tree, config, metadata={"step": 7, "nested": [None, {"a": "é"}]})
    entries = {
        "embed/embedding": plain,
        "layers/0/query": heads,
        "layers/1/up/gate": dora,
        "experts/0": small,
        "norm/scale": tree["norm"]["scale"],
        "norm/bias": tree["norm"]["bias"],
        "é 1": mixed,
    }
    return {
        "entries": {path: {name: described(part) for name, part in entry.items()} for path, entry in entries.items()},
        "config": json.loads(json.dumps(config.to_dict())),
        "metadata": {"step": 7, "nested": [None, {"a": "é"}]},
    }


def described(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    return {"dtype": array.dtype.name, "shape": list(array.shape), "values": array.astype(float).ravel().tolist()}


def make_checkpoint(base: Path, adapters: Path) -> dict[str, Any]:
    """A checkpoint of two shards, and adapters for it; what the merged tensors hold."""
    rng = np.random.default_rng(14)
    dtypes = {"a": ml_dtypes.bfloat16, "b": np.float16, "c": np.float32, "d": ml_dtypes.bfloat16}
    weights = {f"{name}.weight": rng.standard_normal((3, 5)).astype(dtype) for name, dtype in dtypes.items()}
    base.mkdir()
    shards = dict(zip(weights, (SHARDS[0], SHARDS[0], SHARDS[1], SHARDS[1]), strict=True))
    for shard in SHARDS:
        with (base / shard).open("wb") as file:
            write_tensors(file, {n: weights[n] for n in weights if shards[n] == shard}, {"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (base / "config.json").write_text("{}")
    a, b = numbers(15, (5, 2)), numbers(16, (2, 3))
    entry = {"A": a, "B": b}
    config = LoraConfig(rank=2, alpha=3, factorizations={"**": "oi"})
    save_adapters(adapters, {name: {"weight": entry} for name in "abc"}, config)
    delta = 1.5 * (a.astype(np.float64) @ b).T
    sums = {name: (weight.astype(np.float64) + delta).astype(np.float32) for name, weight in weights.items()}
    merged = {name: sums[name].astype(weight.dtype) for name, weight in weights.items() if name != "d.weight"}
    return {name: described(array) for name, array in (weights | merged).items()}


def make_partial(base: Path, adapters: Path, folder: Path) -> None:
    """What a merge leaves that was stopped after its first shard."""

    def stop(done: int, _: int) -> None:
        if done > (base / SHARDS[0]).stat().st_size:
            raise InterruptedError(4, "stopped")

    out = folder.with_name("out")
    with contextlib.suppress(DataError), mock.patch(MACHINE, return_value="golden"):
        merge(base, adapters, out, keep_residual=True, on_progress=stop)
    (place,) = folder.parent.glob(".out.*.jlora")
    place.rename(folder)
    journal = json.loads((folder / "journal.json").read_text(encoding="utf-8"))
    (folder / "journal.json").write_text(json.dumps(journal | {"files": {}}), encoding="utf-8")  # where they lie here
    for shard in (folder / "new").glob("*.safetensors"):
        if shard.name != SHARDS[0]:  # a run that is killed may have written any part of it
            shard.write_bytes(b"")


def main() -> None:
    folder = HERE / __version__
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    expected = make_adapters(folder / ADAPTERS)
    expected["merged"] = make_checkpoint(folder / BASE, folder / TO_MERGE)
    merge(folder / BASE, folder / TO_MERGE, folder / MERGED, keep_residual=True)
    make_partial(folder / BASE, folder / TO_MERGE, folder / PARTIAL)
    (folder / EXPECTED).write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(*sorted(str(path.relative_to(HERE)) for path in folder.rglob("*") if path.is_file()), sep="\n")


if __name__ == "__main__":
    main()
