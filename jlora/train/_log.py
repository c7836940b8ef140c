"""Where the metrics of a run go."""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Logger(Protocol):
    """What `fit(log=)` writes to: a wrapper of two lines around TensorBoard, wandb or a database.

    >>> class Printer:
    ...     def write(self, row):
    ...         print(row)
    >>> isinstance(Printer(), Logger)
    True
    """

    def write(self, row: dict[str, Any], /) -> object:
        """Takes the metrics of a step: `step` as an int, every other value a float, which may be NaN."""


class MetricsLog:
    """Metrics as JSON lines, `{"step": 10, "loss": 0.5}`; nothing in it depends on the clock.

    A value that is not finite, which JSON cannot say, is left out of its row.

    Args:
      path: the file; lines of steps after `step` are dropped, as a resumed run writes them again.
      step: the step that the run starts from.
    """

    def __init__(self, path: str | Path, step: int = 0) -> None:
        self.path = Path(path)
        kept = [row for row in self.read_file(path) if row["step"] <= step] if step else []
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def write(self, row: dict[str, Any]) -> None:
        said = {name: value for name, value in row.items() if not isinstance(value, float) or math.isfinite(value)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(said, allow_nan=False) + "\n")

    @staticmethod
    def read_file(path: str | Path) -> list[dict[str, Any]]:
        """The lines of a file; a last one that a killed run left half written is dropped."""
        rows = []
        for line in Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows
