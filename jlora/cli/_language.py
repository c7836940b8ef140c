"""What generate and eval share: the options that name a model and its adapters, and the file that they write."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jlora.errors import ConfigError, DataError, listed

if TYPE_CHECKING:
    from jlora.recipes import FolderAdapters, LanguageModel, LoadedModel

_DTYPES = ("float32", "bfloat16", "float16")


def add_model_options(parser: argparse.ArgumentParser, several: str) -> None:
    """The model and its adapters; `several` tells what is done with more than one."""
    parser.add_argument("folder", metavar="FOLDER", help="the folder of the model")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="ADAPTER",
        help=f"a folder of adapters, PEFT's or jlora's own; {several}",
    )
    parser.add_argument("--merged", action="store_true", help="add the adapters to the weights first")
    parser.add_argument("--dtype", choices=_DTYPES, help="of the weights; by default as they are in the folder")


def add_out_options(parser: argparse.ArgumentParser) -> None:
    """The file for the answers."""
    parser.add_argument("--out", "-o", metavar="FILE", help="write the answers as JSON lines")
    parser.add_argument("--force", action="store_true", help="replace the file where it is there")


def read_language(arguments: argparse.Namespace) -> LanguageModel:
    """The model that is named, its params not read yet.

    Raises:
      ConfigError: options that do not go together.
    """
    from jlora.recipes import read_language_model

    if arguments.merged and not arguments.adapter:
        raise ConfigError("--merged adds adapters to the weights: give --adapter")
    twice = sorted({name for name in arguments.adapter if arguments.adapter.count(name) > 1})
    if twice:
        raise ConfigError(f"--adapter: {listed(twice)} is given twice")
    return read_language_model(arguments.folder, dtype=arguments.dtype)


def read_adapters(arguments: argparse.Namespace, language: LanguageModel) -> list[FolderAdapters]:
    """The adapters that are named, checked against the model."""
    from jlora.recipes import read_adapter_folder

    return [read_adapter_folder(name, language) for name in arguments.adapter]


def adapted_models(base: LoadedModel, found: list[FolderAdapters], merged: bool) -> Iterator[LoadedModel]:
    """The base with each of the adapters."""
    for each in found:
        yield base.adapted(each, merged=merged)


@contextlib.contextmanager
def lines_written(path: str | None, force: bool) -> Iterator[Callable[[Any], object]]:
    """A function that writes a line of JSON to a file, which is there when the block ends without an error.

    Raises:
      DataError: it is there already, or cannot be written.
    """
    if path is None:
        yield lambda row: None
        return
    if Path(path).exists() and not (force and Path(path).is_file()):
        raise DataError(f"{path}: is there already; --force replaces a file")
    from jlora.disk import file_written_whole

    with file_written_whole(path) as file:
        yield lambda row: file.write(f"{json.dumps(row, ensure_ascii=False)}\n".encode())
