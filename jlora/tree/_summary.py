"""The table of what is adapted, and of what is left out and why."""

import dataclasses
from collections.abc import Container, Sequence
from typing import Any

from jlora.config import LoraConfig
from jlora.paths import leaves_by_path
from jlora.tables import html_table, text_table
from jlora.tree._bind import bind
from jlora.tree._targets import LeftOut, Target, shapes_by_path, survey
from jlora.tree._views import count_params

_COLUMNS = ("path", "shape", "factorization", "rank", "alpha", "parameters", "share")
_LEFT_OUT = ("left out", "shape", "because")
_MOST_LEFT_OUT = 12


@dataclasses.dataclass(frozen=True)
class Summary:
    """What is adapted; `str` is a table for a terminal, a notebook shows it as HTML.

    Attributes:
      targets: the adapted weights, in the order of the params.
      parameters: the number of scalars of each adapter.
      total: the number of scalars of the base.
      others: of entries without A and B, the path, the shape and what they hold.
      left_out: the weights that a pattern spans and that are not adapted, each with the reason.
      dtypes: the dtypes of the adapters; the table names them where there is another than float32.
    """

    targets: tuple[Target, ...]
    parameters: tuple[int, ...]
    total: int
    others: tuple[tuple[str, tuple[int, ...], str], ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    dtypes: tuple[str, ...] = ("float32",)

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of the table, a last row for the sum."""
        rows = [
            (t.path, "x".join(map(str, t.shape)), t.factorization.roles, str(t.rank), f"{t.alpha:g}", *self._share(n))
            for t, n in zip(self.targets, self.parameters, strict=False)
        ]
        rows += [
            (path, "x".join(map(str, shape)), parts, "", "", *self._share(n))
            for (path, shape, parts), n in zip(self.others, self.parameters[len(rows) :], strict=True)
        ]
        weights = f"{len(rows)} weight{'' if len(rows) == 1 else 's'} of {self.total:,} parameters"
        if set(self.dtypes) - {"float32"}:
            weights += f", adapters in {' and '.join(self.dtypes)}"
        return [*rows, (weights, "", "", "", "", *self._share(sum(self.parameters)))]

    def _share(self, parameters: int) -> tuple[str, str]:
        return f"{parameters:,}", f"{parameters / self.total:.2%}" if self.total else "-"

    def __str__(self) -> str:
        *rows, total = self.rows()
        return text_table(_COLUMNS, rows, total, left=_COLUMNS.index("rank")) + left_out_text(self.left_out)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        *rows, total = self.rows()
        return left_out_html(html_table(_COLUMNS, rows, total), self.left_out)


def left_out_text(left_out: Sequence[LeftOut]) -> str:
    """The table of what is left out, to stand below another one; nothing where nothing is."""
    return f"\n\n{text_table(_LEFT_OUT, _left_out_rows(left_out), left=len(_LEFT_OUT))}" if left_out else ""


def left_out_html(above: str, left_out: Sequence[LeftOut]) -> str:
    """A table as HTML, with that of what is left out below it."""
    return f"<div>{above}{html_table(_LEFT_OUT, _left_out_rows(left_out))}</div>" if left_out else above


def _left_out_rows(left_out: Sequence[LeftOut]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for one in left_out[:_MOST_LEFT_OUT]:
        rows.append((one.path, "x".join(map(str, one.shape)), one.why))
    if len(left_out) > len(rows):
        rows.append((f"and {len(left_out) - len(rows)} more", "", ""))
    return rows


def summary(params: Any, adapters: Any, config: LoraConfig) -> Summary:
    """A table of path, shape, factorization, rank, alpha, parameters and share of the whole.

    Below it stand the weights that a pattern spans and that have no adapter: integers, weights narrower than the rank,
    those of which neither the configuration nor the names of Flax's parameters say how the axes split. What a function
    leaves out by how it uses its weights, `explain` and `adapt` know.

    Args:
      params: the base, arrays or shapes.
      adapters: its adapters.
      config: the configuration that they were made with.

    Raises:
      TargetError: adapters, params and configuration do not fit.
    """
    entries = bind(params, adapters, config)
    shapes = shapes_by_path(params)
    targets: list[Target] = []
    others: list[tuple[str, tuple[int, ...], str]] = []
    for path, entry in entries.items():
        if entry.split is None:
            others.append((path, shapes[path], "+".join(entry.parts)))
        else:
            targets.append(Target(path, shapes[path], entry.split, entry.rank, config.alpha_of(path)))
    paths = [*(target.path for target in targets), *(path for path, *_ in others)]
    return Summary(
        tuple(targets),
        tuple(count_params(entries[path].parts) for path in paths),
        count_params(params),
        tuple(others),
        _without_entry(params, config, entries),
        tuple(sorted({part.dtype.name for entry in entries.values() for part in entry.parts.values()})),
    )


def _without_entry(params: Any, config: LoraConfig, entries: Container[str]) -> tuple[LeftOut, ...]:
    """The weights that the configuration takes in and that have no entry, in the order of the params."""
    found = survey(params, config)
    why = {one.path: one for one in found.left_out}
    why |= {path: LeftOut(path, target.shape, "no adapter at hand") for path, target in found.targets.items()}
    return tuple(why[path] for path in leaves_by_path(params) if path in why and path not in entries)
