"""--dry-run: a command that reads, checks and reports everything, and writes nothing."""

import argparse
import textwrap
from collections.abc import Callable
from pathlib import Path

from jlora.cli._done import WIDTH, Done

_FIELDS = (
    'With --dry-run nothing is written, and exit codes and errors are the same. The object then has "dry_run", true, '
    'and "replaces", whether something that would be replaced lies there; what only writing would count is null. '
    "Merging computes no sums then, so that one which is too large for its dtype is found only as it is written."
)


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """The option, and a paragraph on it."""
    parser.add_argument("--dry-run", action="store_true", help="read, check and report everything, and write nothing")
    parser.epilog = f"{parser.epilog}\n\n{textwrap.fill(_FIELDS, WIDTH)}"


def dry_or_not(run: Callable[[argparse.Namespace], Done], arguments: argparse.Namespace) -> Done:
    """What a command does, or with --dry-run what it would do."""
    if not getattr(arguments, "dry_run", False):
        return run(arguments)
    from jlora.disk import dry_run

    with dry_run():
        done = run(arguments)
    out = Path(arguments.out)
    replaces = out.is_file() or (out.is_dir() and any(out.iterdir()))
    lines = ["dry run, nothing was written; without --dry-run:", done.text]
    lines += [f"replaced, wholly or in part: {arguments.out}"] if replaces else []
    return Done("\n".join(lines), {"dry_run": True, "replaces": replaces, **done.fields}, done.code)
