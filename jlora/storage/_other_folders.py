"""The names of the files in a folder of adapters, and what a folder is that has others."""

import os
from pathlib import Path

from jlora.disk import CONFIG, TENSORS, Pair, format_of_file, found_instead, orbax_instead, parse_json
from jlora.errors import listed
from jlora.paths import nearest

VARIANT = "jlora variant"
"""The format of the smaller trees that `jlora.variants.save` writes."""
OF_VARIANT = (
    "this is what VeRA or LoRA-XS trains, and no adapters yet: read it with jlora.variants.load, or expand it with "
    "jlora convert"
)
PEFT = "this is a PEFT adapter: read it with jlora.interop.peft.read_peft"


def what_it_is(folder: Path) -> str:
    """What a path is that holds no tensors of adapters."""
    if os.path.isfile(folder):
        if what := format_of_file(folder):
            return f"is {what}"
        return f"is a file: wanted the folder that save_adapters wrote, with {CONFIG} and {TENSORS}"
    if not os.path.isdir(folder):
        siblings = [path.name for path in _listed(folder.parent) if os.path.isfile(path / TENSORS)]
        near = ", ".join(nearest(folder.name, siblings)) if siblings else ""
        return "no such folder" + (f"; beside it: {near}" if near else "")
    if is_peft(folder):
        return PEFT
    if os.path.lexists(folder / TENSORS):
        return f"{TENSORS} is no regular file"
    if orbax := orbax_instead(folder):
        return orbax
    names = {path.name for path in _listed(folder)}
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return "this is a checkpoint of a model, not a folder of adapters"
    if inside := [path.name for path in _listed(folder) if os.path.isfile(path / TENSORS)]:
        return f"holds no adapters itself, but {listed(inside, 3)} in it does"
    if instead := found_instead(folder, TENSORS):
        return f"holds no adapters itself; {instead}"
    return f"holds no adapters: wanted {CONFIG} and {TENSORS}, as save_adapters writes them"


def is_peft(folder: Path) -> bool:
    """Whether the configuration in a folder is one of PEFT."""
    try:
        return "peft_type" in parse_json(Pair(folder).read_config())
    except ValueError:
        return False


def _listed(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in sorted(os.listdir(folder))[:1000]]
    except OSError:
        return []
