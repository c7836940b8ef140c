"""The command `jlora`: arguments to calls to printed tables."""

from jlora.cli._main import main

__all__ = ["main"]
