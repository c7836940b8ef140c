"""What `combine` is told by name: methods, and what becomes of values and magnitudes that differ."""

import dataclasses

SIGNS = ("total", "frequency")
VALUES = ("same", "first", "last", "mean", "leave_out")
MAGNITUDES = ("same", "mean")


@dataclasses.dataclass(frozen=True)
class Rule:
    """How tensors become one: `prune` "" (nothing), "magnitude" or "random"; whether a sign is elected."""

    prune: str = ""
    elect: bool = False


RULES = {
    "linear": Rule(),
    "magnitude_prune": Rule("magnitude"),
    "ties": Rule("magnitude", elect=True),
    "dare_linear": Rule("random"),
    "dare_ties": Rule("random", elect=True),
}

_PRUNING = tuple(name for name, rule in RULES.items() if rule.prune)
METHODS = ("linear", "cat", "svd", *_PRUNING, *(f"{name}_svd" for name in _PRUNING))
