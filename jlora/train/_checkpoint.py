"""Checkpoints of the training state through Orbax, each written whole or not at all, and read as it was or not."""

import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from jlora.disk import read_json, reason
from jlora.errors import DataError, listed, shortened
from jlora.storage import in_first
from jlora.train._arrays import array_types, read_arrays, read_old_arrays, write_arrays
from jlora.train._manifest import MANIFEST, read_manifest, write_manifest

_KEPT = 2
_TEMPORARY = re.compile(r"\.[0-9]+(\.old)?\.tmp(\.orbax-checkpoint-tmp.*)?")  # the last part is Orbax's own


class Checkpoints:
    """The checkpoints of one run, the newest two kept; a context manager.

    `folder/STEP` is a folder of Orbax under a temporary name until all of it is written, last a manifest with the size
    and SHA-256 of every file: a run that is killed leaves the earlier ones. One that is not as it was written is passed
    over with a warning, before Orbax reads any of it; the one before is taken.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> state = {'adapters': {'A': jnp.ones((5, 2))}, 'count': jnp.int32(3)}
    >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
    ...     checkpoints.save(10, state)
    ...     checkpoints.latest_step, checkpoints.restore(state)['count']
    (10, Array(3, dtype=int32))
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self._types: dict[int, dict[str, str] | None] = {}  # what is known: of the good ones their arrays

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left to do: every checkpoint is written when `save` returns."""

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint that is as it was written, `None` where there is none at all.

        Raises:
          DataError: there are some, and all of them are damaged.
        """
        steps = self._steps()
        for step in reversed(steps):
            if self._good(step):
                return step
        if steps:
            raise DataError(
                f"{self.folder}: none of the checkpoints, of steps {listed(steps)}, is as it was written; "
                "delete them to begin anew"
            )
        return None

    def save(self, step: int, state: Any) -> None:
        """Writes the state at a step, unless it is there already; with several processes all of them call it.

        Raises:
          DataError: a later one is there, or the system refuses.
        """
        newest = in_first(lambda: max((other for other in self._steps() if self._good(other)), default=None))
        if newest == step:
            return
        if newest is not None and newest > step:
            raise DataError(f"{self.folder}: holds the checkpoint of step {newest}, later than {step}: another run's?")
        self._write(step, state)
        self._types[step] = array_types(state)

    def restore(self, like: Any) -> Any:
        """The newest state that is as it was written, with the structure, shapes, dtypes and shardings of `like`.

        What is committed to no device in `like` is so again, as the step and the counts of `init_state`.

        Raises:
          DataError: there is none, or it does not fit.
        """
        step = in_first(lambda: self.latest_step)
        if step is None or not self._good(step):
            raise DataError(f"{self.folder}: no checkpoint to resume from")
        found, wanted = self._types[step] or {}, array_types(like)
        if found != wanted:
            different = [path for path in found | wanted if found.get(path) != wanted.get(path)]
            first = ", ".join(f"{p} (found {found.get(p)}, wanted {wanted.get(p)})" for p in different[:3])
            raise DataError(
                f"{self.folder}: the checkpoint of step {step} does not fit this run in {len(different)} arrays, "
                f"such as {first}"
            )
        folder = self.folder / str(step)
        return read_arrays(folder, like) if (folder / MANIFEST).exists() else read_old_arrays(folder / "state", like)

    def _steps(self) -> list[int]:
        """The steps of all that is there, in their order."""
        try:
            names = [path.name for path in self.folder.iterdir() if path.is_dir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be read: {reason(error)}") from None
        return sorted(int(name) for name in names if name.isdecimal() and name.isascii() and str(int(name)) == name)

    def _good(self, step: int) -> bool:
        """Whether a checkpoint is as it was written; where it is not, it says so once."""
        if step not in self._types:
            try:
                self._types[step] = _read_types(self.folder / str(step), step)
            except DataError as error:
                self._types[step] = None
                warnings.warn(f"the checkpoint of step {step} is damaged and passed over: {error}", stacklevel=4)
        return self._types[step] is not None

    def _write(self, step: int, state: Any) -> None:
        target, temporary = self.folder / str(step), self.folder / f".{step}.tmp"

        def tidy_up() -> None:
            with self._named():
                self.folder.mkdir(parents=True, exist_ok=True)
                for leftover in self.folder.iterdir():
                    if _TEMPORARY.fullmatch(leftover.name):
                        shutil.rmtree(leftover)

        def keep() -> None:
            with self._named():
                write_manifest(temporary, {"step": step, "arrays": array_types(state)})
                self._remove(step)
                os.rename(temporary, target)
                good = [other for other in self._steps() if other < step and self._types.get(other) is not None]
                for other in self._steps():
                    if other != step and other not in good[1 - _KEPT :]:
                        self._remove(other)

        in_first(tidy_up)
        with self._named():
            write_arrays(temporary, state)
        in_first(keep)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """What the system refuses, as a DataError with the folder."""
        try:
            yield
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be written: {reason(error)}") from None

    def _remove(self, step: int) -> None:
        """Removes a checkpoint: under another name first, so that half of one is never met under its own."""
        path = self.folder / str(step)
        if path.exists():
            away = self.folder / f".{step}.old.tmp"
            os.rename(path, away)
            shutil.rmtree(away)


def _read_types(folder: Path, step: int) -> dict[str, str]:
    """The types of the arrays of a checkpoint that is as it was written."""
    if not (folder / MANIFEST).exists() and (folder / "layout" / "metadata").is_file():  # jlora 0.1 had no manifest
        return read_json(folder / "layout" / "metadata")
    about = read_manifest(folder)
    if about.get("step") != step:
        raise DataError(f"{folder}: is the checkpoint of step {shortened(about.get('step'))}")
    types = about.get("arrays")
    if not isinstance(types, dict):
        raise DataError(f"{folder}: says nothing of its arrays")
    return types
