"""Names of modules with underscores for dots, found again among the tensors of a checkpoint."""

import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from jlora.errors import DataError, JloraWarning, listed
from jlora.interop._named import Module

Shapes = Mapping[str, tuple[int, ...]]

_FLAT = re.compile(r"(lora_(?:unet|te\d?|transformer|prior_unet|prior_te)|lycoris)_(.+)")
_DOTTED = re.compile(r"(unet|transformer(?:_2)?|text_encoder(?:_\d)?|prior|diffusion_model)\.(.+)")


def is_flat(path: str) -> bool:
    """Whether the path of a weight has underscores for dots."""
    name = re.sub(r"[./]weight$", "", path)
    return "." not in name and "/" not in name and _FLAT.fullmatch(name) is not None


def in_checkpoint(source: str | Path, modules: Sequence[Module], shapes: Shapes) -> list[Module]:
    """The modules by the names of a checkpoint's tensors, and with as many axes as these.

    Components of which the checkpoint has nothing are left out, with a warning, where it has others; names that it does
    not have stay as they are.

    Raises:
      DataError: names that fit several of its tensors.
    """
    components, names = names_in(source, [module.name for module in modules], shapes)
    absent = [component for component, own in components.items() if names.keys().isdisjoint(own)]
    left_out = [component for component in absent if len(absent) < len(components)]
    if left_out:
        warnings.warn(
            f"{source}: left out, as the checkpoint has no tensor for them: "
            f"{listed(f'{len(components[component])} modules of {component}' for component in left_out)}",
            JloraWarning,
            stacklevel=3,
        )
    kept = [module for module in modules if component_of(module.name) not in left_out]
    return [_fitted(module, names.get(module.name, module.name), shapes) for module in kept]


def component_of(name: str) -> str:
    """The component that the name of a module begins with, such as "unet" or "lora_te1"; "" where it has none."""
    match = (_DOTTED if "." in name else _FLAT).fullmatch(name)
    return match[1] if match else ""


def names_in(source: str | Path, modules: Sequence[str], shapes: Shapes) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The modules of each component, and the names that a checkpoint has for them, as far as it has any.

    Raises:
      DataError: names that fit several of its tensors.
    """
    flattened: dict[str, list[str]] = {}
    for name in shapes:
        if name.endswith(".weight"):
            plain = name.removesuffix(".weight")
            flattened.setdefault(plain.replace(".", "_"), []).append(plain)
    components: dict[str, list[str]] = {}
    for name in modules:
        components.setdefault(component_of(name), []).append(name)
    names: dict[str, str] = {}
    for component, own in components.items():
        names |= _names_of(source, component, own, shapes, flattened)
    return components, names


def _names_of(
    source: str | Path, component: str, modules: Sequence[str], shapes: Shapes, flattened: Mapping[str, list[str]]
) -> dict[str, str]:
    """The checkpoint's names for the modules of one component, as far as it has them."""
    stems = {name: name.removeprefix(component).lstrip("._") for name in modules}
    if not is_flat(modules[0]):
        whole = {name: name for name in stems if f"{name}.weight" in shapes}
        return whole or {name: stem for name, stem in stems.items() if f"{stem}.weight" in shapes}
    first = next(iter(stems.values()))
    starts = [flat.removesuffix(first) for flat in flattened if flat == first or flat.endswith(f"_{first}")]
    starts = [start for start in starts if _may_begin(component, start)]
    fitting = [start for start in starts if all(start + stem in flattened for stem in stems.values())]
    if len(fitting) > 1 and "" not in fitting:
        choices = listed(flattened[start + first][0] for start in fitting)
        raise DataError(f"{source}: {next(iter(stems))} may be any of {choices}: give --mapping")
    if not fitting:
        return {}
    start = "" if "" in fitting else fitting[0]
    found = {name: flattened[start + stem] for name, stem in stems.items()}
    if several := [(name, places) for name, places in found.items() if len(places) > 1]:
        name, places = several[0]
        raise DataError(f"{source}: {name} may be any of {listed(places)}: give --mapping")
    return {name: places[0] for name, places in found.items()}


def _may_begin(component: str, start: str) -> bool:
    """Whether a component may lie behind this; of the two text encoders of SDXL each has its own place."""
    number = re.fullmatch(r"lora_te(\d)", component)
    return not start or number is None or f"embedders_{int(number[1]) - 1}_" in start


def _fitted(module: Module, name: str, shapes: Shapes) -> Module:
    """A module by another name; 1x1 convolutions and matrices are the same to those who write these files."""
    shape = shapes.get(f"{name}.weight")
    a, b = module.a, module.b
    if shape is not None and module.magnitude is None and len(shape) != a.ndim and set(a.shape[2:] + shape[2:]) <= {1}:
        ones = (1,) * (len(shape) - 2)
        a, b = a.reshape(*a.shape[:2], *ones), b.reshape(*b.shape[:2], *ones)
    return dataclasses.replace(module, name=name, a=a, b=b, kind="conv" if a.ndim > 2 else "linear")
