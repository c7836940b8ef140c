"""A command on files, with what all of them have."""

import argparse
import functools
from collections.abc import Callable
from typing import Any

from jlora.cli._done import Done, add_output_options
from jlora.cli._dry import dry_or_not


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], Done], help_: str, fields: str
) -> argparse.ArgumentParser:
    """Adds a command that is called as its function in `jlora.checkpoints`; `fields` are those of its object."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_,
        description=f"{help_[0].upper()}{help_[1:]}. In Python: jlora.checkpoints.{name.replace('-', '_')}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_output_options(parser, fields)
    parser.set_defaults(run=functools.partial(dry_or_not, run), command=name)
    return parser
