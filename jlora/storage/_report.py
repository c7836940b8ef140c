"""How saved adapters fit a params tree."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jlora.arrays import ShapeDtype
from jlora.config import LoraConfig
from jlora.errors import JloraError
from jlora.paths import format_nearest, leaves_by_path, literal_pattern
from jlora.storage._structure import Entries
from jlora.tree import Target, bind, find_targets, is_targeted

Shape = tuple[int, ...]

_MOST_LINES = 12


class Misfit(NamedTuple):
    """An entry that its weight has no place for."""

    path: str
    found: str
    wanted: str


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """How the entries of a file fit a params tree; `str` is a text that lists every kind of problem.

    Attributes:
      matched: the paths of the entries that fit.
      missing: the weights that the configuration adapts and the file has no entry for.
      unexpected: the entries where params has no leaf.
      wrong_shape: the entries whose shapes do not fit the weight.
      unfit: why the configuration does not fit the params, "" where it does.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong_shape: tuple[Misfit, ...] = ()
    unfit: str = ""
    leaves: tuple[str, ...] = dataclasses.field(default=(), repr=False)

    @property
    def fits(self) -> bool:
        """Whether all is as it should be."""
        return not (self.missing or self.unexpected or self.wrong_shape or self.unfit)

    def __str__(self) -> str:
        found = len(self.matched) + len(self.unexpected) + len(self.wrong_shape)
        return "\n  ".join([f"{len(self.matched)} of {found} adapters fit the params", *self._lines()])

    def _lines(self) -> Iterator[str]:
        yield from _shortened([f"missing: {path}: the configuration adapts it" for path in self.missing])
        shown = [f"unexpected: {path}: {format_nearest(path, self.leaves)}" for path in self.unexpected[:_MOST_LINES]]
        yield from _shortened(shown, len(self.unexpected))
        yield from _shortened([f"wrong shape: {m.path}: found {m.found}, wanted {m.wanted}" for m in self.wrong_shape])
        if self.unfit:
            yield f"configuration: {self.unfit}"


def compare(entries: Entries, config: LoraConfig, params: Any) -> LoadReport:
    """The report on the entries of a file and a params tree of arrays or shapes."""
    leaves = leaves_by_path(params)
    shapes = {path: tuple(getattr(leaf, "shape", ())) for path, leaf in leaves.items()}
    updates = dict(entries.values())
    roles: dict[str, str | None] = {}
    for path in (path for path in updates if path in shapes):
        with contextlib.suppress(JloraError):
            roles[path] = _roles(path, shapes[path], updates[path], config)
    targets, unfit = _targets(leaves, config, roles)
    return LoadReport(
        matched=tuple(roles),
        missing=tuple(path for path in targets if path not in updates),
        unexpected=tuple(path for path in updates if path not in shapes),
        wrong_shape=tuple(
            Misfit(path, _found(updates[path]), _wanted(shapes[path], targets.get(path)))
            for path in updates
            if path in shapes and path not in roles
        ),
        unfit=unfit,
        leaves=tuple(shapes),
    )


def _roles(path: str, shape: Shape, update: Mapping[str, Any], config: LoraConfig) -> str | None:
    """The factorization of the weight by the shapes of its A and B; None without them; an error where it has none."""
    given = dict(config.matches("factorizations", path))
    alone = LoraConfig(rank=config.rank_of(path), factorizations=given)
    split = bind({path: ShapeDtype(shape, np.dtype(np.float32))}, {path: update}, alone)[path].split
    return None if split is None else split.roles


def _targets(
    weights: Mapping[str, Any], config: LoraConfig, roles: Mapping[str, str | None]
) -> tuple[dict[str, Target], str]:
    """What the configuration adapts, with the factorizations that the entries show, and why it does not fit.

    A weight of any dtype has a place for its entry.
    """
    known = {
        literal_pattern(path): letters
        for path, letters in roles.items()
        if letters is not None and all(path.split("/")) and is_targeted(config, path)
    }
    weights = {path: _floating(leaf) if path in roles else leaf for path, leaf in weights.items()}
    try:
        # Ranks are asked of the entries themselves: one that was concatenated may be larger than a side of its weight.
        ranks = dict.fromkeys(known, 1) | {p: rank for p, rank in dict(config.rank_pattern).items() if p not in known}
        full = config.replace(factorizations=known | dict(config.factorizations), rank_pattern=ranks)
        return find_targets(weights, full), ""
    except JloraError as error:
        return {}, str(error)


def _floating(leaf: Any) -> ShapeDtype:
    return ShapeDtype(leaf.shape, np.dtype(np.float32))


def _found(update: Mapping[str, Any]) -> str:
    return ", ".join(f"{part} {tuple(array.shape)}" for part, array in update.items())


def _wanted(shape: Shape, target: Target | None) -> str:
    if target is None:
        return f"parts for the weight {shape}"
    a_shape, b_shape = target.factorization.adapter_shapes(shape, target.rank)
    return f"A {a_shape}, B {b_shape} for the weight {shape}"


def _shortened(lines: list[str], count: int | None = None) -> list[str]:
    more = (len(lines) if count is None else count) - _MOST_LINES
    return lines[:_MOST_LINES] + ([f"and {more} more"] if more > 0 else [])
