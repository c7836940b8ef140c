"""How the axes of weights lie where PEFT's file does not say it: config.json names the model, or the shape decides."""

from collections.abc import Mapping
from typing import Any

from jlora.config import LoraConfig
from jlora.errors import DataError, raise_all
from jlora.interop.peft import kept_of, kind_of_experts
from jlora.interop.transformers import facts_of, has_transposed_experts
from jlora.paths import literal_pattern

Shape = tuple[int, ...]

_MATRICES = {"linear": "oi", "conv1d": "io"}
_EXPERTS = {"experts": "boi", "experts_t": "bio"}


def with_layouts(
    config: LoraConfig,
    entries: Mapping[str, Mapping[str, Any]],
    shapes: Mapping[str, Shape],
    settings: Mapping[str, Any],
    transposed_experts: bool | None,
) -> LoraConfig:
    """The configuration of adapters from PEFT's file, with the factorizations that their weights have in this model.

    Args:
      config: of the adapters; one that came from no file of PEFT's stays as it is.
      entries: the adapters by path.
      shapes: of their weights, by path.
      settings: the model's config.json.
      transposed_experts: whether the model keeps its experts as (experts, in, out), where the user says so.

    Raises:
      DataError: square experts of which nothing says how they lie.
    """
    kept = kept_of(config)
    if kept.config is None:
        return config
    if transposed_experts is None:
        transposed_experts = has_transposed_experts(settings)
    conv1d = facts_of(settings).conv1d
    factorizations, problems = dict(config.factorizations), []
    for path, entry in entries.items():
        pattern, name = literal_pattern(path), path.replace("/", ".")
        kind = kept.kinds.get(name, "linear")
        if "A" not in entry or path not in shapes or pattern not in factorizations:
            continue
        if kind in _MATRICES:
            orders, meant = _MATRICES, "conv1d" if name.split(".")[-2:-1] in [[last] for last in conv1d] else kind
        elif kind.startswith("experts"):
            orders, meant = _EXPERTS, kind_of_experts(kept.config, transposed_experts)
            meant = kind if meant == "experts_open" else meant
        else:
            continue
        fitting = [other for other, roles in orders.items() if _shape_of(entry, roles) == shapes[path]]
        if meant == "experts_open" and len(fitting) > 1:
            problems.append(open_experts(path, shapes[path]))
        elif fitting:
            factorizations[pattern] = orders[meant if meant in fitting else fitting[0]]
    raise_all(problems, DataError)
    return config.replace(factorizations=factorizations)


def open_experts(path: str, shape: Shape) -> str:
    """The problem of experts that may lie in two ways, and the way out."""
    return (
        f"{path}: the experts {shape[1:]} are square, and nothing says whether the model keeps them as "
        "(experts, in, out); give transposed_experts: --transposed-experts for models like GPT-OSS, "
        "--no-transposed-experts for most others"
    )


def _shape_of(entry: Mapping[str, Any], roles: str) -> Shape:
    """The shape of the weight of A (*batch, in, r) and B (*batch, r, out), its axes in the order of the roles."""
    *batch, ins, _ = entry["A"].shape
    outs = entry["B"].shape[-1]
    return (*batch, outs, ins) if roles.endswith("oi") else (*batch, ins, outs)
