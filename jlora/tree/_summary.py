"""The table of what is adapted."""

import dataclasses
from typing import Any

from jlora.adapter import is_adapter
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
    """

    targets: tuple[Target, ...]
    parameters: tuple[int, ...]
    total: int

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of the table, a last row for the sum."""
        rows = [
            (t.path, "x".join(map(str, t.shape)), t.factorization.roles, str(t.rank), f"{t.alpha:g}", *self._share(n))
            for t, n in zip(self.targets, self.parameters, strict=True)
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
    by_path = leaves_by_path(adapters, is_leaf=is_adapter)
    parameters = tuple(count_params(by_path[path]) for path in targets)
    return Summary(tuple(targets.values()), parameters, count_params(params))
