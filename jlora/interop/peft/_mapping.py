"""How the names of a Hugging Face model meet the paths of a params tree: one table, read both ways."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jlora.config import read_mapping
from jlora.errors import DataError, listed, raise_all, shortened
from jlora.paths import nearest

_MOST_SHOWN = 12
_MOST_CHARACTERS, _MOST_PLACES, _MOST_SPANS = 1000, 100_000, 3
_PLACEHOLDER = re.compile(r"\{(\w+)([*/]?)\}")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a mapping: a weight's name in the Hugging Face model, and its place in the params tree.

    In both, `{x}` stands for one segment, the same on either side; `{x*}` for any number of segments; `{x/}`, in a path
    alone, for those of `{x*}` with slashes in place of their dots.

    Attributes:
      name: of the weight, such as "model.layers.{i}.self_attn.q_proj.weight".
      path: in the tree, such as "layers/{i}/attn/q_proj/w".
      transpose: the order in which the tree has the axes, after `reshape`; None for the same.
      reshape: what the axes of the Hugging Face weight are split into, such as (heads, head_dim, width), before
        `transpose`; one size may be -1. None for the same.
      stack: where the tree holds several weights in one array, pairs of the place and the number of places of each
        leading axis: (("{e}", 8),) for experts, ((0, 2),) for the first of two.
    """

    name: str
    path: str
    transpose: tuple[int, ...] | None = None
    reshape: tuple[int, ...] | None = None
    stack: tuple[tuple[str | int, int], ...] = ()

    def __post_init__(self) -> None:
        if problem := _problem(self):
            raise DataError(f"row {shortened(self.name)} -> {shortened(self.path)}: {problem}")


Mapping = Sequence[Row]


def _problem(row: Row) -> str | None:
    """What keeps a row from being read both ways."""
    if not all(isinstance(text, str) and text for text in (row.name, row.path)):
        return "wanted a name and a path, which are strings"
    if len(row.name) + len(row.path) > _MOST_CHARACTERS:
        return f"a name and a path of more than {_MOST_CHARACTERS:,} characters"
    for field, least in (("transpose", 0), ("reshape", -1)):
        numbers = getattr(row, field)
        if numbers is not None and not _whole_numbers(numbers, least):
            return f"{field} = {shortened(numbers)}: wanted whole numbers"
    if row.transpose is not None and sorted(row.transpose) != list(range(len(row.transpose))):
        return f"transpose = {shortened(row.transpose)}: wanted the axes 0, 1, ..., each once"
    if row.reshape is not None and (row.reshape.count(-1) > 1 or 0 in row.reshape):
        return f"reshape = {shortened(row.reshape)}: wanted sizes of at least 1, of which one may be -1"
    if not isinstance(row.stack, tuple) or not all(isinstance(s, tuple) and len(s) == 2 for s in row.stack):
        return f"stack = {shortened(row.stack)}: wanted pairs of a place and the number of places"
    return _placeholder_problem(row)


def _placeholder_problem(row: Row) -> str | None:
    in_name, in_path = (dict(_PLACEHOLDER.findall(text)) for text in (row.name, row.path))
    if odd := [name for name in (*in_name, *in_path) if not name.isidentifier()]:
        return f"{{{odd[0]}}} is no name of a placeholder"
    if slashed := [name for name, kind in in_name.items() if kind == "/"]:
        return f"{{{slashed[0]}/}} stands in the name: it is for paths"
    stacked = [place[1:-1] for place, _ in row.stack if isinstance(place, str)]
    for place, count in row.stack:
        inner = place[1:-1] if isinstance(place, str) else place
        if not _whole_numbers((count,), 1) or count > _MOST_PLACES:
            return f"stack = {shortened(row.stack)}: wanted 1 to {_MOST_PLACES:,} places"
        if isinstance(place, str) and (f"{{{inner}}}" != place or in_name.get(str(inner)) != ""):
            return f"stack: {shortened(place)} is no placeholder of the name for one segment"
        if not isinstance(place, str) and not (_whole_numbers((place,), 0) and place < count):
            return f"stack = {shortened(row.stack)}: a place is a placeholder, or a number below that of the places"
    if math.prod(count for _, count in row.stack) > _MOST_PLACES:
        return f"stack = {shortened(row.stack)}: wanted {_MOST_PLACES:,} places at most"
    if len(set(stacked)) < len(stacked) or in_path.keys() & set(stacked):
        return f"stack = {shortened(row.stack)}: a placeholder of a stack stands there once, and not in the path"
    if in_name.keys() - set(stacked) != in_path.keys():
        return "name and path have other placeholders; each stands in both, or in the stack"
    if any((kind == "") != (in_path.get(name, "") == "") for name, kind in in_name.items()):
        return "a placeholder stands for one segment here and for several there"
    if sum(kind != "" for kind in in_name.values()) > _MOST_SPANS:
        return f"more than {_MOST_SPANS} placeholders for any number of segments"
    return None


def _whole_numbers(found: Any, least: int) -> bool:
    return isinstance(found, tuple) and all(type(number) is int and least <= number < 2**31 for number in found)


def read_rows(path: str | Path) -> tuple[Row, ...]:
    """The mapping in a TOML or JSON file, a table [[row]] for each row.

    Raises:
      ConfigError, DataError: a file that cannot be read, or does not hold rows; the message names the row.
    """
    tables = read_mapping(path).get("row")
    if not isinstance(tables, list) or not tables:
        raise DataError(f"{path}: wanted tables [[row]] with name and path")
    known = tuple(field.name for field in dataclasses.fields(Row))
    rows = []
    for number, table in enumerate(tables, 1):
        if not isinstance(table, dict) or not {"name", "path"} <= table.keys() <= set(known):
            wanted = f"wanted name, path, and of {', '.join(sorted(known))} what it needs"
            raise DataError(f"{path}: row {number}: {wanted}")
        try:
            rows.append(Row(**{key: _frozen(value) for key, value in table.items()}))
        except DataError as error:
            raise DataError(f"{path}: row {number}: {error}") from None
    return tuple(rows)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


FLAT: Mapping = (Row("{name*}", "{name*}"),)
"""A state dict as it is loaded: `{"model.layers.0.mlp.up_proj.weight": array}`."""

NESTED: Mapping = (Row("{name*}", "{name/}"),)
"""The same, nested: `{"model": {"layers": {"0": {"mlp": {"up_proj": {"weight": array}}}}}}`."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one weight of the Hugging Face model lies in the tree: `index` on the leading axes of a stack."""

    name: str
    path: str
    row: Row
    index: tuple[int, ...]


def places_of_names(mapping: Mapping, names: Iterable[str]) -> dict[str, Place]:
    """The place of each weight.

    Raises:
      DataError: names that no row maps, or that two rows do, or that meet in one place; all are listed.
    """
    found = {name: [place for row in mapping for place in _by_name(row, name)] for name in names}
    problems = _unclear(found, "name", [row.name for row in mapping])
    taken: dict[tuple[str, tuple[int, ...]], str] = {}
    for name, places in found.items():
        for place in places[:1]:
            if (other := taken.setdefault((place.path, place.index), name)) != name:
                problems.append(f"{name} and {other} both map to {place.path} {list(place.index) or ''}".rstrip())
    by_path: dict[str, list[Place]] = {}
    for places in found.values():
        for place in places[:1]:
            by_path.setdefault(place.path, []).append(place)
    problems += _differing_stacks(by_path)
    raise_all(problems, DataError, "mapping")
    return {name: places[0] for name, places in found.items()}


def paths_of_name(mapping: Mapping, name: str) -> list[str]:
    """Where the rows that map a name put it, in their order."""
    return [place.path for row in mapping for place in _by_name(row, name)]


def places_of_paths(mapping: Mapping, paths: Iterable[str]) -> dict[str, list[Place]]:
    """The places of all weights that lie at each path, several where it is a stack.

    Raises:
      DataError: paths that no row maps, or that two rows do; all are listed.
    """
    found = {path: [place for row in mapping for place in _by_path(row, path)] for path in paths}
    problems = [
        f"{path}: {len(places)} rows map it to the place {list(index)}: {listed(sorted(p.row.name for p in places))}"
        for path, all_places in found.items()
        for index, places in _grouped(all_places)
        if len(places) > 1
    ]
    problems += _differing_stacks(found)
    problems += _unclear({p: places[:1] for p, places in found.items()}, "path", [row.path for row in mapping])
    raise_all(problems, DataError, "mapping")
    return found


def _by_name(row: Row, name: str) -> Iterator[Place]:
    match = _regex(row.name, ".").fullmatch(name)
    if match:
        values = match.groupdict()
        index = tuple(_index(place, values) for place, _ in row.stack)
        if all(0 <= i < count for i, (_, count) in zip(index, row.stack, strict=True)):
            yield Place(name, _filled(row.path, values), row, index)


def _by_path(row: Row, path: str) -> Iterator[Place]:
    match = _regex(row.path, "/").fullmatch(path)
    if match:
        slashed = {name for name, kind in _PLACEHOLDER.findall(row.path) if kind == "/"}
        values = {
            name: value.replace("/", ".") if name in slashed else value for name, value in match.groupdict().items()
        }
        choices = [range(count) if isinstance(place, str) else (place,) for place, count in row.stack]
        for index in itertools.product(*choices):
            chosen = {str(p)[1:-1]: str(i) for i, (p, _) in zip(index, row.stack, strict=True) if isinstance(p, str)}
            yield Place(_filled(row.name, values | chosen), path, row, index)


@functools.lru_cache(4096)
def _regex(template: str, separator: str) -> re.Pattern[str]:
    parts, seen, position = [], set(), 0
    for match in _PLACEHOLDER.finditer(template):
        name, kind = match.groups()
        inner = ".+" if kind else f"[^{re.escape(separator)}]+"
        parts += [
            re.escape(template[position : match.start()]),
            f"(?P={name})" if name in seen else f"(?P<{name}>{inner})",
        ]
        seen.add(name)
        position = match.end()
    return re.compile("".join([*parts, re.escape(template[position:])]))


def _filled(template: str, values: dict[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        found = values[match[1]]
        return found.replace(".", "/") if match[2] == "/" else found

    return _PLACEHOLDER.sub(value, template)


def _index(place: str | int, values: dict[str, str]) -> int:
    if isinstance(place, int):
        return place
    text = values[place[1:-1]]
    return int(text) if text.isdecimal() else -1


def _grouped(places: Sequence[Place]) -> Iterator[tuple[tuple[int, ...], list[Place]]]:
    ordered = sorted(places, key=lambda place: place.index)
    yield from ((index, list(group)) for index, group in itertools.groupby(ordered, key=lambda place: place.index))


def _differing_stacks(found: dict[str, list[Place]]) -> list[str]:
    """A problem for each path that is a stack in one row and another stack, or one weight, in another."""
    problems = []
    for path, places in found.items():
        counts = {place.row.name: tuple(count for _, count in place.row.stack) for place in places}
        if len(set(counts.values())) > 1:
            shown = listed(f"{name} {list(sizes)}" for name, sizes in counts.items())
            problems.append(f"{path}: rows map it as stacks of other sizes: {shown}")
    return problems


def _unclear(found: dict[str, list[Place]], what: str, rows: list[str]) -> list[str]:
    """A problem for each name or path that not exactly one row maps."""
    problems: list[str] = []
    for key, places in found.items():
        if not places:
            near = ", ".join(nearest(key, rows)) if len(problems) < _MOST_SHOWN else "not sought"
            problems.append(f"{key}: no row of the mapping has this {what}; nearest rows: {near}")
        elif len(places) > 1:
            problems.append(f"{key}: {len(places)} rows map it: {listed(place.row.name for place in places)}")
    return problems
