"""Checkpoints of the training state through Orbax, each written whole or not at all."""

from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from jlora.errors import DataError
from jlora.paths import leaves_by_path
from jlora.train._step import TrainState


class Checkpoints:
    """The checkpoints of one run, the newest two kept; a context manager.

    Orbax writes each under a temporary name and renames it: a run that is killed leaves the earlier one readable.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, `None` where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Writes the state at a step, unless it is there already."""
        if self.latest_step != step:
            layout = ocp.args.JsonSave(_layout(state))
            state = ocp.args.StandardSave(_fields(state))
            self._manager.save(step, args=ocp.args.Composite(state=state, layout=layout))

    def restore(self, like: Any) -> Any:
        """The newest state, with the structure, shapes and dtypes of `like`.

        Raises:
          DataError: there is none, or it does not fit.
        """
        step = self.latest_step
        if step is None:
            raise DataError(f"{self.folder}: no checkpoint to resume from")
        found = self._manager.restore(step, args=ocp.args.Composite(layout=ocp.args.JsonRestore()))["layout"]
        wanted = _layout(like)
        if found != wanted:
            different = [path for path in found | wanted if found.get(path) != wanted.get(path)]
            first = ", ".join(f"{p} (found {found.get(p)}, wanted {wanted.get(p)})" for p in different[:3])
            raise DataError(
                f"{self.folder}: the checkpoint of step {step} does not fit this run in {len(different)} arrays, "
                f"such as {first}"
            )
        restore = ocp.args.StandardRestore(jax.tree.map(_abstract, _fields(like)))
        found = self._manager.restore(step, args=ocp.args.Composite(state=restore))["state"]
        return TrainState(**found) if isinstance(like, TrainState) else found


def save_tree(folder: str | Path, tree: Any) -> None:
    """Writes a pytree of arrays as an Orbax checkpoint, in place of one that is there."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder).absolute(), tree, force=True)


def restore_tree(folder: str | Path, like: Any) -> Any:
    """The pytree that `save_tree` wrote, with the structure, shapes and dtypes of `like`.

    Raises:
      DataError: there is none, or it does not fit.
    """
    path = Path(folder).absolute()
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            return checkpointer.restore(path, jax.tree.map(_abstract, like))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise DataError(f"{path}: cannot be read as this tree: {str(error).strip()}") from None


def _fields(state: Any) -> Any:
    """The fields that a state has: one without a model state is stored as before there was such a field."""
    if not isinstance(state, TrainState):
        return state
    return {name: value for name, value in state._asdict().items() if value is not None}


def _layout(tree: Any) -> dict[str, str]:
    """The shape and dtype of every array by its path."""
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves_by_path(tree).items()}


def _abstract(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
