"""How the names of a Hugging Face model meet the paths of a params tree: one table, read both ways."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from jlora.errors import DataError
from jlora.paths import nearest

_MOST_SHOWN = 12
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


Mapping = Sequence[Row]

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
    _raise_all(problems)
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
        f"{path}: {len(places)} rows map it to the place {list(index)}: {', '.join(sorted(p.row.name for p in places))}"
        for path, all_places in found.items()
        for index, places in _grouped(all_places)
        if len(places) > 1
    ]
    problems += _differing_stacks(found)
    problems += _unclear({p: places[:1] for p, places in found.items()}, "path", [row.path for row in mapping])
    _raise_all(problems)
    return found


def _by_name(row: Row, name: str) -> Iterator[Place]:
    match = re.fullmatch(_regex(row.name, "."), name)
    if match:
        values = match.groupdict()
        index = tuple(_index(place, values) for place, _ in row.stack)
        if all(0 <= i < count for i, (_, count) in zip(index, row.stack, strict=True)):
            yield Place(name, _filled(row.path, values), row, index)


def _by_path(row: Row, path: str) -> Iterator[Place]:
    match = re.fullmatch(_regex(row.path, "/"), path)
    if match:
        slashed = {name for name, kind in _PLACEHOLDER.findall(row.path) if kind == "/"}
        values = {
            name: value.replace("/", ".") if name in slashed else value for name, value in match.groupdict().items()
        }
        choices = [range(count) if isinstance(place, str) else (place,) for place, count in row.stack]
        for index in itertools.product(*choices):
            chosen = {str(p)[1:-1]: str(i) for i, (p, _) in zip(index, row.stack, strict=True) if isinstance(p, str)}
            yield Place(_filled(row.name, values | chosen), path, row, index)


def _regex(template: str, separator: str) -> str:
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
    return "".join([*parts, re.escape(template[position:])])


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
            shown = ", ".join(f"{name} {list(sizes)}" for name, sizes in counts.items())
            problems.append(f"{path}: rows map it as stacks of other sizes: {shown}")
    return problems


def _unclear(found: dict[str, list[Place]], what: str, rows: list[str]) -> list[str]:
    """A problem for each name or path that not exactly one row maps."""
    problems = []
    for key, places in found.items():
        if not places:
            problems.append(
                f"{key}: no row of the mapping has this {what}; nearest rows: {', '.join(nearest(key, rows))}"
            )
        elif len(places) > 1:
            problems.append(f"{key}: {len(places)} rows map it: {', '.join(place.row.name for place in places)}")
    return problems


def _raise_all(problems: list[str]) -> None:
    if problems:
        more = [f"and {len(problems) - _MOST_SHOWN} more"] if len(problems) > _MOST_SHOWN else []
        raise DataError("\n  ".join([f"mapping: {len(problems)} problems:", *problems[:_MOST_SHOWN], *more]))
