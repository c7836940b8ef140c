"""The curve of a run as a picture."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jlora.disk import write_whole

_COLORS = {"loss": "tab:blue", "accuracy": "tab:orange", "token_accuracy": "tab:orange"}


def write_curve(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draws the loss, and the accuracy (of classes or tokens) where there is one, of training (line) and test (dots).

    Args:
      path: of the PNG file.
      rows: the metrics of a run, as `MetricsLog` writes them.

    Raises:
      DataError: the file cannot be written.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.add_subplot()
    axes = {"loss": left}
    for name in ("accuracy", "token_accuracy"):
        if any(name in row for row in rows):
            axes[name] = left.twinx()
            axes[name].set_ylim(0, 1.02)
            break
    for name, axis in axes.items():
        for key, style in ((name, {"linewidth": 1.5}), (f"test_{name}", {"linestyle": "none", "marker": "o"})):
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), color=_COLORS[name], label=key.replace("_", " "), **style)
        axis.set_ylabel(name.replace("_", " "), color=_COLORS[name])
    left.set_xlabel("step")
    left.set_ylim(bottom=0)
    handles = [line for axis in axes.values() for line in axis.get_lines()]
    if handles:
        left.legend(handles=handles, loc="center right")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_whole(path, picture.getvalue())
