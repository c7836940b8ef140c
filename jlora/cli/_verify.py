"""The command verify: whether adapters are for a base, and an inference engine takes them."""

import argparse
import dataclasses
from typing import Any

from jlora.cli._command import add_command
from jlora.cli._done import DIFFERENT, DONE, Done, plain_fields
from jlora.errors import DataError

_ENGINES = ("peft", "vllm", "sglang")
_FIELDS = (
    '"is_right", "manifest" (the file that was written, or null) and those of jlora.checkpoints.Verification; each '
    'check has "answer", each engine "loads"'
)
_EXAMPLES = """\
examples:
  jlora verify base adapter --prompt "every day at noon"
  jlora verify base adapter --engine vllm --write-manifest adapter.json
  jlora verify base adapter --manifest adapter.json

Every tensor of the adapters has to have a weight in the base, and every weight that they target an adapter; shapes
have to fit, and no A or B may be all zero. Of the language models that jlora knows, the logits with the adapters have
to differ from the base's and to equal the merged model's, in float32: the memory holds 8 bytes a parameter.

Whether PEFT, vLLM and SGLang load the adapters is told by rules read off their sources; the versions are in the table.
"""


def add_verify_command(commands: Any) -> None:
    """Adds verify to the parser's commands."""
    help_ = "whether adapters are for a base, whole, and loaded by inference engines"
    parser = add_command(commands, "verify", _run, help_, _FIELDS)
    parser.epilog = f"{_EXAMPLES}\n{parser.epilog}"
    parser.add_argument("base", metavar="BASE", help="the folder of a Hugging Face model")
    parser.add_argument("adapters", metavar="ADAPTER", help="a folder of adapters, PEFT's for all of the checks")
    parser.add_argument("--prompt", metavar="TEXT", help="whose logits are computed (random tokens)")
    parser.add_argument("--files-only", action="store_true", help="compute no logits")
    parser.add_argument(
        "--engine",
        action="append",
        choices=_ENGINES,
        default=[],
        help="the exit code is 1 too where this one does not load it; may be given again",
    )
    parser.add_argument("--mapping", metavar="FILE", help="as for merge: the adapters' names and the base's")
    parser.add_argument("--manifest", metavar="FILE", help="the tensors have to be those of this manifest")
    parser.add_argument(
        "--write-manifest", metavar="FILE", help="write a hash of each tensor, where nothing is wrong with them"
    )


def _run(arguments: argparse.Namespace) -> Done:
    from jlora import checkpoints
    from jlora.interop.peft import read_rows

    if arguments.files_only and arguments.prompt is not None:
        raise DataError("--prompt is for logits, which --files-only leaves out: give one of them")
    mapping = () if arguments.mapping is None else read_rows(arguments.mapping)
    found = checkpoints.verify(arguments.base, arguments.adapters, mapping=mapping, manifest=arguments.manifest)
    if not arguments.files_only:
        from jlora.recipes import verify_logits

        logits = verify_logits(arguments.base, arguments.adapters, prompt=arguments.prompt)
        found = dataclasses.replace(found, checks=(*found.checks, logits))
    names = dict(zip(_ENGINES, found.engines, strict=False))
    unasked = [name for name in arguments.engine if name not in names]
    if unasked:
        raise DataError(f"{arguments.adapters}: {unasked[0]} reads PEFT's format: jlora convert --to peft writes it")
    is_right = found.is_right and all(names[name].loads for name in arguments.engine)
    lines = [str(found)]
    written = arguments.write_manifest if is_right else None
    if written is not None:
        checkpoints.write_manifest(arguments.adapters, written)
        lines.append(f"the manifest was written to {written}")
    elif arguments.write_manifest is not None:
        lines.append(f"{arguments.write_manifest} was not written, as not all is right")
    fields = {
        **plain_fields(found),
        "checks": [{**plain_fields(check), "answer": check.answer} for check in found.checks],
        "engines": [{**plain_fields(engine), "loads": engine.loads} for engine in found.engines],
        "is_right": is_right,
        "manifest": written,
    }
    return Done("\n\n".join(lines), fields, DONE if is_right else DIFFERENT)
