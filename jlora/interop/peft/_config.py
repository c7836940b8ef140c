"""PEFT's `adapter_config.json` as a LoraConfig, and what the LoraConfig keeps of it."""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from jlora.config import LoraConfig
from jlora.disk import CONFIG, parse_json
from jlora.errors import ConfigError, DataError, shortened
from jlora.interop.peft._patterns import Patterns, budget_of_patterns

EXTRA = "peft"
"""The name under which a configuration keeps what PEFT's file said."""

_VARIANTS = {
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "aLoRA",
    "velora_config": "VeLoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow",
    "use_bdlora": "BD-LoRA",
    "layer_replication": "layer replication",
    "trainable_token_indices": "trainable tokens",
}
_PORTABLE_INITS = (True, False, None, "gaussian", "eva", "mica", "orthogonal")
_TRANSPOSED_EXPERTS = ("gpt_oss", "gptoss", "aria", "openai_privacy_filter")


def check_peft_config(data: Mapping[str, Any]) -> None:
    """Raises a DataError for what is no LoRA, or a variant that is no sum of A@B."""
    kind = data.get("peft_type")
    if "peft_type" not in data:
        raise DataError(
            f"{CONFIG} has no peft_type, which is \"LORA\" in PEFT's; jlora's own are read by load_adapters"
        )
    if kind == "VERA":
        raise DataError(
            "peft_type 'VERA': jlora.interop.peft.read_vera reads it; jlora convert FOLDER OUT --to peft --base MODEL "
            "makes a LoRA of it, which acts the same"
        )
    if kind != "LORA":
        raise DataError(f"peft_type {shortened(kind)}: jlora reads LORA")
    for key, name in _VARIANTS.items():
        if data.get(key):
            found = shortened(data[key])
            raise DataError(f"{key} = {found}: {name} is a variant that A and B alone do not represent")
    init = data.get("init_lora_weights", True)
    if not any(init is known or (isinstance(known, str) and init == known) for known in _PORTABLE_INITS):
        raise DataError(
            f"init_lora_weights = {shortened(init)} changes the base, so that the adapter alone is not portable; in "
            "PEFT, save_pretrained(path_initial_model_for_weight_conversion=...) writes it as a plain LoRA"
        )
    for key in ("lora_alpha", "lora_dropout"):
        if not _is_number(data.get(key, 0)):
            raise DataError(f"{key} = {shortened(data[key])}: wanted a number")
    if not _is_rank(data.get("r", 8)):
        raise DataError(f"r = {shortened(data['r'])}: wanted a whole number of at least 1")
    for key, is_allowed in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        pattern = data.get(key, {})
        if not isinstance(pattern, Mapping) or not all(map(is_allowed, pattern.values())):
            raise DataError(f"{key} = {shortened(pattern)}: wanted a mapping from patterns to numbers")
    targets = data.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise DataError(f"target_parameters = {shortened(targets)}: wanted a list of names")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def kind_of_experts(data: Mapping[str, Any], transposed: bool | None) -> str:
    """The kind of stacked experts in a file with this configuration: which of their axes A belongs to.

    A lies on the first axis of every expert's matrix in PEFT 0.17 and 0.18; since 0.19 on the one that the model takes
    for in, which 0.19.0 has the wrong way round. The configuration names the version from 0.18 on.

    Args:
      data: PEFT's configuration.
      transposed: whether the model keeps its experts as (experts, in, out), as GPT-OSS does; None where it is not known
        but by the name of the base model.
    """
    version = _version(data)
    if version < (0, 19, 0):
        return "experts_t"
    if transposed is None and _names_transposed(data):
        transposed = True
    if transposed is None:
        return "experts_open"
    return "experts_t" if transposed != (version == (0, 19, 0)) else "experts"


def _version(data: Mapping[str, Any]) -> tuple[int, int, int]:
    """The version that a configuration names, 0.17 where it names none."""
    named = data.get("peft_version") or "0.17.0"
    match = re.match(r"(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?", str(named))
    if match is None:
        raise DataError(f"peft_version = {shortened(named)}: wanted a version, such as 0.19.1")
    return int(match[1]), int(match[2]), int(match[3] or 0)


def _names_transposed(data: Mapping[str, Any]) -> bool:
    """Whether the name of the base model is that of one with experts (experts, in, out) (transformers 5)."""
    named = json.dumps([data.get("auto_mapping"), data.get("base_model_name_or_path")]).lower().replace("-", "_")
    return any(f"{end}{name}" in named for name in _TRANSPOSED_EXPERTS for end in ('"', "/", "."))


class Scales:
    """The rank and the alpha that PEFT's configuration gives each module."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.rank, self.alpha = data.get("r", 8), data.get("lora_alpha", 8)
        budget = budget_of_patterns()
        self._ranks, self._alphas = (Patterns(data.get(key), budget) for key in ("rank_pattern", "alpha_pattern"))

    def rank_of(self, module: str) -> int:
        """The rank of a module's A and B."""
        return self._ranks.value_of(module, self.rank)

    def alpha_of(self, module: str) -> float:
        """The alpha of a module."""
        return self._alphas.value_of(module, self.alpha)


@dataclasses.dataclass(frozen=True)
class Kept:
    """What `LoraConfig.extras` keeps of the file that a configuration was read from.

    Attributes:
      config: PEFT's configuration, None where there was no file.
      kinds: the name of an entry -> its kind, where this is not what its axes say.
      digest: of the names and parts of all entries.
    """

    config: dict[str, Any] | None = None
    kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    digest: str | None = None

    def to_extras(self) -> dict[str, str]:
        """The entry of `LoraConfig.extras`."""
        return {EXTRA: json.dumps(dataclasses.asdict(self), sort_keys=True)}


def kept_of(config: LoraConfig) -> Kept:
    """What a configuration keeps of a file of PEFT's."""
    text = dict(config.extras).get(EXTRA)
    if text is None:
        return Kept()
    try:
        data = parse_json(text.encode("utf-8"))
        return Kept(dict(data["config"]), dict(data["kinds"]), data.get("digest"))
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"extras[{EXTRA!r}] is not what jlora.interop.peft keeps there; take it out") from None


def base_model_of(config: LoraConfig) -> str | None:
    """The name or the folder of the base model, where the file that a configuration came from said it."""
    name = (kept_of(config).config or {}).get("base_model_name_or_path")
    return name if isinstance(name, str) else None
