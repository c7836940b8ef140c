"""`jlora_merge.json`: what was merged into a checkpoint, the last merge and those before it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jlora.checkpoints._forms import files_of
from jlora.checkpoints._rewrite import file_digest, fingerprint
from jlora.disk import RECORD, Checkpoint, read_json
from jlora.errors import DataError, listed, printable, shortened

Merge = dict[str, Any]
"""One merge: "adapters", the hashes of each one's files; "names" of their folders; "weights"."""


def record_of(
    command: str,
    source: Checkpoint,
    folders: Sequence[Path],
    weights: Sequence[float] | None,
    earlier: Sequence[Merge],
    **options: Any,
) -> dict[str, Any]:
    """What is done, by which a run that was killed is known again: all that a run is given.

    Options at their defaults, which are None here, are not in it: one that a later version has more makes no other run.
    """
    return {
        "command": command,
        "source": fingerprint(source),
        "adapters": [[file_digest(path) for path in files_of(folder)] for folder in folders],
        "names": [folder.resolve().name for folder in folders],
        "weights": [1.0] * len(folders) if weights is None else list(map(float, weights)),
        **({"earlier": list(earlier)} if earlier else {}),
        **{key: value for key, value in options.items() if value is not None},
    }


def merges_in(source: Checkpoint) -> list[Merge] | None:
    """The merges that made a checkpoint, the last one at the end; None where no record says anything.

    Raises:
      DataError: a record that is none.
    """
    path = source.folder / RECORD
    if RECORD in source.shards or not os.path.lexists(path):
        return None
    record = read_json(path)
    earlier = record.get("earlier", [])
    found = [*earlier, record] if isinstance(earlier, list) and record.get("command") == "merge" else earlier
    is_record = record.get("command") in ("merge", "unmerge") and isinstance(earlier, list)
    if not is_record or not all(isinstance(merge, dict) and isinstance(merge.get("adapters"), list) for merge in found):
        raise DataError(f"{path}: not what jlora writes there; remove it if nothing was merged into this checkpoint")
    return [{key: merge.get(key) for key in ("adapters", "names", "weights")} for merge in found]


def check_not_merged(folder: Path, merges: Sequence[Merge], record: Merge) -> None:
    """Refuses adapters that were merged already."""
    for merge in merges:
        for name, adapter in zip(record["names"], record["adapters"], strict=True):
            if adapter in merge["adapters"]:
                raise DataError(
                    f"{folder}: {printable(name)} is merged in it already, its {RECORD} says; start from the base, or "
                    f"remove {RECORD} to merge it once more"
                )


def check_last_merged(folder: Path, merges: Sequence[Merge] | None, record: Merge, unrecorded: bool) -> None:
    """Refuses adapters that are not those that were merged last."""
    if merges is None:
        if not unrecorded:
            raise DataError(
                f"{folder}: has no {RECORD}, so that nothing says what was merged into it, and of a checkpoint without "
                "these adapters they would be subtracted; say that they are in it by unrecorded (--unrecorded)"
            )
        return
    if not merges:
        raise DataError(f"{folder}: nothing is merged here, its {RECORD} says")
    last = merges[-1]
    for key in ("adapters", "weights"):
        if last[key] != record[key]:
            names = shortened(last["names"]).strip("[]").replace("'", "")
            raise DataError(
                f"{folder}: merged were the adapters {names} with the weights {shortened(last['weights'])}; "
                f"given are {listed(record['names'])} with {record['weights']}"
            )
