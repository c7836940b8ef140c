"""Sums that a dtype does not hold are refused where they are made outside of jit, in every face."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import jlora
from jlora.adapter import LoRALayer
from jlora.nnx import LoRA as NnxLoRA

DTYPES = [
    "float32",
    "bfloat16",
    "float16",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e4m3b11fnuz",
    "float8_e3m4",
]
CONFIG = jlora.LoraConfig(rank=2, alpha=3.0, target_modules="up", factorizations={"up": "io"})
SCALE = 1.5
WIDE = ("float32", "bfloat16")  # beyond which float32 does not go
ROWS, COLUMNS = 7, 5


def largest(dtype: str) -> float:
    return float(ml_dtypes.finfo(dtype).max)


def entry_of(kind: str, dtype: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """An entry in float32 that takes some of the numbers beyond the dtype, and not all."""
    top = largest(dtype) * (0.9 if dtype in WIDE else 1.2)
    if kind in ("value", "offset"):
        whole = rng.choice([-1, -0.5, 0.2, 1], (ROWS, COLUMNS))  # no sum at the edge, which XLA rounds in its own ways
        return {kind: (whole * top).astype("float32")}
    a, b = rng.uniform(0.1, 1, (ROWS, 2)), rng.uniform(-0.01, 0.01, (2, COLUMNS))
    entry = {"A": a.astype("float32"), "B": b.astype("float32")}
    if kind == "magnitude":
        return entry | {"magnitude": np.where(np.arange(COLUMNS) == 2, top * 4, 0.01).astype("float32")}
    entry["B"][:, 3] = top
    return entry


def total_of(weight: np.ndarray, entry: dict[str, np.ndarray], sign: int = 1) -> np.ndarray:
    """The sums in float64."""
    part = {name: array.astype(np.float64) for name, array in entry.items()}
    total = part.get("value", weight.astype(np.float64)) + sign * SCALE * part.get("offset", np.zeros(()))
    if "A" in part:
        total = total + sign * SCALE * sum(np.multiply.outer(part["A"][:, k], part["B"][k]) for k in range(2))
    if "magnitude" in part:
        total = part["magnitude"] * total / np.sqrt(sum(row**2 for row in total))
    return total


def lost(total: np.ndarray, dtype: str) -> int:
    with np.errstate(all="ignore"):
        return int((~np.isfinite(total.astype(np.float32).astype(dtype).astype(np.float64))).sum())


def message(path: str, count: int, dtype: str) -> str:
    return "^" + re.escape(f"{path}: {dtype} does not hold {count} of {ROWS * COLUMNS} sums; lower alpha, or cast the")


KINDS = ["adapter", "offset", "value", "magnitude"]


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(dtype, kind) for dtype in DTYPES for kind in KINDS if kind != "magnitude" or dtype not in WIDE],
)
def test_what_a_dtype_does_not_hold_is_refused(dtype: str, kind: str, rng: np.random.Generator) -> None:
    weight = rng.uniform(0.2, 1, (ROWS, COLUMNS)).astype(np.float32).astype(dtype)
    entry = entry_of(kind, dtype, rng)
    if kind == "value" and dtype in WIDE:
        entry["value"] = entry["value"].astype(np.float64) * 4
    count = lost(total_of(weight, entry), dtype)
    assert 0 < count < ROWS * COLUMNS
    with np.errstate(over="ignore"), pytest.raises(jlora.TargetError, match=message("up", count, dtype)):
        jlora.merge_params({"up": weight}, {"up": entry}, CONFIG)
    small = {name: part * np.float32(1e-3) if name in ("value", "offset") else part for name, part in entry.items()}
    small |= {name: np.ones_like(entry[name]) * np.float32(0.01) for name in ("B", "magnitude") if name in entry}
    merged = jlora.merge_params({"up": jnp.asarray(weight)}, {"up": small}, CONFIG)["up"]
    assert merged.dtype == dtype
    assert np.isfinite(np.asarray(merged, np.float64)).all()


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
@pytest.mark.parametrize("kind", ["adapter", "offset"])
def test_what_is_taken_out_is_looked_at_too(dtype: str, kind: str, rng: np.random.Generator) -> None:
    merged = rng.uniform(-1, 1, (ROWS, COLUMNS)).astype(np.float32).astype(dtype)
    entry = entry_of(kind, dtype, rng)
    count = lost(total_of(merged, entry, -1), dtype)
    with pytest.raises(jlora.TargetError, match=message("up", count, dtype)):
        jlora.unmerge_params({"up": merged}, {"up": entry}, CONFIG)


def test_numbers_of_the_base_that_are_not_finite_stay(rng: np.random.Generator) -> None:
    """And hide no other that is too large."""
    weight = rng.uniform(-1, 1, (ROWS, COLUMNS)).astype("float16")
    weight[0, 0], weight[1, 3] = np.inf, np.nan
    entry = {name: part * np.float32(1e-3) for name, part in entry_of("adapter", "float16", rng).items()}
    merged = np.asarray(jlora.merge_params({"up": weight}, {"up": entry}, CONFIG)["up"])
    assert np.array_equal(np.isfinite(merged), np.isfinite(weight))
    again = np.asarray(jlora.unmerge_params({"up": merged}, {"up": entry}, CONFIG)["up"])
    assert np.array_equal(np.isfinite(again), np.isfinite(weight))
    entry = entry_of("adapter", "float16", rng)
    count = int((np.isfinite(weight) & (np.abs(total_of(weight, entry)) > 65519)).sum())
    with pytest.raises(jlora.TargetError, match=message("up", count, "float16")):
        jlora.merge_params({"up": weight}, {"up": entry}, CONFIG)


@pytest.mark.parametrize("weight", ["a number that is not finite", "norms that float32 does not hold"])
def test_a_norm_that_is_infinite_makes_no_zeros(weight: str, rng: np.random.Generator) -> None:
    base = rng.uniform(-1, 1, (ROWS, COLUMNS)).astype("float32")
    base[1, 2] = np.inf if weight == "a number that is not finite" else 3e20
    count = ROWS - 1 if weight == "a number that is not finite" else ROWS
    entry = entry_of("magnitude", "float16", rng)
    with pytest.raises(jlora.TargetError, match=message("up", count, "float32")):
        jlora.merge_params({"up": base}, {"up": entry}, CONFIG)


@pytest.mark.parametrize("name", ["A", "B", "magnitude"])
def test_parts_that_are_not_finite_are_named(name: str, rng: np.random.Generator) -> None:
    entry = entry_of("magnitude", "float16", rng)
    entry[name].flat[1] = np.nan
    with pytest.raises(jlora.TargetError, match=rf"^up: a NaN or an infinity in {name}: the update is no number"):
        jlora.merge_params({"up": np.ones((ROWS, COLUMNS), np.float32)}, {"up": entry}, CONFIG)


@pytest.mark.parametrize("transform", [jax.jit, lambda fn: jax.vmap(fn, in_axes=0)], ids=["jit", "vmap"])
def test_nothing_is_looked_at_while_tracing(transform: Any, rng: np.random.Generator) -> None:
    weight = rng.uniform(-1, 1, (3, ROWS, COLUMNS)).astype("float16")
    entry = {name: np.stack([part] * 3) for name, part in entry_of("adapter", "float16", rng).items()}
    config = CONFIG.replace(factorizations={"up": "bio"}) if transform is jax.jit else CONFIG
    merge = transform(lambda weight, entry: jlora.merge_params({"up": weight}, {"up": entry}, config)["up"])
    found = np.asarray(merge(weight, entry))
    wanted = [total_of(one, entry_of_one) for one, entry_of_one in zip(weight, _each(entry), strict=True)]
    assert np.array_equal(np.isinf(found), np.abs(np.stack(wanted)) > 65519)


def _each(entry: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    return [{name: part[i] for name, part in entry.items()} for i in range(3)]


def layer_of(weight: Any, entry: Any) -> LoRALayer:
    layer = LoRALayer(weight, 2, 3.0, key=jax.random.key(0))
    return layer.load({"lora_a": entry["A"], "lora_b": entry["B"]})


def nnx_of(weight: Any, entry: Any) -> NnxLoRA:
    model = nnx.Linear(ROWS, COLUMNS, use_bias=False, rngs=nnx.Rngs(0), param_dtype=jnp.float16)
    nnx.update(model, {"kernel": jnp.asarray(weight)})
    config = CONFIG.replace(target_modules="kernel", factorizations={})
    lora = NnxLoRA(model, config, args=(jnp.ones((3, ROWS)),))
    nnx.update(lora.lora, {"kernel": entry})
    return lora


FACES: dict[str, Any] = {
    "merge_lora_weight": lambda w, e: jlora.merge_lora_weight(w, e, 3.0),
    "unmerge_lora_weight": lambda w, e: jlora.unmerge_lora_weight(w, e, 3.0),
    "LoRALayer.merge": lambda w, e: layer_of(w, e).merge(),
    "LoRALayer.merge_to_base": lambda w, e: layer_of(w, e).merge_to_base(),
    "LoRALayer.unmerge": lambda w, e: layer_of(w, e)._replace(is_merged=True).unmerge(),
    "nnx.LoRA.merge": lambda w, e: nnx_of(w, e).merge(),
}


@pytest.mark.parametrize("face", FACES)
def test_every_face(face: str, rng: np.random.Generator) -> None:
    weight = np.zeros((ROWS, COLUMNS), "float16")
    entry = entry_of("adapter", "float16", rng)
    count = lost(total_of(weight, entry), "float16")
    with pytest.raises(jlora.JloraError, match=f"float16 does not hold {count} of 35 sums; lower alpha, or cast"):
        FACES[face](weight, entry)
