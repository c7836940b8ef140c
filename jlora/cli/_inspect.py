"""The commands that look at files and write none, inspect and diff: arguments to functions of `jlora.checkpoints`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jlora.cli._command import add_command
from jlora.cli._done import DIFFERENT, DONE, REFUSED, Done, plain_fields
from jlora.cli._progress import progress_of
from jlora.cli._shared import ADAPTERS, CHECKPOINT, TABLE, add_experts, add_mapping, add_names, read_mapping_rows
from jlora.errors import JloraError, listed, plain, shortened
from jlora.tables import text_table

if TYPE_CHECKING:
    from jlora.diagnostics import Inspection

_LINE = 80  # characters of an error in a table

_FIELDS = {  # of the object that --json prints; the docstrings of the classes tell what each is
    "inspect": (
        'those of jlora.diagnostics.Inspection, "norm" and "parameters"; of several folders a list "inspected" of such '
        'objects, each with "adapters", the folder, and an "error" in place of the rest where it cannot be read'
    ),
    "diff": '"is_identical", "counts" and those of jlora.diagnostics.Difference (adapters) or CheckpointDifference',
}


def add_inspect_and_diff(commands: Any) -> None:
    """Adds inspect and diff to the parser's commands."""
    help_ = "what adapters hold, and whether anything looks wrong"
    _inspect(add_command(commands, "inspect", _run_inspect, help_, _FIELDS["inspect"]))
    help_ = "how two adapters or two checkpoints differ"
    _diff(add_command(commands, "diff", _run_diff, help_, _FIELDS["diff"]))


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", nargs="+", help=f"{ADAPTERS}; several give a line each")
    parser.add_argument("--base", metavar="CHECKPOINT", help="to compare with: sizes of the updates, shares")
    add_mapping(parser)
    add_experts(parser)
    add_names(parser)


def _diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("left", help="a folder of adapters, or a checkpoint")
    parser.add_argument("right", help="another of the same kind")
    parser.add_argument("--base", help=f"{CHECKPOINT}; adapters of the same weight of it are compared")
    names = "the left's names and the right's, or the adapters' and the base's"
    parser.add_argument("--mapping", metavar="FILE", help=f"{TABLE} of name and path: {names}")


def _run_inspect(arguments: argparse.Namespace) -> Done:
    from jlora import checkpoints

    how = {
        "base": arguments.base,
        "mapping": read_mapping_rows(arguments.mapping) or (),
        "transposed_experts": arguments.transposed_experts,
        "names": arguments.names,
        "alpha": arguments.alpha,
    }
    if len(arguments.adapters) > 1:
        return _inspected_each(arguments.adapters, how)
    found = checkpoints.inspect(arguments.adapters[0], **how)
    return Done(str(found), _inspection_fields(found))


def _inspected_each(folders: Sequence[str], how: Mapping[str, Any]) -> Done:
    """A line for each folder; one that cannot be read has its error there, and does not hide the others.

    The whole error, with the way out, is said on standard error.
    """
    from jlora import checkpoints

    rows, found, errors = [], [], []
    for folder in folders:
        try:
            inspection = checkpoints.inspect(folder, **how)
        except (JloraError, OSError) as error:
            text = plain(str(error))
            errors.append(text)
            rows.append((plain(folder), "", "", "", "", shortened(text.removeprefix(f"{plain(folder)}: "), _LINE)))
            found.append({"adapters": folder, "error": text})
        else:
            ranks = sorted({entry.rank for entry in inspection.entries if entry.rank is not None})
            rows.append(
                (
                    plain(folder),
                    f"{len(inspection.entries):,}",
                    ", ".join(map(str, ranks)),
                    f"{inspection.parameters:,}",
                    f"{inspection.norm:.3g}",
                    listed(inspection.warnings, 1),
                )
            )
            found.append({"adapters": folder, **_inspection_fields(inspection)})
    table = text_table(("adapters", "entries", "rank", "parameters", "update", "what looks wrong"), rows, left=1)
    return Done(table, {"inspected": found}, REFUSED if errors else DONE, errors)


def _inspection_fields(found: Inspection) -> dict[str, Any]:
    return {**plain_fields(found), "norm": found.norm, "parameters": found.parameters}


def _run_diff(arguments: argparse.Namespace) -> Done:
    from jlora import checkpoints

    with progress_of("diff", arguments) as show:
        found = checkpoints.diff(
            arguments.left,
            arguments.right,
            base=arguments.base,
            mapping=read_mapping_rows(arguments.mapping) or (),
            on_progress=show,
        )
    fields = {"is_identical": found.is_identical, "counts": found.counts(), **plain_fields(found)}
    return Done(str(found), fields, DONE if found.is_identical else DIFFERENT)
