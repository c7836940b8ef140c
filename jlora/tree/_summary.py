"""The table of what is adapted."""

import dataclasses
from typing import Any

from jlora.adapter import is_update
from jlora.config import LoraConfig
from jlora.paths import leaves_by_path
from jlora.tables import html_table, text_table
from jlora.tree._targets import Target, adapted_targets
from jlora.tree._views import count_params

_COLUMNS = ("path", "shape", "factorization", "rank", "alpha", "parameters", "share")


@dataclasses.dataclass(frozen=True)
class Summary:
    """What is adapted; `str` is a table for a terminal, a notebook shows it as HTML.

    Attributes:
      targets: the adapted weights, in the order of the params.
      parameters: the number of scalars of each adapter.
      total: the number of scalars of the base.
      others: of entries without A and B, the path, the shape and what they hold.
    """

    targets: tuple[Target, ...]
    parameters: tuple[int, ...]
    total: int
    others: tuple[tuple[str, tuple[int, ...], str], ...] = ()

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
        return [*rows, (weights, "", "", "", "", *self._share(sum(self.parameters)))]

    def _share(self, parameters: int) -> tuple[str, str]:
        return f"{parameters:,}", f"{parameters / self.total:.2%}" if self.total else "-"

    def __str__(self) -> str:
        *rows, total = self.rows()
        return text_table(_COLUMNS, rows, total, left=_COLUMNS.index("rank"))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        *rows, total = self.rows()
        return html_table(_COLUMNS, rows, total)


def summary(params: Any, adapters: Any, config: LoraConfig) -> Summary:
    """A table of path, shape, factorization, rank, alpha, parameters and share of the whole.

    Args:
      params: the base, arrays or shapes.
      adapters: its adapters.
      config: the configuration that they were made with.

    Raises:
      TargetError: adapters, params and configuration do not fit.
    """
    targets = adapted_targets(params, adapters, config)
    updates = leaves_by_path(adapters, is_leaf=is_update)
    others = {path: "+".join(update) for path, update in updates.items() if path not in targets}
    shapes = leaves_by_path(params)
    return Summary(
        tuple(targets.values()),
        tuple(count_params(updates[path]) for path in (*targets, *others)),
        count_params(params),
        tuple((path, tuple(shapes[path].shape), parts) for path, parts in others.items()),
    )
