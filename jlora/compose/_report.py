"""What an extraction found, as a table."""

import dataclasses
import html
import math
from collections.abc import Mapping

from jlora.errors import listed
from jlora.tables import html_table, text_table

_COLUMNS = ("path", "shape", "rank", "energy", "error left")


@dataclasses.dataclass(frozen=True)
class Extracted:
    """How well one adapter stands for the difference of its weight.

    Attributes:
      path: of the weight; "" where one weight was given alone.
      shape: of the weight.
      rank: of the adapter.
      energy: the share of the squared Frobenius norm of the difference that the adapter has, 1 - error^2.
      error: ||D - A@B||_F / ||D||_F, with A and B as they are returned; 0 where D is zero.
      norm: ||D||_F.
    """

    path: str
    shape: tuple[int, ...]
    rank: int
    energy: float
    error: float
    norm: float


@dataclasses.dataclass(frozen=True)
class Extraction:
    """The weights of an extraction; `str` is a table for a terminal, a notebook shows it as HTML.

    Attributes:
      weights: the adapted ones, in the order of the params.
      unchanged: paths that the configuration targets and that did not change; they have no adapter.
      left_out: paths that changed and have no adapter, such as biases and norms: base and adapters together do not
        give these.
      whole: paths that changed and are carried as they are.
      why: path -> why it is left out.
    """

    weights: tuple[Extracted, ...]
    unchanged: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    why: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def error(self) -> float:
        """The relative error of all adapted weights together."""
        norm = math.hypot(*(weight.norm for weight in self.weights))
        return math.hypot(*(weight.error * weight.norm for weight in self.weights)) / norm if norm else 0.0

    @property
    def warning(self) -> str:
        """A line for each reason for which something that changed is left out; empty where nothing is."""
        reasons: dict[str, list[str]] = {}
        for path in self.left_out:
            reasons.setdefault(self.why.get(path, ""), []).append(path)
        lines = []
        for reason, paths in reasons.items():
            what = f"changed, but not adapted, and so not in the adapters{f' ({reason})' if reason else ''}"
            lines.append(f"{len(paths)} {what}: {listed(paths)}")
        return "\n".join(lines)

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to say beside the table, line by line."""
        carried = [f"{len(self.whole)} carried whole: {listed(self.whole)}"] if self.whole else []
        return (*carried, *self.warning.splitlines())

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of the table, a last row for the whole."""
        rows = [
            (w.path, "x".join(map(str, w.shape)), str(w.rank), f"{w.energy:.2%}", f"{w.error:.2e}")
            for w in self.weights
        ]
        count = f"{len(rows)} weight{'' if len(rows) == 1 else 's'}"
        return [*rows, (count, "", "", f"{1 - self.error**2:.2%}", f"{self.error:.2e}")]

    def __str__(self) -> str:
        *rows, total = self.rows()
        table = [text_table(_COLUMNS, rows, total, left=2)] if rows else []
        return "\n".join([*table, *self.notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        *rows, total = self.rows()
        table = html_table(_COLUMNS, rows, total) if rows else ""
        return table + "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
