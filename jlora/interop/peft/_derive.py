"""What PEFT's `adapter_config.json` has to say of the tensors beside it, derived from these at every write."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jlora.config import LoraConfig
from jlora.errors import DataError
from jlora.interop.peft._config import Kept, Scales, kept_of
from jlora.interop.peft._keys import ends_of
from jlora.interop.peft._targeted import Saved

# Known to every PEFT; LoraConfig has no others that say nothing of the tensors.
_NEW: dict[str, Any] = {
    "base_model_name_or_path": None,
    "inference_mode": True,
    "peft_type": "LORA",
    "task_type": None,
}
OLDEST = "0.3.0"
"""The oldest PEFT that the table of keys has."""
LAYOUT = "0.20.0"
"""A PEFT that has the layout in which experts are written, as all have since 0.19.1."""

NO_TARGETS = "dummy-target-modules"
"""What PEFT takes for the targets of an adapter that has none, since 0.12; names that match nothing are an error."""

_SELECTING = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "target_parameters")


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a file of tensors holds.

    Attributes:
      adapted: PEFT's module, or the parameter, that has A and B or an offset -> the path of its adapter.
      parameters: those of them that are parameters.
      whole: the names of tensors that are there as a whole.
      base: those of them that belong to the base, and not to a module of `modules_to_save`.
      digest: of the names and parts of all entries.
      conv1d, dora, lora_bias: whether there are weights (in, out), magnitudes, offsets.
    """

    adapted: Mapping[str, str]
    parameters: Sequence[str]
    whole: Sequence[str]
    base: frozenset[str]
    digest: str
    conv1d: bool
    dora: bool
    lora_bias: bool


def of_model(
    config: LoraConfig,
    *,
    base_model_name_or_path: str | None,
    task_type: str | None,
    kinds: Mapping[str, str],
    target_parameters: Sequence[str],
) -> LoraConfig:
    """A configuration that tells `write_peft` of the model.

    Args:
      config: of the adapters.
      base_model_name_or_path: the model's name, or its folder.
      task_type: PEFT's.
      kinds: the name of a weight -> its kind, where its axes and its name do not say it.
      target_parameters: the ends of the names of weights whose modules PEFT does not adapt.
    """
    data = _NEW | {
        "base_model_name_or_path": base_model_name_or_path,
        "peft_version": LAYOUT,
        "target_parameters": list(target_parameters),
        "task_type": task_type,
    }
    return config.replace(extras={**dict(config.extras), **Kept(data, kinds).to_extras()})


def with_kinds_of(config: LoraConfig, others: Iterable[LoraConfig]) -> LoraConfig:
    """A configuration that keeps of what kind the weights are in the files of others too, for adapters of all."""
    kept = kept_of(config)
    kinds, parameters = dict(kept.kinds), dict.fromkeys((kept.config or {}).get("target_parameters") or ())
    version = (kept.config or {}).get("peft_version") if parameters else None
    for other in map(kept_of, others):
        kinds = {**other.kinds, **kinds}
        more = (other.config or {}).get("target_parameters") or ()
        if more and not parameters:
            version = (other.config or {}).get("peft_version")
        parameters |= dict.fromkeys(more)
    if not kinds and not parameters:
        return config
    data = dict(_NEW if kept.config is None else kept.config)
    if parameters:
        data |= {"target_parameters": list(parameters), "peft_version": version}
    return config.replace(extras={**dict(config.extras), **Kept(data, kinds, kept.digest).to_extras()})


def digest_of(entries: Mapping[str, Iterable[str]]) -> str:
    """A digest of which entries there are, name -> parts."""
    lines = sorted(f"{name} {' '.join(sorted(parts))}" for name, parts in entries.items())
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def peft_config(config: LoraConfig, contents: Contents, kept: Kept) -> dict[str, Any]:
    """PEFT's configuration of what a file holds.

    A configuration that was read stays as it is where it still says the same of the same entries. Else all that it said
    of them is said anew, and keys that only repeat a default are left out, as an older PEFT may not know them.

    Raises:
      DataError: tensors beside which PEFT cannot have others of the file.
    """
    same_entries = kept.config is not None and kept.digest == contents.digest
    same_scales = kept.config is not None and _says_scales(kept.config, config, contents.adapted)
    data = dict(_NEW if kept.config is None else kept.config)
    if not same_entries:
        _check_beside(config, contents)
        data |= _selection(contents, data)
    if not (same_entries and same_scales):
        data |= scales_in_peft(config, contents.adapted)
        data["init_lora_weights"] = True  # how A and B began says nothing of these any more
    if (data.get("lora_dropout") or 0.0) != config.dropout or kept.config is None:
        data["lora_dropout"] = config.dropout
    if data == kept.config:
        return data
    return without_defaults(data | {"peft_version": _version(contents, kept.config or {})})


def _check_beside(config: LoraConfig, contents: Contents) -> None:
    beside = {
        "dropout": config.dropout,
        "Conv1D": contents.conv1d,
        "DoRA": contents.dora,
        "the bias of a B": contents.lora_bias,
    }
    if contents.parameters and (found := [name for name, value in beside.items() if value]):
        first = min(contents.parameters)
        raise DataError(f"{first} is a parameter, beside which PEFT does not have {found[0]}: write two folders")


def _selection(contents: Contents, data: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that say which entries there are, and of what kind; `data` is what they were before."""
    named = set(contents.parameters)
    biases = [name for name in contents.whole if name.endswith(".bias")]
    saved = _saved(contents, data.get("modules_to_save") or ())
    loose = [module for name in biases if not Saved(saved).holds(module := name.rpartition(".")[0])]
    is_all = data.get("bias") == "all" or any(module not in contents.adapted for module in loose)
    return dict.fromkeys(_SELECTING) | {
        "bias": "none" if not loose else "all" if is_all else "lora_only",
        "fan_in_fan_out": contents.conv1d,
        "lora_bias": contents.lora_bias,
        "modules_to_save": saved or None,
        "target_modules": sorted(module for module in contents.adapted if module not in named)
        or ([] if named else NO_TARGETS),
        "target_parameters": sorted(named) or None,
        "use_dora": contents.dora,
    }


def _version(contents: Contents, before: Mapping[str, Any]) -> str | None:
    """Whose layout the experts of parameters are in: it has changed twice; nothing else here depends on the version."""
    if not contents.parameters:
        return None
    return before.get("peft_version") if before.get("target_parameters") else LAYOUT


def _saved(contents: Contents, before: Sequence[str]) -> list[str]:
    """The names for `modules_to_save`: those that were there and still hold something, and modules that are new.

    A bias alone is no module that is saved, nor is a tensor of the base.
    """
    found = set()
    for name in contents.whole:
        module, _, last = name.rpartition(".")
        holder = next((saved for saved in before if Saved((saved,)).holds(module)), None)
        if holder is not None:
            found.add(holder)
        elif last != "bias" and name not in contents.base and module not in contents.adapted:
            found.add(module)
    return sorted(found)


def _says_scales(data: Mapping[str, Any], config: LoraConfig, modules: Mapping[str, str]) -> bool:
    """Whether a configuration of PEFT's gives each module the rank and the scaling that ours does."""
    scales = Scales(data)
    return bool(data.get("use_rslora")) == (config.scaling == "rslora") and all(
        scales.rank_of(module) == config.rank_of(path) and float(scales.alpha_of(module)) == config.alpha_of(path)
        for module, path in modules.items()
    )


def scales_in_peft(config: LoraConfig, modules: Mapping[str, str]) -> dict[str, Any]:
    """The keys of PEFT's configuration that give each module its rank and alpha; `modules` are name -> path."""
    ranks = {module: config.rank_of(path) for module, path in modules.items()}
    alphas = {module: _number(config.alpha_of(path)) for module, path in modules.items()}
    given = {"r": config.rank, "lora_alpha": _number(config.alpha), "use_rslora": config.scaling == "rslora"}
    plain = {
        "rank_pattern": _patterns(ranks, config.rank),
        "alpha_pattern": _patterns(alphas, _number(config.alpha)),
    }
    if _says_scales(given | plain, config, modules):
        return given | plain
    return given | {
        "rank_pattern": _exact_patterns(ranks, config.rank),
        "alpha_pattern": _exact_patterns(alphas, _number(config.alpha)),
    }


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """The plain names of modules with another value than the default, which PEFT before 0.14 looks up as they are.

    A name is matched with the end of a longer one too. The first that matches wins, so that the longer ones come first,
    with the default where it is theirs.
    """
    others = {module for module, value in values.items() if value != default}
    named = [module for module in values if not others.isdisjoint(ends_of(module))]
    return {module: values[module] for module in sorted(named, key=lambda module: -module.count("."))}


def _exact_patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Patterns that match one module alone, for names with characters that mean something in a pattern."""
    return {f"^{re.escape(module)}": value for module, value in values.items() if value != default}


def without_defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the keys that the oldest PEFT does not know and that say what they say by default.

    PEFT before 0.14 refuses keys that it does not know.
    """
    later = {name: default for name, (since, default) in fields_of_peft().items() if since != OLDEST}
    return {key: value for key, value in data.items() if key not in later or value != later[key]}


def fields_of_peft() -> dict[str, tuple[str, Any]]:
    """The keys of PEFT's LoraConfig: the version that brought each, and its default."""
    text = Path(__file__).with_name("fields.json").read_text("utf-8")
    return {name: (since, default) for name, (since, default) in json.loads(text).items()}


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value
