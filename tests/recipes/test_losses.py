"""The loss of a language model, whole, in parts and over devices, against float64."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jlora.recipes import next_token
from jlora.train import Batches, ExpMean, Mean, init_state, make_train_step
from tests.storage.devices import run_with_devices

N, LENGTH, VOCABULARY, WIDTH = 8, 5, 11, 3


def arrays():
    """A table that is trained, and a batch whose rows have very different numbers of tokens that count."""
    rng = np.random.default_rng(3)
    table = rng.standard_normal((WIDTH, VOCABULARY)).astype(np.float32)
    weights = np.zeros((N, LENGTH), np.float32)
    for row, count in enumerate((5, 0, 1, 2, 0, 4, 1, 0)):
        weights[row, :count] = 1
    batch = {
        "inputs": {"x": rng.standard_normal((N, LENGTH, WIDTH)).astype(np.float32)},
        "labels": rng.integers(0, VOCABULARY, (N, LENGTH)).astype(np.int32),
        "weights": weights,
    }
    return table, batch


def loss(table, _, batch, key):
    return next_token(batch["inputs"]["x"] @ table, batch)


def in_float64(table, batch):
    """Loss, accuracy and gradient, by hand."""
    table, x = np.asarray(table, np.float64), np.asarray(batch["inputs"]["x"], np.float64)
    logits = x @ table
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted = np.eye(VOCABULARY)[batch["labels"]]
    weights = np.asarray(batch["weights"], np.float64)
    count = weights.sum()
    value = -(weights * np.log((shares * wanted).sum(-1))).sum() / count
    right = (weights * (logits.argmax(-1) == batch["labels"])).sum() / count
    grad = np.einsum("btw,btv->wv", x, (shares - wanted) * weights[..., None]) / count
    return value, right, grad


def check(step, table, batch):
    value, right, grad = in_float64(*arrays())
    state, metrics = step(init_state(table, optax.sgd(1.0)), None, batch)
    assert float(metrics["loss"]) == pytest.approx(value, rel=1e-6)
    assert float(metrics["perplexity"]) == pytest.approx(np.exp(value), rel=1e-6)
    assert float(metrics["token_accuracy"]) == pytest.approx(right)
    np.testing.assert_allclose(arrays()[0] - np.asarray(state.trained), grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_it_is_a_mean_over_the_tokens_of_the_whole_step(accumulate):
    check(make_train_step(loss, optax.sgd(1.0), accumulate=accumulate), *arrays())


def over_devices(_: Path):
    table, batch = arrays()
    mesh = jax.make_mesh((4,), ("data",))
    rows = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    everywhere = jax.device_put(table, NamedSharding(mesh, PartitionSpec()))
    for accumulate in (1, 2):
        check(make_train_step(loss, optax.sgd(1.0), accumulate=accumulate), everywhere, rows)


def test_over_devices_too(tmp_path):
    run_with_devices(__name__, "over_devices", tmp_path, devices=4)


def test_it_is_computed_in_float32_of_16_bit_logits():
    table, batch = arrays()
    logits = jnp.asarray(batch["inputs"]["x"] @ table, jnp.bfloat16)
    value, metrics = next_token(logits, batch)
    assert isinstance(value, Mean)
    assert isinstance(metrics["perplexity"], ExpMean)
    assert value.total.dtype == value.weight.dtype == jnp.float32
    wanted, _ = next_token(logits.astype(jnp.float32), batch)
    np.testing.assert_array_equal(value.total, wanted.total)


class TestBatchesOfSeveralLengths:
    GROUPS = (
        {"inputs": {"x": np.arange(11)[:, None]}, "labels": np.arange(11)},
        {"inputs": {"x": np.arange(100, 107)[:, None].repeat(3, 1)}, "labels": np.arange(100, 107)},
    )

    def test_each_is_of_one_length_and_an_epoch_has_all(self):
        batches = Batches(self.GROUPS, size=3, seed=1)
        assert len(batches) == 3 + 2
        for epoch in range(2):
            found = [batches(epoch * 5 + step) for step in range(5)]
            assert sorted(batch["inputs"]["x"].shape[1] for batch in found) == [1, 1, 1, 3, 3]
            for batch in found:
                np.testing.assert_array_equal(batch["inputs"]["x"][:, 0], batch["labels"])
            labels = np.concatenate([batch["labels"] for batch in found])
            assert len(set(labels)) == len(labels) == 15

    def test_they_are_a_function_of_seed_and_step(self):
        first, again = (Batches(self.GROUPS, size=3, seed=1) for _ in range(2))
        other = Batches(self.GROUPS, size=3, seed=2)
        labels = [[batches(step)["labels"].tolist() for step in (7, 2, 7)] for batches in (first, again, other)]
        assert labels[0] == labels[1] != labels[2]
        assert labels[0][0] == labels[0][2]

    def test_one_that_is_too_small_is_refused(self):
        with pytest.raises(ValueError, match="7 examples are fewer than a batch of 8"):
            Batches(self.GROUPS, size=8, seed=1)
