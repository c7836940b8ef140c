"""Batches, metrics and the loop: what is written when, and where it comes from."""

import io
import json
import math
import re
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jlora import ConfigError, DataError
from jlora.train import Batches, Checkpoints, MetricsLog, count_examples, fit, init_state, make_train_step
from tests.train.runs import OPTIMIZER, QUIET, assert_same, run, start


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

    def test_what_is_not_finite_is_left_out_as_json_has_no_word_for_it(self, tmp_path):
        log = MetricsLog(tmp_path / "metrics.jsonl")
        log.write({"step": 1, "loss": 0.5, "share": math.nan, "most": math.inf, "least": -math.inf})
        assert log.path.read_text() == '{"step": 1, "loss": 0.5}\n'
        log.path.write_text('{"step": 1, "loss": NaN}\n')
        MetricsLog(log.path, 1)
        assert log.path.read_text() == '{"step": 1}\n'


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

    def test_it_trains_in_a_thread_that_gets_no_signals(self, batches):
        found = []
        thread = threading.Thread(target=lambda: found.append(run(batches, 3)))
        thread.start()
        thread.join()
        assert_same(found[0], run(batches, 3))

    @pytest.mark.parametrize(
        "kind", [list, iter, lambda found: (batch for batch in found)], ids=["list", "iter", "gen"]
    )
    def test_an_iterable_gives_the_same_batches_and_a_resumed_run_those_that_are_left(self, tmp_path, batches, kind):
        whole = run(batches, 7)
        given = [batches(step) for step in range(9)]
        assert_same(run(kind(given), 7), whole)
        with Checkpoints(tmp_path) as checkpoints:
            state = run(kind(given), 3, checkpoints=checkpoints)
            assert_same(run(kind(given), 7, state, checkpoints=checkpoints), whole)
        last = iter(given[3:])
        assert_same(run(lambda step: next(last), 7, run(batches, 3)), whole)

    def test_no_batch_is_drawn_that_is_not_used(self, batches):
        drawn = []
        given = (drawn.append(step) or batches(step) for step in range(9))
        run(given, 4)
        assert drawn == [0, 1, 2, 3]

    @pytest.mark.parametrize("done", [0, 1, 5])
    def test_batches_that_end_early_are_an_error_and_the_state_is_saved(self, tmp_path, batches, done):
        state = run(batches, done)
        given = [batches(step) for step in range(4)]
        message = f"the batches ended after step {max(done, 4)} of 9: give as many, or steps={max(done, 4)}"
        with Checkpoints(tmp_path) as checkpoints:
            with pytest.raises(DataError, match=message):
                run(given, 9, state, checkpoints=checkpoints)
            assert_same(checkpoints.restore(start()), run(batches, max(done, 4)))

    @pytest.mark.parametrize("wrong", [{"x": np.zeros(3)}, np.zeros((3, 2)), jnp.zeros(3), "abc", None, 3])
    def test_what_is_no_batches_is_refused(self, wrong):
        kind = type(wrong).__name__
        with pytest.raises(DataError, match=re.escape(f"wanted batches(step) or an iterable of batches, found {kind}")):
            run(wrong, 3)

    def test_several_loggers_get_the_same_rows(self, tmp_path, batches):
        class Rows(list):
            def write(self, row):
                self.append(row)

        logs = MetricsLog(tmp_path / "metrics.jsonl"), Rows(), Rows()
        run(batches, 5, log=logs, log_every=2)
        assert [row["step"] for row in logs[1]] == [2, 4, 5]
        assert logs[1] == logs[2] == MetricsLog.read_file(logs[0].path)
        run(batches, 3, log=(alone := Rows()))
        assert [row["step"] for row in alone] == [3]

    def test_a_metric_that_is_no_scalar_is_named(self, batches):
        step = make_train_step(lambda t, f, b, k: (jnp.sum(t["up"]["A"]), {"each": t["up"]["A"]}), OPTIMIZER)
        with pytest.raises(DataError, match=re.escape("the metric 'each' has shape (5, 2): wanted a scalar to log")):
            fit(step, start(), None, batches, steps=1, console=QUIET)

    def test_the_model_state_is_trained_on_and_evaluated(self, batches):
        def loss(trained, frozen, batch, key, seen):
            return jnp.mean((batch["x"] @ trained) ** 2), {}, seen + batch["x"].sum()

        state, rows = init_state(jnp.ones(5), OPTIMIZER, jnp.float32(0)), []
        evaluate = lambda trained, seen: rows.append(float(seen)) or {}  # noqa: E731
        state = fit(
            make_train_step(loss, OPTIMIZER),
            state,
            None,
            batches,
            steps=3,
            console=QUIET,
            eval_every=2,
            evaluate=evaluate,
        )
        sums = [batches(step)["x"].sum(dtype=np.float64) for step in range(3)]
        np.testing.assert_allclose(rows, [sum(sums[:2]), sum(sums)], rtol=1e-5)
        assert float(state.model_state) == rows[-1]

    @pytest.mark.parametrize("done", [0, 2, 5])
    def test_a_folder_of_another_run_is_refused_before_a_step(self, tmp_path, batches, done):
        with Checkpoints(tmp_path) as checkpoints:
            run(batches, 3, checkpoints=checkpoints)
            state = run(batches, done)
            message = (
                f"^{tmp_path}: holds the checkpoint of step 3, and the state is at step {done}: go on from it with"
            )
            with pytest.raises(DataError, match=message):
                run(pytest.fail, 9, state, checkpoints=checkpoints)
            assert checkpoints.latest_step == 3

    def test_a_run_that_is_done_stays_as_it_is(self, batches):
        state = run(batches, 3)
        assert_same(run(pytest.fail, 3, state), state)

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
