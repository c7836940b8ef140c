"""Checkpoints whose weights are packed or scaled: named with their format, never added to, nothing written."""

import json
from typing import Any

import numpy as np
import pytest

from jlora import LoraConfig
from jlora.checkpoints import extract, merge, unmerge
from jlora.disk import Checkpoint
from jlora.errors import DataError
from tests.checkpoints.make import DTYPES, factors, random, write_checkpoint, write_own

OUT, IN = 8, 6
MODULE = "model.layers.0.mlp.up_proj"
CONFIG = LoraConfig(rank=2, alpha=2, factorizations={"**": "oi"})
WAY_OUT = "; dequantize the checkpoint first, or merge into the one that it was made from"
F8, ONE = DTYPES["e4m3"], np.ones(1, np.float32)


def packed(rng: Any, dtype: Any, *shape: int) -> Any:
    return rng.integers(0, 100, shape).astype(dtype)


def made(tmp_path: Any, rng: Any, tensors: Any, settings: Any = None, path: str = f"{MODULE}.weight") -> Any:
    """A checkpoint of these tensors and an ordinary one, and an adapter of a weight that it may not have."""
    base = write_checkpoint(tmp_path / "base", {"model.norm.weight": random(rng, (IN,)), **tensors}, 1)
    (base / "config.json").write_text(json.dumps(settings or {}))
    shape = (2, OUT, IN) if path.endswith("gate_up_proj") else (OUT, IN)
    config = CONFIG.replace(factorizations={"**": "boi"}) if len(shape) == 3 else CONFIG
    roles = "boi" if len(shape) == 3 else "oi"
    return base, write_own(tmp_path / "adapter", {path: factors(rng, shape, roles, 2)}, config)


def refused(tmp_path: Any, base: Any, adapter: Any, message: str) -> None:
    for command in (merge, unmerge):
        with pytest.raises(DataError, match=message):
            command(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def beside(rng: Any, name: str, shape: tuple[int, ...] = (1,)) -> dict[str, Any]:
    return {f"{MODULE}.weight": random(rng, (OUT, IN), F8), name: random(rng, shape)}


@pytest.mark.parametrize(
    "companion",
    [
        f"{MODULE}.weight_scale",
        f"{MODULE}.weight_scale_inv",
        f"{MODULE}.scale_weight",
        f"{MODULE}.qscale_weight",
        f"{MODULE}.scale",
        f"{MODULE}.input_scale",
        f"{MODULE}.weight.scale",
        f"{MODULE}.something_new",
        "scaled_fp8",
        "diffusion_model.scaled_fp8",
    ],
)
def test_float8_with_anything_beside_it_that_a_plain_module_lacks(tmp_path, rng, companion):
    base, adapter = made(tmp_path, rng, beside(rng, companion))
    message = f"{MODULE}.weight: F8_E4M3 is in other units than the model's, with {companion} beside it{WAY_OUT}"
    refused(tmp_path, base, adapter, message)


def test_float8_that_only_config_json_calls_quantized(tmp_path, rng):
    settings = {"quantization_config": {"quant_method": "fbgemm_fp8"}}
    base, adapter = made(tmp_path, rng, {f"{MODULE}.weight": random(rng, (OUT, IN), F8)}, settings)
    refused(tmp_path, base, adapter, rf"is in other units than the model's \(FBGEMM's float8\){WAY_OUT}")


@pytest.mark.parametrize("others", [{}, {f"{MODULE}.bias": 0}, {"model.layers.0.mlp.down_proj.scale": 0}])
def test_plain_float8_is_merged(tmp_path, rng, others):
    tensors = {f"{MODULE}.weight": random(rng, (OUT, IN), F8), **{name: random(rng, (OUT,)) for name in others}}
    base, adapter = made(tmp_path, rng, tensors)
    merge(base, adapter, tmp_path / "out")
    before, after = Checkpoint(base).read(f"{MODULE}.weight"), Checkpoint(tmp_path / "out").read(f"{MODULE}.weight")
    assert (before.astype(np.float32) != after.astype(np.float32)).any()


FORMATS = {  # tensors in place of the weight, the config of transformers, what is said
    "gptq": ({".qweight": np.int32, ".qzeros": np.int32, ".scales": np.float16}, "gptq", r"qweight \(GPTQ\)"),
    "awq": ({".qweight": np.int32, ".qzeros": np.int32, ".scales": np.float16}, "awq", r"qweight \(AWQ\)"),
    "no config": ({".qweight": np.int32, ".scales": np.float16}, None, r"qweight \(GPTQ or AWQ\)"),
    "hqq": ({".W_q": np.uint8, ".scale": np.float16, ".zero": np.float16}, "hqq", r"W_q \(HQQ\)"),
    "compressed-tensors": (
        {".weight_packed": np.int32, ".weight_scale": np.float16},
        "compressed-tensors",
        r"weight_packed \(compressed-tensors\)",
    ),
    "quanto": ({".weight._data": np.int8, ".weight._scale": np.float32}, "quanto", r"weight._data \(quanto\)"),
    "aqlm": ({".codes": np.int16, ".codebooks": np.float16}, None, r"codes \(AQLM\)"),
}


@pytest.mark.parametrize("prefix", ["", "language_model."])
@pytest.mark.parametrize("form", FORMATS)
def test_a_weight_that_is_packed_under_another_name(tmp_path, rng, form, prefix):
    ends, method, message = FORMATS[form]
    tensors = {f"{prefix}{MODULE}{end}": packed(rng, dtype, OUT, 2) for end, dtype in ends.items()}
    settings = {"quantization_config": {"quant_method": method}} if method else {}
    base, adapter = made(tmp_path, rng, tensors, settings)
    refused(tmp_path, base, adapter, f"the checkpoint has it packed, as {prefix}{MODULE}.{message}{WAY_OUT}")


def test_experts_in_mxfp4(tmp_path, rng):
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {
        f"{experts}_blocks": packed(rng, np.uint8, 2, OUT, 3),
        f"{experts}_scales": packed(rng, np.uint8, 2, OUT),
    }
    settings = {"quantization_config": {"quant_method": "mxfp4"}}
    base, adapter = made(tmp_path, rng, tensors, settings, path=experts)
    refused(tmp_path, base, adapter, rf"the checkpoint has it packed, as {experts}_blocks \(MXFP4\){WAY_OUT}")


@pytest.mark.parametrize(
    ("dtype", "others", "settings"),
    [
        (np.uint8, {".weight.absmax": (4,), ".weight.quant_map": (16,)}, {}),
        (np.int8, {".SCB": (OUT,)}, {}),
        (np.uint8, {}, {"quantization_config": {"load_in_4bit": True}}),
        (np.int8, {}, {"quantization_config": {"quant_method": "bitsandbytes"}}),
    ],
)
def test_bitsandbytes_keeps_the_name_of_the_weight(tmp_path, rng, dtype, others, settings):
    tensors = {f"{MODULE}.weight": packed(rng, dtype, OUT, IN)}
    tensors |= {MODULE + end: random(rng, shape) for end, shape in others.items()}
    base, adapter = made(tmp_path, rng, tensors, settings)
    refused(tmp_path, base, adapter, rf"{MODULE}.weight: dtype \w+ is not floating \(bitsandbytes\){WAY_OUT}")


def test_what_is_left_in_floats_is_merged(tmp_path, rng):
    """Modules that a quantization left out stay ordinary weights."""
    tensors = {
        f"{MODULE}.weight": random(rng, (OUT, IN)),
        "model.layers.0.mlp.down_proj.qweight": packed(rng, np.int32, OUT, 2),
    }
    base, adapter = made(tmp_path, rng, tensors, {"quantization_config": {"quant_method": "gptq"}})
    assert merge(base, adapter, tmp_path / "out").changed == (f"{MODULE}.weight",)


@pytest.mark.parametrize(
    ("name", "found", "given", "message"),
    [
        ("norm.num_batches_tracked", np.int64, np.int32, r"the value for it is int32, wanted int64"),
        ("norm.num_batches_tracked", np.int64, np.float32, r"the value for it is float32, wanted int64"),
        ("norm.mask", np.bool_, np.uint8, r"the value for it is uint8, wanted bool"),
        ("up_proj.weight", np.int8, np.int8, f"dtype I8 is not floating{WAY_OUT}"),
        ("up_proj.qweight", np.int32, np.int32, rf".*it packed, as up_proj.qweight \(GPTQ or AWQ\){WAY_OUT}"),
        ("up_proj.W_q", np.uint8, np.uint8, rf".*it packed, as up_proj.W_q \(HQQ\){WAY_OUT}"),
    ],
)
def test_integers_are_replaced_by_their_own_dtype_and_not_where_they_are_packed(
    tmp_path, rng, name, found, given, message
):
    value = packed(rng, given, OUT, IN)
    base = write_checkpoint(tmp_path / "base", {name: packed(rng, found, OUT, IN), "up": random(rng, (OUT, IN))}, 1)
    entries = {name: {"value": value}, "up": factors(rng, (OUT, IN), "oi", 2)}
    adapter = write_own(tmp_path / "adapter", entries, CONFIG)
    with pytest.raises(DataError, match=f"{name.rpartition('.')[0]}.*: {message}"):
        merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.bool_])
def test_a_buffer_of_integers_is_replaced(tmp_path, rng, dtype):
    name, value = "norm.buffer", packed(rng, dtype, OUT, 3)
    value.reshape(-1)[0] = np.iinfo(dtype).max if dtype is not np.bool_ else True
    base = write_checkpoint(tmp_path / "base", {name: ~value, "up": random(rng, (OUT, IN))}, 1)
    entries = {name: {"value": value}, "up": factors(rng, (OUT, IN), "oi", 2)}
    merge(base, write_own(tmp_path / "adapter", entries, CONFIG), tmp_path / "out")
    np.testing.assert_array_equal(Checkpoint(tmp_path / "out").read(name), value)


def test_no_adapter_is_extracted_of_scaled_weights(tmp_path, rng):
    for name in ("base", "tuned"):
        write_checkpoint(tmp_path / name, beside(rng, f"{MODULE}.weight_scale"), 1)
    message = rf"(?s)no adapter can be extracted: 2 problems:.*base: {MODULE}.weight: F8_E4M3 is in other .*tuned: "
    with pytest.raises(DataError, match=message):
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()
