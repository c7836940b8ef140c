"""The packages that only texts need: imported when they are, and their errors told as ours."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from jlora.errors import DataError, shortened


def imported(name: str) -> Any:
    """A module of the extra `lm`.

    Raises:
      DataError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise DataError(f"{error.name} is not installed: pip install 'jlora[lm]'") from None


@contextlib.contextmanager
def told_as(problem: str) -> Iterator[None]:
    """Raises a DataError of this problem for whatever `tokenizers` raises, a panic of its Rust included."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{problem}: {shortened(str(error), 300)}") from None
