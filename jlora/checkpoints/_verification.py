"""What `verify` found, and how it is shown."""

import dataclasses
from collections.abc import Iterator, Sequence

from jlora.errors import plain
from jlora.interop.engines import Verdict
from jlora.tables import text_table

_MOST_SHOWN = 12


@dataclasses.dataclass(frozen=True)
class Check:
    """A question and its answer.

    Attributes:
      name: the question.
      found: what was found, in a few words; why it was not asked, where it was not.
      problems: what is not right.
      asked: whether it was.
    """

    name: str
    found: str
    problems: tuple[str, ...] = ()
    asked: bool = True

    @property
    def answer(self) -> str:
        """`ok`, `wrong` or `-`."""
        return "-" if not self.asked else "wrong" if self.problems else "ok"


@dataclasses.dataclass(frozen=True)
class Kind:
    """Weights whose names differ by numbers alone, such as those of a module in each layer.

    Attributes:
      name: of the weights in the base, `*` for numbers.
      adapted, wanted: how many of them the adapters change, and how many they say that they change.
      shape: of the weight in the base; () where several are found, or it is not known.
      ranks: of the adapters.
    """

    name: str
    adapted: int
    wanted: int
    shape: tuple[int, ...]
    ranks: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
      checks: the questions, in order.
      kinds: the weights that the adapters are for.
      engines: of PEFT's format, whether each engine loads it; of others none.
    """

    checks: tuple[Check, ...]
    kinds: tuple[Kind, ...] = ()
    engines: tuple[Verdict, ...] = ()

    @property
    def is_right(self) -> bool:
        """Whether no check found a problem; what an engine lacks is none of the adapters' own."""
        return not any(check.problems for check in self.checks)

    def __str__(self) -> str:
        parts = []
        if self.kinds:
            rows = [_kind_row(kind) for kind in self.kinds]
            parts.append(text_table(("weights", "adapted", "shape", "rank"), rows))
        rows = [(check.name, check.answer, check.found) for check in self.checks]
        parts.append(text_table(("check", "", "found"), rows, left=3))
        wrong = [f"{check.name}: {problem}" for check in self.checks for problem in _few(check.problems)]
        if wrong:
            parts.append("\n".join(wrong))
        if self.engines:
            rows = [row for found in self.engines for row in _engine_rows(found)]
            parts.append(text_table(("engine", "loads it", "with, or why not"), rows, left=3))
        return "\n\n".join(parts)


def _kind_row(kind: Kind) -> Sequence[str]:
    shape = " x ".join(map(str, kind.shape))
    return (kind.name, f"{kind.adapted:,} of {kind.wanted:,}", shape, ", ".join(map(str, kind.ranks)))


def _engine_rows(found: Verdict) -> Iterator[Sequence[str]]:
    """A row for each reason; the engine in the first."""
    name, answer = f"{found.engine} {found.version}", "yes" if found.loads else "no"
    for reason in found.problems or found.options or ("",):
        yield name, answer, reason
        name = answer = ""


def _few(problems: Sequence[str]) -> list[str]:
    more = [f"and {len(problems) - _MOST_SHOWN:,} more"] if len(problems) > _MOST_SHOWN else []
    return [*(plain(problem) for problem in problems[:_MOST_SHOWN]), *more]
