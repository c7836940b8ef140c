"""Folders that are wrong, for us and for PEFT: what it refuses we refuse; what both read is the same model.

PEFT warns where tensors or modules have no counterpart, and goes on with what it has; here these are errors.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jlora
from jlora.disk import write_tensors
from jlora.interop.peft import read_peft
from tests.interop.models import Case, adapted, base_of, load_file, merged_by_peft, peft, save, torch

PREFIX = "base_model.model."
DELETED: Any = object()


class Block(torch.nn.Module):
    """Two linear layers, an embedding and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(13, 5)
        self.up = torch.nn.Linear(5, 7)
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"down": torch.nn.Linear(7, 5, bias=False)})])
        self.norm = torch.nn.LayerNorm(5)


NAMES = ["up", "down", "embed"]
CASE = Case(Block, {"target_modules": NAMES, "modules_to_save": ["norm"], "rank_pattern": {"down": 3}})
FIELDS: dict[str, list[Any]] = {
    "r": [0, -1, 1, 3, "2", None, 2.5, 10**30, DELETED],
    "lora_alpha": [-3, "5", None, 2.5, DELETED],
    "rank_pattern": [{"down": 2}, {"down": "3"}, {"down": 0}, {"down": 3, "no": 7}, [], None, "x", DELETED],
    "rank_pattern ": [{"d.wn": 3}, {"^down": 3}, {"^layers.0.down": 3}, {}, {"(": 1}],
    "alpha_pattern": [{"down": 7}, {"down": "7"}, {"down": -1}, {"up": 2.5, "embed": 1}, [], None, {"(": 1}, {".*": 3}],
    "target_modules": [[], ["up"], ["up", "down"], [*NAMES, "more"], "up|.*down|embed", "(", 5, "all-linear", [5]],
    "target_modules ": ["up", ["up", "layers.0.down", "embed"], ["up", "wn", "embed"]],
    "exclude_modules": [["up"], "up", "(", [], ["p"], "u"],
    "layers_to_transform": [[0], 0, [], "x"],
    "layers_pattern": ["layers", ["x"]],
    "use_rslora": [True, "yes", 1, 0, None, DELETED],
    "use_dora": [True, "yes", 1, None],
    "fan_in_fan_out": [True],
    "bias": ["all", "lora_only", "x", None, True],
    "lora_bias": [True, "x"],
    "modules_to_save": [["norm", "other"], "norm", 5],
    "lora_dropout": [0.5, 1.5, "x", None],
    "init_lora_weights": ["x", True, "gaussian", None],
    "peft_type": ["X", "lora", None, DELETED, "LOHA", "IA3", 5],
    "target_parameters": [[], "x"],
    "unknown_key": [1],
}
FILES = {"empty": "", "list": "[]", "null": "null", "cut": "{", "text": '"a"', "mark": "\ufeff{}"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """The base, and the configuration and the tensors of an adapter that PEFT made for it."""
    base, live = adapted(CASE)
    folder = save(CASE, live, tmp_path_factory.mktemp("peft"))
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {key: value.numpy() for key, value in load_file(folder / "adapter_model.safetensors").items()}
    return {key: value.astype("float32") for key, value in base.items()}, config, tensors


def written(folder: Path, config: dict[str, Any] | str, tensors: dict[str, Any]) -> Path:
    if isinstance(config, dict):
        config = json.dumps({key: value for key, value in config.items() if value is not DELETED})
    (folder / "adapter_config.json").write_text(config)
    with (folder / "adapter_model.safetensors").open("wb") as file:
        write_tensors(file, {k: v for k, v in tensors.items() if v is not DELETED}, {"format": "pt"})
    return folder


def theirs(folder: Path) -> Any:
    """What PEFT makes of the base; None where it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            live = peft.PeftModel.from_pretrained(base_of(CASE), str(folder), autocast_adapter_dtype=False)
            return merged_by_peft(live)
        except Exception:
            return None


def outcome(folder: Path, base: Any) -> str:
    wanted = theirs(folder)
    try:
        adapters, config = read_peft(folder, params=base)
    except jlora.DataError:
        return "refused" if wanted is None else "refused by us alone"
    assert wanted is not None, "PEFT refuses it"
    merged = jlora.merge_params(base, adapters, config)
    assert merged.keys() == wanted.keys()
    for name, array in merged.items():
        np.testing.assert_allclose(array, wanted[name], rtol=0, atol=1e-5, err_msg=name)
    return "read"


@pytest.mark.parametrize("field", FIELDS)
def test_fields(field: str, whole: Any, tmp_path: Path) -> None:
    base, config, tensors = whole
    assert outcome(written(tmp_path, config, tensors), base) == "read"
    for value in FIELDS[field]:
        try:
            outcome(written(tmp_path, config | {field.strip(): value}, tensors), base)
        except AssertionError as error:
            raise AssertionError(f"{field} = {value!r}: {error}") from error


@pytest.mark.parametrize("name", FILES)
def test_configurations_that_are_none(name: str, whole: Any, tmp_path: Path) -> None:
    base, _, tensors = whole
    assert outcome(written(tmp_path, FILES[name], tensors), base) == "refused"


def changed(key: str, array: np.ndarray[Any, Any]) -> dict[str, dict[str, Any]]:
    """Ways to damage one tensor, by name."""
    return {
        "missing": {key: DELETED},
        "transposed": {key: np.ascontiguousarray(array.T)},
        "longer": {key: np.concatenate([array, array[:1]])},
        "shorter": {key: array[:-1]},
        "an axis more": {key: array[..., None]},
        "float16": {key: array.astype("float16")},
        "whole numbers": {key: array.astype("int32")},
        "another name": {key: DELETED, f"{key}x": array},
        "no prefix": {key: DELETED, key.removeprefix(PREFIX): array},
        "empty": {key: array[:0]},
    }


@pytest.mark.parametrize("name", ["up.lora_A.weight", "layers.0.down.lora_B.weight", "embed.lora_embedding_A"])
def test_tensors(name: str, whole: Any, tmp_path: Path) -> None:
    base, config, tensors = whole
    for how, change in changed(PREFIX + name, tensors[PREFIX + name]).items():
        if how == "float16":  # which PEFT computes with as it is
            continue
        try:
            found = outcome(written(tmp_path, config, tensors | change), base)
        except AssertionError as error:
            raise AssertionError(f"{how}: {error}") from error
        assert found != "read", how


ONES = {shape: np.ones(shape, "float32") for shape in ((2, 5), (7, 2), (7, 5), (7,), (2, 13), (5, 2))}
ADDED = {
    "a module that is none": {"other.lora_A.weight": ONES[2, 5], "other.lora_B.weight": ONES[7, 2]},
    "a tensor that is none": {"x": ONES[7,]},
    "the weight without its layer": {"up.weight": ONES[7, 5]},
    "a magnitude without DoRA": {"up.lora_magnitude_vector": ONES[7,]},
    "a bias without lora_bias": {"up.lora_B.bias": ONES[7,]},
    "A of a norm": {"norm.lora_A.weight": ONES[2, 5]},
    "an embedding as a layer": {"embed.lora_A.weight": ONES[2, 13], "embed.lora_B.weight": ONES[5, 2]},
}


@pytest.mark.parametrize("name", ADDED)
def test_what_peft_passes_over_is_refused(name: str, whole: Any, tmp_path: Path) -> None:
    base, config, tensors = whole
    added = {PREFIX + key: array for key, array in ADDED[name].items()}
    assert outcome(written(tmp_path, config, tensors | added), base) == "refused by us alone"
    base_layer = {f"{PREFIX}up.base_layer.weight": ONES[7, 5]}
    assert outcome(written(tmp_path, config, tensors | base_layer), base) == "read"
