"""How the ways of adapting did."""

import dataclasses
import resource
from collections.abc import Sequence

import jax

from jlora.tables import text_table

SHARES = ("accuracy", "token_accuracy", "exact_match")  # metrics that are printed in %


@dataclasses.dataclass(frozen=True)
class Result:
    """How one way of adapting did on the test set.

    Attributes:
      name: of the way.
      metrics: of the loss on the test set.
      parameters: the scalars that were trained.
      optimizer_bytes: the bytes of the optimizer's state.
      seconds: of training, compilation included.
    """

    name: str
    metrics: dict[str, float]
    parameters: int
    optimizer_bytes: int
    seconds: float


def results_table(results: Sequence[Result]) -> str:
    """A line for each way of adapting: how it does on the test set, and what it costs."""
    metrics = [name for name in results[0].metrics if name != "loss"] or ["loss"]
    header = ("on the test set", *(name.replace("_", " ") for name in metrics))
    table = []
    for result in results:
        values = [shown_metric(name, result.metrics.get(name)) for name in metrics]
        costs = (f"{result.parameters:,}", f"{result.optimizer_bytes:,} B", f"{result.seconds:.1f}")
        table.append((result.name, *values, *costs))
    return text_table((*header, "trained parameters", "optimizer state", "seconds"), table)


def shown_metric(name: str, value: float | None) -> str:
    """A metric as a table has it: shares in %."""
    if value is None:
        return ""
    return f"{value:{'.1%' if name in SHARES else '.4g'}}"


def peak_memory() -> int:
    """The most bytes that this process has had so far: of the accelerator, where there is one that tells."""
    told = jax.local_devices()[0].memory_stats() or {}
    return told.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
