"""Adapters and their configuration as one folder: saved whole or not at all, loaded as they were or refused."""

from jlora.storage._folder import folder_to_write, is_adapters_folder
from jlora.storage._load import load_adapters, load_arrays, load_fitting_adapters, read_metadata
from jlora.storage._processes import in_first, unreachable, write_once
from jlora.storage._report import LoadReport, Misfit
from jlora.storage._save import save_adapters

__all__ = [
    "LoadReport",
    "Misfit",
    "folder_to_write",
    "in_first",
    "is_adapters_folder",
    "load_adapters",
    "load_arrays",
    "load_fitting_adapters",
    "read_metadata",
    "save_adapters",
    "unreachable",
    "write_once",
]
