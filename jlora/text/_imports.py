"""The packages that only texts need, imported when they are."""

import importlib
from typing import Any

from jlora.errors import DataError


def imported(name: str) -> Any:
    """A module of the extra `lm`.

    Raises:
      DataError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise DataError(f"{error.name} is not installed: pip install 'jlora[lm]'") from None
