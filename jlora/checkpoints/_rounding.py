"""What rounding to the dtype of a checkpoint leaves of the updates that are merged into it."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jlora.checkpoints._arithmetic import Moved
from jlora.disk import Checkpoint
from jlora.errors import listed, printable

_ALL = ""
_MOST_LOST = 0.5  # of the norm of an update; more than that is told
_LEAST_TOLD = 1e-3
_MOST_NAMES = 3


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What rounding leaves of an update d: the difference k between the merged tensor and the base.

    It is asked of the first of every sixteen blocks of a quarter of a million numbers; of a small tensor so of all.
    Numbers that are not finite are left out.

    Attributes:
      tensor: its name; "" of all together.
      share: of the numbers that the update moves, how many are others at all.
      error: ||k - d|| / ||d||: 0 where nothing is lost, 1 where all is.
      cosine: between d and k.
    """

    tensor: str
    share: float
    error: float
    cosine: float

    @property
    def is_worth_telling(self) -> bool:
        """Whether more than a thousandth of the update is lost, as in float32 it never is."""
        return self.error > _LEAST_TOLD

    def __str__(self) -> str:
        return (
            f"rounding leaves of the update a relative error of {self.error:.2g} and a cosine of {self.cosine:.4f}; "
            f"{self.share:.1%} of its numbers change something"
        )


def roundings(notes: Iterable[Mapping[str, Sequence[Any]]]) -> tuple[Rounding, ...]:
    """That of all tensors together, then of each, from what was noted of each shard; nothing where nothing was."""
    found: dict[str, Moved] = {}
    for note in notes:
        for name, numbers in note.items():
            found[name] = found.get(name, Moved()).plus(Moved(*numbers))
    if not found:
        return ()
    whole = Moved()
    for moved in found.values():
        whole = whole.plus(moved)
    return tuple(
        Rounding(name, moved.share, moved.error, moved.cosine) for name, moved in {_ALL: whole, **found}.items()
    )


def warnings_of_rounding(found: Sequence[Rounding], same: Collection[str], source: Checkpoint) -> Iterator[str]:
    """A warning where more than half of an update is lost; of tensors that are as they were another one tells."""
    lost = [one for one in found[1:] if one.error > _MOST_LOST and one.tensor not in same]
    if not lost:
        return
    dtypes = sorted({str(source.entries[one.tensor].dtype) for one in lost if one.tensor in source.entries})
    worst = max(lost, key=lambda one: one.error)
    names = printable(listed([one.tensor for one in lost], _MOST_NAMES))
    yield (
        f"rounding to {' and '.join(dtypes) or 'the dtype'} loses more than half of the update of {len(lost):,} of "
        f"{len(found) - 1:,} tensors ({names}; at most {worst.error:.0%} of its norm): keep the adapter beside the "
        "base, or merge it into the base in float32"
    )
