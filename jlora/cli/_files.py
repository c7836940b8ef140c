"""The commands on files: arguments to the functions of `jlora.checkpoints`, which have the same names."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jlora.cli._command import add_command
from jlora.cli._done import DIFFERENT, DONE, REFUSED, Done, plain_fields
from jlora.cli._dry import add_dry_run
from jlora.cli._progress import progress_of
from jlora.errors import JloraError, listed, plain, shortened
from jlora.tables import text_table

if TYPE_CHECKING:
    from jlora.config import LoraConfig
    from jlora.diagnostics import Inspection

_LINE = 80  # characters of an error in a table

_ADAPTERS = "a folder of adapters: jlora's own, PEFT's or mlx-lm's; or a LoRA file of a diffusion model"
_FORMATS = ("own", "peft", "mlx")
_NAMES = ("gemma", "qwix", "openpi", "maxtext")
_WRITTEN = (*_FORMATS, "gguf", "kohya", "diffusers")
_TO = "the format to write; of the last three, for llama.cpp and for diffusion models, --out may name the file"
_TIED = "an output head that is the embedding too stays that: an adapter of one of them acts on both"
_VOCABULARY = "take over an embedding and a head with other rows, vocab_size and the tokenizer beside the adapter too"
_TABLE = "a .toml or .json file with tables [[row]]"
_CHECKPOINT = "a folder of safetensors in the layout of Hugging Face, sharded or not, or one file"


_FIELDS = {  # of the object that --json prints; the docstrings of the classes tell what each is
    "merge": "those of jlora.checkpoints.Merged",
    "unmerge": "those of jlora.checkpoints.Unmerged",
    "extract": '"out", "error_left" and those of jlora.compose.Extraction',
    "resize": '"out" and "config"',
    "combine": '"out" and "config"',
    "convert": '"out" and "config"',
    "inspect": (
        'those of jlora.diagnostics.Inspection, "norm" and "parameters"; of several folders a list "inspected" of such '
        'objects, each with "adapters", the folder, and an "error" in place of the rest where it cannot be read'
    ),
    "diff": '"is_identical", "counts" and those of jlora.diagnostics.Difference (adapters) or CheckpointDifference',
}


def add_file_commands(commands: Any) -> None:
    """Adds merge, unmerge, extract, resize, combine, convert, inspect and diff to the parser's commands."""
    _merge(_command(commands, "merge", _run_merge, "adapters into a checkpoint, in bounded memory"))
    _unmerge(_command(commands, "unmerge", _run_unmerge, "adapters out of a checkpoint again"))
    _extract(_command(commands, "extract", _run_extract, "the best adapters of a fine-tuned checkpoint"))
    _resize(_command(commands, "resize", _run_resize, "adapters of another rank"))
    _combine(_command(commands, "combine", _run_combine, "several adapters as one"))
    _convert(_command(commands, "convert", _run_convert, "adapters in another format"))
    _inspect(_command(commands, "inspect", _run_inspect, "what adapters hold, and whether anything looks wrong"))
    _diff(_command(commands, "diff", _run_diff, "how two adapters or two checkpoints differ"))


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], Done], help_: str
) -> argparse.ArgumentParser:
    return add_command(commands, name, run, help_, _FIELDS[name])


def _out(parser: argparse.ArgumentParser, *, form: bool = False) -> None:
    parser.add_argument("--out", "-o", required=True, metavar="FOLDER", help="the folder to write")
    parser.add_argument("--force", action="store_true", help="replace the folder where it is there")
    add_dry_run(parser)
    if form:
        parser.add_argument("--format", choices=_FORMATS, help="of the adapters that are written")


def _weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one for each adapter, 1 by default")


def _renames(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mapping", metavar="FILE", help=f"{_TABLE} of name and path: the adapters' names and the checkpoint's"
    )


def _experts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--transposed-experts",
        action=argparse.BooleanOptionalAction,
        help="whether the model keeps stacked experts as (experts, in, out), as GPT-OSS does, where neither the model "
        "type nor a shape says it",
    )


def _merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help=_CHECKPOINT)
    parser.add_argument("adapters", nargs="+", help=_ADAPTERS)
    _out(parser)
    _weights(parser)
    _renames(parser)
    _experts(parser)
    parser.add_argument("--tied", action="store_true", help=_TIED)
    parser.add_argument("--resize-vocabulary", action="store_true", help=_VOCABULARY)
    parser.add_argument("--keep-residual", action="store_true", help="keep what unmerge needs to be exact")


def _unmerge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="the folder that merge wrote")
    parser.add_argument("adapters", nargs="+", help="the adapters that were merged")
    _out(parser)
    _weights(parser)
    _renames(parser)
    _experts(parser)
    parser.add_argument("--tied", action="store_true", help="merged was with --tied")
    parser.add_argument(
        "--unrecorded",
        action="store_true",
        help="the adapters are in the checkpoint, though it has no jlora_merge.json",
    )


def _extract(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", help=_CHECKPOINT)
    parser.add_argument("tuned", help="the fine-tuned checkpoint, with the same tensors")
    _out(parser, form=True)
    parser.add_argument("--rank", type=int, default=16, help="of each adapter, at most (16)")
    parser.add_argument("--energy", type=float, help="the share of each difference that its rank has to keep, up to 1")
    parser.add_argument("--target", action="append", metavar="PATTERN", help="weights to adapt, such as '**/q_proj'")
    parser.add_argument("--exclude", action="append", metavar="PATTERN", default=[], help="weights to leave out")
    parser.add_argument(
        "--adapters-only",
        action="store_true",
        help="leave out what changed and has no adapter (norms, biases, new rows), and do not carry it whole",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random sketches (0)")


def _resize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", help=_ADAPTERS)
    parser.add_argument("--rank", type=int, required=True, help="the new rank")
    _out(parser, form=True)


def _combine(parser: argparse.ArgumentParser) -> None:
    from jlora.compose import MAGNITUDES, METHODS, VALUES

    parser.add_argument("adapters", nargs="+", help=_ADAPTERS)
    _out(parser, form=True)
    _weights(parser)
    parser.add_argument("--method", choices=METHODS, default="linear", help="how (linear)")
    parser.add_argument("--density", type=float, help="the share of numbers that pruning keeps")
    parser.add_argument("--rank", type=int, help="of the result, for the methods that end in svd")
    parser.add_argument("--majority-sign", choices=("total", "frequency"), default="total", help="of ties (total)")
    parser.add_argument("--seed", type=int, default=0, help="of random pruning (0)")
    parser.add_argument(
        "--values",
        choices=VALUES,
        default="same",
        help="which of the weights that several adapters save as a whole: all have to be the same (same), that of the "
        "first or the last adapter, their mean by weight, or none of them",
    )
    parser.add_argument(
        "--magnitudes",
        choices=MAGNITUDES,
        default="same",
        help="of DoRA: all have to be the same, and weights sum to 1 (same), or their mean by weight",
    )


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help=f"{_ADAPTERS}; with --names, a checkpoint, safetensors or Orbax's")
    parser.add_argument("--to", choices=_WRITTEN, required=True, help=_TO)
    _out(parser)
    parser.add_argument(
        "--mapping",
        metavar="FILE",
        help=f"{_TABLE} of name, path, transpose, reshape, stack; by default paths are the names in the Hugging Face "
        "model, with slashes for dots",
    )
    _experts(parser)
    _names(parser)
    parser.add_argument(
        "--base",
        metavar="CHECKPOINT",
        help="that the adapters are for: --to gguf reads its config.json; sd-scripts' names are found among its own; "
        "with --names it has the weights where the params hold LoRA alone",
    )
    parser.add_argument(
        "--component",
        metavar="NAME",
        help="of a diffusion model (unet, transformer, text_encoder, text_encoder_2 or _3), for --to kohya and "
        "diffusers where the names do not begin with one",
    )


def _names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--names", choices=_NAMES, help="read params that hold another library's LoRA")
    parser.add_argument(
        "--alpha",
        type=float,
        help="that qwix, openpi or MaxText was given; by default of openpi the rank, of MaxText what lies beside it",
    )


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", nargs="+", help=f"{_ADAPTERS}; several give a line each")
    parser.add_argument("--base", metavar="CHECKPOINT", help="to compare with: sizes of the updates, shares")
    _renames(parser)
    _experts(parser)
    _names(parser)


def _diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("left", help="a folder of adapters, or a checkpoint")
    parser.add_argument("right", help="another of the same kind")
    parser.add_argument("--base", help=f"{_CHECKPOINT}; adapters of the same weight of it are compared")
    names = "the left's names and the right's, or the adapters' and the base's"
    parser.add_argument("--mapping", metavar="FILE", help=f"{_TABLE} of name and path: {names}")


def _run_merge(arguments: argparse.Namespace) -> Done:
    from jlora import checkpoints

    with progress_of("merge", arguments) as show:
        done = checkpoints.merge(
            arguments.checkpoint,
            arguments.adapters,
            arguments.out,
            weights=arguments.weights,
            mapping=_mapping(arguments.mapping) or (),
            transposed_experts=arguments.transposed_experts,
            tied=arguments.tied,
            resize_vocabulary=arguments.resize_vocabulary,
            keep_residual=arguments.keep_residual,
            force=arguments.force,
            on_progress=show,
        )
    return Done(str(done), plain_fields(done))


def _run_unmerge(arguments: argparse.Namespace) -> Done:
    from jlora import checkpoints

    with progress_of("unmerge", arguments) as show:
        done = checkpoints.unmerge(
            arguments.checkpoint,
            arguments.adapters,
            arguments.out,
            weights=arguments.weights,
            mapping=_mapping(arguments.mapping) or (),
            transposed_experts=arguments.transposed_experts,
            tied=arguments.tied,
            unrecorded=arguments.unrecorded,
            force=arguments.force,
            on_progress=show,
        )
    return Done(str(done), plain_fields(done))


def _run_extract(arguments: argparse.Namespace) -> Done:
    from jlora import checkpoints

    with progress_of("extract", arguments) as show:
        report = checkpoints.extract(
            arguments.base,
            arguments.tuned,
            arguments.out,
            rank=arguments.rank,
            energy=arguments.energy,
            target_modules=arguments.target or "**",
            exclude_modules=arguments.exclude,
            form=arguments.format or "own",
            seed=arguments.seed,
            whole=not arguments.adapters_only,
            force=arguments.force,
            on_progress=show,
        )
    fields = {"out": arguments.out, "error_left": report.error, **plain_fields(report)}
    return Done(f"{report}\nwritten to {arguments.out}", fields)


def _run_resize(arguments: argparse.Namespace) -> Done:
    from jlora import checkpoints

    config = checkpoints.resize(
        arguments.adapters, arguments.out, arguments.rank, form=arguments.format, force=arguments.force
    )
    return _written(f"adapters of rank {arguments.rank} written to {arguments.out}", arguments, config)


def _run_combine(arguments: argparse.Namespace) -> Done:
    from jlora import checkpoints

    config = checkpoints.combine(
        arguments.adapters,
        arguments.out,
        arguments.weights,
        method=arguments.method,
        density=arguments.density,
        rank=arguments.rank,
        majority_sign=arguments.majority_sign,
        seed=arguments.seed,
        values=arguments.values,
        magnitudes=arguments.magnitudes,
        form=arguments.format,
        force=arguments.force,
    )
    text = f"{len(arguments.adapters)} adapters combined by {arguments.method}, written to {arguments.out}"
    return _written(text, arguments, config)


def _run_convert(arguments: argparse.Namespace) -> Done:
    from jlora import checkpoints

    config = checkpoints.convert(
        arguments.source,
        arguments.out,
        arguments.to,
        mapping=_mapping(arguments.mapping),
        transposed_experts=arguments.transposed_experts,
        names=arguments.names,
        alpha=arguments.alpha,
        base=arguments.base,
        component=arguments.component,
        force=arguments.force,
    )
    return _written(f"written to {arguments.out}", arguments, config)


def _written(text: str, arguments: argparse.Namespace, config: LoraConfig) -> Done:
    return Done(text, {"out": arguments.out, "config": config.to_dict()})


def _run_inspect(arguments: argparse.Namespace) -> Done:
    from jlora import checkpoints

    how = {
        "base": arguments.base,
        "mapping": _mapping(arguments.mapping) or (),
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
            mapping=_mapping(arguments.mapping) or (),
            on_progress=show,
        )
    fields = {"is_identical": found.is_identical, "counts": found.counts(), **plain_fields(found)}
    return Done(str(found), fields, DONE if found.is_identical else DIFFERENT)


def _mapping(path: str | None) -> Any:
    """The rows of a mapping that a file gives; None without a file."""
    from jlora.interop.peft import read_rows

    return None if path is None else read_rows(path)
