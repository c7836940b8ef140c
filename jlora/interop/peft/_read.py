"""PEFT's files as adapters and a configuration."""

import math
import warnings
from collections.abc import Callable, Iterable
from collections.abc import Mapping as MappingType
from pathlib import Path
from typing import Any

import numpy as np

from jlora.adapter import Entry
from jlora.arrays import is_jax_array
from jlora.config import LoraConfig
from jlora.contraction import Factorization
from jlora.disk import CONFIG, TENSORS, Pair, dump_json, parse_json
from jlora.errors import ConfigError, DataError, JloraError, JloraWarning, TargetError, listed, raise_all, shortened
from jlora.interop._placed import placed
from jlora.interop.peft._config import Kept, Scales, check_peft_config, kind_of_experts
from jlora.interop.peft._derive import LAYOUT, digest_of
from jlora.interop.peft._keys import Named, entries_of
from jlora.interop.peft._layout import Arrays, check_numbers, from_peft, roles_of, to_tree, whole_to_tree
from jlora.interop.peft._mapping import FLAT, Mapping, Place, places_of_names
from jlora.interop.peft._targeted import Saved, check_fields, check_together
from jlora.interop.peft._wrappers import without_wrappers
from jlora.paths import format_nearest, leaves_by_path, literal_pattern, nest
from jlora.storage import is_adapters_folder
from jlora.tree import in_structure

_MOST_SHOWN = 12
_OTHERS = {
    "linear": ("conv1d",),
    "conv1d": ("linear",),
    "experts": ("experts_t",),
    "experts_t": ("experts",),
    "experts_open": ("experts_t",),
}
"""What else a weight may be, if its shape says so."""


def is_peft_folder(path: str | Path) -> bool:
    """Whether a folder holds an adapter that PEFT wrote: a configuration like PEFT's, and no tensors of jlora's own.

    Its configuration may be damaged, or not say that it is PEFT's.
    """
    try:
        data = parse_json(Pair(path).read_config())
    except DataError:  # there is none
        return False
    except ValueError:
        data = {}
    return "format" not in data and not is_adapters_folder(path)


def read_peft(
    path: str | Path,
    mapping: Mapping = FLAT,
    *,
    params: Any = None,
    transposed_experts: bool | None = None,
) -> tuple[Any, LoraConfig]:
    """The adapters and the configuration in a folder that PEFT wrote.

    Args:
      path: the folder with `adapter_config.json` and `adapter_model.safetensors`.
      mapping: how the names of the Hugging Face model meet the paths of your params tree: `FLAT` for a state dict,
        `NESTED` for one that is nested at its dots, or a table of `Row` for any other tree.
      params: the params tree, arrays or shapes: the adapters are checked against it and come in its structure.
      transposed_experts: whether the model keeps stacked experts as (experts, in, out), as GPT-OSS does, and not as
        (experts, out, in); by default the shapes in `params` decide, else the name of the base model. Files of PEFT
        0.17 and 0.18 do not depend on it.

    Returns:
      `(adapters, config)`: nested dicts by path, or the structure of `params`. An entry holds A and B, for DoRA
      `magnitude`; the bias of a B is the `offset` of the layer's bias, a weight that was saved as a whole a `value`.
      `config.extras` keeps what PEFT's configuration said, for `write_peft`.

    Raises:
      DataError: no such adapter, a damaged file, a variant that A and B do not represent, a configuration that does not
        name what the tensors adapt, names that the mapping does not map, numbers that are not finite, adapters that do
        not fit `params`, square experts of which nothing says how they lie.
    """
    entries, config = read_peft_arrays(
        path, mapping, params=params, transposed_experts=transposed_experts, settled_experts=True
    )
    return _tree(path, entries, config, params), config


def from_tensors(
    tensors: MappingType[str, Any],
    data: MappingType[str, Any],
    mapping: Mapping = FLAT,
    *,
    params: Any = None,
    transposed_experts: bool | None = None,
) -> tuple[Any, LoraConfig]:
    """`read_peft` of what PEFT would write, in memory: the inverse of `to_tensors`.

    Args:
      tensors: PEFT's name -> array of NumPy or JAX.
      data: PEFT's configuration as plain data, such as `json.load` of adapter_config.json, or `to_dict()` in PEFT.
      mapping, params, transposed_experts: as for `read_peft`.

    Returns:
      `(adapters, config)`, as `read_peft`.

    Raises:
      DataError: as of `read_peft`; what is no array, or no plain data.

    >>> data = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up"]}
    >>> a, b = np.ones((2, 7), np.float32), np.ones((5, 2), np.float32)
    >>> tensors = {"base_model.model.up.lora_A.weight": a, "base_model.model.up.lora_B.weight": b}
    >>> adapters, config = from_tensors(tensors, data)
    >>> adapters["up.weight"]["A"].shape, config.scaling_of("up.weight")
    ((7, 2), 2.0)
    """
    source = Path("tensors")
    if wrong := [name for name, tensor in tensors.items() if not _is_array(tensor)]:
        found = type(tensors[wrong[0]]).__name__
        raise DataError(f"{source}: {shortened(wrong[0])} is a {found}: wanted an array of NumPy or JAX")
    lists = {key: sorted(value) if isinstance(value, set | frozenset) else value for key, value in data.items()}
    try:
        plain = parse_json(dump_json(lists))
        names, arrays = _taken(source, plain, tensors, lambda key: np.asarray(tensors[key]))
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    check_numbers(source, arrays)
    entries, config = _Reader(source, plain, mapping, transposed_experts, True).read(names, arrays, params)
    return _tree(source, entries, config, params), config


def _is_array(node: Any) -> bool:
    return isinstance(node, np.ndarray) or is_jax_array(node)


def _tree(source: str | Path, entries: dict[str, Arrays], config: LoraConfig, params: Any) -> Any:
    """The entries as arrays of JAX: nested, or in the structure of params."""
    adapters = placed(source, entries)
    if params is not None:
        return in_structure(params, adapters, config)
    try:
        return nest(adapters)
    except TargetError as error:
        raise DataError(f"{source}: {error}") from None


def read_peft_arrays(
    path: str | Path,
    mapping: Mapping = FLAT,
    *,
    params: Any = None,
    transposed_experts: bool | None = None,
    settled_experts: bool = False,
    lazy: bool = False,
) -> tuple[dict[str, Arrays], LoraConfig]:
    """`read_peft` with NumPy arrays by path, whatever dtypes JAX is set to have; lazy ones are read when asked for.

    Without `settled_experts`, square experts of which nothing says how they lie are read too, as (experts, out, in).
    """
    folder = Path(path)
    try:
        with Pair(folder).opened() as (text, file):
            data = _parsed(folder, text)
            names, arrays = _taken(folder, data, file.entries, file.lazy if lazy else file.read)
    except DataError as error:
        raise DataError(f"{folder}: {error}") from None
    check_numbers(folder, arrays)
    reader = _Reader(folder, data, mapping, transposed_experts, settled_experts)
    return reader.read(names, arrays, params)


def read_named(
    source: str | Path,
    data: MappingType[str, Any],
    names: list[Named],
    tensors: MappingType[str, Any],
    mapping: Mapping = FLAT,
    params: Any = None,
) -> tuple[dict[str, Arrays], LoraConfig]:
    """`read_peft_arrays` of what another file holds, said in PEFT's words.

    Args:
      source: the file, for errors.
      data: PEFT's configuration, of a version since 0.19.1; experts are (experts, out, in).
      names: the entries, whose parts are names of `tensors`.
      tensors: with the axes that PEFT has; NumPy's arrays, or lazy ones.
      mapping, params: as for `read_peft`.
    """
    arrays = {entry.name: {part: tensors[key] for part, key in entry.parts.items()} for entry in names}
    check_numbers(source, arrays)
    reader = _Reader(Path(source), {**data, "peft_version": LAYOUT}, mapping, False, True)
    return reader.read(names, arrays, params)


def _taken(
    source: Path, data: MappingType[str, Any], keys: Iterable[str], read: Callable[[str], Any]
) -> tuple[list[Named], dict[str, Arrays]]:
    """The entries that tensors of these names make up, and the arrays of each."""
    names = _names(data, keys)
    _warn_of_wrappers(source, keys)
    return names, {entry.name: {part: read(key) for part, key in entry.parts.items()} for entry in names}


def _names(data: MappingType[str, Any], keys: Iterable[str]) -> list[Named]:
    """The entries of a file, whose configuration is checked."""
    check_peft_config(data)
    check_fields(data)
    entries = entries_of(keys, data.get("target_parameters") or [])
    if not entries:
        raise DataError(f"{TENSORS} holds no tensors")
    check_together(data, entries)
    return entries


def _warn_of_wrappers(folder: Path, keys: Iterable[str]) -> None:
    wrapped = [(key, name) for key, name in without_wrappers(keys).items() if key != name]
    if wrapped:
        key, name = wrapped[0]
        text = f"{folder}: {len(wrapped)} names are not PEFT's: {shortened(key)} is read as {shortened(name)}"
        warnings.warn(text, JloraWarning, stacklevel=5)


def _parsed(folder: Path, text: bytes) -> dict[str, Any]:
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{folder / CONFIG}: not valid JSON: {error}") from None


class _Reader:
    """One reading: what all entries share."""

    def __init__(
        self,
        folder: Path,
        data: MappingType[str, Any],
        mapping: Mapping,
        transposed_experts: bool | None,
        settled_experts: bool,
    ) -> None:
        self.folder, self.data, self.mapping = folder, data, mapping
        self.transposed_experts, self.settled_experts = transposed_experts, settled_experts
        try:
            self.scales = Scales(data)
        except DataError as error:
            raise DataError(f"{folder}: {error}") from None
        self.saved = Saved(data.get("modules_to_save") or ())
        self.kinds: dict[str, str] = {}
        self.digest = ""
        self.roles: dict[str, str] = {}
        self.matched: dict[str, str] = {}
        self.problems: list[str] = []

    def read(
        self, entries: list[Named], arrays: dict[str, Arrays], params: Any
    ) -> tuple[dict[str, Arrays], LoraConfig]:
        places = places_of_names(self.mapping, arrays)
        self.digest = digest_of(arrays)
        shapes = None if params is None else {p: tuple(leaf.shape) for p, leaf in leaves_by_path(params).items()}
        pieces: dict[str, list[tuple[Place, Arrays]]] = {}
        for entry in entries:
            place = places[entry.name]
            try:
                parts = self._placed(entry, arrays[entry.name], place, shapes)
            except JloraError as error:
                self.problems.append(f"{entry.name}: {error}")
            else:
                pieces.setdefault(place.path, []).append((place, parts))
                self.matched[place.path] = entry.matched
        stacked = {path: self._stacked(path, found) for path, found in pieces.items()}
        adapters = {path: parts for path, parts in stacked.items() if parts is not None}
        if shapes is not None:
            self._check(adapters, shapes)
        raise_all(self.problems, DataError, str(self.folder))
        return adapters, self._config(adapters)

    def _placed(
        self, entry: Named, arrays: Arrays, place: Place, shapes: MappingType[str, tuple[int, ...]] | None
    ) -> Arrays:
        """The parts of one entry in the layout of the tree."""
        if "A" not in arrays:
            if not (entry.name.endswith(".bias") or self.saved.holds(entry.matched)):
                self.kinds[entry.name] = "base"
            return whole_to_tree(arrays, place.row)
        rank = self.scales.rank_of(entry.matched)
        kind = self._kind(entry, arrays, rank)
        wanted = None if shapes is None else shapes.get(place.path)
        for choice in (kind, *_OTHERS.get(kind, ())):
            parts, roles, shape = _tree_of(choice, arrays, rank, place)
            if wanted in (None, shape):
                break
        else:
            choice = kind
            parts, roles, shape = _tree_of(kind, arrays, rank, place)
        if choice == "experts_open":
            choice = self._open_or_not(arrays, wanted)
        self.roles[place.path] = roles
        if choice != "linear":
            self.kinds[entry.name] = choice
        return parts

    def _open_or_not(self, arrays: Arrays, wanted: tuple[int, ...] | None) -> str:
        """The kind of experts whose model is not known: open where no weight is at hand, or it fits both ways."""
        (_, ins), (outs, _) = arrays["A"].shape, arrays["B"].shape
        if ins != outs:
            return "experts_open" if wanted is None else "experts"
        if self.settled_experts:
            raise DataError(
                f"experts {outs} x {ins}, and nothing says whether the model keeps them as (experts, in, out): give "
                "transposed_experts, True for models like GPT-OSS, False for most others"
            )
        return "experts_open"

    def _kind(self, entry: Named, arrays: Arrays, rank: int) -> str:
        if entry.is_embedding:
            return "embedding"
        if entry.is_parameter:
            if arrays["A"].shape[:1] == (rank,):
                return "linear"
            return kind_of_experts(self.data, self.transposed_experts)
        if arrays["A"].ndim > 2:
            return "conv"
        a, b = arrays["A"].shape, arrays["B"].shape
        if "value" in arrays and len(a) == len(b) == 2 and a[1] != b[0]:
            return "linear" if arrays["value"].shape == (b[0], a[1]) else "conv1d"
        return "conv1d" if self.data.get("fan_in_fan_out") else "linear"

    def _stacked(self, path: str, pieces: list[tuple[Place, Arrays]]) -> Arrays | None:
        """The entry at a path; the pieces of a stack together, zeros where one is missing; None where they differ."""
        counts = tuple(count for _, count in pieces[0][0].row.stack)
        if not counts:
            return pieces[0][1]
        first = pieces[0][1]
        layouts = {tuple((name, part.shape, part.dtype) for name, part in parts.items()) for _, parts in pieces}
        scales = {
            (self.scales.rank_of(m), self.scales.alpha_of(m)) for m in (p.name.rpartition(".")[0] for p, _ in pieces)
        }
        if len(layouts) > 1 or len(scales) > 1:
            names = listed(place.name for place, _ in pieces)
            self.problems.append(
                f"{path}: {names} differ in rank, alpha, shape or dtype; one array cannot hold them: `jlora resize` "
                "gives all of them one rank and alpha"
            )
            return None
        if missing := math.prod(counts) - len(pieces):
            replaced = [name for name in first if name in ("value", "magnitude")]
            if replaced:
                self.problems.append(
                    f"{path}: {missing} of {math.prod(counts)} weights of the stack have no {replaced[0]}, in whose "
                    "place zeros would make them zero"
                )
        stacks = {name: np.zeros((*counts, *part.shape), part.dtype) for name, part in first.items()}
        for place, parts in pieces:
            for name, part in parts.items():
                stacks[name][place.index] = part
        return stacks

    def _check(self, adapters: MappingType[str, Arrays], shapes: MappingType[str, tuple[int, ...]]) -> None:
        for path, update in adapters.items():
            if path not in shapes:
                near = format_nearest(path, shapes) if len(self.problems) < _MOST_SHOWN else "near ones are not sought"
                self.problems.append(f"{path}: params has no leaf there; {near}")
                continue
            try:
                Entry(update, 1.0, Factorization(self.roles[path]) if "A" in update else None).check(shapes[path])
            except JloraError as error:
                self.problems.append(f"{path}: {error}")

    def _config(self, adapters: MappingType[str, Arrays]) -> LoraConfig:
        """The configuration that gives each path its rank, alpha and factorization."""
        targets = [path for path, update in adapters.items() if "A" in update]
        scaled = [path for path, update in adapters.items() if update.keys() & {"A", "offset"}]
        try:
            ranks = {path: self.scales.rank_of(module) for path, module in self.matched.items()}
            alphas = {path: self.scales.alpha_of(module) for path, module in self.matched.items()}
            return LoraConfig(
                kind="dora" if self.data.get("use_dora") else "lora",
                rank=self.scales.rank,
                alpha=self.scales.alpha,
                dropout=self.data.get("lora_dropout") or 0.0,
                target_modules=tuple(literal_pattern(path) for path in targets or adapters),
                scaling="rslora" if self.data.get("use_rslora") else "standard",
                init="kaiming_uniform",
                rank_pattern={literal_pattern(p): ranks[p] for p in scaled if ranks[p] != self.scales.rank},
                alpha_pattern={literal_pattern(p): alphas[p] for p in scaled if alphas[p] != self.scales.alpha},
                factorizations={literal_pattern(path): self.roles[path] for path in targets},
                extras=Kept(dict(self.data), self.kinds, self.digest).to_extras(),
            )
        except (ConfigError, DataError) as error:
            raise DataError(f"{self.folder / CONFIG}: {error}") from None


def _tree_of(kind: str, arrays: Arrays, rank: int, place: Place) -> tuple[Arrays, str, tuple[int, ...]]:
    """The parts of a weight of this kind in the layout of the tree, the roles of its axes there, and its shape."""
    parts, shape = from_peft(kind, arrays, rank)
    parts, roles, shape = to_tree(parts, roles_of(kind, len(shape)), shape, place.row)
    stack = place.row.stack
    return parts, "b" * len(stack) + roles, (*(count for _, count in stack), *shape)
