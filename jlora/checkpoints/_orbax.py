"""Params in Orbax's folders, as NumPy arrays."""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.errors import DataError, listed, shortened

_TREE = "_METADATA"  # lies in the folder of each tree
_PARAMS = ("params", "model_params", "items")  # of several trees the one that is read; tunix's, MaxText's
_STATE = ("opt_state", "optimizer", "opt")


def is_orbax_folder(path: str | Path) -> bool:
    """Whether a folder holds trees that Orbax saved, itself or one or two levels below.

    >>> is_orbax_folder("no/such/folder")
    False
    """
    folder = Path(path)
    return (folder / _TREE).is_file() or bool(_trees_in(folder)) or any(map(_trees_in, _folders_in(folder)))


def read_orbax_params(path: str | Path) -> dict[str, Any]:
    """The params of a checkpoint of Orbax, nested, without the optimizer's state that lies beside them.

    Args:
      path: the folder of a tree, or of a step with one tree in it or with several, of which one is `params`,
        `model_params` or `items`.

    Raises:
      DataError: several steps or trees, none, no tree of named arrays, what Orbax cannot read.
    """
    folder = _tree_of(Path(path))
    return _params_of(folder, _restored(folder))


def read_orbax_shapes(path: str | Path) -> dict[str, Any]:
    """`read_orbax_params` with what Orbax says of each array, its `shape` and `dtype`, in the place of the array."""
    folder = _tree_of(Path(path))
    with _opened(folder) as checkpointer:
        return _params_of(folder, _metadata(checkpointer, folder))


def _params_of(folder: Path, tree: Any) -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        raise DataError(f"{folder}: holds {shortened(type(tree).__name__)}: wanted a tree of named params")
    if "params" in tree and isinstance(tree["params"], Mapping):
        tree = tree["params"]
    elif state := [key for key in _STATE if key in tree]:
        raise DataError(
            f"{folder}: holds {state[0]} beside its params, whose names are the same: save the params alone"
        )
    return dict(_without_values(tree))


def _tree_of(folder: Path) -> Path:
    """The folder of the one tree that is meant."""
    if (folder / _TREE).is_file():
        return folder
    trees = {tree.name: tree for tree in _trees_in(folder)}
    wanted = next((name for name in _PARAMS if name in trees), None)
    if len(trees) == 1 or wanted is not None:
        return trees[wanted or next(iter(trees))]
    if trees:
        raise DataError(f"{folder}: holds the trees {listed(trees)}: give one of them, such as {folder / min(trees)}")
    steps = [step for step in _folders_in(folder) if _trees_in(step)]
    if not steps:
        raise DataError(f"{folder}: holds no tree that Orbax saved")
    last = max(steps, key=lambda step: (step.name.isdecimal(), int(step.name) if step.name.isdecimal() else 0))
    raise DataError(f"{folder}: holds {len(steps)} checkpoints: give one of them, such as {last}")


def _restored(folder: Path) -> Any:
    import orbax.checkpoint as ocp
    from jax import tree

    with _opened(folder) as checkpointer:
        found = _metadata(checkpointer, folder)
        as_numpy = tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), found)
        return checkpointer.restore(folder.absolute(), args=ocp.args.PyTreeRestore(restore_args=as_numpy))


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    """What reads a tree of Orbax; a DataError where it cannot."""
    import orbax.checkpoint as ocp

    with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            yield checkpointer
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise DataError(f"{folder}: Orbax cannot read it: {shortened(error)}") from None


def _metadata(checkpointer: Any, folder: Path) -> Any:
    """The tree with what Orbax says of each array."""
    found = checkpointer.metadata(folder.absolute())
    found = getattr(found, "item_metadata", found)
    return getattr(found, "tree", found)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what Orbax tells of metadata that a tree does not need to have."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # errors are raised too
    try:
        yield
    finally:
        logger.setLevel(level)


def _without_values(tree: Any) -> Any:
    """A tree with the arrays themselves where NNX's variables are, {"value": array}."""
    if not isinstance(tree, Mapping):
        return tree
    if tree.keys() == {"value"} and not isinstance(tree["value"], Mapping):
        return tree["value"]
    return {key: _without_values(child) for key, child in tree.items()}


def _trees_in(folder: Path) -> list[Path]:
    return [inner for inner in _folders_in(folder) if (inner / _TREE).is_file()]


def _folders_in(folder: Path) -> list[Path]:
    try:
        names = sorted(os.listdir(folder))
    except (OSError, ValueError):
        return []
    return [folder / name for name in names[:1000] if (folder / name).is_dir()]
