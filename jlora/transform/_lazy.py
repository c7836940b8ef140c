"""A lazy base as the transform follows it: the packed arrays, and the moves that the program has made of the weight.

A move is an equation that only rearranges or casts the weight. It is noted, and made each time when the weight becomes
dense. That happens together with the equation that uses it, in one part of the program that the backward pass computes
again, so that nothing dense is kept for it.

The first `front` axes of the weight as it stands are still the leading axes of every packed array: what takes a part
along them takes it of the packed arrays. A move has a `depth`: how many of the leading axes it leaves alone. It is
written down for one element along them, so that it stays the same when a scan or an index takes them away.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from jlora.errors import AdapterError
from jlora.lazy import is_lazy
from jlora.transform import _jax
from jlora.transform._primitives import name_of_primitive

Shape = tuple[int, ...]
Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Move:
    """A function of the weight and of other operands, among which the weight stands at `place`.

    Of several results it gives that numbered `output`.
    """

    function: Callable[..., Any]
    params: tuple[tuple[str, Any], ...]
    place: int
    depth: int
    output: int | None = None

    def __call__(self, value: jax.Array, operands: Sequence[Any]) -> jax.Array:
        def moved(value: jax.Array) -> Any:
            inputs = [*operands[: self.place], value, *operands[self.place :]]
            found = self.function(*inputs, **dict(self.params))
            return found if self.output is None else found[self.output]

        for _ in range(self.depth):
            moved = jax.vmap(moved)
        return moved(value)


@dataclasses.dataclass(frozen=True, eq=False)
class Lazy:
    """A lazy base after some moves, with the shape and dtype that they give it; a pytree of the packed arrays.

    `path` is that of a leaf of params, and is given for `explain` alone: as a part of the tree's structure it would
    make programs of each of its own that are compiled once for all.
    """

    base: Any
    shape: Shape
    dtype: Any
    front: int
    moves: tuple[Move, ...] = ()
    operands: tuple[tuple[Any, ...], ...] = ()
    path: str = ""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def dense(self) -> jax.Array:
        value = jnp.asarray(self.base.dense())
        for move, operands in zip(self.moves, self.operands, strict=True):
            value = move(value, operands)
        return value

    def element(self, base: Any) -> "Lazy":
        """One element along the first axis, whose packed arrays are these."""
        moves = tuple(dataclasses.replace(move, depth=move.depth - 1) for move in self.moves)
        return dataclasses.replace(self, base=base, shape=self.shape[1:], front=self.front - 1, moves=moves)

    def part(self, taken: Callable[[jax.Array], jax.Array], size: int) -> "Lazy":
        """So many elements along the first axis, which the function takes out of every packed array."""
        return dataclasses.replace(self, base=jax.tree.map(taken, self.base), shape=(size, *self.shape[1:]))

    def after(self, move: Move, operands: Sequence[Any], shape: Shape, dtype: Any) -> "Lazy":
        moves, noted = (*self.moves, move), (*self.operands, tuple(operands))
        return Lazy(self.base, shape, dtype, move.depth, moves, noted, self.path)


jax.tree_util.register_dataclass(Lazy, ["base", "operands"], ["shape", "dtype", "front", "moves", "path"])


def as_lazy(leaf: Any, path: str | None = None) -> Any:
    """A leaf of params as the program takes it: a lazy base as `Lazy`, a constant to gradients; an array as it is."""
    if not is_lazy(leaf):
        return leaf
    shape, dtype = tuple(leaf.shape), jnp.dtype(leaf.dtype)
    found = jax.eval_shape(lambda base: base.dense(), leaf)
    if (found.shape, found.dtype) != (shape, dtype):
        raise AdapterError(
            f"{path}: dense() of its {type(leaf).__name__} gives {found.dtype} {found.shape}, but it says that it is "
            f"{dtype} {shape}; its shape and dtype have to be those of dense()"
        )
    frozen = jax.tree.map(lax.stop_gradient, leaf)
    return Lazy(frozen, shape, dtype, getattr(leaf, "batch_dims", 0))


def is_packed(value: Any) -> bool:
    """Whether a value is a lazy base, packed still."""
    return isinstance(value, Lazy)


def densified(tree: Any) -> Any:
    """The tree with every lazy base in it dense."""
    return jax.tree.map(lambda node: dense(node) if is_packed(node) else node, tree, is_leaf=is_packed)


def dense(value: Any) -> Any:
    """A lazy base as an array; an array as it is."""
    return on_dense(lambda array: array, value)


def on_dense(function: Callable[..., Any], *args: Any) -> Any:
    """The function of the arguments, in which every lazy base is dense; the backward pass makes it dense again."""
    if not any(map(is_packed, jax.tree.leaves(args, is_leaf=is_packed))):
        return function(*args)

    @jax.checkpoint
    def recomputed(*args: Any) -> Any:
        arrays = jax.tree.map(lambda node: node.dense() if is_packed(node) else node, args, is_leaf=is_packed)
        return function(*arrays)

    return recomputed(*args)


def packed(value: Any) -> Any:
    """What a scan along the first axis takes apart: the packed arrays, if they have this axis; else the dense array."""
    if not is_packed(value):
        return value
    return value.base if value.front else dense(value)


def element(value: Any, taken: Any) -> Any:
    """One element of a stack, from one of `packed`."""
    return value.element(taken) if is_packed(value) and value.front else taken


def bind(eqn: JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any]:
    """The equation as it stands, on other inputs: a move of a lazy base is noted, anything else takes it dense."""
    places = [number for number, value in enumerate(inputs) if is_packed(value)]
    if not places:
        return _jax.bind(eqn, inputs)
    if len(places) == 1:
        (place,) = places
        others = [*inputs[:place], *inputs[place + 1 :]]
        moved = _moved(eqn, inputs[place], place, others)
        if moved is not None:
            return moved
    if eqn.effects:  # which must not happen again in the backward pass
        return _jax.bind(eqn, list(map(dense, inputs)))
    return on_dense(lambda *inputs: _jax.bind(eqn, inputs), *inputs)


def _moved(eqn: JaxprEqn, lazy: Lazy, place: int, operands: Sequence[Any]) -> list[Lazy] | None:
    """The results of an equation that moves a lazy base, its other operands given; None if it is no move."""
    name = name_of_primitive(eqn.primitive)
    params: Params = eqn.params
    if name in _UNMOVED:
        return [lazy]
    if name not in _WITHIN or (place and name != "mul"):
        return None
    if name in ("mul", "div") and jnp.ndim(operands[0]):
        return None
    avals: Any = [var.aval for var in eqn.outvars]
    if lazy.front and name in _TAKES:
        taken = _TAKES[name](lazy, params, operands)
        if taken is not None:
            lazies, rest, operands = taken
            if rest is None:
                return lazies
            (lazy,), params = lazies, rest
    depth, shape = 0, lazy.shape
    while depth < lazy.front:
        within = _WITHIN[name](params, operands, shape)
        if within is None:
            break
        (params, operands), depth, shape = within, depth + 1, shape[1:]
    several = eqn.primitive.multiple_results
    outputs = []
    for number, aval in enumerate(avals):
        output = number if several else None
        move = Move(eqn.primitive.bind, tuple(sorted(params.items())), place, depth, output)
        outputs.append(lazy.after(move, operands, aval.shape, aval.dtype))
    return outputs


# What a move does within each element along the first axis, as its parameters and operands there; None if it does not
# leave that axis alone.

_Within = tuple[Params, Sequence[Any]] | None


def _same(params: Params, operands: Sequence[Any], shape: Shape) -> _Within:
    return params, operands


def _never(params: Params, operands: Sequence[Any], shape: Shape) -> _Within:
    return None


def _transpose(params: Params, operands: Sequence[Any], shape: Shape) -> _Within:
    first, *rest = params["permutation"]
    return None if first else ({**params, "permutation": tuple(axis - 1 for axis in rest)}, operands)


def _reshape(params: Params, operands: Sequence[Any], shape: Shape) -> _Within:
    sizes = params["new_sizes"]
    if sizes[:1] != shape[:1] or params["dimensions"] is not None or params.get("sharding") is not None:
        return None
    return {**params, "new_sizes": sizes[1:]}, operands


def _broadcast_in_dim(params: Params, operands: Sequence[Any], shape: Shape) -> _Within:
    sizes, axes = params["shape"], params["broadcast_dimensions"]
    if axes[0] or sizes[0] != shape[0] or params.get("sharding") is not None:
        return None
    inner = {"shape": sizes[1:], "broadcast_dimensions": tuple(axis - 1 for axis in axes[1:])}
    return {**params, **inner}, operands


def _along(key: str, params: Params, operands: Sequence[Any], shape: Shape) -> _Within:
    axes = params[key]
    return None if 0 in axes else ({**params, key: tuple(axis - 1 for axis in axes)}, operands)


def _of_axis(params: Params, operands: Sequence[Any], shape: Shape) -> _Within:
    return ({**params, "axis": params["axis"] - 1}, operands) if params["axis"] else None


def _slice(params: Params, operands: Sequence[Any], shape: Shape) -> _Within:
    if not _is_whole(params, shape):
        return None
    strides = params["strides"] and params["strides"][1:]
    inner = {name: params[name][1:] for name in ("start_indices", "limit_indices")}
    return {**params, **inner, "strides": strides}, operands


def _dynamic_slice(params: Params, operands: Sequence[Any], shape: Shape) -> _Within:
    if params["slice_sizes"][0] != shape[0]:
        return None
    return {**params, "slice_sizes": params["slice_sizes"][1:]}, operands[1:]


_WITHIN: Mapping[str, Callable[[Params, Sequence[Any], Shape], _Within]] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "convert_element_type": _same,
    "div": _same,
    "dynamic_slice": _dynamic_slice,
    "gather": _never,
    "mul": _same,
    "neg": _same,
    "reduce_precision": _same,
    "reshape": _reshape,
    "rev": functools.partial(_along, "dimensions"),
    "slice": _slice,
    "split": _of_axis,
    "squeeze": functools.partial(_along, "dimensions"),
    "transpose": _transpose,
    "unstack": _of_axis,
}
_UNMOVED = ("copy", "name", "sharding_constraint")  # the packed arrays lie where they lie


# What takes a part along the first axis: the results, then the parameters and operands of what is left to be done to
# them; None for them if nothing is, and for all if it takes no part.

_Taken = tuple[list[Lazy], Params | None, Sequence[Any]] | None


def _take_slice(lazy: Lazy, params: Params, operands: Sequence[Any]) -> _Taken:
    if _is_whole(params, lazy.shape):
        return None
    starts, limits, strides = params["start_indices"], params["limit_indices"], params["strides"]
    step = strides[0] if strides else 1
    size = -(-(limits[0] - starts[0]) // step)
    part = lazy.part(lambda array: lax.slice_in_dim(array, starts[0], limits[0], step), size)
    rest = {**params, "start_indices": (0, *starts[1:]), "limit_indices": (size, *limits[1:])}
    rest["strides"] = strides and (1, *strides[1:])
    is_done = limits[1:] == lazy.shape[1:] and not any(starts[1:]) and set(rest["strides"] or [1]) == {1}
    return [part], None if is_done else rest, operands


def _take_dynamic_slice(lazy: Lazy, params: Params, operands: Sequence[Any]) -> _Taken:
    size, *others = params["slice_sizes"]
    if size == lazy.shape[0]:
        return None
    start, *rest = operands
    part = lazy.part(lambda array: lax.dynamic_slice_in_dim(array, start, size), size)
    is_done = tuple(others) == lazy.shape[1:]
    return [part], None if is_done else params, [jnp.zeros_like(start), *rest]


def _take_squeeze(lazy: Lazy, params: Params, operands: Sequence[Any]) -> _Taken:
    if 0 not in params["dimensions"]:
        return None
    found = lazy.element(jax.tree.map(lambda array: lax.squeeze(array, [0]), lazy.base))
    rest = tuple(axis - 1 for axis in params["dimensions"] if axis)
    return [found], {**params, "dimensions": rest} if rest else None, operands


def _take_split(lazy: Lazy, params: Params, operands: Sequence[Any]) -> _Taken:
    if params["axis"]:
        return None
    pieces, start = [], 0
    for size in params["sizes"]:
        pieces.append(lazy.part(functools.partial(lax.slice_in_dim, start_index=start, limit_index=start + size), size))
        start += size
    return pieces, None, operands


def _take_unstack(lazy: Lazy, params: Params, operands: Sequence[Any]) -> _Taken:
    if params["axis"]:
        return None
    elements = []
    for number in range(lazy.shape[0]):
        one = functools.partial(lax.index_in_dim, index=number, keepdims=False)
        elements.append(lazy.element(jax.tree.map(one, lazy.base)))
    return elements, None, operands


def _take_gather(lazy: Lazy, params: Params, operands: Sequence[Any]) -> _Taken:
    """One element, looked up by an index; beyond the last one it is what the lookup fills in."""
    numbers, mode = params["dimension_numbers"], params["mode"]
    (indices,) = operands
    one = (1, *lazy.shape[1:])
    if indices.ndim != 1 or tuple(numbers.start_index_map) != (0,) or tuple(params["slice_sizes"]) != one:
        return None
    if tuple(numbers.collapsed_slice_dims) != (0,):
        return None
    index, last = indices[0], lazy.shape[0] - 1

    def looked_up(array: jax.Array) -> jax.Array:
        return lax.dynamic_index_in_dim(array, jnp.clip(index, 0, last), keepdims=False)

    found = lazy.element(jax.tree.map(looked_up, lazy.base))
    if mode == lax.GatherScatterMode.FILL_OR_DROP:
        fill = jnp.nan if params["fill_value"] is None else params["fill_value"]
        is_there = (index >= 0) & (index <= last)
        move = Move(_filled, (), 0, found.front)
        found = found.after(move, [is_there, jnp.asarray(fill, lazy.dtype)], found.shape, found.dtype)
    return [found], None, operands


def _filled(value: jax.Array, is_there: jax.Array, fill: jax.Array) -> jax.Array:
    return jnp.where(is_there, value, fill)


def _is_whole(params: Params, shape: Shape) -> bool:
    """Whether a slice takes all of the first axis."""
    strides = params["strides"]
    return (params["start_indices"][0], params["limit_indices"][0]) == (0, shape[0]) and not (
        strides and strides[0] > 1
    )


_TAKES: Mapping[str, Callable[[Lazy, Params, Sequence[Any]], _Taken]] = {
    "dynamic_slice": _take_dynamic_slice,
    "gather": _take_gather,
    "slice": _take_slice,
    "split": _take_split,
    "squeeze": _take_squeeze,
    "unstack": _take_unstack,
}
