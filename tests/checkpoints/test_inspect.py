"""`inspect --base` finds the weights that `merge` changes, whatever they are called and however they lie."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora import LoraConfig
from jlora.checkpoints import inspect, merge
from jlora.errors import DataError
from jlora.interop.peft import Row
from tests.checkpoints.make import factors, peft_parts, product, random, read, write_checkpoint, write_own, write_peft

GEMMA = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
UP, DOWN = "layers.0.mlp.up_proj", "layers.0.mlp.down_proj"


def weights(rng: Any, prefix: str) -> Any:
    shapes = {f"{prefix}{UP}.weight": (13, 7), f"{prefix}{DOWN}.weight": (7, 13), f"{prefix}norm.weight": (11,)}
    return {name: random(rng, shape) for name, shape in shapes.items()}


def adapter(rng: Any, folder: Path, prefix: str) -> Any:
    """An adapter of two Linear weights in PEFT's format: its folder, and its tensors."""
    parts = peft_parts(rng, weights(rng, prefix), UP, DOWN)
    return write_peft(folder / "adapter", parts), parts


def norm(array: Any) -> float:
    return float(np.linalg.norm(np.asarray(array, np.float64)))


@pytest.mark.parametrize(
    ("on_disk", "in_adapter", "settings", "rows"),
    [
        ("model.", "model.", {}, ()),
        ("language_model.model.", "model.language_model.", GEMMA, ()),
        ("model.", "", {}, ()),
        ("", "model.", {}, ()),
        ("model.language_model.", "model.", {}, ()),
        ("language_model.model.", "trained.language_model.", GEMMA, ()),
        ("language_model.model.", "language_model.", GEMMA, ()),
        ("transformer.", "model._trainer_wrap.", {}, [Row("model._trainer_wrap.{x*}", "transformer.{x*}")]),
        ("a.{}.b.", "z.", {}, [Row("z.layers.{i}.{x*}", "a.{i}.b.layers.{i}.{x*}")]),
    ],
)
def test_names_prefixes_and_mappings(tmp_path, rng, on_disk, in_adapter, settings, rows):
    tensors = weights(rng, on_disk.replace("{}", "0"))
    base = write_checkpoint(tmp_path / "base", tensors, **settings)
    folder, parts = adapter(rng, tmp_path, in_adapter)
    found = inspect(folder, base=base, mapping=tuple(rows))
    assert {entry.path.replace("/", ".") for entry in found.entries} == {f"{in_adapter}{n}.weight" for n in (UP, DOWN)}
    for entry in found.entries:
        module = entry.path.replace("/", ".").removesuffix(".weight")
        a, b = (np.asarray(parts[f"{module}.lora_{part}.weight"], np.float64) for part in "AB")
        weight = next(array for name, array in tensors.items() if name.endswith(f"{module[-7:]}.weight"))
        np.testing.assert_allclose(entry.relative, norm(2 * b @ a) / norm(weight), rtol=1e-6)
        np.testing.assert_allclose(entry.share, (a.size + b.size) / (2 * 7 * 13 + 11), rtol=1e-12)
    assert (found.total, found.warnings) == (2 * 7 * 13 + 11, ())
    merged = merge(base, folder, tmp_path / "out", mapping=tuple(rows))
    assert len(merged.changed) == 2


def test_a_prefix_and_a_renaming_at_once(tmp_path, rng):
    """The body of a classifier by itself, as transformers names it in memory; the rest of the name leads to it."""
    settings = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
    tensors = {f"vit.encoder.layer.{i}.attention.attention.query.weight": random(rng, (5, 7)) for i in range(3)}
    base = write_checkpoint(tmp_path / "base", tensors | {"classifier.weight": random(rng, (3, 7))}, **settings)
    for number, prefix in enumerate(("", "wrapped.", "vit.")):
        names = [f"{prefix}layers.{i}.attention.q_proj" for i in (0, 2)]
        parts = peft_parts(rng, {f"{name}.weight": np.zeros((5, 7)) for name in names}, *names)
        changed = merge(base, write_peft(tmp_path / f"{number}", parts), tmp_path / f"out {number}").changed
        assert changed == tuple(name for name in tensors if "layer.1" not in name)


def test_of_several_parts_with_the_names_the_one_with_the_sizes(tmp_path, rng):
    tensors = {f"{part}.{UP}.weight": random(rng, (13, width)) for part, width in (("text", 7), ("image", 11))}
    base = write_checkpoint(tmp_path / "base", tensors)
    for prefix in ("", "model.", "any.thing."):
        parts = peft_parts(rng, {f"{prefix}{UP}.weight": np.zeros((13, 7))}, UP)
        found = merge(base, write_peft(tmp_path / f"adapter{prefix}", parts), tmp_path / f"out{prefix}")
        assert found.changed == (f"text.{UP}.weight",)


def test_a_prefix_of_some_and_none_of_others(tmp_path, rng):
    tensors = {f"model.language_model.{UP}.weight": random(rng, (13, 7)), "lm_head.weight": random(rng, (5, 7))}
    base = write_checkpoint(tmp_path / "base", tensors)
    names = {"lm_head.weight": np.zeros((5, 7)), f"model.{UP}.weight": np.zeros((13, 7))}
    parts = peft_parts(rng, names, UP, "lm_head")
    assert set(merge(base, write_peft(tmp_path / "adapter", parts), tmp_path / "out").changed) == set(tensors)


def mixtral(rng: Any, folder: Path) -> Any:
    """Three experts one by one, and an adapter of all in one array: the checkpoint, the folder, the entry."""
    tensors = {}
    for expert in range(3):
        at = f"model.layers.0.block_sparse_moe.experts.{expert}"
        tensors |= {f"{at}.{name}.weight": random(rng, (5, 7)) for name in ("w1", "w3")}
        tensors[f"{at}.w2.weight"] = random(rng, (7, 5))
    base = write_checkpoint(folder / "base", tensors, model_type="mixtral", architectures=["MixtralForCausalLM"])
    entry = factors(rng, (3, 10, 7), "boi", 2)
    config = LoraConfig(rank=2, alpha=6, factorizations={"**": "boi"})
    return base, write_own(folder / "adapter", {"model.layers.0.mlp.experts.gate_up_proj": entry}, config), entry


def test_experts_that_the_checkpoint_has_one_by_one(tmp_path, rng):
    base, folder, entry = mixtral(rng, tmp_path)
    found = inspect(folder, base=base).entries[0]
    own = {name: weight for name, weight in read(base).items() if "w2" not in name}
    whole = norm(np.concatenate([weight.reshape(-1) for weight in own.values()]))
    np.testing.assert_allclose(found.relative, norm(product(entry, "boi", 3)) / whole, rtol=1e-6)
    assert found.factorization == "boi"
    merged = merge(base, folder, tmp_path / "out")
    assert set(merged.changed) == set(own)
    difference = [read(tmp_path / "out")[name].astype(np.float64) - own[name] for name in own]
    np.testing.assert_allclose(found.relative, norm(np.stack(difference)) / whole, rtol=1e-5)


@pytest.mark.parametrize(("transposed", "roles"), [(False, "boi"), (True, "bio")])
def test_square_experts_need_a_word(tmp_path, rng, transposed, roles):
    name = "model.layers.0.mlp.experts.down_proj"
    base = write_checkpoint(tmp_path / "base", {name: random(rng, (3, 7, 7))}, model_type="mine")
    parts = {
        "model.layers.0.mlp.experts.lora_A.weight": random(rng, (2 * 3, 7)),
        "model.layers.0.mlp.experts.lora_B.weight": random(rng, (7, 2 * 3)),
    }
    folder = write_peft(
        tmp_path / "adapter", parts, r=2, target_parameters=["experts.down_proj"], peft_version="0.19.1"
    )
    for command in (inspect, lambda folder, base: merge(base, folder, tmp_path / "out")):
        with pytest.raises(DataError, match=r"square.*--transposed-experts"):
            command(folder, base=base)
    found = inspect(folder, base=base, transposed_experts=transposed)
    assert found.entries[0].factorization == roles


@pytest.mark.parametrize(
    ("names", "settings", "reason"),
    [
        ({".qweight": np.int32, ".scales": np.float16}, "gptq", r"packed, as .*up_proj.qweight \(GPTQ\)"),
        ({".weight": np.uint8, ".weight.absmax": np.float32}, "", r"U8 is not floating \(bitsandbytes\)"),
        ({".weight_packed": np.int32}, "compressed-tensors", r"weight_packed \(compressed-tensors\)"),
    ],
)
def test_of_quantized_weights_no_size_is_told_and_why(tmp_path, rng, names, settings, reason):
    """The other weight is an ordinary one, and is compared; names in memory are found as those of ordinary weights."""
    prefix = "language_model.model."
    tensors = {f"{prefix}{UP}{end}": rng.integers(1, 99, (13, 2)).astype(dtype) for end, dtype in names.items()}
    tensors[f"{prefix}{DOWN}.weight"] = random(rng, (7, 13))
    method = {"quantization_config": {"quant_method": settings}} if settings else {}
    base = write_checkpoint(tmp_path / "base", tensors, **GEMMA, **method)
    folder, _ = adapter(rng, tmp_path, "model.language_model.")
    found = inspect(folder, base=base)
    up, down = sorted(found.entries, key=lambda entry: "down" in entry.path)
    assert (up.relative, up.share, down.share, found.total) == (None, None, None, None)
    assert (up.a_shape, up.b_shape, up.factorization) == ((7, 3), (3, 13), "oi")
    np.testing.assert_allclose(down.relative, down.norm / norm(tensors[f"{prefix}{DOWN}.weight"]), rtol=1e-6)
    with pytest.raises(DataError, match=reason):
        merge(base, folder, tmp_path / "out")
    (warning,) = found.warnings
    assert re.fullmatch(f"not compared, 1 of 2 weights: .*{reason}", warning)
    assert "update/W" in str(found)


def test_packed_experts(tmp_path, rng):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{name}{end}": rng.integers(1, 99, (3, 14, 2)).astype(np.uint8) for end in ("_blocks", "_scales")}
    base = write_checkpoint(tmp_path / "base", tensors, quantization_config={"quant_method": "mxfp4"})
    config = LoraConfig(rank=2, alpha=2, factorizations={"**": "bio"})
    folder = write_own(tmp_path / "adapter", {name: factors(rng, (3, 7, 14), "bio", 2)}, config)
    found = inspect(folder, base=base)
    assert found.entries[0].relative is None
    assert found.entries[0].side == 7
    assert "MXFP4" in found.warnings[0]


def test_refusals_are_those_of_merge(tmp_path, rng):
    base = write_checkpoint(tmp_path / "base", weights(rng, "model."), model_type="llama")
    folder, _ = adapter(rng, tmp_path, "model.")
    with pytest.raises(DataError, match="give it as base"):
        inspect(folder, mapping=(Row("{x*}", "model.{x*}"),))
    wrong = (Row("model.layers.{i}.{x*}", "blocks.{i}.{x*}"),)
    assert inspect(folder, base=base, mapping=wrong).total == 193  # a row that leads nowhere says nothing
    other = write_peft(
        tmp_path / "other", {f"{n}.lora_{p}.weight": random(rng, (3, 3)) for n in ("x.q",) for p in "AB"}
    )
    with pytest.raises(DataError, match=r"the checkpoint has no such tensor; nearest: ") as refused:
        inspect(other, base=base)
    with pytest.raises(DataError) as of_merge:
        merge(base, other, tmp_path / "out")
    assert str(refused.value).replace("x/q/", "x.q.") == str(of_merge.value)


def test_mixtral_is_known_without_its_config(tmp_path, rng):
    base, folder, _ = mixtral(rng, tmp_path)
    (base / "config.json").write_text(json.dumps({}))
    assert inspect(folder, base=base).entries[0].relative is not None
