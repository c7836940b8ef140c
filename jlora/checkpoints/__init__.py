"""Checkpoints and adapters as files: merged, unmerged, extracted, resized, combined, converted, inspected, compared."""

from typing import TYPE_CHECKING

from jlora.faces import lazy_face

if TYPE_CHECKING:
    from jlora.checkpoints._adapter_files import combine, convert, read_adapters, resize, write_adapters
    from jlora.checkpoints._extract import extract
    from jlora.checkpoints._import_gguf import Imported, gguf_in_package, import_gguf
    from jlora.checkpoints._inspect import diff, inspect
    from jlora.checkpoints._merge import Merged, Unmerged, merge, unmerge
    from jlora.checkpoints._verification import Check, Kind, Verification
    from jlora.checkpoints._verify import verify, write_manifest
    from jlora.disk import dry_run

__all__ = [
    "Check",
    "Imported",
    "Kind",
    "Merged",
    "Unmerged",
    "Verification",
    "combine",
    "convert",
    "diff",
    "dry_run",
    "extract",
    "gguf_in_package",
    "import_gguf",
    "inspect",
    "merge",
    "read_adapters",
    "resize",
    "unmerge",
    "verify",
    "write_adapters",
    "write_manifest",
]

# Each command is a process of its own: what it does not use is not imported.
__getattr__, __dir__ = lazy_face(
    __name__,
    {
        "jlora.checkpoints._extract": ("extract",),
        "jlora.checkpoints._adapter_files": ("combine", "convert", "read_adapters", "resize", "write_adapters"),
        "jlora.checkpoints._import_gguf": ("Imported", "gguf_in_package", "import_gguf"),
        "jlora.checkpoints._inspect": ("diff", "inspect"),
        "jlora.checkpoints._merge": ("Merged", "Unmerged", "merge", "unmerge"),
        "jlora.checkpoints._verification": ("Check", "Kind", "Verification"),
        "jlora.checkpoints._verify": ("verify", "write_manifest"),
        "jlora.disk": ("dry_run",),
    },
)
