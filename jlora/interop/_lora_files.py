"""LoRA files of diffusion models, written: with the names of sd-scripts, or with those of diffusers.

    lora_unet_<module, with underscores>.lora_down.weight, .lora_up.weight, .alpha      sd-scripts
    unet.<module>.lora_A.weight, .lora_B.weight, .lora_magnitude_vector, .lora_B.bias   diffusers

diffusers 0.42 takes ranks and alphas from PEFT's configurations in the metadata (loaders/peft.py), and of several
alphas of sd-scripts those of to_q, to_k and to_v from none (loaders/lora_conversion_utils.py), so that there is one.
"""

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlora.config import LoraConfig
from jlora.disk import CONFIG, bytes_of_all, check_can_hold, file_written_whole, write_tensors
from jlora.errors import DataError, JloraWarning, listed, raise_all
from jlora.interop._flattened import component_of, is_flat, names_in
from jlora.interop._lora_keys import METADATA, parts_by_module
from jlora.interop._named import most_frequent, scaled
from jlora.interop.peft import FLAT, ModelEntry, model_entries, peft_tensors, scales_in_peft, without_defaults
from jlora.interop.peft import Mapping as Table
from jlora.pytrees import leaves
from jlora.storage import write_once

COMPONENTS = {  # diffusers' name -> how sd-scripts, or for transformers of diffusers OneTrainer, begins its names
    "unet": "lora_unet",
    "transformer": "lora_transformer",
    "text_encoder": "lora_te",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
}
_NAME = "pytorch_lora_weights.safetensors"  # for which diffusers looks first
_ITS_PARTS = {"A", "B", "magnitude", "offset"}

Tensors = dict[str, np.ndarray[Any, Any]]


def lora_file(out: str | Path) -> Path:
    """The file that is written for `out`, which is a name that ends with .safetensors or a folder."""
    path = Path(out)
    return path if path.suffix == ".safetensors" else path / _NAME


def write_kohya(
    path: str | Path,
    adapters: Any,
    config: LoraConfig,
    mapping: Table = FLAT,
    *,
    component: str | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Writes a LoRA file with the names of sd-scripts, for it, ComfyUI, the web UIs and diffusers.

    All modules have one alpha, as diffusers reads several wrongly: other ones go into lora_up. Ranks stay.

    Args:
      path: the file, or a folder, in which it is `pytorch_lora_weights.safetensors`; written whole or not at all.
      adapters, config, mapping: as of `jlora.interop.peft.write_peft`.
      component: of the modules whose names do not begin with one: "unet", "transformer", "text_encoder",
        "text_encoder_2" or "text_encoder_3".
      shapes: of the tensors of the checkpoint that the file is for: names that would be found in another place of it
        are refused.

    Raises:
      DataError: entries without a place there: a magnitude (dora_scale is there, but diffusers leaves it out, and
        ComfyUI takes another norm than PEFT), whole values, biases of a B, embeddings, experts; a name without a
        component; two names that are one with underscores for dots.

    >>> import tempfile
    >>> from jlora.interop.diffusion import read_lora_file
    >>> entry = {"A": np.ones((7, 2), np.float32), "B": np.ones((2, 5), np.float32)}
    >>> config = LoraConfig(rank=2, alpha=6, factorizations={"**": "oi"})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_kohya(f"{folder}/x.safetensors", {"mid.to_q.weight": entry}, config, component="unet")
    ...     entries, config = read_lora_file(f"{folder}/x.safetensors", shapes={"mid.to_q.weight": (5, 7)})
    >>> list(entries), config.scaling_of("mid.to_q.weight")
    (['mid.to_q.weight'], 3.0)
    """
    entries = model_entries(path, adapters, config, mapping)
    names = _names(path, entries, {"A", "B"}, "sd-scripts", component, may_be_flat=True)
    flat = _flattened(path, names)
    if shapes is not None:
        _check_found_again(path, names, flat, shapes)
    alphas = {entry.name: config.scaling_of(entry.path) * _rank(entry) for entry in entries}
    others = [alpha for alpha in alphas.values() if alpha] or [1.0]  # sd-scripts takes 0 for the rank
    common = np.array(most_frequent(others), np.float32)
    tensors: Tensors = {}
    for entry in entries:
        down, up = np.moveaxis(entry.parts["A"], -1, 0), entry.parts["B"].T  # (r, in...), (out, r)
        factor = alphas[entry.name] / float(common)
        up = up if factor == 1 else scaled(up, factor)
        name = flat[names[entry.name]]
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.alpha": common}
        tensors[f"{name}.lora_up.weight"] = up.reshape(*up.shape, *(1 for _ in down.shape[2:]))
    _write(path, adapters, tensors, {})


def write_diffusers(
    path: str | Path, adapters: Any, config: LoraConfig, mapping: Table = FLAT, *, component: str | None = None
) -> None:
    """Writes a LoRA file as `save_lora_weights` of diffusers does, for its `load_lora_weights`.

    Ranks, alphas, rsLoRA and DoRA are in the metadata, as PEFT's configuration of each component. diffusers before 0.34
    and ComfyUI do not read them there, and take B@A as it is: where another scaling is meant a warning says so.

    Args:
      path, adapters, config, mapping, component: as of `write_kohya`.

    Raises:
      DataError: entries without a place there: whole values, embeddings, experts, DoRA of some modules of a component
        alone; a name without a component.

    >>> import tempfile
    >>> from jlora.interop.diffusion import read_lora_file
    >>> entry = {"A": np.ones((7, 2), np.float32), "B": np.ones((2, 5), np.float32)}
    >>> config = LoraConfig(rank=2, alpha=2, factorizations={"**": "oi"})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_diffusers(f"{folder}/x.safetensors", {"unet.mid.to_q.weight": entry}, config)
    ...     list(read_lora_file(f"{folder}/x.safetensors")[0])
    ['unet.mid.to_q.weight']
    """
    entries, tensors = peft_tensors(path, adapters, config, mapping)
    names = _names(path, entries, _ITS_PARTS, "diffusers", component, may_be_flat=False)
    components: dict[str, list[ModelEntry]] = {}
    renamed = {}
    for entry in entries:
        module = entry.name.rpartition(".")[0]
        renamed[module] = names[entry.name]
        components.setdefault(component_of(names[entry.name]), []).append(entry)
    packed = {
        f"{own}.{key}": value
        for own, group in components.items()
        for key, value in _peft_config(path, own, group, names, config).items()
    }
    other = [entry.path for entry in entries if not math.isclose(config.scaling_of(entry.path), 1.0, rel_tol=1e-6)]
    if other:
        warnings.warn(
            f"{path}: the scaling of {len(other)} modules is not 1, such as {config.scaling_of(other[0]):.4g} of "
            f"{other[0]}: diffusers reads it since 0.34, ComfyUI and older ones take 1; with kohya all read it",
            JloraWarning,
            stacklevel=3,
        )
    found = {_with_name(key, renamed): array for key, array in tensors.items()}
    _write(path, adapters, found, {METADATA: json.dumps(packed, indent=2, sort_keys=True)})


def _rank(entry: ModelEntry) -> int:
    return int(entry.parts["A"].shape[-1])


def _names(
    path: str | Path,
    entries: Sequence[ModelEntry],
    allowed: set[str],
    program: str,
    component: str | None,
    *,
    may_be_flat: bool,
) -> dict[str, str]:
    """The name of each entry's module with its component, by the entry's name."""
    if component is not None and component not in COMPONENTS:
        raise DataError(f"component {component!r}: wanted one of {listed(COMPONENTS)}")
    weights = {entry.name for entry in entries if "A" in entry.parts}
    problems, names = [], {}
    for entry in entries:
        module = entry.name.rpartition(".")[0]
        known = component_of(module)
        if problem := _unwritable(entry, allowed, weights):
            problems.append(problem)
        elif (may_be_flat and is_flat(module)) or known in COMPONENTS:
            names[entry.name] = module
        elif is_flat(module):
            problems.append(f"{entry.path}: has underscores for dots: give the base, which has its name (--base)")
        elif known:
            problems.append(f"{entry.path}: a module of {known}, which is none of {listed(COMPONENTS)}; rename it")
        elif component is None:
            problems.append(
                f"{entry.path}: begins with none of {listed(COMPONENTS)}; say of which one it is, such as "
                "component='unet' (--component unet)"
            )
        else:
            names[entry.name] = f"{component}.{module}"
    raise_all(problems, DataError, f"{path}: {program} has no place for")
    return names


def _unwritable(entry: ModelEntry, allowed: set[str], weights: set[str]) -> str | None:
    """Why there is no place for an entry; None where there is one."""
    module, _, last = entry.name.rpartition(".")
    more = set(entry.parts) - allowed
    if "magnitude" in more:
        return (
            f"{entry.path}: a magnitude (DoRA), which diffusers leaves out of such files and ComfyUI applies in "
            "another way; the formats diffusers and peft have it"
        )
    if more:
        return f"{entry.path}: a part {min(more)}"
    if entry.kind == "whole":  # an offset
        return None if f"{module}.weight" in weights else f"{entry.path}: a part offset without A and B of its module"
    if entry.kind not in ("linear", "conv") or last != "weight" or not module:
        return f"{entry.path}: {entry.kind} of {entry.name}; wanted the weight of a Linear or a convolution"
    return None


def _flattened(path: str | Path, names: Mapping[str, str]) -> dict[str, str]:
    """The modules' names with underscores for dots; a DataError for two that are one then."""
    encoders = [component_of(module) for module in names.values()]
    several = any(re.fullmatch(r"text_encoder_\d", own) for own in encoders)
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    problems = []
    for module in names.values():
        component = component_of(module)
        start = "lora_te1" if several and component == "text_encoder" else COMPONENTS.get(component)
        flat = module if start is None else f"{start}_{module.removeprefix(component)[1:].replace('.', '_')}"
        if taken.setdefault(flat, module) != module:
            problems.append(f"{taken[flat]} and {module}: both {flat} with underscores for dots")
        found[module] = flat
    back = parts_by_module([f"{flat}.lora_{part}.weight" for flat in taken for part in ("down", "up")])
    problems += [f"{taken[flat]}: {flat} would be read as another name" for flat in taken if flat not in back]
    raise_all(problems, DataError, f"{path}: names that sd-scripts does not tell apart; the format diffusers does")
    return found


def _check_found_again(
    path: str | Path, names: Mapping[str, str], flat: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises a DataError for modules whose names are found in another place of the checkpoint."""
    _, found = names_in(path, list(flat.values()), shapes)
    problems = []
    for module in names.values():
        stem, there = module.removeprefix(f"{component_of(module)}."), found.get(flat[module])
        if there is not None and not is_flat(module) and there != stem and not there.endswith(f".{stem}"):
            problems.append(f"{module}: {flat[module]} is {there} in the checkpoint")
    raise_all(problems, DataError, f"{path}: names that would be found in another place")


def _peft_config(
    path: str | Path, component: str, entries: Sequence[ModelEntry], names: Mapping[str, str], config: LoraConfig
) -> dict[str, Any]:
    """PEFT's configuration of a component's modules."""
    weights = [entry for entry in entries if entry.kind != "whole"]
    plain = [entry for entry in weights if "magnitude" not in entry.parts]
    if plain and len(plain) < len(weights):
        raise DataError(f"{path}: {plain[0].path} has no magnitude, others of {component} have one (DoRA): not in PEFT")
    modules = {names[entry.name].removeprefix(f"{component}."): entry.path for entry in weights}
    data = {
        "peft_type": "LORA",
        "lora_dropout": config.dropout,
        "target_modules": sorted(modules),
        "use_dora": not plain,
        "lora_bias": len(weights) < len(entries),
        **scales_in_peft(config, modules),
    }
    return without_defaults(data)


def _with_name(key: str, renamed: Mapping[str, str]) -> str:
    """A key of PEFT's with the module's name for the file."""
    module = key
    while module not in renamed:
        module = module.rpartition(".")[0]
    return renamed[module] + key.removeprefix(module)


def _write(path: str | Path, adapters: Any, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    target = lora_file(path)
    if target.is_dir():
        raise DataError(f"{target}: is a folder; wanted the name of a file, or of a folder for it")
    _check_alone(target)
    parts_by_module(tensors)

    def write() -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with file_written_whole(target) as file:
            write_tensors(file, tensors, {"format": "pt", **metadata})

    write_once(leaves(adapters), write, lambda: check_can_hold(target.parent, bytes_of_all(tensors)))


def _check_alone(target: Path) -> None:
    """Raises a DataError where the folder of a file whose name was not given holds other adapters."""
    if target.name != _NAME:
        return
    others = [name for name in sorted(target.parent.glob("*.safetensors")) if name != target]
    others += [name for name in (target.parent / CONFIG,) if name.is_file()]
    if others:
        raise DataError(f"{target.parent}: holds {others[0].name} too; give the name of a file, such as x.safetensors")
