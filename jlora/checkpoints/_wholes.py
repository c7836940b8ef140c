"""What of a fine-tuned checkpoint is carried whole, and where PEFT has a place for it."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from jlora.checkpoints._memory import Tree
from jlora.config import LoraConfig
from jlora.interop.transformers import Facts
from jlora.tree import is_targeted

Entries = Mapping[str, Mapping[str, Any]]


def for_peft(entries: Entries, after: Tree, sources: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """The entries as PEFT can have them, and the names of those that its file has as tensors of the base.

    PEFT saves a module as a whole, in `modules_to_save`, with all of its tensors, those too that did not change. It
    finds it by the end of its name, and there may be no adapter in it or around it. A bias has a place of its own.
    Everything else is a tensor of the base, as PEFT has embeddings that were resized: it is loaded into the model in
    place of its own, and in that of weights that are it too, as they are of the `sources`.
    """
    found = {path: dict(entry) for path, entry in entries.items()}
    of_base, modules = [], _Modules(after, found)
    for path in [path for path, entry in found.items() if "value" in entry]:
        module, _, name = path.rpartition("/")
        if name == "bias":
            continue
        if path in sources or not modules.can_be_saved(module):
            of_base.append(path.replace("/", "."))
        else:
            found |= {other: {"value": after[other]} for other in modules.tensors[module] if other not in found}
    return found, of_base


def tied_in(before: Tree, after: Tree, facts: Facts, config: LoraConfig) -> Iterator[tuple[str, str]]:
    """Each weight that is another in both checkpoints, and this other, where both are targeted."""
    for tied, source in facts.tied:
        memory, other = tied.replace(".", "/"), source.replace(".", "/")
        is_one = all(memory in tree and tree[memory] is tree.get(other) for tree in (before, after))
        if is_one and is_targeted(config, memory) and is_targeted(config, other):
            yield memory, other


class _Modules:
    """The modules of a model, by the paths of its tensors."""

    def __init__(self, tree: Tree, entries: Entries) -> None:
        self.tensors: dict[str, list[str]] = {}
        for path in tree:
            self.tensors.setdefault(path.rpartition("/")[0], []).append(path)
        self._adapted = {path.rpartition("/")[0] for path, entry in entries.items() if "A" in entry}
        self._names = "".join(f"/{module}/\n" for module in self.tensors)

    def can_be_saved(self, module: str) -> bool:
        """Whether PEFT can save this module as a whole, and no other by its name."""
        is_alone = self._names.count(f"{module}/\n") == self._names.count(f"/{module}/") == 1
        segments = module.split("/")
        around = ("/".join(segments[:depth]) for depth in range(1, len(segments) + 1))
        return bool(module) and is_alone and self._adapted.isdisjoint(around)
