"""A function as a traced program, with the paths of its params."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jlora.boxes import box_like, is_box, unboxed
from jlora.lazy import is_lazy
from jlora.paths import is_param, path_string
from jlora.transform._lazy import as_lazy, is_packed
from jlora.transform._liveness import live_inputs
from jlora.transform._run import Run
from jlora.transform._weight import Plain, Weight


class Program:
    """`fn(params, *args, **kwargs)`, traced.

    Arrays are traced; every other leaf of the arguments reaches the function as it is.

    Attributes:
      jaxpr: the closed jaxpr.
      leaves: its inputs, arrays or shapes; among those of params lazy bases.
      paths: of the leaves in params; None for those of the other arguments.
    """

    def __init__(self, fn: Callable[..., Any], params: Any, args: Any, kwargs: Any) -> None:
        of_params, first_tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_param)
        others, second_tree = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_box)
        params_tree: Any = first_tree
        others_tree: Any = second_tree
        boxed = [*of_params, *others]
        leaves = [unboxed(leaf) for _, leaf in boxed]
        lazy = {number for number, leaf in enumerate(leaves[: len(of_params)]) if is_lazy(leaf)}
        traced = [number for number, leaf in enumerate(leaves) if number in lazy or is_array(leaf)]

        def flat(*arrays: Any) -> list[Any]:
            values = [leaf for _, leaf in boxed]
            for number, array in zip(traced, arrays, strict=True):
                values[number] = box_like(values[number], array)
            own_params = params_tree.unflatten(values[: len(of_params)])
            own_args, own_kwargs = others_tree.unflatten(values[len(of_params) :])
            outputs, out_tree = jax.tree.flatten(fn(own_params, *own_args, **own_kwargs))
            self._out_tree: Any = out_tree
            self._outside = [None if is_array(output) else output for output in outputs]
            return [output for output in outputs if is_array(output)]

        paths = [path_string(key_path) for key_path, _ in of_params]
        self.leaves = [leaves[number] for number in traced]
        self.paths = [paths[number] if number < len(paths) else None for number in traced]
        shapes = [
            jax.ShapeDtypeStruct(leaves[number].shape, leaves[number].dtype) if number in lazy else leaves[number]
            for number in traced
        ]
        self.jaxpr = jax.make_jaxpr(flat)(*shapes)

    def evaluate(self, run: Run, weights: Mapping[Any, Weight | Plain], leaves: Sequence[Any]) -> list[Any]:
        """The outputs of the jaxpr for these leaves, with the weights in place of those at their paths."""
        inputs = []
        for path, leaf in zip(self.paths, leaves, strict=True):
            if path in weights:
                leaf = weights[path]
            elif path is not None:
                value = as_lazy(leaf, path)
                if run.unpacked is not None and is_packed(value):
                    value = dataclasses.replace(value, path=path)
                leaf = Plain(value)
            inputs.append(leaf)
        return run.merge_outputs(None, run.evaluate(self.jaxpr, inputs), "it is the weight itself")

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
