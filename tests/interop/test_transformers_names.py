"""The table of what transformers renames is that of the transformers which is installed."""

import json
import warnings
from typing import Any

import pytest

from jlora.interop.transformers import Facts, facts_of, task_of
from tests.interop.models import transformers

make_names = pytest.importorskip("tests.interop.make_names")
SOME = ["bert", "dinov2", "gemma3", "gpt2", "gpt_oss", "mixtral", "qwen2_vl", "t5", "vit", "whisper"]


def stored() -> dict[str, dict[str, Any]]:
    data = json.loads(make_names.TABLE.read_text())
    return {
        model_type: {name: data["facts"][number] for name, number in classes.items()}
        for model_type, classes in data["models"].items()
    }


def found(only: list[str]) -> dict[str, dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return json.loads(json.dumps(make_names.table(only)))


def test_some_of_the_table() -> None:
    wanted = {name: classes for name, classes in stored().items() if name in SOME}
    assert set(wanted) == set(SOME)
    assert found(SOME) == wanted


@pytest.mark.slow
def test_all_of_the_table() -> None:
    every, wanted = found([]), stored()
    shared = every.keys() & wanted.keys()
    assert len(shared) > 300
    assert {name: every[name] for name in shared} == {name: wanted[name] for name in shared}


def test_names_on_the_disk_lead_to_those_in_memory() -> None:
    facts = facts_of({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]})
    names = {
        "language_model.model.layers.3.mlp.up_proj.weight": "model.language_model.layers.3.mlp.up_proj.weight",
        "language_model.lm_head.weight": "lm_head.weight",
        "vision_tower.vision_model.x.weight": "model.vision_tower.vision_model.x.weight",
        "something.else": "something.else",
    }
    assert {name: facts.in_memory(name) for name in names} == names


@pytest.mark.parametrize(
    "config",
    [{}, {"model_type": "gpt2"}, {"model_type": "gpt2", "architectures": ["Mine"]}, {"architectures": [3]}],
)
def test_models_that_the_table_does_not_have(config: dict[str, Any]) -> None:
    assert facts_of(config) == Facts()
    assert task_of(config) is None


def test_the_task_follows_from_the_class() -> None:
    t5 = transformers.T5Config(architectures=["T5ForConditionalGeneration"]).to_dict()
    whisper = transformers.WhisperConfig(architectures=["WhisperForConditionalGeneration"]).to_dict()
    assert (task_of(t5), task_of(whisper)) == ("SEQ_2_SEQ_LM", None)
    assert task_of({"architectures": ["BertForTokenClassification"]}) == "TOKEN_CLS"
