"""The weights that a variant adapts, and whether what is trained fits them."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jlora.config import LoraConfig
from jlora.errors import ConfigError, TargetError, raise_all
from jlora.paths import format_nearest
from jlora.tree import Target, check_config, find_targets

Shapes = dict[str, tuple[int, ...]]


def targets_of(params: Any, config: LoraConfig, kind: str) -> dict[str, Target]:
    """The weights that a configuration of this kind adapts, by path.

    Raises:
      ConfigError: it is of another kind.
      TargetError: it does not fit the params.
    """
    check_config(config)
    if config.kind != kind:
        raise ConfigError(f"kind = {config.kind!r}: jlora.variants.{kind} wants a LoraConfig with kind={kind!r}")
    return find_targets(params, config)


def check_trained(trained: Any, targets: Mapping[str, Target], wanted: Callable[[Target], Shapes]) -> None:
    """Raises a TargetError where what is trained, parts by path, is for other weights; all problems at once.

    Args:
      trained: path -> name of a part -> array.
      targets: the weights.
      wanted: the shapes of the parts of a weight.
    """
    problems = []
    for path, parts in trained.items():
        if path not in targets:
            problems.append(f"{path}: is trained, and is no weight that is adapted; {format_nearest(path, targets)}")
            continue
        found = {name: tuple(np.shape(part)) for name, part in parts.items()}
        if found != (shapes := wanted(targets[path])):
            problems.append(f"{path} {targets[path].shape}: found {_shown(found)}, wanted {_shown(shapes)}")
    raise_all(problems, TargetError)


def _shown(shapes: Shapes) -> str:
    return " and ".join(f"{name} {shape}" for name, shape in sorted(shapes.items())) or "nothing"
