"""PEFT's `adapter_config.json` as a LoraConfig, and back."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jlora.config import LoraConfig
from jlora.disk import parse_json
from jlora.errors import ConfigError, DataError, shortened
from jlora.interop.peft._patterns import Patterns, budget_of_patterns
from jlora.interop.peft._targeted import Targeted

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
_PORTABLE_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_TRANSPOSED_EXPERTS = ("gpt_oss", "gptoss", "aria", "openai_privacy_filter")
_NEW: dict[str, Any] = {
    "alpha_pattern": {},
    "base_model_name_or_path": None,
    "bias": "none",
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_bias": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "rank_pattern": {},
    "target_parameters": None,
    "task_type": None,
    "use_dora": False,
}


def check_peft_config(data: Mapping[str, Any]) -> None:
    """Raises a DataError for what is no LoRA, or a variant that is no sum of A@B."""
    kind = data.get("peft_type")
    if "peft_type" not in data:
        raise DataError("no folder of PEFT's, which names its peft_type; jlora's own are read by load_adapters")
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


def has_transposed_experts(data: Mapping[str, Any]) -> bool:
    """Whether the base model keeps its experts as (experts, in, out), as far as its name says (transformers 5)."""
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


def extras_of(config: LoraConfig) -> dict[str, Any]:
    """What `LoraConfig.extras` keeps of the file that a configuration was read from: its `config`, and `kinds`."""
    text = dict(config.extras).get(EXTRA)
    if text is None:
        return {"config": None, "kinds": {}}
    try:
        data = parse_json(text.encode("utf-8"))
        return {"config": dict(data["config"]), "kinds": dict(data["kinds"])}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"extras[{EXTRA!r}] is not what jlora.interop.peft keeps there; take it out") from None


def peft_config(
    config: LoraConfig,
    modules: Mapping[str, str],
    parameters: Iterable[str],
    *,
    conv1d: bool,
    dora: bool,
    lora_bias: bool,
    whole: Iterable[str],
) -> dict[str, Any]:
    """PEFT's configuration.

    Args:
      config: ours; what it kept of a file of PEFT's is written back wherever it still says the same.
      modules: PEFT's module, or the parameter -> the path of its adapter.
      parameters: those of them that are parameters.
      conv1d, dora, lora_bias: whether there are weights (in, out), magnitudes, offsets.
      whole: modules that are saved as a whole.
    """
    kept = extras_of(config)["config"]
    data = dict(_NEW if kept is None else kept)
    scaling = config.scaling == "rslora"
    scales = Scales(data)
    same = (
        kept is not None
        and bool(data.get("use_rslora")) == scaling
        and all(
            scales.rank_of(module) == config.rank_of(path) and scales.alpha_of(module) == config.alpha_of(path)
            for module, path in modules.items()
        )
    )
    if not same:
        data |= {"r": config.rank, "lora_alpha": _number(config.alpha), "use_rslora": scaling}
        data["rank_pattern"] = {
            _exactly(module): config.rank_of(path)
            for module, path in modules.items()
            if config.rank_of(path) != config.rank
        }
        data["alpha_pattern"] = {
            _exactly(module): _number(config.alpha_of(path))
            for module, path in modules.items()
            if config.alpha_of(path) != config.alpha
        }
    if kept is None or config.dropout != (data.get("lora_dropout") or 0.0):
        data["lora_dropout"] = config.dropout
    named = set(parameters)
    layers = sorted(module for module in modules if module not in named)
    if kept is None:
        beside = {"dropout": config.dropout, "Conv1D": conv1d, "DoRA": dora, "the bias of a B": lora_bias}
        if named and (found := [name for name, value in beside.items() if value]):
            raise DataError(
                f"{sorted(named)[0]} is a parameter, beside which PEFT does not have {found[0]}: write two folders"
            )
        data |= {"fan_in_fan_out": conv1d, "use_dora": dora, "lora_bias": lora_bias}
        data["target_modules"] = layers
        data["target_parameters"] = sorted(named) or None
        data["modules_to_save"] = sorted(set(whole)) or None
        return data
    data |= {
        key: value for key, value in (("use_dora", dora), ("lora_bias", lora_bias)) if bool(data.get(key)) != value
    }
    targeted = Targeted(data)
    if any(targeted.why_not(module) for module in layers):  # others than those of the file that was read
        data |= {"target_modules": layers, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    return data


def _exactly(module: str) -> str:
    """The pattern that matches this module alone; without the anchor "q" would match "layers.0.q" too."""
    return f"^{re.escape(module)}"


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value
