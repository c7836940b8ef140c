"""What was measured, as one table and as JSON."""

import json
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from benchmarks.forms import FLOORS, FORMS
from benchmarks.measure import COMPILES, Cell, Cells
from benchmarks.products import ALPHA, RANK
from benchmarks.workloads import WORKLOADS
from jlora.tables import text_table

Results = Mapping[str, Cells]
DETAILED = ("A", "B")
PACKAGES = ("jlora", "jax", "jaxlib", "numpy", "flax", "optax", "gemma", "qwix", "quax")


def floor_of(cells: Cells) -> Cell | None:
    """The faster floor, by which everything is divided."""
    floors = [cells[name] for name in FLOORS if name in cells and cells[name].median is not None]
    return min(floors, key=lambda cell: cell.median or 0.0, default=None)


def ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def ratios(cells: Cells, form: str) -> dict[str, float | None]:
    """A form's numbers over the floor's; of compiling, over those of hand_flat."""
    cell, floor, hand = cells.get(form, Cell()), floor_of(cells) or Cell(), cells.get("hand_flat", Cell())
    return {
        "step": ratio(cell.median, floor.median),
        "flops": ratio(cell.flops, floor.flops),
        "compile": ratio(cell.compile_median, hand.compile_median),
    }


def shown(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(results: Results) -> str:
    """Rows are forms; the footer says what 1.00 is."""
    details = [name for name in DETAILED if name in results]
    header = ["step / floor", *results]
    header += [f"{name} {what}" for name in details for what in ("FLOP", "MB", "compile")]
    measured = [form for form in FORMS if any(form in cells for cells in results.values())]
    rows = []
    for form in measured:
        row = [form, *(shown(ratios(cells, form)["step"]) for cells in results.values())]
        for name in details:
            found, temp = ratios(results[name], form), results[name].get(form, Cell()).temp_bytes
            row += [shown(found["flops"]), shown(ratio(temp, 1e6), 0), shown(found["compile"])]
        rows.append(row)
    footer = ["1.00 is", *(unit((floor_of(cells) or Cell()).median, 1e-3, "ms") for cells in results.values())]
    for name in details:
        floor, hand = floor_of(results[name]) or Cell(), results[name].get("hand_flat", Cell())
        footer += [unit(floor.flops, 1e9, "G"), "", unit(hand.compile_median, 1, "s", 1)]
    return text_table(header, rows, footer)


def unit(value: float | None, one: float, name: str, digits: int = 0) -> str:
    return "-" if value is None else f"{value / one:.{digits}f} {name}"


def missing(results: Results) -> dict[str, list[str]]:
    """Why a cell is empty -> where."""
    reasons: dict[str, list[str]] = {}
    for name, cells in results.items():
        for form, cell in cells.items():
            if cell.missing:
                reasons.setdefault(cell.missing, []).append(f"{form} on {name}")
    return reasons


def as_data(results: Results, repeats: int, complete: bool) -> dict[str, Any]:
    """Everything, raw samples too, and what it was measured with; nothing that names the machine."""
    return {
        "complete": complete,
        "settings": {"rank": RANK, "alpha": ALPHA, "repeats": repeats, "compiles": min(COMPILES, repeats)},
        "versions": versions(),
        "workloads": {
            name: {
                "about": WORKLOADS[name].about,
                "floor": next((form for form in FLOORS if cells.get(form) is floor_of(cells)), None),
                "forms": {form: cell_data(cells, form) for form in cells},
            }
            for name, cells in results.items()
        },
    }


def cell_data(cells: Cells, form: str) -> dict[str, Any]:
    cell = cells[form]
    if cell.missing:
        return {"missing": cell.missing}
    return {
        "median_seconds": cell.median,
        "compile_median_seconds": cell.compile_median,
        "flops": cell.flops,
        "temp_bytes": cell.temp_bytes,
        "ratios": ratios(cells, form),
        "seconds": cell.seconds,
        "compile_seconds": cell.compile_seconds,
    }


def versions() -> dict[str, Any]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        **found,
        "cpu_count": os.cpu_count(),
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
    }


def write(path: Path, data: dict[str, Any]) -> None:
    """Writes beside the file first: a run that is killed leaves the last whole one."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
