"""Batches, metrics, checkpoints and the loop: what is written when, and a run that stops and goes on."""

import io
import json
import re
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from jlora import ConfigError, DataError
from jlora.train import (
    Batches,
    Checkpoints,
    Interrupted,
    MetricsLog,
    count_examples,
    fit,
    init_state,
    make_train_step,
    restore_tree,
    save_tree,
)
from tests.reference import random_adapter

OPTIMIZER = optax.adam(0.1)
QUIET = Console(quiet=True)


def loss(adapters, base, batch, key):
    y = (batch["x"] @ adapters["up"]["A"]) @ adapters["up"]["B"]
    return jnp.mean((y - 1) ** 2) + 1e-3 * jax.random.uniform(key), {"accuracy": jnp.mean(y > 0)}


STEP = make_train_step(loss, OPTIMIZER)


def start():
    adapters = {"up": random_adapter(np.random.default_rng(3), (5, 2), (2, 3)), "head": None}
    return init_state(adapters, OPTIMIZER)


@pytest.fixture
def batches(rng):
    return Batches({"x": rng.standard_normal((12, 5)).astype(np.float32)}, size=4, seed=0)


def run(batches, steps, state=None, console=QUIET, **options):
    return fit(STEP, start() if state is None else state, None, batches, steps=steps, console=console, **options)


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


class TestBatches:
    def test_a_batch_is_a_function_of_the_step_and_the_seed(self):
        examples = {"x": np.arange(100), "y": -np.arange(100)}
        one, again, other = (Batches(examples, 10, seed) for seed in (0, 0, 1))
        for step in (23, 0, 9, 10):
            assert_same(one(step), again(step))
            np.testing.assert_array_equal(one(step)["x"], -one(step)["y"])
            assert not np.array_equal(one(step)["x"], other(step)["x"])

    def test_an_epoch_takes_every_example_once_and_the_next_in_another_order(self):
        batches = Batches({"x": np.arange(12)}, 4, seed=0)
        first, second = (np.concatenate([batches(3 * epoch + i)["x"] for i in range(3)]) for epoch in range(2))
        assert sorted(first) == sorted(second) == list(range(12))
        assert first.tolist() != second.tolist()

    def test_what_is_left_of_an_epoch_is_dropped(self):
        batches = Batches({"x": np.arange(11)}, 4, seed=0)
        assert [len(set(np.concatenate([batches(i)["x"], batches(i + 1)["x"]]))) for i in (0, 2, 4)] == [8, 8, 8]

    @pytest.mark.parametrize(
        ("lengths", "size", "error", "message"),
        [
            ({}, 1, DataError, "the dataset is empty: found no arrays"),
            ({"x": 0, "y": 0}, 1, DataError, "the dataset is empty: found {'x': 0, 'y': 0}"),
            ({"x": 3, "y": 2}, 1, DataError, "the arrays of the dataset differ in length: {'x': 3, 'y': 2}"),
            ({"x": 3}, 4, DataError, "3 examples are fewer than a batch of 4"),
            ({"x": 3}, 0, ConfigError, "batch_size = 0: wanted a whole number of at least 1"),
            ({"x": 3}, 1.5, ConfigError, "batch_size = 1.5: wanted a whole number of at least 1"),
        ],
    )
    def test_a_dataset_that_gives_no_batch_is_refused(self, lengths, size, error, message):
        with pytest.raises(error, match=re.escape(message)):
            Batches({name: np.zeros(length) for name, length in lengths.items()}, size, 0)

    def test_the_examples_are_counted(self):
        assert count_examples({"x": np.zeros((7, 2)), "y": np.zeros(7)}) == 7


ROWS = [{"step": step, "loss": 1 / step} for step in (2, 4, 6)]


class TestMetricsLog:
    @pytest.mark.parametrize(("step", "kept"), [(0, 0), (1, 0), (2, 1), (5, 2), (6, 3), (9, 3)])
    def test_a_resumed_log_keeps_the_rows_up_to_its_step(self, tmp_path, step, kept):
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        log = MetricsLog(path, step)
        log.write({"step": 10, "loss": 0.1})
        assert MetricsLog.read_file(path) == [*ROWS[:kept], {"step": 10, "loss": 0.1}]
        assert [json.loads(line) for line in path.read_text().splitlines()] == MetricsLog.read_file(path)
        assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]

    @pytest.mark.parametrize("cut", [1, 9, 24])
    def test_a_half_written_last_line_is_dropped(self, tmp_path, cut):
        path = tmp_path / "metrics.jsonl"
        whole = "".join(json.dumps(row) + "\n" for row in ROWS[:2])
        path.write_text(whole + json.dumps(ROWS[2])[:cut])
        assert MetricsLog.read_file(path) == ROWS[:2]
        MetricsLog(path, 6).write(ROWS[2])
        assert path.read_text() == whole + json.dumps(ROWS[2]) + "\n"

    def test_there_is_nothing_in_a_file_that_is_not_there(self, tmp_path):
        assert MetricsLog.read_file(tmp_path / "none.jsonl") == []

    def test_numbers_come_back_bitwise(self, tmp_path, rng):
        log = MetricsLog(tmp_path / "metrics.jsonl")
        values = rng.standard_normal(20).astype(np.float32)
        for step, value in enumerate(values):
            log.write({"step": step, "loss": float(value)})
        read = [row["loss"] for row in MetricsLog.read_file(log.path)]
        np.testing.assert_array_equal(np.array(read, np.float32), values)


class TestFit:
    def test_metrics_are_written_at_their_steps_and_after_the_last(self, tmp_path, batches):
        log = MetricsLog(tmp_path / "metrics.jsonl")
        state = run(batches, 11, log=log, log_every=2, eval_every=4, evaluate=lambda trained: {"loss": 0.5})
        rows = MetricsLog.read_file(log.path)
        assert int(state.step) == 11
        assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 11]
        assert [row["step"] for row in rows if "test_loss" in row] == [4, 8, 11]
        assert all({"step", "loss", "accuracy", "grad_norm"} <= set(row) for row in rows)

    @pytest.mark.parametrize(("log_every", "eval_every", "evaluated"), [(4, 3, [3, 6, 7]), (5, 2, [2, 4, 6, 7])])
    def test_evaluation_keeps_its_own_cadence(self, tmp_path, batches, log_every, eval_every, evaluated):
        log = MetricsLog(tmp_path / "metrics.jsonl")
        run(batches, 7, log=log, log_every=log_every, eval_every=eval_every, evaluate=lambda trained: {"loss": 0.5})
        assert [row["step"] for row in MetricsLog.read_file(log.path) if "test_loss" in row] == evaluated

    def test_what_is_evaluated_is_what_is_trained(self, tmp_path, batches):
        log = MetricsLog(tmp_path / "metrics.jsonl")
        options = {"log": log, "log_every": 1, "eval_every": 1}
        state = run(batches, 3, evaluate=lambda trained: {"sum": trained["up"]["B"].sum()}, **options)
        assert MetricsLog.read_file(log.path)[-1]["test_sum"] == float(state.trained["up"]["B"].sum())

    def test_checkpoints_are_written_at_their_steps_and_at_the_end(self, tmp_path, batches):
        saved = []

        class Noted(Checkpoints):
            def save(self, step, state):
                super().save(step, state)
                saved.append((step, int(state.step)))

        with Noted(tmp_path) as checkpoints:
            state = run(batches, 7, checkpoints=checkpoints, checkpoint_every=3)
            assert_same(checkpoints.restore(start()), state)
        assert saved == [(3, 3), (6, 6), (7, 7)]

    @pytest.mark.parametrize("at", [0, 3, 4, 8])
    def test_an_interrupted_run_saves_and_goes_on_bitwise(self, tmp_path, batches, at):
        def interrupting(step):
            if step == at:
                signal.raise_signal(signal.SIGINT)
            return batches(step)

        options = {"log_every": 2, "eval_every": 4, "evaluate": lambda trained: {"loss": trained["up"]["A"].sum()}}
        logs = [MetricsLog(tmp_path / name) for name in ("whole.jsonl", "parts.jsonl")]
        whole = run(batches, 9, log=logs[0], **options)
        handler = signal.getsignal(signal.SIGINT)
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            with pytest.raises(Interrupted, match=f"interrupted after step {at + 1}") as caught:
                run(interrupting, 9, log=logs[1], checkpoints=checkpoints, checkpoint_every=4, **options)
            assert signal.getsignal(signal.SIGINT) is handler
            assert caught.value.step == checkpoints.latest_step == at + 1
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            log = MetricsLog(logs[1].path, checkpoints.latest_step)
            resumed = run(batches, 9, checkpoints.restore(start()), log=log, checkpoints=checkpoints, **options)
        assert_same(resumed, whole)
        assert logs[0].path.read_bytes() == logs[1].path.read_bytes()

    def test_a_second_interrupt_stops_at_once(self, batches):
        def impatient(step):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt) as caught:
            run(impatient, 9)
        assert not isinstance(caught.value, Interrupted)

    def test_it_trains_in_a_thread_that_gets_no_signals(self, batches):
        found = []
        thread = threading.Thread(target=lambda: found.append(run(batches, 3)))
        thread.start()
        thread.join()
        assert_same(found[0], run(batches, 3))

    def test_a_run_that_is_done_stays_as_it_is(self, batches):
        state = run(batches, 3)
        assert_same(run(None, 3, state), state)

    def test_the_bar_shows_steps_loss_accuracy_and_speed_and_a_quiet_console_nothing(self, capfd, batches):
        text = io.StringIO()
        run(batches, 5, console=Console(file=text, width=200), title="adapting")
        assert re.search(r"adapting .* 5/5 +loss \d\.\d{3} +accuracy \d\.\d{3} +[\d.]+ steps/s", text.getvalue())
        run(batches, 5)
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("name", ["log_every", "eval_every", "checkpoint_every"])
    def test_a_cadence_is_a_whole_number(self, batches, name):
        with pytest.raises(ConfigError, match=f"{name} = 0: wanted a whole number of at least 1"):
            run(batches, 3, **{name: 0})


class TestCheckpoints:
    def test_the_newest_two_are_kept_and_come_back_bitwise(self, tmp_path, batches):
        with Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.latest_step is None
            for steps in (1, 2, 3):
                checkpoints.save(steps, state := run(batches, steps))
            checkpoints.save(3, start())
        assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"2", "3"}
        with Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.latest_step == 3
            assert_same(checkpoints.restore(start()), state)

    @pytest.mark.parametrize("model_state", [None, {"mean": jnp.arange(3.0), "unused": None}])
    def test_a_model_state_comes_back_too(self, tmp_path, model_state):
        state = init_state({"a": jnp.ones(2)}, OPTIMIZER, model_state)
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, state)
            assert_same(checkpoints.restore(jax.tree.map(jnp.zeros_like, state)), state)

    def test_where_there_is_none_it_says_so(self, tmp_path):
        with Checkpoints(tmp_path) as checkpoints, pytest.raises(DataError, match="no checkpoint to resume from"):
            checkpoints.restore(start())

    @pytest.mark.parametrize(
        "change",
        [
            lambda state: state._replace(trained=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[::-1]), state.trained)),
            lambda state: state._replace(trained={"other": state.trained["up"]}),
            lambda state: state._replace(opt_state=optax.sgd(0.1, momentum=0.9).init(state.trained)),
        ],
        ids=["shapes", "paths", "optimizer"],
    )
    def test_one_that_does_not_fit_is_refused(self, tmp_path, change):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(4, start())
            with pytest.raises(
                DataError, match=f"^{tmp_path}: the checkpoint of step 4 does not fit this run in .+, such as .+"
            ):
                checkpoints.restore(change(start()))

    def test_a_tree_is_saved_in_place_of_another_and_restored_bitwise(self, tmp_path, rng):
        trees = [{"up": random_adapter(rng, (5, 2), (2, 3), dtype), "head": None} for dtype in ("float32", "bfloat16")]
        for tree in trees:
            save_tree(tmp_path / "tree", tree)
            assert_same(restore_tree(tmp_path / "tree", jax.tree.map(jnp.zeros_like, tree)), tree)
