"""Metrics on a test set, a chunk at a time."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jlora.recipes._chunks import chunk_size
from jlora.train import Examples, ExpMean, Mean, Metrics, Sum, count_examples

Forward = Callable[..., tuple[Any, Any]]  # forward(trained, frozen, inputs, state, key) -> (outputs, state)
_CHUNK, _CHUNK_NUMBERS = 1024, 1 << 26  # examples that are evaluated at once, and the numbers of what comes out


def evaluator(
    forward: Forward, loss: Callable[[Any, Examples], Any], test: Examples, frozen: Any
) -> Callable[..., dict[str, float]]:
    """A function of what is trained, and of the model's state, that gives the metrics on a test set.

    Each metric is put together of those of the chunks by its kind: a plain number is weighed by the chunk's length.

    Args:
      forward: the model.
      loss: `loss(outputs, batch)`.
      test: the test set.
      frozen: what the model is given beside what is trained.
    """

    @jax.jit
    def chunk_metrics(trained: Any, frozen: Any, state: Any, chunk: Examples) -> dict[str, Any]:
        outputs, _ = forward(trained, frozen, chunk["inputs"], state, None)
        value, metrics = value_and_metrics(loss(outputs, chunk))
        return {"loss": value, **metrics}

    def evaluate(trained: Any, state: Any = None) -> dict[str, float]:
        sums: dict[str, Any] = {}
        size = _chunk_size(forward, test["inputs"], trained, frozen, state)
        for start in range(0, count_examples(test), size):
            chunk = jax.tree.map(lambda array, start=start: array[start : start + size], test)
            count = count_examples(chunk)
            for name, value in chunk_metrics(trained, frozen, state, chunk).items():
                kind = value if isinstance(value, Mean | ExpMean | Sum) else Mean(float(value) * count, count)
                before = sums.get(name, [0.0] * len(kind))
                sums[name] = type(kind)(*(old + float(new) for old, new in zip(before, kind, strict=True)))
        return {name: _value(kind) for name, kind in sums.items()}

    return evaluate


def value_and_metrics(returned: Any) -> tuple[Any, Metrics]:
    """What a loss returned, which may be a value alone."""
    return returned if type(returned) is tuple else (returned, {})


def _chunk_size(forward: Forward, inputs: Any, trained: Any, frozen: Any, state: Any) -> int:
    """How many examples are evaluated at once: no more than memory holds the outputs of."""
    one = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array[:1].shape, array.dtype), inputs)
    outputs, _ = jax.eval_shape(lambda *known: forward(*known, None), trained, frozen, one, state)
    numbers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(outputs))
    return chunk_size(len(jax.tree.leaves(inputs)[0]), min(_CHUNK, _CHUNK_NUMBERS // max(1, numbers)))


def _value(kind: Mean | ExpMean | Sum) -> float:
    if isinstance(kind, Sum):
        return float(kind.value)
    mean = float(kind.total / kind.weight) if kind.weight else math.nan
    return float(np.exp(mean)) if isinstance(kind, ExpMean) else mean
