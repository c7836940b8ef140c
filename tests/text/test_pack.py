"""Rows of several examples, and of one: every example is there once, and nothing else."""

import time
from collections import Counter

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jlora import ConfigError, DataError
from jlora.text import Example, Examples, bucket, pack


def make(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return Examples.of(Example(rng.integers(1, 9, n), rng.random(n) < 0.6) for n in lengths)


def as_counter(examples):
    return Counter((tuple(example.tokens.tolist()), tuple(example.counts.tolist())) for example in examples)


def unpacked(rows):
    """The examples in rows, each found by its segment, with what its labels and weights say of them; by loops."""
    found = []
    for tokens, positions, segments, labels, weights in zip(
        *rows["inputs"].values(), rows["labels"], rows["weights"], strict=True
    ):
        assert (np.diff(segments[segments > 0]) >= 0).all()
        assert (segments[np.count_nonzero(segments) :] == 0).all()
        for segment in range(1, segments.max() + 1):
            (where,) = np.nonzero(segments == segment)
            assert positions[where].tolist() == list(range(len(where)))
            example = tokens[where]
            assert labels[where][:-1].tolist() == example[1:].tolist()
            assert weights[where[-1]] == 0
            found.append((tuple(example.tolist()), (False, *(weights[where][:-1] == 1).tolist())))
        padding = segments == 0
        assert not weights[padding].any()
        assert not positions[padding].any()
        assert (tokens[padding] == 99).all()
    return Counter(found)


sizes = st.lists(st.integers(1, 17), min_size=1, max_size=60)


@hypothesis.given(sizes, st.integers(0, 3))
def test_every_example_once(lengths, seed):
    examples = make(lengths, seed)
    rows, report = pack(examples, 17, seed=seed, pad=99)
    assert unpacked(rows) == as_counter(examples)
    assert report.padding == pytest.approx((rows["inputs"]["segments"] == 0).mean())
    assert report.rows == {17: len(rows["labels"])}
    assert len(rows["labels"]) <= 2 * sum(lengths) / 17 + 1  # two rows that are half empty would be one
    shapes = {array.shape for array in (*rows["inputs"].values(), rows["labels"], rows["weights"])}
    assert shapes == {(len(rows["labels"]), 17)}
    assert {array.dtype for array in (*rows["inputs"].values(), rows["labels"])} == {np.dtype(np.int32)}
    assert rows["weights"].dtype == np.float32


@hypothesis.given(sizes)
def test_one_example_a_row(lengths):
    examples = make(lengths)
    groups, report = bucket(examples, (17, 5, 11), pad=99)
    found = sum((unpacked(rows) for rows in groups), Counter())
    assert found == as_counter(examples)
    for rows, (length, count) in zip(groups, report.rows.items(), strict=True):
        assert rows["labels"].shape == (count, length)
        shorter = {5: 0, 11: 5, 17: 11}[length]
        assert ((rows["inputs"]["segments"] == 1).sum(1) > shorter).all()
        assert rows["inputs"]["segments"].max() == 1
    places = sum(length * count for length, count in report.rows.items())
    assert report.padding == pytest.approx(1 - sum(lengths) / places)


def test_a_function_of_examples_and_seed():
    examples = make(np.random.default_rng(0).integers(1, 30, 500))
    (first, _), (again, _), (other, _) = (pack(examples, 64, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first["inputs"]["tokens"], again["inputs"]["tokens"])
    assert not np.array_equal(first["inputs"]["tokens"], other["inputs"]["tokens"])
    fill = (first["inputs"]["segments"] > 0).sum(1)
    assert abs(np.corrcoef(fill, np.arange(len(fill)))[0, 1]) < 0.5  # rows are in no order


def test_many(monkeypatch):
    """A hundred thousand examples in a moment, in rows that are nearly full; the pieces of the copy do not show."""
    examples = make(np.random.default_rng(0).integers(2, 50, 100_000))
    started = time.process_time()
    rows, report = pack(examples, 512)
    assert time.process_time() - started < 30
    assert report.padding < 0.01
    monkeypatch.setattr("jlora.text._pack._CHUNK", 999)
    again, _ = pack(examples, 512)
    for name in ("tokens", "positions", "segments"):
        np.testing.assert_array_equal(rows["inputs"][name], again["inputs"][name])
    np.testing.assert_array_equal(rows["weights"], again["weights"])
    assert rows["weights"].sum() == examples.counts.sum()


def test_reports_and_refusals():
    examples = make([3, 9, 2])
    assert str(pack(examples, 12)[1]) == "3 examples in 2 rows of 12, 41.7% padding"
    assert str(bucket(examples, (4, 12))[1]) == "3 examples in 2 rows of 4, 1 rows of 12, 30.0% padding"
    with pytest.raises(DataError, match="example 1 has 9 tokens, for rows of 8: read with length=8"):
        pack(examples, 8)
    with pytest.raises(DataError, match="example 1 has 9 tokens, for rows of 8"):
        bucket(examples, (4, 8))
    with pytest.raises(DataError, match="there are no examples"):
        pack(make([]), 8)
    with pytest.raises(ConfigError, match=r"lengths = \[\]: wanted at least one length"):
        bucket(examples, ())
    with pytest.raises(ConfigError, match="length = 0"):
        pack(examples, 0)
    with pytest.raises(ConfigError, match="seed = -1"):
        pack(examples, 12, seed=-1)
