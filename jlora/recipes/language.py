"""A language model of a folder, and examples of JSON lines: what `[model] folder` and `[data] train` are short for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from jlora.errors import ConfigError
from jlora.fields import choice, integer, refusal
from jlora.recipes._language import LanguageModel, read_language_model
from jlora.text import Examples, Question, bucket, pack, read_examples, read_questions

_MOST_LENGTHS, _STEP = 4, 16  # of rows that are not packed: how many lengths, and what they are multiples of
DTYPES = ("float32", "bfloat16", "float16")
REMATS = ("layer",)


def model(folder: str, dtype: str | None = None, remat: str | None = None) -> LanguageModel:
    """The language model in a folder of Hugging Face's layout.

    Args:
      folder: with config.json, safetensors and tokenizer.json; `~` is the home folder.
      dtype: of the params, "float32", "bfloat16" or "float16"; by default as they are in the folder.
      remat: "layer" keeps the input of each layer alone for the gradient, and computes the rest again: less memory for
        about a third more time.

    Raises:
      ConfigError, DataError: as of `jlora.recipes.LanguageModel`.
    """
    if not isinstance(folder, str) or not folder:
        raise refusal("model.folder", folder, "the path of a folder")
    if dtype is not None:
        choice("model.dtype", dtype, DTYPES)
    if remat is not None:
        choice("model.remat", remat, REMATS)
    return read_language_model(folder, dtype=dtype, remat=remat)


def data(
    language: LanguageModel,
    train: str,
    eval: str,
    length: int = 512,
    packed: bool = True,
    long: str = "cut",
    template: bool = False,
    seed: int = 0,
    batch_size: int = 1,
    console: Console | None = None,
) -> tuple[Any, Any, Sequence[Question]]:
    """Files of JSON lines as the data of a job.

    Args:
      language: the model that is trained.
      train, eval: the files, as `jlora.text.read_examples` reads them.
      length: of a row, in tokens; the most that an example may have.
      packed: whether a row holds as many examples as fit; else each example has one, of one of a few lengths.
      long: what is done with longer examples, "cut" or "drop".
      template: whether prompts and completions that are strings go through the model's chat template.
      seed: of how examples are packed.
      batch_size: rows of a step; no length of rows is left with fewer.
      console: where it is said what was read.

    Returns:
      The rows for training, those for evaluation, which are always packed, and the questions of the evaluation file.

    Raises:
      ConfigError, DataError: files that cannot be read, lines that are no examples, a length that the model has not.
    """
    console = console or Console(quiet=True)
    for name, value in (("train", train), ("eval", eval)):
        if not isinstance(value, str) or not value:
            raise refusal(f"data.{name}", value, "the path of a file of JSON lines")
    for name, flag in (("packed", packed), ("template", template)):
        if not isinstance(flag, bool):
            raise refusal(f"data.{name}", flag, "true or false")
    seed = integer("data.seed", seed, 0)
    if integer("data.length", length, 2) > language.config.max_positions:
        raise refusal("data.length", length, f"at most {language.config.max_positions:,}, the positions of the model")
    tokenizer = language.tokenizer
    examples, read = read_examples(Path(train).expanduser(), tokenizer, length=length, long=long, template=template)
    tests, tested = read_examples(Path(eval).expanduser(), tokenizer, length=length, long=long, template=template)
    rows: Any
    if packed:
        rows, packing = pack(examples, length, seed=seed, pad=tokenizer.pad)
    else:
        rows, packing = bucket(examples, _lengths(examples, length, batch_size), pad=tokenizer.pad)
    test_rows, test_packing = pack(tests, length, seed=seed, pad=tokenizer.pad)
    programs = 1 if packed else len(rows)
    compiled = "once" if programs == 1 else f"{programs} times, once for each length of rows"
    for line in (read, packing, f"the step of training is compiled {compiled}", tested, test_packing):
        console.out(str(line), highlight=False)
    return rows, test_rows, read_questions(Path(eval).expanduser(), template=template, completed=True)


def _lengths(examples: Examples, most: int, batch_size: int) -> list[int]:
    """A few lengths of rows, none with fewer examples than a batch: each is a shape that is compiled.

    Raises:
      ConfigError: there are fewer examples than a batch.
    """
    if len(examples) < batch_size:
        raise ConfigError(f"train.batch_size = {batch_size}: wanted at most {len(examples)}, the examples")
    rounded = np.minimum(-(-examples.lengths // _STEP) * _STEP, most)
    shares = np.arange(1, _MOST_LENGTHS + 1) / _MOST_LENGTHS
    wanted = sorted({int(length) for length in np.quantile(rounded, shares, method="higher")})
    kept: list[int] = []
    for length in reversed(wanted):  # the longest first: rows that are too few for a batch go to the next longer length
        if not kept:
            kept.append(length)
            continue
        longer = np.count_nonzero((rounded > length) & (rounded <= kept[-1]))
        if longer >= batch_size:
            kept.append(length)
    shortest = np.count_nonzero(rounded <= kept[-1])
    return sorted(kept if shortest >= batch_size or len(kept) == 1 else kept[:-1])
