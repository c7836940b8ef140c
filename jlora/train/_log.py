"""Where the metrics of a run go."""

import json
import math
import os
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jlora.disk import read_json_lines, reason, write_whole
from jlora.errors import DataError, shortened


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

    Attributes:
      values, called: the types of what a row says, and a word for them; other rows are damaged.
    """

    values: tuple[type, ...] = (int, float)
    called = "numbers"

    def __init__(self, path: str | Path, step: int = 0) -> None:
        self.path = Path(path)
        kept = [row for row in self.read_file(path) if row["step"] <= step] if step else []
        write_whole(self.path, "".join(map(_line, kept)).encode("utf-8"))

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row.

        Raises:
          DataError: the system refuses, as for a full disk.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(row))
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written: {reason(error)}") from None

    @classmethod
    def read_file(cls, path: str | Path) -> list[dict[str, Any]]:
        """The rows in a file, none where there is no file; a last one that a killed run left half written is dropped.

        Raises:
          DataError: a file that cannot be read, or a line that is no row; the message says which.
        """
        if not os.path.lexists(path):
            return []
        rows = read_json_lines(path)
        for number, row in enumerate(rows, 1):
            if type(row.get("step")) is not int or not all(type(value) in cls.values for value in row.values()):
                raise DataError(f"{path}: row {number}: found {shortened(row)}, wanted a step and {cls.called}")
        return rows


def _line(row: dict[str, Any]) -> str:
    said = {name: value for name, value in row.items() if not isinstance(value, float) or math.isfinite(value)}
    return json.dumps(said, allow_nan=False) + "\n"
