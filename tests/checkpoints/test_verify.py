"""Adapters that are not for a base, not whole or without effect are found by their files."""

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jlora import LoraConfig, checkpoints
from jlora.disk import file_written_whole, write_tensors
from jlora.errors import DataError
from jlora.interop.peft import differences, manifest_of, to_tensors, write_peft
from jlora.storage import save_adapters
from tests.models.folders import LLAMA, tensors_of, write_folder

RANK = 3
LAYER = "base_model.model.model.layers.{}.{}"
SIZES = {"self_attn.q_proj": (12, 12), "self_attn.v_proj": (4, 12), "mlp.down_proj": (12, 22)}
DATA = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("base"), LLAMA, tensors_of(LLAMA))


@pytest.fixture
def tensors(rng):
    found = {}
    for layer in range(LLAMA["num_hidden_layers"]):
        for module, (outs, ins) in SIZES.items():
            found[f"{LAYER.format(layer, module)}.lora_A.weight"] = array(rng, RANK, ins)
            found[f"{LAYER.format(layer, module)}.lora_B.weight"] = array(rng, outs, RANK)
    return found


def array(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def write(folder, tensors, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(DATA | changes))
    with file_written_whole(folder / "adapter_model.safetensors") as file:
        write_tensors(file, tensors, {"format": "pt"})
    return folder


def problems(found):
    return {check.name: list(check.problems) for check in found.checks if check.problems}


def test_whole_adapters_are_right(base, tensors, tmp_path):
    found = checkpoints.verify(base, write(tmp_path / "adapter", tensors))
    assert found.is_right
    assert problems(found) == {}
    kinds = {(kind.name, kind.adapted, kind.wanted, kind.shape, kind.ranks) for kind in found.kinds}
    assert kinds == {(f"model.layers.*.{module}.weight", 3, 3, shape, (RANK,)) for module, shape in SIZES.items()}
    assert [verdict.loads for verdict in found.engines] == [True, True, True]
    assert "model.layers.*.mlp.down_proj.weight" in str(found)


Q_A = f"{LAYER.format(1, 'self_attn.q_proj')}.lora_A.weight"
Q_B = f"{LAYER.format(1, 'self_attn.q_proj')}.lora_B.weight"


def renamed(tensors):
    return {name.replace("layers.1.self_attn.q_proj", "layers.1.self_attn.query"): a for name, a in tensors.items()}


def part_renamed(tensors):
    return {name.replace("lora_A", "lora_a") if name == Q_A else name: a for name, a in tensors.items()}


def transposed(tensors):
    return tensors | {Q_A: np.ascontiguousarray(tensors[Q_A].T)}


def both_transposed(tensors):  # down_proj as a Conv1D has it
    name = LAYER.format(2, "mlp.down_proj")
    a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
    turned = {f"{name}.lora_A.weight": b.T, f"{name}.lora_B.weight": a.T}
    return tensors | {key: np.ascontiguousarray(part) for key, part in turned.items()}


def zero(tensors):
    return tensors | {Q_B: np.zeros_like(tensors[Q_B])}


def not_finite(tensors):
    spoilt = tensors[Q_B].copy()
    spoilt[2, 1] = np.nan
    return tensors | {Q_B: spoilt}


def without_a_layer(tensors):
    return {name: part for name, part in tensors.items() if ".layers.1." not in name}


def of_a_wider_base(tensors):
    return {n: np.concatenate([a, a], 1 if "lora_A" in n else 0) for n, a in tensors.items()}


def of_a_deeper_base(tensors):
    return tensors | {n.replace("layers.2", "layers.7"): a for n, a in tensors.items() if "layers.2" in n}


WRONG = {  # change -> check, and the beginning of its problem
    renamed: ("names", "the configuration and the tensors do not go together: model.layers.1.self_attn.query has"),
    part_renamed: ("names", "tensors that are no part of a LoRA"),
    transposed: ("names", "model.layers.1.self_attn.q_proj.weight: lora_A (12, 3) and lora_B (12, 3) do not fit"),
    both_transposed: ("shapes", "model.layers.2.mlp.down_proj.weight: A and B make an update of (out, in) = (22, 12)"),
    zero: ("numbers", "model.layers.1.self_attn.q_proj.weight: B is all zero"),
    not_finite: ("names", "B of model.layers.1.self_attn.q_proj.weight holds a NaN"),
    without_a_layer: ("targets", "model.layers.1.self_attn.q_proj.weight: the adapters are said to change it"),
    of_a_wider_base: ("shapes", "the adapters do not fit the checkpoint: 9 problems"),
    of_a_deeper_base: ("weights", "model.layers.7.self_attn.q_proj.weight: the checkpoint has no such tensor"),
}


@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.__name__)
def test_wrong_adapters_are_found(change, base, tensors, tmp_path):
    found = checkpoints.verify(base, write(tmp_path / "adapter", change(tensors)))
    name, start = WRONG[change]
    assert not found.is_right
    assert any(problem.startswith(start) for problem in problems(found)[name]), problems(found)
    assert f"{name}: " in str(found)


def test_a_renamed_module_is_told_with_what_then_lacks_an_adapter(base, tensors, tmp_path):
    found = checkpoints.verify(
        base, write(tmp_path / "adapter", renamed(tensors), target_modules=[*DATA["target_modules"], "query"])
    )
    assert problems(found).keys() == {"weights", "targets"}
    counts = {kind.name.split(".")[-2]: (kind.adapted, kind.wanted) for kind in found.kinds}
    assert counts == {"q_proj": (2, 3), "v_proj": (3, 3), "down_proj": (3, 3)}


def test_layers_that_are_not_to_be_adapted_are_not_missed(base, tensors, tmp_path):
    folder = write(tmp_path / "adapter", without_a_layer(tensors), layers_to_transform=[0, 2])
    assert checkpoints.verify(base, folder).is_right


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q_proj|v_proj|down_proj)"])
def test_targets_that_are_no_list(targets, base, tensors, tmp_path):
    folder = tmp_path / "adapter"
    assert checkpoints.verify(base, write(folder, tensors, target_modules=targets)).is_right
    found = checkpoints.verify(base, write(folder, without_a_layer(tensors), target_modules=targets))
    assert len(problems(found)["targets"]) == 3


def test_targets_of_names_below_another_prefix(base, tensors, tmp_path):
    other = {name.replace("base_model.model.model.", "base_model.model."): part for name, part in tensors.items()}
    found = checkpoints.verify(
        base, write(tmp_path / "adapter", other, target_modules=r"layers\.\d+\..*(q|v|down)_proj")
    )
    wanted = "layers.0.mlp.down_proj.weight: is model.layers.0.mlp.down_proj.weight in the base"
    assert problems(found)["weights"][0].startswith(wanted)
    peft, vllm, sglang = found.engines
    assert "layers.0.mlp.down_proj.weight is model.layers.0.mlp.down_proj.weight there" in peft.problems[0]
    assert "9 weights have other names" in vllm.problems[0]
    assert "target_modules = " in sglang.problems[0]


def test_a_model_that_nobody_knows_may_have_other_names(tensors, tmp_path):
    base = write_folder(tmp_path / "base", LLAMA | {"architectures": ["Unheard"]}, tensors_of(LLAMA))
    other = {name.replace("base_model.model.model.", "base_model.model."): part for name, part in tensors.items()}
    assert checkpoints.verify(base, write(tmp_path / "adapter", other)).is_right


def test_own_format_is_verified_without_engines(base, rng, tmp_path):
    paths = [f"model/layers/{layer}/self_attn/v_proj/weight" for layer in (0, 2)]
    entries = {path: {"A": array(rng, 12, RANK), "B": array(rng, RANK, 4)} for path in paths}
    save_adapters(tmp_path / "own", entries, LoraConfig(rank=RANK, factorizations={"**": "oi"}))
    found = checkpoints.verify(base, tmp_path / "own")
    assert found.engines == ()
    assert problems(found).keys() == {"targets"}


def test_manifest_tells_what_changed_on_the_way(base, tensors, tmp_path):
    folder = write(tmp_path / "adapter", tensors)
    checkpoints.write_manifest(folder, tmp_path / "sent.json")
    assert checkpoints.verify(base, folder, manifest=tmp_path / "sent.json").is_right
    changed = tensors[Q_A].copy()
    changed[0, 0] = np.nextafter(changed[0, 0], 9)
    others = {name: part for name, part in tensors.items() if "layers.2.mlp" not in name} | {Q_A: changed}
    write(folder, others | {f"{LAYER.format(0, 'mlp.up_proj')}.lora_A.weight": array(np.random.default_rng(), 3, 12)})
    found = checkpoints.verify(base, write(folder, others), manifest=tmp_path / "sent.json")
    down = LAYER.format(2, "mlp.down_proj")
    assert sorted(problems(found)["manifest"]) == [
        f"{Q_A}: is not as it was sent",
        f"{down}.lora_A.weight: did not arrive",
        f"{down}.lora_B.weight: did not arrive",
    ]
    found = checkpoints.verify(base, write(folder, tensors, lora_alpha=5), manifest=tmp_path / "sent.json")
    assert problems(found) == {"manifest": ["the configuration is another one"]}


def test_a_manifest_of_tensors_in_memory_is_that_of_the_files(rng, tmp_path):
    entry = {"A": array(rng, 12, RANK).astype(ml_dtypes.bfloat16), "B": array(rng, RANK, 4).astype(ml_dtypes.bfloat16)}
    adapters = {"model.layers.0.self_attn.v_proj.weight": entry}
    config = LoraConfig(rank=RANK, factorizations={"**": "oi"})
    write_peft(tmp_path / "adapter", adapters, config)
    checkpoints.write_manifest(tmp_path / "adapter", tmp_path / "sent.json")
    tensors, data = to_tensors(adapters, config)
    sent = json.loads((tmp_path / "sent.json").read_text())
    assert sent == manifest_of(tensors, data)
    assert differences(sent, tensors, data) == []
    a, b = sorted(tensors)
    assert sent["tensors"][b]["sha256"] == hashlib.sha256(entry["B"].T.tobytes()).hexdigest()
    halves = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    assert differences(sent, halves, data) == [f"{a}: is not as it was sent", f"{b}: is not as it was sent"]
    assert differences(sent, {a: tensors[a], "more": tensors[b]}, data) == [
        f"{b}: did not arrive",
        "more: was not sent",
    ]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "jlora tensors 2", "tensors": {}}', '{"tensors": 3}'])
def test_what_is_no_manifest_is_refused(text, base, tensors, tmp_path):
    Path(tmp_path / "sent.json").write_text(text)
    with pytest.raises(DataError, match=r"sent\.json"):
        checkpoints.verify(base, write(tmp_path / "adapter", tensors), manifest=tmp_path / "sent.json")


def test_what_is_not_there_is_refused(base, tensors, tmp_path):
    folder = write(tmp_path / "adapter", tensors)
    with pytest.raises(DataError, match="nowhere"):
        checkpoints.verify(tmp_path / "nowhere", folder)
    with pytest.raises(DataError, match="nowhere"):
        checkpoints.verify(base, tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"nowhere\.json"):
        checkpoints.verify(base, folder, manifest=tmp_path / "nowhere.json")
    cut = folder / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-7])
    with pytest.raises(DataError, match=r"adapter_model\.safetensors"):
        checkpoints.verify(base, folder)
