"""The names of the tensors in PEFT's files, taken apart and put together."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from jlora.errors import DataError, listed, raise_all
from jlora.interop.peft._wrappers import PREFIX, without_wrappers

_BASE = "base_layer."
_SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_B.bias": "offset",
}
_EMBEDDINGS = ("wte", "wpe", "shared")
_VARIANT = re.compile(r"(^|\.)(lora_\w+|\w*trainable_tokens\w*|token_adapter)(\.|$)")
_DOT = re.compile(r"\.")
_REGISTERED = (
    "gate_proj",
    "w1",
    "gate_up_proj",
    "gate_up_proj_bias",
    "up_proj",
    "w3",
    "down_proj",
    "w2",
    "down_proj_bias",
)


@dataclasses.dataclass
class Named:
    """What a file says of one tensor of the model.

    Attributes:
      name: of the tensor in the model, such as "model.layers.0.mlp.up_proj.weight".
      matched: what PEFT's patterns of ranks and alphas are matched with, the module's name.
      parts: part (A, B, magnitude, offset, value) -> the tensor's name in the file.
    """

    name: str
    matched: str
    parts: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def is_embedding(self) -> bool:
        """Whether its A and B are named as those of an embedding."""
        return ".lora_embedding_" in self.parts.get("A", "")

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter by its own name, not the weight of a module."""
        return "A" in self.parts and self.matched == self.name


def entries_of(keys: Iterable[str], target_parameters: Sequence[str]) -> list[Named]:
    """The entries that a file's tensors make up, in the order of the file; names are read without their wrappers.

    Raises:
      DataError: names that are not PEFT's, of a variant that is not known, or A without B; all are listed.
    """
    entries: dict[str, Named] = {}
    problems = []
    plain = without_wrappers(keys)
    levels, parents = _levels(plain.values()), by_parent(target_parameters)
    for key, plain_key in plain.items():
        found = _taken_apart(plain_key, parents, levels)
        if found is None:
            problems.append(key)
            continue
        name, matched, part = found
        entry = entries.setdefault(name, Named(name, matched))
        if part in entry.parts:
            problems.append(f"{key} and {entry.parts[part]} are both the {part} of {name}")
        entry.parts[part] = key
        entry.matched = matched if part in "AB" else entry.matched
    problems += [
        f"{'A' if 'A' in entry.parts else 'B'} of {entry.name} stands alone"
        for entry in entries.values()
        if ("A" in entry.parts) != ("B" in entry.parts) or ("magnitude" in entry.parts and "A" not in entry.parts)
    ]
    raise_all(problems, DataError, "tensors that are no part of a LoRA that jlora knows")
    return list(entries.values())


def key_of(name: str, part: str, *, embedding: bool, wrapped: Mapping[str, int], level: int | None) -> str:
    """The name in PEFT's file of one part of the tensor `name`.

    `wrapped` says how many times PEFT wraps each module that has A and B, `level` how deep a parameter lies among those
    of its module.
    """
    module = name.rpartition(".")[0]
    if level is not None:
        return f"{PREFIX}{module}.{_BASE * level}lora_{part}.weight"
    if part == "value":
        return PREFIX + _within(name, wrapped)
    suffixes = {
        part: suffix for suffix, part in _SUFFIXES.items() if ("embedding" in suffix) == (embedding and part in "AB")
    }
    return f"{PREFIX}{module}{suffixes[part]}"


def _within(name: str, wrapped: Mapping[str, int]) -> str:
    """The name of a tensor, through what PEFT puts around the modules that hold it."""
    *modules, last = name.split(".")
    found, module = "", ""
    for segment in modules:
        module = f"{module}.{segment}" if module else segment
        found += f"{segment}.{_BASE * wrapped.get(module, 0)}"
    return found + last


def names_embedding(module: str) -> bool:
    """Whether a module of this name, without those around it, is an embedding in the models of transformers."""
    return module in _EMBEDDINGS or "emb" in module


def ends_of(name: str) -> Iterator[str]:
    """A name, and what stands behind each of its dots."""
    yield name
    yield from (name[match.end() :] for match in _DOT.finditer(name))


def by_parent(target_parameters: Iterable[str]) -> dict[str, list[str]]:
    """The targeted parameters by the end of their modules' names; those of no module are left out."""
    parents: dict[str, list[str]] = {}
    for target in sorted(set(target_parameters)):
        parent, _, name = target.rpartition(".")
        if parent:
            parents.setdefault(parent, []).append(name)
    return parents


def parameters_of(module: str, parents: Mapping[str, Sequence[str]]) -> list[str]:
    """The targeted parameters of a module, in the order in which PEFT wraps them, the innermost first.

    PEFT's order is that of the model's own registration; of names that are not those of experts it is not known.
    """
    found = sorted(name for end in ends_of(module) for name in parents.get(end, ())) if parents else []
    if len(found) > 1 and (unknown := [name for name in found if name not in _REGISTERED]):
        raise DataError(f"{module}: which of the parameters {listed(found)} comes first is not known ({unknown[0]})")
    return sorted(found, key=lambda name: _REGISTERED.index(name) if len(found) > 1 else 0)


def _levels(keys: Iterable[str]) -> Mapping[str, int]:
    """How many times each module that has A and B is wrapped in another."""
    deepest: dict[str, int] = {}
    for key in keys:
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            plain = module.replace(f".{_BASE[:-1]}", "")
            deepest[plain] = max(deepest.get(plain, 0), module.count(_BASE[:-1]))
    return deepest


def _taken_apart(
    key: str, parents: Mapping[str, Sequence[str]], levels: Mapping[str, int]
) -> tuple[str, str, str] | None:
    """The name of the tensor in the model, what patterns are matched with, and the part; None for what is unknown."""
    if not key.startswith(PREFIX) or key == PREFIX:
        return None
    name = key.removeprefix(PREFIX)
    suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
    if suffix is None:
        plain = name.replace(_BASE, "")
        return None if _VARIANT.search(plain) else (plain, plain.rpartition(".")[0], "value")
    part, wrapped = _SUFFIXES[suffix], name.removesuffix(suffix)
    module = wrapped.replace(f".{_BASE[:-1]}", "")
    if not module or _VARIANT.search(module):
        return None
    if part in "AB" and "embedding" not in suffix:
        parameters = parameters_of(module, parents)
        if parameters:
            level = wrapped.count(_BASE[:-1])
            if levels.get(module, 0) + 1 != len(parameters):
                return None
            parameter = f"{module}.{parameters[levels.get(module, 0) - level]}"
            return parameter, parameter, part
    if wrapped != module:
        return None
    return f"{module}.{'bias' if part == 'offset' else 'weight'}", module, part
