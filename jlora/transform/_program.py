"""A function as a traced program, with the paths of its params."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jlora.boxes import box_like, is_box, unboxed
from jlora.paths import path_string
from jlora.transform._liveness import live_inputs
from jlora.transform._run import Run
from jlora.transform._weight import Plain, Weight


class Program:
    """`fn(params, *args, **kwargs)`, traced.

    Arrays are traced; every other leaf of the arguments reaches the function as it is.

    Attributes:
      jaxpr: the closed jaxpr.
      leaves: its inputs, arrays or shapes.
      paths: of the leaves in params; None for those of the other arguments.
    """

    def __init__(self, fn: Callable[..., Any], params: Any, args: Any, kwargs: Any) -> None:
        boxed, tree = jax.tree_util.tree_flatten_with_path((params, args, kwargs), is_leaf=is_box)
        treedef: Any = tree
        leaves = [(key_path, unboxed(leaf)) for key_path, leaf in boxed]
        traced = [number for number, (_, leaf) in enumerate(leaves) if is_array(leaf)]

        def flat(*arrays: Any) -> list[Any]:
            values = [leaf for _, leaf in boxed]
            for number, array in zip(traced, arrays, strict=True):
                values[number] = box_like(values[number], array)
            own_params, own_args, own_kwargs = treedef.unflatten(values)
            outputs, out_tree = jax.tree.flatten(fn(own_params, *own_args, **own_kwargs))
            self._out_tree: Any = out_tree
            self._outside = [None if is_array(output) else output for output in outputs]
            return [output for output in outputs if is_array(output)]

        self.leaves = [leaves[number][1] for number in traced]
        self.paths = [self._path(leaves[number][0]) for number in traced]
        self.jaxpr = jax.make_jaxpr(flat)(*self.leaves)

    @staticmethod
    def _path(key_path: Any) -> str | None:
        argument, *rest = key_path
        return path_string(rest) if argument.idx == 0 else None

    def evaluate(self, run: Run, weights: Mapping[Any, Weight | Plain], leaves: Sequence[Any]) -> list[Any]:
        """The outputs of the jaxpr for these leaves, with the weights in place of those at their paths."""
        inputs = []
        for path, leaf in zip(self.paths, leaves, strict=True):
            inputs.append(leaf if path is None else weights.get(path, Plain(leaf)))
        return run.merge_all(None, run.evaluate(self.jaxpr, inputs), "it is the weight itself")

    def read(self) -> set[str]:
        """The paths of the params on which the outputs, or an effect, depend."""
        live = live_inputs(self.jaxpr)
        return {path for path, is_live in zip(self.paths, live, strict=True) if is_live and path is not None}

    def output(self, arrays: Sequence[Any]) -> Any:
        """What the function returns, from the outputs of its jaxpr."""
        remaining = iter(arrays)
        return self._out_tree.unflatten([next(remaining) if out is None else out for out in self._outside])


def is_array(leaf: Any) -> bool:
    """Whether a leaf of the arguments is traced."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)
