"""Whole jobs: what a run writes and reports, which folders it takes, and what a configuration may say."""

import contextlib
import dataclasses
import inspect
import io
import json
import re
import shutil
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from jlora import ConfigError, DataError, TargetError, count_params, init_lora, load_adapters, merge_params
from jlora.recipes import JobConfig, OptimizerConfig, cross_entropy, run_job
from jlora.storage import read_metadata
from jlora.train import MetricsLog

# What a user would write: a model of 5*7+7 + 7*3+3 parameters, and a test set larger than one chunk of evaluation.
MINE = """
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(7, name="body")(x)))

def model(seed=0):
    return Net(), Net().init(jax.random.key(seed), jnp.zeros((1, 5)))["params"]

def data(train=40, test=1030):
    x = np.random.default_rng(0).standard_normal((train + test, 5)).astype(np.float32)
    examples = {"inputs": x, "labels": x[:, :3].argmax(-1).astype(np.int32)}
    return tuple({name: a[part] for name, a in examples.items()} for part in (slice(train), slice(train, None)))

def squares(outputs, batch):
    return jnp.mean((outputs - jax.nn.one_hot(batch["labels"], 3)) ** 2), {}

def plain(outputs, batch):
    return squares(outputs, batch)[0]

def weighted(outputs, batch):
    from jlora.train import Mean, Sum
    some = batch["labels"] != 0
    errors = jnp.abs(outputs - jax.nn.one_hot(batch["labels"], 3)).sum(-1)
    return Mean((errors * some).sum(), some.sum()), {"count": Sum(some.sum()), "mean": errors.mean()}

def no_pair():
    return 1

def no_inputs():
    return {"x": np.zeros(9)}, {"x": np.zeros(9)}

NUMBER = 3
ROWS = []

def log(row):
    ROWS.append(row)
"""
TRAIN = {"steps": 8, "batch_size": 8, "log_every": 2, "eval_every": 4, "checkpoint_every": 4}
LORA_SCALARS = (5 * 2 + 2 * 7) + (7 * 2 + 2 * 3)
ALL_SCALARS = (5 * 7 + 7) + (7 * 3 + 3)


@pytest.fixture(scope="module", autouse=True)
def mine(tmp_path_factory):
    """The user's module, `mine_of_test_job`."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine_of_test_job.py").write_text(MINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield __import__("mine_of_test_job")


def plan(folder="unused", **sections):
    """The sections of a job of the user's model and data."""
    plain = {
        "model": {"function": "mine_of_test_job:model"},
        "data": {"function": "mine_of_test_job:data"},
        "lora": {"rank": 2, "alpha": 4.0},
        "optimizer": {"learning_rate": 0.1, "weight_decay": 0.01},
        "train": TRAIN,
        "full": {"enabled": False},
        "output": {"folder": str(folder)},
    }
    return {name: {**plain.get(name, {}), **sections.get(name, {})} for name in plain}


def run(folder, console=None, resume=False, extend=False, force=False, **sections):
    job = JobConfig.from_dict(plan(folder, **sections))
    return job, run_job(job, resume=resume, extend=extend, force=force, console=console or Console(quiet=True))


@dataclasses.dataclass
class Run:
    job: JobConfig
    results: list
    folder: Path
    printed: str = ""


@pytest.fixture(scope="module")
def users(tmp_path_factory):
    """A run of the user's model and data, with full fine-tuning to compare with."""
    folder = tmp_path_factory.mktemp("users") / "made" / "here"
    text = io.StringIO()
    sections = {"full": {"enabled": True, "learning_rate": 0.02}, "output": {"log": "mine_of_test_job:log"}}
    job, results = run(folder, Console(file=text, width=120), **sections)
    return Run(job, results, folder, text.getvalue())


@pytest.fixture(scope="module")
def shifted(tmp_path_factory):
    """A run of the digits recipe on a tiny model, on a quiet console."""
    folder = tmp_path_factory.mktemp("shifted")
    sizes = {"width": 6, "depth": 1, "heads": 2, "hidden": 5, "patch": 4, "steps": 5, "cache": str(folder / "cache")}
    lora = {"target_modules": ["patches", "block_*/attention", "block_*/up"]}
    model, data = ({"function": f"jlora.recipes.digits:{name}"} for name in ("model", "data"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        job, results = run(folder / "run", model={**model, **sizes}, data=data, lora=lora, train={"batch_size": 64})
    return Run(job, results, folder / "run", printed.getvalue())


def restored(run):
    """The model, its params and test set, and the adapters of the folder."""
    module, params = run.job.model.call("model")
    _, test = run.job.data.call("data")
    adapters, config = load_adapters(run.folder / "adapters", params=params)
    found = {name: getattr(config, name) for name in ("exclude_modules", "factorizations")}
    assert config == run.job.lora.replace(**found)
    return module, params, test, config, adapters


class TestRun:
    def test_the_folder_holds_what_it_says(self, users):
        wanted = {"adapters", "checkpoints", "config.toml", "curve.png", "metrics.jsonl", "results.json", "tensorboard"}
        assert {path.name for path in users.folder.iterdir()} == wanted
        assert (users.folder / "curve.png").read_bytes().startswith(b"\x89PNG\r\n")
        assert JobConfig.read(users.folder / "config.toml") == users.job
        assert {path.name for path in (users.folder / "checkpoints").iterdir() if path.is_dir()} == {"4", "8"}
        assert json.loads((users.folder / "results.json").read_text()) == [
            dataclasses.asdict(result) for result in users.results
        ]

    def test_the_three_ways_are_compared_by_what_they_train_and_hold(self, users):
        costs = [(result.name, result.parameters, result.optimizer_bytes) for result in users.results]
        moments_and_two_counts = [8 * scalars + 8 for scalars in (LORA_SCALARS, ALL_SCALARS)]
        assert costs == [
            ("frozen base", 0, 0),
            ("LoRA", LORA_SCALARS, moments_and_two_counts[0]),
            ("full fine-tuning", ALL_SCALARS, moments_and_two_counts[1]),
        ]
        assert [result.seconds > 0 for result in users.results] == [False, True, True]

    def test_metrics_are_rows_of_training_and_test(self, users):
        rows = MetricsLog.read_file(users.folder / "metrics.jsonl")
        assert [row["step"] for row in rows] == [2, 4, 6, 8]
        assert [set(row) for row in rows] == [
            {"step", "loss", "accuracy", "grad_norm", *tests}
            for tests in ((), ("test_loss", "test_accuracy"), (), ("test_loss", "test_accuracy"))
        ]
        assert {name: rows[-1][f"test_{name}"] for name in ("loss", "accuracy")} == users.results[1].metrics

    def test_a_function_gets_the_same_rows(self, users, mine):
        assert MetricsLog.read_file(users.folder / "metrics.jsonl") == mine.ROWS

    def test_the_adapters_say_of_what_they_are_and_how_they_do(self, users):
        wanted = {"model": "mine_of_test_job:model", "steps": 8, "metrics": users.results[1].metrics, "model_state": 0}
        assert read_metadata(users.folder / "adapters") == wanted

    @pytest.mark.parametrize("which", ["users", "shifted"])
    def test_the_adapters_of_the_folder_merged_give_what_is_reported(self, which, request):
        run = request.getfixturevalue(which)
        module, params, test, config, adapters = restored(run)
        for result, weights in zip(run.results, (params, merge_params(params, adapters, config)), strict=False):
            logits = np.asarray(jax.jit(module.apply)({"params": weights}, test["inputs"]), np.float64)
            right = logits.argmax(-1) == test["labels"]
            logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            loss = -logs[np.arange(len(right)), test["labels"]].mean()
            assert result.metrics["accuracy"] == pytest.approx(right.mean(), abs=1.5 / len(right))
            assert result.metrics["loss"] == pytest.approx(loss, rel=1e-5)
        assert count_params(adapters) == run.results[1].parameters
        assert run.results[1].metrics["loss"] < run.results[0].metrics["loss"]

    def test_tables_progress_and_results_are_printed(self, users):
        wanted = [
            r"body/kernel +5x7 +io +2 +4 +24 +36\.36%",
            r"2 weights of 66 parameters .* 44 +66\.67%",
            r"LoRA .* 8/8 +loss \d\.\d{3} +accuracy \d\.\d{3}",
            r"full fine-tuning .* 8/8 ",
            rf"frozen base +{users.results[0].metrics['accuracy']:.1%} +0 +0 B",
            rf"LoRA +{users.results[1].metrics['accuracy']:.1%} +44 +360 B +\d+\.\d",
            rf"full fine-tuning +{users.results[2].metrics['accuracy']:.1%} +66 +536 B +\d+\.\d",
            rf"written to {re.escape(str(users.folder))}: adapters, checkpoints, config\.toml, curve\.png, .*",
        ]
        assert [line for line in wanted if not re.search(line, users.printed)] == []

    def test_the_same_seed_gives_the_same_numbers_bitwise(self, users, tmp_path):
        again = Run(*run(tmp_path / "again"), tmp_path / "again")
        assert (again.folder / "metrics.jsonl").read_bytes() == (users.folder / "metrics.jsonl").read_bytes()
        jax.tree.map(np.testing.assert_array_equal, restored(again)[-1], restored(users)[-1])
        assert again.results[1].metrics == users.results[1].metrics

    @pytest.mark.parametrize("change", [{"train": {"seed": 1}}, {"lora": {"seed": 1}}, {"lora": {"dropout": 0.5}}])
    def test_every_seed_and_the_dropout_matter(self, users, tmp_path, change):
        run(tmp_path / "other", **change)
        assert (tmp_path / "other" / "metrics.jsonl").read_bytes() != (users.folder / "metrics.jsonl").read_bytes()

    def test_a_loss_without_an_accuracy_reports_the_loss(self, tmp_path):
        _, results = run(tmp_path / "run", train={"loss": "mine_of_test_job:squares", "accumulate": 4})
        assert [set(result.metrics) for result in results] == [{"loss"}, {"loss"}]
        assert (tmp_path / "run" / "curve.png").stat().st_size > 0

    def test_a_loss_may_be_a_scalar_alone(self, tmp_path):
        for name in ("plain", "squares"):
            run(tmp_path / name, train={"loss": f"mine_of_test_job:{name}"})
        rows = [MetricsLog.read_file(tmp_path / name / "metrics.jsonl") for name in ("plain", "squares")]
        assert rows[0] == rows[1]

    def test_a_loss_that_says_of_what_kind_its_values_are_is_tested_so_over_chunks(self, tmp_path):
        job, results = run(tmp_path / "run", train={"loss": "mine_of_test_job:weighted"})
        module, params = job.model.call("model")
        test = job.data.call("data")[1]
        outputs = np.asarray(module.apply({"params": params}, test["inputs"]), np.float64)
        errors, some = np.abs(outputs - np.eye(3)[test["labels"]]).sum(-1), test["labels"] != 0
        assert results[0].metrics["loss"] == pytest.approx(errors[some].mean(), rel=1e-5)
        assert results[0].metrics["count"] == some.sum()
        assert results[0].metrics["mean"] == pytest.approx(errors.mean(), rel=1e-5)

    def test_a_quiet_console_gets_nothing_from_the_training_of_the_base_either(self, shifted):
        assert shifted.printed == ""


class TestOptimizers:
    """[optimizer] for adapters: what is trained, counted and kept differs, full fine-tuning does not."""

    def test_a_that_is_frozen_stays_is_not_counted_and_has_no_moments(self, tmp_path):
        job, (_, result) = run(tmp_path / "run", optimizer={"freeze_a": True})
        _, params, _, config, adapters = restored(Run(job, [], tmp_path / "run"))
        begun = init_lora(None, params, config)
        for name in ("body", "head"):
            np.testing.assert_array_equal(adapters[name]["kernel"]["A"], begun[name]["kernel"]["A"])
            assert np.abs(adapters[name]["kernel"]["B"]).max() > 0
        assert result.parameters == 2 * 7 + 2 * 3
        assert result.optimizer_bytes == 8 * result.parameters + 8

    def test_b_moves_by_its_own_rate(self, tmp_path):
        found = {}
        for ratio in (1.0, 4.0):
            options = {"name": "sgd", "weight_decay": 0.0, "b_ratio": ratio, "learning_rate": 1e-3}
            job, _ = run(tmp_path / str(ratio), optimizer=options, train={"steps": 1, "log_every": 1})
            found[ratio] = restored(Run(job, [], tmp_path / str(ratio)))[4]["head"]["kernel"]["B"]
        np.testing.assert_allclose(found[4.0], 4 * np.asarray(found[1.0]), rtol=1e-5)

    @pytest.mark.parametrize("own", [{"preconditioner": "riemannian", "b_ratio": 2.0}, {"freeze_a": True}])
    def test_a_run_goes_on_bitwise(self, own, tmp_path):
        options = {**own, "learning_rate": 0.01, "schedule": "constant"}
        run(tmp_path / "whole", optimizer=options)
        run(tmp_path / "parts", optimizer=options, train={"steps": 4})
        run(tmp_path / "parts", optimizer=options, extend=True)
        whole, parts = (load_adapters(tmp_path / name / "adapters")[0] for name in ("whole", "parts"))
        jax.tree.map(np.testing.assert_array_equal, whole, parts)

    def test_full_fine_tuning_has_the_plain_optimizer(self):
        config = OptimizerConfig(name="sgd", b_ratio=4.0, freeze_a=False, preconditioner="riemannian")
        params = {"kernel": jnp.ones((2, 3))}
        plain, made = OptimizerConfig(name="sgd").make(9), config.make(9)
        assert jax.tree.structure(plain.init(params)) == jax.tree.structure(made.init(params))


@pytest.mark.parametrize("how", ["plain", "interrupted"])
def test_a_job_of_dora_trains_saves_and_goes_on(tmp_path, how):
    lora = {"rank": 2, "alpha": 4.0, "kind": "dora"}
    options = {"lora": lora, "optimizer": {"schedule": "constant"}}
    if how == "interrupted":
        run(tmp_path / "run", train={"steps": 4}, **options)
    job, results = run(tmp_path / "run", extend=how == "interrupted", **options)
    assert results[1].parameters == LORA_SCALARS + 7 + 3
    assert results[1].metrics["loss"] < results[0].metrics["loss"]
    module, params, test, config, adapters = restored(Run(job, results, tmp_path / "run"))
    assert config.kind == "dora"
    merged = merge_params(params, adapters, config)
    loss, _ = cross_entropy(module.apply({"params": merged}, test["inputs"]), test)
    assert float(getattr(loss, "total", loss)) / float(getattr(loss, "weight", 1)) == pytest.approx(
        results[1].metrics["loss"], rel=1e-4
    )


class TestFolder:
    def test_a_finished_run_is_resumed_bitwise_without_a_step(self, users, tmp_path):
        folder = shutil.copytree(users.folder, tmp_path / "run")
        before = (folder / "metrics.jsonl").read_bytes()
        _, results = run(folder, resume=True, full={"enabled": True, "learning_rate": 0.02})
        assert (folder / "metrics.jsonl").read_bytes() == before
        assert [r.metrics for r in results] == [r.metrics for r in users.results]

    def test_force_begins_anew_and_leaves_other_files_alone(self, tmp_path):
        run(tmp_path, train={"steps": 2})
        (tmp_path / "notes.txt").write_text("mine")
        run(tmp_path, force=True, train={"steps": 4})
        assert (tmp_path / "notes.txt").read_text() == "mine"
        assert MetricsLog.read_file(tmp_path / "metrics.jsonl")[-1]["step"] == 4

    @pytest.mark.parametrize(
        ("content", "options", "error", "message"),
        [
            ("file", {}, DataError, "is a file; give output.folder another path"),
            ("under a file", {}, DataError, "give output.folder another path"),
            ("strange", {}, DataError, "is not empty: it holds no run of jlora; or give another folder"),
            ("strange", {"force": True}, DataError, "is not empty: it holds no run of jlora; or give another folder"),
            ("run", {}, DataError, "is not empty: --resume goes on with it, --force begins anew; or give"),
            ("none", {"resume": True}, DataError, "nothing to resume: it holds no run"),
            ("strange", {"resume": True}, DataError, "nothing to resume: it holds no run"),
            ("file", {"resume": True}, DataError, "nothing to resume: it holds no run"),
            ("none", {"extend": True}, DataError, "nothing to resume: it holds no run"),
            (
                "run",
                {"resume": True, "train": {"steps": 9}, "optimizer": {"learning_rate": 0.2}},
                ConfigError,
                "changed: optimizer.learning_rate, train.steps; --extend goes on with them changed",
            ),
            (
                "run",
                {
                    "extend": True,
                    "train": {"steps": 9, "batch_size": 4},
                    "optimizer": {"name": "sgd", "weight_decay": 0},
                },
                ConfigError,
                "--extend changes train.steps, optimizer.learning_rate, optimizer.schedule, optimizer.warmup_steps "
                "alone; changed: optimizer.name, optimizer.weight_decay, train.batch_size",
            ),
            (
                "run",
                {"extend": True, "train": {"steps": 7}},
                ConfigError,
                "train.steps = 7: wanted 8 or more, to extend the run of 8",
            ),
            (
                "run",
                {"resume": True, "lora": {"rank": 1}, "train": {"seed": 5}, "model": {"seed": 3}},
                ConfigError,
                "to resume, give the same configuration; changed: lora.rank, model.seed, train.seed",
            ),
        ],
    )
    def test_a_folder_that_does_not_fit_is_refused_and_left_alone(self, tmp_path, content, options, error, message):
        folder = tmp_path / "out"
        if content in ("file", "under a file"):
            folder.write_text("mine")
        elif content != "none":
            folder.mkdir()
            (folder / "mine.txt").write_text("mine")
        if content == "run":
            JobConfig.from_dict(plan(folder)).write(folder / "config.toml")
        before = sorted((path, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*"))
        with pytest.raises(error, match=re.escape(message)):
            run(folder / "run" if content == "under a file" else folder, **options)
        assert sorted((path, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")) == before

    @pytest.mark.parametrize(
        ("sections", "error", "message"),
        [
            ({"data": {"train": 0}}, DataError, "the training set is empty: found {'inputs': 0, 'labels': 0}"),
            ({"data": {"test": 0}}, DataError, "the test set is empty: found {'inputs': 0, 'labels': 0}"),
            ({"data": {"train": 7}}, DataError, "7 examples are fewer than a batch of 8"),
            (
                {"data": {"function": "mine_of_test_job:no_inputs"}},
                DataError,
                "the training set has no 'inputs', found x",
            ),
            ({"data": {"function": "mine_of_test_job:no_pair"}}, ConfigError, "wanted it to return (train, test)"),
            ({"model": {"function": "mine_of_test_job:no_pair"}}, ConfigError, "found int; wanted it to return one of"),
            ({"model": {"function": "mine_of_test_job:data"}}, ConfigError, "found dict in the first place; wanted it"),
            ({"data": {"function": "nowhere:data"}}, ConfigError, "no module 'nowhere' can be imported"),
            ({"data": {"function": "mine_of_test_job:dat"}}, ConfigError, "mine_of_test_job has no 'dat'"),
            ({"data": {"function": "mine_of_test_job"}}, ConfigError, "wanted 'module:function'"),
            ({"data": {"function": "mine_of_test_job:NUMBER"}}, ConfigError, "data.function = "),
            ({"data": {"function": ".here:data"}}, ConfigError, "data.function = '.here:data'"),
            ({"data": {"trian": 3}}, ConfigError, "unknown key 'trian' (did you mean 'train'?)"),
            ({"train": {"loss": "nowhere:loss"}}, ConfigError, "train.loss = 'nowhere:loss'"),
            ({"lora": {"target_modules": ["boddy"]}}, TargetError, "'boddy' matches nothing; nearest paths: body"),
            (
                {"lora": {"rank": 4, "target_modules": ["head"]}},
                TargetError,
                "rank 4 is larger than the smaller side 3",
            ),
        ],
    )
    def test_what_cannot_run_is_refused_before_anything_is_written(self, tmp_path, sections, error, message):
        with pytest.raises(error, match=re.escape(message)):
            run(tmp_path / "out", **sections)
        assert list(tmp_path.iterdir()) == []


CONSTANT = {"schedule": "constant", "warmup_steps": 2}  # the same rates whatever the number of steps


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of eight steps."""
    run(folder := tmp_path_factory.mktemp("finished") / "run")
    return folder


class TestExtend:
    @pytest.mark.parametrize("resume", [pytest.param(False, marks=pytest.mark.slow), True])
    def test_a_finished_run_of_a_constant_rate_goes_on_to_what_a_longer_one_gives(self, tmp_path, resume):
        run(tmp_path / "long", optimizer=CONSTANT, train={"steps": 12})
        run(tmp_path / "extended", optimizer=CONSTANT)
        text = io.StringIO()
        job, results = run(
            tmp_path / "extended",
            Console(file=text, width=120),
            resume=resume,
            extend=True,
            optimizer=CONSTANT,
            train={"steps": 12},
        )
        adapters = [(tmp_path / name / "adapters/adapter_model.safetensors") for name in ("long", "extended")]
        assert load_adapters(adapters[0].parent)[1] == load_adapters(adapters[1].parent)[1]
        assert adapters[0].read_bytes() == adapters[1].read_bytes()
        assert "extended: train.steps was 8, is 12\n" in text.getvalue()
        assert JobConfig.read(tmp_path / "extended" / "config.toml") == job
        assert read_metadata(tmp_path / "extended" / "adapters")["steps"] == 12
        assert [row["step"] for row in MetricsLog.read_file(tmp_path / "extended/metrics.jsonl")] == [
            2,
            4,
            6,
            8,
            10,
            12,
        ]
        assert run(tmp_path / "extended", resume=True, optimizer=CONSTANT, train={"steps": 12})[1][1].metrics == (
            results[1].metrics
        )

    @pytest.mark.parametrize(
        ("options", "rate"),
        [
            pytest.param({"schedule": "constant"}, 0.1, marks=pytest.mark.slow),
            ({"schedule": "constant", "learning_rate": 0.3}, 0.3),
            pytest.param({"schedule": "linear"}, 0.1 / 9, marks=pytest.mark.slow),
            ({}, 0.1 * (1 + np.cos(np.pi * 8 / 9)) / 2),
        ],
    )
    def test_the_rate_is_what_the_new_values_give_at_the_step(self, finished, tmp_path, options, rate):
        """One step of AdamW, whose move is in proportion to the rate, behind the eighth."""

        def moved(name, **options):
            folder = shutil.copytree(finished, tmp_path / name)
            before, _ = load_adapters(folder / "adapters")
            run(folder, extend=True, optimizer=options, train={"steps": 9})
            after, _ = load_adapters(folder / "adapters")
            return jax.tree.map(lambda old, new: np.asarray(new, np.float64) - old, before, after)

        unit = moved("unit", schedule="constant", learning_rate=1.0)
        found = moved("found", **options)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, rate * b, rtol=1e-3, atol=1e-6), found, unit)


def test_cross_entropy_is_that_of_float64(rng):
    logits, labels = rng.standard_normal((11, 5)).astype(np.float32), rng.integers(0, 5, 11)
    loss, metrics = cross_entropy(jnp.asarray(logits), {"labels": jnp.asarray(labels)})
    shares = np.exp(logits.astype(np.float64))
    wanted = -np.log(shares[np.arange(11), labels] / shares.sum(-1)).mean()
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx((logits.argmax(-1) == labels).mean())


class TestJobConfig:
    @pytest.mark.parametrize("suffix", [".toml", ".json"])
    def test_a_file_is_read_as_it_was_written(self, tmp_path, suffix):
        lora = {"rank_pattern": {"body": 1}, "dtype": "bfloat16", "target_modules": ["body", "head"]}
        job = JobConfig.from_dict(plan(model={"seed": 3}, data={"train": 9}, lora=lora))
        job.write(tmp_path / f"job{suffix}")
        assert JobConfig.read(tmp_path / f"job{suffix}") == job
        assert JobConfig.from_dict(job.to_dict()) == job

    def test_only_the_two_functions_have_to_be_given(self):
        functions = {name: {"function": f"mine:{name}"} for name in ("model", "data")}
        data = JobConfig.from_dict(functions).to_dict()
        assert {name: data[name] for name in functions} == functions
        assert JobConfig.from_dict(data) == JobConfig.from_dict(functions)

    def test_the_digits_file_says_every_value_that_it_may_and_is_valid(self):
        path = Path(__file__).parents[2] / "configs" / "digits.toml"
        said, job = tomllib.loads(path.read_text()), JobConfig.read(path)
        for name in ("optimizer", "train", "full", "output"):
            assert said[name].keys() == job.to_dict()[name].keys()
        for name, section in (("model", job.model), ("data", job.data)):
            parameters = inspect.signature(section.load(name)).parameters
            assert {*parameters, "function"} - {"console"} == said[name].keys()

    @pytest.mark.parametrize(
        ("override", "section", "value"),
        [
            ("lora.rank=3", "lora", 3),
            ("lora.alpha=2", "lora", 2.0),
            ('lora.target_modules=["body"]', "lora", ["body"]),
            ("lora.target_modules=head", "lora", ["head"]),
            ("lora.rank_pattern={head = 1}", "lora", {"head": 1}),
            ("optimizer.learning_rate=5e-3", "optimizer", 5e-3),
            ("optimizer.name=lion", "optimizer", "lion"),
            ("full.enabled=true", "full", True),
            ("output.folder=a=b c", "output", "a=b c"),
            ('output.folder="3"', "output", "3"),
            ("model.new=x", "model", "x"),
        ],
    )
    def test_an_override_stands_over_the_file(self, tmp_path, override, section, value):
        JobConfig.from_dict(plan()).write(tmp_path / "job.toml")
        key = override.partition("=")[0].partition(".")[2]
        found = JobConfig.read(tmp_path / "job.toml", ["lora.rank=7", override]).to_dict()
        assert found[section][key] == value
        assert found["lora"]["rank"] == (3 if override == "lora.rank=3" else 7)

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("lora.rank=" + "[" * 5000, "rank = '[[["),
            ("lora.rank=" + "9" * 5000, "rank = '999"),
            ("output.folder=\udcff", "output.folder = '\\udcff': wanted a path in printable characters"),
        ],
        ids=["deep", "long", "bytes"],
    )
    def test_an_override_that_no_file_could_hold_is_refused(self, tmp_path, override, message):
        JobConfig.from_dict(plan()).write(tmp_path / "job.toml")
        with pytest.raises(ConfigError, match=re.escape(message)) as error:
            JobConfig.read(tmp_path / "job.toml", [override])
        assert len(str(error.value)) < 1000

    @pytest.mark.parametrize("override", ["rank=3", "lora.rank", "lora.=3", ".rank=3", "=3", ""])
    def test_an_override_of_another_form_is_refused(self, tmp_path, override):
        JobConfig.from_dict(plan()).write(tmp_path / "job.toml")
        with pytest.raises(ConfigError, match=re.escape(f"override {override!r}: wanted section.key=value")):
            JobConfig.read(tmp_path / "job.toml", [override])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"trian": {}}, "the job: unknown key 'trian' (did you mean 'train'?)"),
            ({"train": 3}, "train = 3: wanted a section, [train]"),
            ({"model": {}}, "model.function is missing: wanted [model] with function = 'module:function'"),
            ({"data": {"train": 3}}, "data.function is missing"),
            ({"lora": {"rnk": 3}}, "[lora]: LoraConfig: unknown key 'rnk' (did you mean 'rank'?)"),
            ({"lora": {"rank": 0}}, "[lora]: rank = 0: wanted a whole number of at least 1"),
            ({"optimizer": {"lr": 1}}, "[optimizer]: unknown key 'lr'"),
            ({"optimizer": {"name": "adamW"}}, "optimizer.name = 'adamW': wanted one of 'adamw'"),
            (
                {"lora": {"init": "pissa"}},
                "lora.init = 'pissa': wanted one of 'gaussian', 'kaiming_uniform', 'normal' in a job",
            ),
            ({"optimizer": {"b_ratio": -1}}, "optimizer.b_ratio = -1: wanted a finite number of at least 0"),
            ({"optimizer": {"freeze_a": "A"}}, "optimizer.freeze_a = 'A': wanted true or false"),
            ({"optimizer": {"preconditioner": "k"}}, "preconditioner = 'k': wanted one of 'none', 'riemannian'"),
            ({"optimizer": {"freeze_a": True, "b_ratio": 2}}, "wanted false beside b_ratio or a preconditioner"),
            ({"optimizer": {"schedule": "cos"}}, "optimizer.schedule = 'cos': wanted one of 'constant', 'cosine'"),
            ({"optimizer": {"learning_rate": -1}}, "optimizer.learning_rate = -1: wanted"),
            ({"optimizer": {"clip_norm": "no"}}, "optimizer.clip_norm = 'no': wanted"),
            ({"optimizer": {"warmup_steps": 1.5}}, "optimizer.warmup_steps = 1.5: wanted"),
            ({"optimizer": {"name": "sgd", "weight_decay": 0.1}}, "wanted 0, as sgd has none; adamw and lion do"),
            ({"train": {"steps": 0}}, "train.steps = 0: wanted a whole number of at least 1"),
            ({"train": {"seed": -1}}, "train.seed = -1: wanted a whole number of at least 0"),
            ({"train": {"batch_size": 8, "accumulate": 3}}, "train.accumulate = 3: wanted a divisor of batch_size = 8"),
            ({"full": {"enabled": "no"}}, "full.enabled = 'no': wanted true or false"),
            ({"output": {"folder": ""}}, "output.folder = '': wanted the path of a folder"),
            ({"output": {"log": 3}}, "output.log = 3: wanted 'module:function'"),
        ],
    )
    def test_what_it_may_not_say_is_refused(self, tmp_path, change, message):
        path = tmp_path / "job.json"
        path.write_text(json.dumps({**plan(), **change}))
        with pytest.raises(ConfigError, match=re.escape(message)) as caught:
            JobConfig.read(path)
        assert str(caught.value).startswith(f"{path}: ")


COSINE = [0.5 * (1 + np.cos(np.pi * t / 6)) for t in range(7)]


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1, 1, 1]),
        ({"schedule": "linear"}, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({"schedule": "cosine"}, COSINE[:6]),
        ({"schedule": "constant", "warmup_steps": 4}, [0, 0.25, 0.5, 0.75, 1, 1]),
        ({"schedule": "linear", "warmup_steps": 2}, [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ({"schedule": "cosine", "warmup_steps": 3}, [0, 1 / 3, 2 / 3, 1, COSINE[2], COSINE[4]]),
    ],
)
def test_the_learning_rate_is_warmed_up_and_follows_its_schedule(options, rates):
    optimizer = OptimizerConfig(name="lion", learning_rate=0.01, **options).make(steps=6)
    state, moves = optimizer.init(jnp.zeros(())), []
    for _ in rates:
        update, state = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
        moves.append(-float(update) / 0.01)
    np.testing.assert_allclose(moves, rates, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("adamw", optax.adamw(0.01, weight_decay=0.1)),
        ("adam", optax.adam(0.01)),
        ("lion", optax.lion(0.01, weight_decay=0.1)),
        ("sgd", optax.sgd(0.01, momentum=0.9)),
    ],
)
def test_the_optimizer_is_the_one_of_optax(name, wanted):
    decay = 0.1 if name in ("adamw", "lion") else 0.0
    made = OptimizerConfig(name=name, learning_rate=0.01, weight_decay=decay, schedule="constant").make(9)
    params = {"A": jnp.array([1.0, -2.0])}
    grads = {"A": jnp.array([0.3, 0.1])}
    updates = [optimizer.update(grads, optimizer.init(params), params)[0]["A"] for optimizer in (made, wanted)]
    np.testing.assert_allclose(*updates, rtol=1e-6)
