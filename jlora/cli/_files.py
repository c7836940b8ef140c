"""The commands that write files: arguments to the functions of `jlora.checkpoints`, which have the same names."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jlora.cli._command import add_command
from jlora.cli._done import Done, plain_fields
from jlora.cli._dry import add_dry_run
from jlora.cli._progress import progress_of
from jlora.cli._shared import ADAPTERS, CHECKPOINT, TABLE, add_experts, add_mapping, add_names, read_mapping_rows

if TYPE_CHECKING:
    from jlora.config import LoraConfig


_FORMATS = ("own", "peft", "mlx")
_WRITTEN = (*_FORMATS, "gguf", "kohya", "diffusers")
_TO = "the format to write; of the last three, for llama.cpp and for diffusion models, --out may name the file"
_TIED = "an output head that is the embedding too stays that: an adapter of one of them acts on both"
_VOCABULARY = "take over an embedding and a head with other rows, vocab_size and the tokenizer beside the adapter too"


_FIELDS = {  # of the object that --json prints; the docstrings of the classes tell what each is
    "merge": "those of jlora.checkpoints.Merged",
    "unmerge": "those of jlora.checkpoints.Unmerged",
    "extract": '"out", "error_left" and those of jlora.compose.Extraction',
    "resize": '"out" and "config"',
    "combine": '"out" and "config"',
    "convert": '"out" and "config"',
}


def add_file_commands(commands: Any) -> None:
    """Adds merge, unmerge, extract, resize, combine and convert to the parser's commands."""
    _merge(_command(commands, "merge", _run_merge, "adapters into a checkpoint, in bounded memory"))
    _unmerge(_command(commands, "unmerge", _run_unmerge, "adapters out of a checkpoint again"))
    _extract(_command(commands, "extract", _run_extract, "the best adapters of a fine-tuned checkpoint"))
    _resize(_command(commands, "resize", _run_resize, "adapters of another rank"))
    _combine(_command(commands, "combine", _run_combine, "several adapters as one"))
    _convert(_command(commands, "convert", _run_convert, "adapters in another format"))


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


def _merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help=CHECKPOINT)
    parser.add_argument("adapters", nargs="+", help=ADAPTERS)
    _out(parser)
    _weights(parser)
    add_mapping(parser)
    add_experts(parser)
    parser.add_argument("--tied", action="store_true", help=_TIED)
    parser.add_argument("--resize-vocabulary", action="store_true", help=_VOCABULARY)
    parser.add_argument("--keep-residual", action="store_true", help="keep what unmerge needs to be exact")


def _unmerge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="the folder that merge wrote")
    parser.add_argument("adapters", nargs="+", help="the adapters that were merged")
    _out(parser)
    _weights(parser)
    add_mapping(parser)
    add_experts(parser)
    parser.add_argument("--tied", action="store_true", help="merged was with --tied")
    parser.add_argument(
        "--unrecorded",
        action="store_true",
        help="the adapters are in the checkpoint, though it has no jlora_merge.json",
    )


def _extract(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", help=CHECKPOINT)
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
    parser.add_argument("adapters", help=ADAPTERS)
    parser.add_argument("--rank", type=int, required=True, help="the new rank")
    _out(parser, form=True)


def _combine(parser: argparse.ArgumentParser) -> None:
    from jlora.compose import MAGNITUDES, METHODS, VALUES

    parser.add_argument("adapters", nargs="+", help=ADAPTERS)
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
    parser.add_argument("source", help=f"{ADAPTERS}; with --names, a checkpoint, safetensors or Orbax's")
    parser.add_argument("--to", choices=_WRITTEN, required=True, help=_TO)
    _out(parser)
    parser.add_argument(
        "--mapping",
        metavar="FILE",
        help=f"{TABLE} of name, path, transpose, reshape, stack; by default paths are the names in the Hugging Face "
        "model, with slashes for dots",
    )
    add_experts(parser)
    add_names(parser)
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


def _run_merge(arguments: argparse.Namespace) -> Done:
    from jlora import checkpoints

    with progress_of("merge", arguments) as show:
        done = checkpoints.merge(
            arguments.checkpoint,
            arguments.adapters,
            arguments.out,
            weights=arguments.weights,
            mapping=read_mapping_rows(arguments.mapping) or (),
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
            mapping=read_mapping_rows(arguments.mapping) or (),
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
        mapping=read_mapping_rows(arguments.mapping),
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
