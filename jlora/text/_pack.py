"""Examples as rows of one length: several in a row, or one in a row of a few lengths."""

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jlora.errors import ConfigError, DataError, listed
from jlora.fields import integer
from jlora.text._examples import Examples

_CHUNK = 1 << 14  # examples that are copied at once

Rows = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class PackReport:
    """How examples were laid into rows.

    Attributes:
      examples: of these.
      rows: for each length of a row, how many there are.
      tokens: of the examples.
      padding: the share of the rows that is none of these, of 1.
    """

    examples: int
    rows: Mapping[int, int]
    tokens: int
    padding: float

    def __str__(self) -> str:
        rows = listed(f"{count:,} rows of {length:,}" for length, count in self.rows.items())
        return f"{self.examples:,} examples in {rows}, {self.padding:.1%} padding"


def pack(examples: Examples, length: int, *, seed: int = 0, pad: int = 0) -> tuple[Rows, PackReport]:
    """Rows of one length, each of as many examples as fit.

    The longest examples are placed first, each into the fullest row that has room for it (best-fit decreasing), in time
    n log n. The seed says which of equally long ones stand together, and the order of the rows; the same examples and
    seed give the same rows.

    Args:
      examples: of `read_examples`, none longer than `length`.
      length: of a row, in tokens.
      seed: of the order.
      pad: the token at the end of a row that is not full.

    Returns:
      The rows, as arrays (rows, length), and a report which prints as a line. Arrays are int32, weights float32:

          inputs / tokens     the examples, one after the other, then `pad`
          inputs / positions  0, 1, ... within each example
          inputs / segments   1, 2, ... within each row, 0 for padding: attention stays within equal numbers
          labels              the token that follows; `pad` where none does
          weights             1 where the label is to be learned, and else 0

    Raises:
      DataError: there are no examples, or one is longer than a row.

    >>> from jlora.text import Example
    >>> examples = Examples.of([Example(np.arange(3), np.ones(3, bool)), Example(np.arange(7, 9), np.ones(2, bool))])
    >>> rows, report = pack(examples, 6)
    >>> rows["inputs"]["tokens"].tolist(), rows["labels"].tolist(), rows["weights"].tolist()
    ([[0, 1, 2, 7, 8, 0]], [[1, 2, 0, 8, 0, 0]], [[1.0, 1.0, 0.0, 1.0, 0.0, 0.0]])
    >>> print(report)
    2 examples in 1 rows of 6, 16.7% padding
    """
    length = integer("length", length, 2)
    rng = np.random.default_rng((integer("seed", seed, 0), 0))
    _check_lengths(examples, length)
    order = rng.permutation(len(examples))
    order = order[np.argsort(-examples.lengths[order], kind="stable")]
    place, count = _best_fit(examples.lengths[order], length)
    place = rng.permutation(count)[place]
    rows = _filled(examples, order, place, count, length, pad)
    return rows, _report(examples, {length: count})


def bucket(examples: Examples, lengths: Sequence[int], *, pad: int = 0) -> tuple[tuple[Rows, ...], PackReport]:
    """One example a row, in the shortest of a few lengths that holds it.

    Args:
      examples: of `read_examples`, none longer than the greatest length.
      lengths: of rows, in tokens; each is a shape for which a train step is compiled.
      pad: the token that fills a row.

    Returns:
      For each length that occurs, the shortest first, rows as of `pack`, in the order of the examples; and a report.

    Raises:
      DataError: there are no examples, or one is longer than any row.
    """
    if not len(lengths):
        raise ConfigError("lengths = []: wanted at least one length of rows")
    wanted = sorted({integer("lengths", length, 2) for length in lengths})
    _check_lengths(examples, wanted[-1])
    which = np.searchsorted(wanted, examples.lengths)
    groups, counts = [], {}
    for number, length in enumerate(wanted):
        (chosen,) = np.nonzero(which == number)
        if len(chosen):
            groups.append(_filled(examples, chosen, np.arange(len(chosen)), len(chosen), length, pad))
            counts[length] = len(chosen)
    return tuple(groups), _report(examples, counts)


def _check_lengths(examples: Examples, length: int) -> None:
    if not len(examples):
        raise DataError("there are no examples")
    longest = int(examples.lengths.max())
    if longest > length:
        number = int(examples.lengths.argmax())
        raise DataError(f"example {number} has {longest:,} tokens, for rows of {length:,}: read with length={length}")


def _report(examples: Examples, counts: Mapping[int, int]) -> PackReport:
    places = sum(length * count for length, count in counts.items())
    return PackReport(len(examples), dict(counts), len(examples.tokens), 1 - len(examples.tokens) / places)


def _best_fit(lengths: np.ndarray, length: int) -> tuple[np.ndarray, int]:
    """The row of each example, int64 (n,), and how many rows there are; the longest examples stand first."""
    place = np.empty(len(lengths), np.int64)
    rooms: list[int] = []  # the sizes of the rooms that are left in rows, each once, in order
    rows_with: dict[int, list[int]] = {}
    count = 0
    for number, wanted in enumerate(lengths.tolist()):
        at = bisect.bisect_left(rooms, wanted)
        if at == len(rooms):
            row, room = count, length
            count += 1
        else:
            room = rooms[at]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rooms[at]
        place[number] = row
        left = room - wanted
        if left:
            if not rows_with.setdefault(left, []):
                bisect.insort(rooms, left)
            rows_with[left].append(row)
    return place, count


def _filled(examples: Examples, order: np.ndarray, place: np.ndarray, count: int, length: int, pad: int) -> Rows:
    """Rows with the examples of `order`, each in the row of `place`, after those that are before it there."""
    tokens = np.full((count, length), pad, np.int32)
    labels = tokens.copy()
    positions, segments = np.zeros((2, count, length), np.int32)
    weights = np.zeros((count, length), np.float32)
    lengths = examples.lengths[order]
    by_row = np.argsort(place, kind="stable")
    ends, number = _within_rows(place[by_row], lengths[by_row])
    begin, segment = np.empty_like(lengths), np.empty_like(lengths)
    begin[by_row], segment[by_row] = ends - lengths[by_row], number
    for first in range(0, len(order), _CHUNK):
        some = slice(first, first + _CHUNK)
        sizes = lengths[some]
        within = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)  # 0, 1, ... in each example
        source = np.repeat(examples.offsets[order[some]], sizes) + within
        target = np.repeat(place[some] * length + begin[some], sizes) + within
        tokens.flat[target] = examples.tokens[source]
        positions.flat[target] = within
        segments.flat[target] = np.repeat(segment[some], sizes)
        follows = within > 0  # each token but the first is the label of the one before it
        labels.flat[target[follows] - 1] = examples.tokens[source[follows]]
        weights.flat[target[follows] - 1] = examples.counts[source[follows]]
    inputs = {"tokens": tokens, "positions": positions, "segments": segments}
    return {"inputs": inputs, "labels": labels, "weights": weights}


def _within_rows(place: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where in its row each example ends, and the how many-th of it it is, from 1; those of a row stand together."""
    is_first = np.diff(place, prepend=-1) != 0
    total = lengths.cumsum()
    before = np.maximum.accumulate(np.where(is_first, total - lengths, 0))
    number = np.arange(1, len(place) + 1)
    return total - before, number - np.maximum.accumulate(np.where(is_first, number - 1, 0))
