"""What transformers makes of a checkpoint: names in memory that are others than on the disk, and axes.

Adapters carry the names that modules have in memory, checkpoints those that they were published with. The table beside
this file has them by the model type and the class that config.json names; `tests/interop/make_names.py` takes it from
transformers itself. `RENAMED` has the rows for checkpoints whose config.json does not lie beside them.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlora.interop.peft import Row, paths_of_name

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}

_ATTENTION = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
_MLP = {"fc1": "intermediate.dense", "fc2": "output.dense"}

RENAMED: tuple[Row, ...] = (
    # ViT, DeiT, BEiT
    *(
        Row(
            f"{{m*}}.layers.{{i}}.attention.{memory}.{{e}}",
            f"{{m*}}.encoder.layer.{{i}}.attention.attention.{disk}.{{e}}",
        )
        for memory, disk in _ATTENTION.items()
    ),
    Row("{m*}.layers.{i}.attention.o_proj.{e}", "{m*}.encoder.layer.{i}.attention.output.dense.{e}"),
    *(
        Row(f"{{m*}}.layers.{{i}}.mlp.{memory}.{{e}}", f"{{m*}}.encoder.layer.{{i}}.{disk}.{{e}}")
        for memory, disk in _MLP.items()
    ),
    Row("{m*}.layers.{i}.{rest*}", "{m*}.encoder.layer.{i}.{rest*}"),
    # DINOv2
    *(
        Row(f"{{m*}}.attention.{memory}.{{e}}", f"{{m*}}.attention.attention.{disk}.{{e}}")
        for memory, disk in _ATTENTION.items()
    ),
    Row("{m*}.attention.o_proj.{e}", "{m*}.attention.output.dense.{e}"),
    # Swin
    *(
        Row(f"{{m*}}.attention.{memory}.{{e}}", f"{{m*}}.attention.self.{disk}.{{e}}")
        for memory, disk in _ATTENTION.items()
    ),
    *(Row(f"{{m*}}.mlp.{memory}.{{e}}", f"{{m*}}.{disk}.{{e}}") for memory, disk in _MLP.items()),
    # Mixtral
    Row("{m*}.mlp.gate.{e}", "{m*}.block_sparse_moe.gate.{e}"),
    Row("{m*}.mlp.experts.{e}", "{m*}.block_sparse_moe.experts.{e}"),
)
"""Rows of a name in memory and the name on the disk; one that leads to no tensor says nothing."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is not as one would expect in a model of transformers.

    Attributes:
      renamed: rows of a name in memory and the name on the disk; the first that matches counts.
      stacked: experts that are one array in memory: its name, and the names on the disk, {e} the number of the expert;
        the rows of several names follow one another.
      converted: names on the disk whose tensors are others in memory.
      tied: a weight in memory, and the embedding that it is where the checkpoint has none of its own.
      tied_beside: pairs of other weights that are tied where the embeddings are.
      keeps_tie: whether `tie_word_embeddings` says something else of the model than that they are, or nothing.
      conv1d, embedding, linear: the last part of the names of such modules, where nothing else says it.
      transposed: the ends of the names of parameters (experts, in, out).
      parameters: the ends of the names of weights that PEFT adapts as parameters alone, not with their modules.
    """

    renamed: tuple[Row, ...] = ()
    stacked: tuple[tuple[str, tuple[str, ...]], ...] = ()
    converted: tuple[str, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    tied_beside: tuple[tuple[str, str], ...] = ()
    keeps_tie: bool = False
    conv1d: tuple[str, ...] = ()
    embedding: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()

    def in_memory(self, disk: str) -> str:
        """The name in memory of a tensor that has this name on the disk."""
        found = paths_of_name(_reversed(self.renamed), disk)
        return found[0] if found else disk


def facts_of(config: Mapping[str, Any]) -> Facts:
    """The facts of the model that a config.json names; none where the table does not have it."""
    number = _number_of(config)
    return Facts() if number is None else _facts(number)


def names_in_memory(config: Mapping[str, Any], disk: str) -> list[str]:
    """The other names that the tensor of this name on the disk may have in memory."""
    facts = facts_of(config)
    found = paths_of_name(_reversed((*facts.renamed, *RENAMED)), disk)
    for memory, parts in facts.stacked:
        found += [filled(memory, match) for part in parts if (match := pattern_of(part).fullmatch(disk))]
    return found


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether the table has the model that a config.json names."""
    return _number_of(config) is not None


def _number_of(config: Mapping[str, Any]) -> int | None:
    classes = config.get("architectures")
    if not isinstance(classes, list) or not classes:
        return None
    number: int | None = _table()["models"].get(str(config.get("model_type")), {}).get(str(classes[0]))
    return number


def has_transposed_experts(config: Mapping[str, Any]) -> bool | None:
    """Whether the model that a config.json names keeps stacked experts as (experts, in, out); None for unknown ones."""
    classes = _table()["models"].get(str(config.get("model_type")))
    return None if classes is None else any(_facts(number).transposed for number in classes.values())


def task_of(config: Mapping[str, Any]) -> str | None:
    """PEFT's task type of the model that a config.json names."""
    classes = config.get("architectures")
    name = str(classes[0]) if isinstance(classes, list) and classes else ""
    if name.endswith("ForConditionalGeneration"):
        is_of_text = bool(config.get("is_encoder_decoder")) and "num_mel_bins" not in config
        return "SEQ_2_SEQ_LM" if is_of_text else None
    return next((task for end, task in _TASKS.items() if name.endswith(end)), None)


@functools.cache
def pattern_of(template: str) -> re.Pattern[str]:
    """What matches the names of a template, a group for the number {e} of an expert, one for each other number."""
    parts = re.split(r"\{(\w)\}", template)
    inner = [f"(?P<{part}>\\d+)" if place % 2 else re.escape(part) for place, part in enumerate(parts)]
    return re.compile("".join(inner))


def filled(template: str, match: re.Match[str]) -> str:
    """A template with the numbers of a match of another."""
    for letter, number in match.groupdict().items():
        template = template.replace(f"{{{letter}}}", number)
    return template


@functools.cache
def _reversed(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    return tuple(Row(row.path, row.name) for row in rows)


@functools.cache
def _table() -> Mapping[str, Any]:
    text = Path(__file__).with_name("transformers.json").read_text("utf-8")
    return dict(json.loads(text))


@functools.cache
def _facts(number: int) -> Facts:
    own = _table()["facts"][number]
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}
    return Facts(
        **given
        | {
            "renamed": tuple(Row(memory, disk) for memory, disk in own.get("renamed", ())),
            "stacked": tuple((memory, tuple(disk)) for memory, disk in own.get("stacked", ())),
            "tied": tuple((tied, source) for tied, source in own.get("tied", ())),
            "tied_beside": tuple((tied, source) for tied, source in own.get("tied_beside", ())),
        }
    )
