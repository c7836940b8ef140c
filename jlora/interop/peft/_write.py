"""Adapters and a configuration as PEFT's files."""

import dataclasses
from collections.abc import Mapping as MappingType
from pathlib import Path
from typing import Any

import numpy as np

from jlora.adapter import is_entry
from jlora.config import LoraConfig
from jlora.disk import Pair, bytes_of_all, dump_json, parse_json, write_tensors
from jlora.errors import DataError, JloraError, raise_all
from jlora.interop.peft._config import Scales, check_peft_config, kept_of
from jlora.interop.peft._derive import Contents, digest_of, peft_config
from jlora.interop.peft._keys import by_parent, ends_of, entries_of, key_of, parameters_of
from jlora.interop.peft._layout import Arrays, check_numbers, to_model, to_peft
from jlora.interop.peft._mapping import FLAT, Mapping, Place, places_of_paths
from jlora.interop.peft._targeted import check_fields, check_together
from jlora.interop.peft._wrappers import PREFIX
from jlora.paths import leaves_by_path, literal_pattern
from jlora.pytrees import leaves
from jlora.storage import check_folder_to_write, folder_to_write, unreachable, write_once
from jlora.tree import check_config

_EMBEDDINGS = ("wte", "wpe", "shared")


@dataclasses.dataclass(frozen=True)
class ModelEntry:
    """An entry with the axes of the Hugging Face model.

    Attributes:
      name: of the weight, such as "model.layers.0.mlp.up_proj.weight".
      path: of the adapter.
      kind: "linear" (out, in), "conv1d" (in, out), "conv" (out, in, window), "embedding" (vocabulary, dim), "experts"
        (experts, out, in), "experts_t" (experts, in, out), or "whole" where there are no A and B.
      parts: A (*batch, *in, r), B (*batch, r, *out), and what else there is.
    """

    name: str
    path: str
    kind: str
    parts: Arrays


def write_peft(path: str | Path, adapters: Any, config: LoraConfig, mapping: Mapping = FLAT) -> None:
    """Writes a folder that PEFT and what reads its files can load.

    Args:
      path: the folder; made where it is not there, its adapter replaced where it is: a kill, a full disk or an
        interrupt leaves the old one or the new one. What else lies there stays as it is. Of several processes the
        first one writes, as for `save_adapters`.
      adapters: a pytree of adapters at the paths of their weights.
      config: the configuration that they were made with. One that came from `read_peft` brings PEFT's own keys back.
      mapping: as for `read_peft`.

    Raises:
      DataError: paths that the mapping does not map, an adapter that PEFT has no place for or would read as something
        else, numbers that are not finite or not floating, a folder that cannot be written; nothing is written then.

    A weight of two axes is taken for a Linear (out, in) where the factorization is "oi", for a Conv1D (in, out) where
    it is "io", for an embedding where its module is called one.

    >>> import tempfile
    >>> from jlora.interop.peft import read_peft
    >>> entry = {"A": np.ones((7, 2), np.float32), "B": np.ones((2, 5), np.float32)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_peft(folder, {"up.weight": entry}, LoraConfig(rank=2, factorizations={"**": "oi"}))
    ...     adapters, config = read_peft(folder)
    >>> adapters["up.weight"]["A"].shape, config.rank
    ((7, 2), 2)
    """
    tensors, data = _made(path, adapters, config, mapping)
    folder, text = Path(path), dump_json(data).rstrip(b"\n")

    def write() -> None:
        with folder_to_write(folder):
            Pair(folder).replace(text, lambda file: write_tensors(file, tensors, {"format": "pt"}))

    write_once(leaves(adapters), write, lambda: check_folder_to_write(folder, bytes_of_all(tensors)))


def to_tensors(adapters: Any, config: LoraConfig, mapping: Mapping = FLAT) -> tuple[Arrays, dict[str, Any]]:
    """What `write_peft` writes, in memory: for an inference engine in the same program, or files of one's own.

    Args:
      adapters, config, mapping: as for `write_peft`.

    Returns:
      `(tensors, data)`: PEFT's name -> array of NumPy in C order, sorted by name, and its configuration as plain data.

    Raises:
      DataError: as of `write_peft`.

    >>> entry = {"A": np.ones((7, 2), np.float32), "B": np.ones((2, 5), np.float32)}
    >>> tensors, data = to_tensors({"up.weight": entry}, LoraConfig(rank=2, factorizations={"**": "oi"}))
    >>> {name: array.shape for name, array in tensors.items()}
    {'base_model.model.up.lora_A.weight': (2, 7), 'base_model.model.up.lora_B.weight': (5, 2)}
    >>> data["r"], data["target_modules"]
    (2, ['up'])
    """
    tensors, data = _made("adapters", adapters, config, mapping)
    return {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}, parse_json(dump_json(data))


def _made(path: str | Path, adapters: Any, config: LoraConfig, mapping: Mapping) -> tuple[Arrays, dict[str, Any]]:
    """PEFT's tensors by name, and its configuration, which `read_peft` would take."""
    writer = _writer(path, adapters, config, mapping)
    tensors = writer.tensors()
    try:
        data = writer.config()
        _check_readable(data, tensors)
    except DataError as error:
        raise DataError(f"{path}: PEFT would read something else, or nothing: {error}") from None
    return tensors, data


def model_entries(path: str | Path, adapters: Any, config: LoraConfig, mapping: Mapping = FLAT) -> list[ModelEntry]:
    """The entries as the Hugging Face model has them, for the files of other libraries; arguments as of `write_peft`.

    Raises:
      DataError: as of `write_peft`.
    """
    return list(_writer(path, adapters, config, mapping).entries.values())


def peft_tensors(
    path: str | Path, adapters: Any, config: LoraConfig, mapping: Mapping = FLAT
) -> tuple[list[ModelEntry], Arrays]:
    """`model_entries`, and their tensors by PEFT's names without the prefix that all of PEFT's have."""
    writer = _writer(path, adapters, config, mapping)
    tensors = {key.removeprefix(PREFIX): array for key, array in writer.tensors().items()}
    return list(writer.entries.values()), tensors


def _writer(path: str | Path, adapters: Any, config: LoraConfig, mapping: Mapping) -> "_Writer":
    check_config(config)
    config.check_portable()
    entries = _entries(adapters)
    check_numbers(path, entries)
    places = [place for found in places_of_paths(mapping, entries).values() for place in found]
    writer = _Writer(config, {place.name for place in places if "A" in entries[place.path]})
    problems = []
    for place in places:
        try:
            writer.add(place, _piece(entries[place.path], place))
        except JloraError as error:
            problems.append(f"{place.path}: {error}")
    raise_all(problems, DataError, str(path))
    return writer


def _check_readable(data: dict[str, Any], tensors: Arrays) -> None:
    """Raises a DataError for what `read_peft` refuses."""
    check_peft_config(data)
    check_fields(data)
    entries, scales = entries_of(tensors, data.get("target_parameters") or []), Scales(data)
    check_together(data, entries)
    for entry in entries:  # whose names may be too long for the patterns
        scales.rank_of(entry.matched)
        scales.alpha_of(entry.matched)


class _Writer:
    """One writing: the weights of the Hugging Face model, and what its configuration has to say of them."""

    def __init__(self, configuration: LoraConfig, adapted: set[str]) -> None:
        self.configuration = configuration
        self.adapted_modules = {name.rpartition(".")[0] for name in adapted}
        self.kept = kept_of(configuration)
        self.entries: dict[str, ModelEntry] = {}

    def add(self, place: Place, entry: Arrays) -> None:
        """Takes in one weight; an entry of a stack that is all zero was not there."""
        if place.row.stack and not any(np.any(part) for part in entry.values()):
            return
        rank = self.configuration.rank_of(place.path)
        if "A" in entry and entry["A"].shape[-1] != rank:
            raise DataError(f"A {entry['A'].shape} does not have the rank {rank} of the configuration")
        module = place.name.rpartition(".")[0]
        if "offset" in entry and module not in self.adapted_modules:
            raise DataError(
                f"an offset without A and B of {module}.weight: to PEFT it is the bias of a B, which it passes over "
                "where there is none; give the whole bias as a value"
            )
        kind = self._kind(place, entry)
        self.entries[place.name] = ModelEntry(place.name, place.path, kind, to_model(entry, kind, place.row))

    def _kind(self, place: Place, entry: Arrays) -> str:
        if "A" not in entry:
            return "whole"
        if place.name in self.kept.kinds:
            return str(self.kept.kinds[place.name])
        roles = self._roles(place)
        module, _, last = place.name.rpartition(".")
        if last != "weight":
            kinds = {"boi": "experts", "bio": "experts_t", "oi": "linear"}
            if roles not in kinds:
                raise DataError(
                    f"a parameter with the axes {roles!r}: PEFT has (experts, out, in) and (experts, in, out); for the "
                    "weight of a module, give a mapping whose row has its name in the Hugging Face model, such as "
                    "name = 'mlp.up_proj.weight', and transpose = (1, 0) where its axes stand the other way round"
                )
            return kinds[roles]
        if place.row.reshape is None and len(roles) > 2 and roles.strip("i") == "o" and roles[0] == "o":
            return "conv"
        matrix = len(roles) == 2 or place.row.reshape is not None
        if matrix and roles.strip("i").strip("o") == "" and roles[0] == "i":
            name = module.rpartition(".")[2]
            return "embedding" if name in _EMBEDDINGS or "emb" in name else "conv1d"
        if matrix and roles.strip("o").strip("i") == "":
            return "linear"
        raise DataError(f"a weight with the axes {roles!r} in the Hugging Face model: PEFT has no module for it")

    def _roles(self, place: Place) -> str:
        """The roles of the axes of the weight in the Hugging Face model, before it is split by the mapping's row."""
        row = place.row
        tree_roles = next((roles for _, roles in self.configuration.matches("factorizations", place.path)), None)
        if tree_roles is None:
            if row.transpose is None and row.reshape is None:
                raise DataError(
                    "the axes are not known; give the configuration factorizations="
                    f"{{{literal_pattern(place.path)!r}: 'oi'}} for a Linear (out, in), 'io' for an embedding or a "
                    "Conv1D"
                )
            return "oi"
        own = tree_roles.replace("b", "", len(row.stack))  # of scanned layers the axis may be another than the first
        order = row.transpose or tuple(range(len(own)))
        return "".join(own[order.index(axis)] for axis in range(len(own)))

    def tensors(self) -> Arrays:
        """PEFT's tensors by name."""
        found: Arrays = {}
        parameters = self._parameters()
        parents, named = by_parent(parameters), set(parameters)
        wrapped = {module: max(1, len(parameters_of(module, parents))) for module in self.adapted_modules}
        for name, entry in self.entries.items():
            module, _, last = name.rpartition(".")
            kind, parts = entry.kind, to_peft(entry.kind, entry.parts)
            order = parameters_of(module, parents)
            level = len(order) - 1 - order.index(last) if name in named else None
            for part, array in parts.items():
                if part == "offset":
                    array = self._with_scaling_of_weight(entry, array)
                found[key_of(name, part, embedding=kind == "embedding", wrapped=wrapped, level=level)] = array
        return found

    def _with_scaling_of_weight(self, entry: ModelEntry, offset: Any) -> Any:
        """The bias of a B, which PEFT multiplies with the scaling of A@B, whatever the path of the offset has."""
        weight = self.entries.get(f"{entry.name.rpartition('.')[0]}.weight")
        if weight is None:
            return offset
        own, theirs = map(self.configuration.scaling_of, (entry.path, weight.path))
        if own == theirs:
            return offset
        if theirs == 0:
            raise DataError(
                f"{entry.path}: its scaling is {own:.6g}, and that of {weight.path} 0: PEFT has one for both"
            )
        return (offset.astype(np.float64) * (own / theirs)).astype(offset.dtype)

    def config(self) -> dict[str, Any]:
        """PEFT's configuration."""
        parameters = self._parameters()
        named = set(parameters)
        entries = self.entries.values()
        dora = [entry.name for entry in entries if "magnitude" in entry.parts]
        modules = [entry for entry in entries if "A" in entry.parts and entry.name not in named]
        plain = [entry.name for entry in modules if "magnitude" not in entry.parts]
        if dora and plain:
            raise DataError(
                f"{dora[0]} has a magnitude (DoRA) and {plain[0]} has none: PEFT has them at all modules of a folder "
                "or at none; write two folders, or one in jlora's own format, which has both"
            )
        contents = Contents(
            adapted={
                entry.name if entry.name in named else entry.name.rpartition(".")[0]: entry.path
                for entry in entries
                if entry.kind != "whole"
            },
            parameters=parameters,
            whole=[entry.name for entry in entries if entry.kind == "whole" and "value" in entry.parts],
            base=frozenset(name for name, kind in self.kept.kinds.items() if kind == "base"),
            digest=digest_of({entry.name: entry.parts for entry in entries}),
            conv1d=any(entry.kind == "conv1d" for entry in entries),
            dora=bool(dora),
            lora_bias=any("offset" in entry.parts for entry in entries),
        )
        return peft_config(self.configuration, contents, self.kept)

    def _parameters(self) -> list[str]:
        targets = set((self.kept.config or {}).get("target_parameters") or [])
        return [
            entry.name
            for entry in self.entries.values()
            if entry.kind.startswith("experts")
            or (entry.kind != "whole" and not entry.name.endswith(".weight"))
            or (entry.kind != "whole" and not targets.isdisjoint(ends_of(entry.name)))
        ]


def _entries(adapters: Any) -> dict[str, Arrays]:
    """The entries by path, on the host."""
    found = leaves_by_path(adapters, is_leaf=is_entry)
    if not found:
        raise DataError("adapters: there is none to write")
    if wrong := [path for path, entry in found.items() if not is_entry(entry)]:
        raise DataError(f"{wrong[0] or 'adapters'}: found no adapter {{'A', 'B'}} nor None")
    for path, entry in found.items():
        if problem := next((p for part in entry.values() if (p := unreachable(part))), None):
            raise DataError(f"{path}: {problem}")
    return {path: {name: np.asarray(part) for name, part in entry.items()} for path, entry in found.items()}


def _piece(entry: MappingType[str, Any], place: Place) -> Arrays:
    """The entry of one place of a stack."""
    return {name: part[place.index] for name, part in entry.items()}
