"""What of a table of cases the short run has."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def some(cases: Iterable[Any], of: int = 2) -> list[Any]:
    """Every other case, or every `of`-th one, for the short run; the rest is slow.

    For cases of which each shows the same, of another dtype, place or size; those of a mapping have its keys as ids.
    """
    items = cases.items() if isinstance(cases, Mapping) else [(None, case) for case in cases]
    found = []
    for number, (name, case) in enumerate(items):
        values = case if isinstance(case, tuple) else (case,)
        found.append(pytest.param(*values, id=name, marks=() if number % of == 0 else pytest.mark.slow))
    return found
