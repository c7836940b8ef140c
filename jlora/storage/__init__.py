"""Adapters and their configuration as one folder: saved whole or not at all, loaded as they were or refused."""

from typing import TYPE_CHECKING

from jlora.faces import lazy_face
from jlora.storage._folder import check_folder_to_write, folder_to_write, is_adapters_folder
from jlora.storage._other_folders import VARIANT
from jlora.storage._processes import in_first, unreachable, write_once
from jlora.storage._read import load_arrays, load_on_host, read_metadata
from jlora.storage._report import LoadReport, Misfit
from jlora.storage._save import save_adapters

if TYPE_CHECKING:
    from jlora.storage._load import load_adapters, load_fitting_adapters

__all__ = [
    "VARIANT",
    "LoadReport",
    "Misfit",
    "check_folder_to_write",
    "folder_to_write",
    "in_first",
    "is_adapters_folder",
    "load_adapters",
    "load_arrays",
    "load_fitting_adapters",
    "load_on_host",
    "read_metadata",
    "save_adapters",
    "unreachable",
    "write_once",
]

__getattr__, __dir__ = lazy_face(__name__, {"jlora.storage._load": ("load_adapters", "load_fitting_adapters")})
