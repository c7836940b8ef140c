"""A run that is interrupted or diverges stops where nothing is lost, and nothing bad is written."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jlora.train import Checkpoints, DivergedError, Interrupted, MetricsLog, fit, init_state, make_train_step
from tests.train.runs import OPTIMIZER, QUIET, assert_same, loss, run, start


@pytest.fixture
def handled():
    """`handled(signal, handler)` sets a handler for the length of a test."""
    before = {}

    def handle(number, handler):
        before[number] = signal.signal(number, handler)

    yield handle
    for number, handler in before.items():
        signal.signal(number, handler)


class TestInterrupts:
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

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_what_takes_a_machine_or_a_terminal_away_saves_too(self, tmp_path, batches, number, handled):
        def interrupting(step):
            if step == 2:
                signal.raise_signal(number)
            return batches(step)

        handled(number, stopped := pytest.fail)
        message = (
            "interrupted after step 3" if number == signal.SIGINT else f"interrupted by {number.name} after step 3"
        )
        with Checkpoints(tmp_path) as checkpoints:
            with pytest.raises(Interrupted, match=f"^{message}$") as caught:
                run(interrupting, 9, checkpoints=checkpoints)
            assert caught.value.signal == number
            assert caught.value.step == checkpoints.latest_step == 3
        assert signal.getsignal(number) is stopped

    def test_a_second_interrupt_stops_at_once(self, batches):
        def impatient(step):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt) as caught:
            run(impatient, 9)
        assert not isinstance(caught.value, Interrupted)

    def test_a_second_signal_of_another_kind_still_saves(self, tmp_path, batches, handled):
        def hanging_up(step):
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
            return batches(step)

        handled(signal.SIGTERM, pytest.fail)
        handled(signal.SIGHUP, pytest.fail)
        with Checkpoints(tmp_path) as checkpoints:
            with pytest.raises(Interrupted, match="interrupted by SIGHUP after step 1"):
                run(hanging_up, 9, checkpoints=checkpoints)
            assert checkpoints.latest_step == 1

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
    def test_a_signal_that_is_ignored_stays_so(self, batches, number, handled):
        def interrupting(step):
            signal.raise_signal(number)
            return batches(step)

        handled(number, signal.SIG_IGN)
        assert int(run(interrupting, 3).step) == 3
        assert signal.getsignal(number) == signal.SIG_IGN


def poisoned(batches, at, value=np.nan):
    """Batches of which that of the index `at` makes the loss not finite."""
    return lambda step: jax.tree.map(lambda leaf: leaf + value if step == at else leaf, batches(step))


class TestDivergence:
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    @pytest.mark.parametrize("at", [0, 4, 6, 8, 9])
    def test_the_first_bad_step_is_named_and_nothing_of_it_is_written(self, tmp_path, batches, at, value):
        log = MetricsLog(tmp_path / "metrics.jsonl")
        wanted = (
            rf"^step {at + 1}, on batch {at}: the (loss|norm of the gradients) is (nan|inf); nothing of it is saved"
        )
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            options = {"log": log, "log_every": 3, "checkpoints": checkpoints, "checkpoint_every": 4}
            with pytest.raises(DivergedError, match=wanted) as caught:
                run(poisoned(batches, at, value), 10, **options)
            assert (caught.value.step, caught.value.batch) == (at + 1, at)
            assert checkpoints.latest_step == (at // 4 * 4 or None)
            if checkpoints.latest_step:
                assert_same(checkpoints.restore(start()), run(batches, checkpoints.latest_step))
        assert [row["step"] for row in MetricsLog.read_file(log.path)] == [s for s in (3, 6, 9) if s <= at]

    def test_it_is_found_where_nothing_is_logged_for_long(self, batches):
        drawn = []
        with pytest.raises(DivergedError, match=r"^step 7, on batch 6"):
            run(lambda step: drawn.append(step) or poisoned(batches, 6)(step), 10**6, log_every=10**6)
        assert len(drawn) <= 100

    def test_an_interrupted_run_saves_nothing_bad(self, tmp_path, batches):
        def interrupting(step):
            if step == 3:
                signal.raise_signal(signal.SIGINT)
            return poisoned(batches, 2)(step)

        with Checkpoints(tmp_path) as checkpoints:
            with pytest.raises(DivergedError, match=r"^step 3, on batch 2"):
                run(interrupting, 9, checkpoints=checkpoints)
            assert checkpoints.latest_step is None

    def test_gradients_that_are_not_finite_stop_it_though_the_loss_is(self, batches):
        step = make_train_step(lambda trained, f, b, k: jnp.sqrt(jnp.sum(trained)), OPTIMIZER)
        with pytest.raises(DivergedError, match=r"^step 1, on batch 0: the norm of the gradients is inf"):
            fit(step, init_state(jnp.zeros(2), OPTIMIZER), None, batches, steps=2, console=QUIET)

    def test_an_update_that_is_not_finite_is_not_saved(self, tmp_path, batches):
        optimizer = optax.scale_by_schedule(lambda count: jnp.where(count == 2, jnp.nan, -0.1))
        step = make_train_step(lambda trained, f, b, k: jnp.sum(trained["w"] ** 2), optimizer)
        state = init_state({"v": None, "w": jnp.ones(2)}, optimizer)
        with Checkpoints(tmp_path) as checkpoints:
            message = "^step 3, on batch 2: w is no longer finite, in 1 of 1 arrays"
            with pytest.raises(DivergedError, match=message):
                fit(step, state, None, batches, steps=9, checkpoints=checkpoints, checkpoint_every=1, console=QUIET)
            assert checkpoints.latest_step == 2

    def test_an_optimizer_that_skips_bad_steps_may_go_on(self, tmp_path, batches):
        optimizer = optax.apply_if_finite(OPTIMIZER, max_consecutive_errors=3)
        log = MetricsLog(tmp_path / "metrics.jsonl")
        state = fit(
            make_train_step(loss, optimizer),
            init_state(start().trained, optimizer),
            None,
            poisoned(batches, 2),
            steps=4,
            log=log,
            log_every=1,
            stop_at_nan=False,
            console=QUIET,
        )
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.trained))
        assert ["loss" in row for row in MetricsLog.read_file(log.path)] == [True, True, False, True]
