"""Faces of packages whose parts are imported when they are first asked for (PEP 562)."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["lazy_face"]


def lazy_face(package: str, names: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package with names out of modules that are not imported with it.

    JAX takes most of a second to import. A package that some use without it takes what has need of JAX by this, and
    imports it for type checkers alone. A module of the package that is not imported yet is found as well.

    Args:
      package: its name.
      names: the module that has them -> the names that the package shows.
    """
    module_of = {name: module for module, shown in names.items() for name in shown}

    def look_up(name: str) -> Any:
        if name in module_of:
            found = getattr(importlib.import_module(module_of[name]), name)
        elif not name.startswith("_") and importlib.util.find_spec(f"{package}.{name}"):
            found = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, found)
        return found

    def names_shown() -> list[str]:
        return sorted({*vars(sys.modules[package]), *module_of})

    return look_up, names_shown
