"""Metrics for TensorBoard, by the package tensorboardX."""

import importlib.util
import math
import shutil
import time
import weakref
from pathlib import Path
from typing import Any

from jlora.errors import ConfigError, DataError


def has_tensorboard() -> bool:
    """Whether the package tensorboardX is installed."""
    return importlib.util.find_spec("tensorboardX") is not None


class TensorBoardLog:
    """Metrics as an event file, which `tensorboard --logdir FOLDER` shows; a `Logger` for `fit(log=)`.

    A value that is not finite is left out of its row, as in a `MetricsLog`.

    Args:
      folder: where event files go; made where there is none. A run that starts from step 0 removes those that are
        there, and one that goes on hides their points after `step`, as it writes them again.
      step: the step that the run starts from.

    Raises:
      ConfigError: tensorboardX is not installed.
      DataError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, step: int = 0) -> None:
        if not has_tensorboard():
            raise ConfigError("the package tensorboardX is not installed: pip install tensorboardX")
        from tensorboardX.event_file_writer import EventsWriter

        if not step:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder}: cannot be made: {error.strerror}") from None
        # Not a SummaryWriter: its thread writes later, and what it still has is lost with the process.
        # The name has the time in seconds: a run that goes on at once has the step in it too.
        self._writer = EventsWriter(str(Path(folder) / "events"), f".{step}")
        weakref.finalize(self, self._writer.close)
        if step:
            self._write(step + 1, session_log={"status": "START"})

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row, `{"step": 10, "loss": 0.5}`, and has it on the disk."""
        finite = {name: value for name, value in row.items() if name != "step" and math.isfinite(value)}
        values = [{"tag": name, "simple_value": value} for name, value in finite.items()]
        self._write(row["step"], summary={"value": values})

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(step=step, wall_time=time.time(), **content))
        self._writer.flush()
