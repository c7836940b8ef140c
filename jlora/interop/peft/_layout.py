"""The arrays of one weight: as PEFT's files have them, as the Hugging Face model has its axes, as the tree has them.

`kind` says what PEFT's module is, and so how the axes of its weight split:

    linear     (out, in)
    conv1d     (in, out), the Conv1D of GPT-2, `fan_in_fan_out` in PEFT
    conv       (out, in, window...)
    embedding  (vocabulary, dim), which is in, out
    experts    (experts, out, in), a stack of matrices in one parameter
    experts_t  (experts, in, out)
    experts_open  one of the two, the model is not known; taken for (experts, out, in) as most have it
    whole      no A and B: a tensor, or an offset, as it is
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.arrays import is_floating
from jlora.contraction import split_batch_axes
from jlora.disk import NOT_GATHERED
from jlora.errors import DataError, raise_all
from jlora.interop.peft._mapping import Row

Arrays = dict[str, np.ndarray[Any, Any]]

_ROLES = {
    "linear": "oi",
    "conv1d": "io",
    "embedding": "io",
    "experts": "boi",
    "experts_t": "bio",
    "experts_open": "boi",
}


def roles_of(kind: str, ndim: int) -> str:
    """The roles of the axes of a Hugging Face weight."""
    return "o" + "i" * (ndim - 1) if kind == "conv" else _ROLES[kind]


def from_peft(kind: str, parts: Mapping[str, np.ndarray[Any, Any]], rank: int) -> tuple[Arrays, tuple[int, ...]]:
    """The parts of an entry with A (*batch, *in, r) and B (*batch, r, *out), and the shape of the weight."""
    arrays = dict(parts)
    if kind == "whole":
        return arrays, next(iter(arrays.values())).shape
    a, b = arrays["A"], arrays["B"]
    _check(kind, a, b, rank)
    if kind.startswith("experts"):
        count = a.shape[0] // rank
        arrays["A"] = a.reshape(count, rank, -1).transpose(0, 2, 1)
        arrays["B"] = b.reshape(-1, rank, count).transpose(2, 1, 0)
        sides = (a.shape[1], b.shape[0]) if kind == "experts_t" else (b.shape[0], a.shape[1])
        return arrays, (count, *sides)
    arrays["A"] = np.moveaxis(a, 0, -1)
    arrays["B"] = b.reshape(b.shape[0], rank).T
    ins, outs = a.shape[1:], (b.shape[0],)
    shape = (*outs, *ins) if kind in ("linear", "conv") else (*ins, *outs)
    magnitude = (1, *outs, *(1 for _ in ins[1:])) if kind == "conv" else outs
    for name, wanted in (("value", shape), ("magnitude", magnitude)):
        if name in arrays and arrays[name].shape != wanted:
            raise DataError(f"{name} {arrays[name].shape} does not fit A and B: wanted {wanted}")
    if "magnitude" in arrays:
        arrays["magnitude"] = arrays["magnitude"].reshape(-1)
    return arrays, shape


def to_peft(kind: str, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Arrays:
    """The inverse of `from_peft`."""
    parts = dict(arrays)
    if kind == "whole":
        return parts
    a, b = arrays["A"], arrays["B"]
    if kind.startswith("experts"):
        count, ins, rank = a.shape
        parts["A"] = a.transpose(0, 2, 1).reshape(count * rank, ins)
        parts["B"] = b.transpose(2, 1, 0).reshape(-1, rank * count)
        return parts
    window = (1,) * (a.ndim - 2)
    parts["A"] = np.moveaxis(a, -1, 0)
    parts["B"] = b.T.reshape(*b.T.shape, *window)
    if "magnitude" in parts and kind == "conv":
        parts["magnitude"] = parts["magnitude"].reshape(1, -1, *window)
    return parts


def whole_to_tree(arrays: Arrays, row: Row) -> Arrays:
    """Whole tensors with the axes of the tree."""
    placed = {}
    for name, array in arrays.items():
        split, _ = _split(array.shape, "o" * array.ndim, row)
        placed[name] = array.reshape(split).transpose(_transpose(row, len(split)))
    return placed


def to_tree(arrays: Arrays, roles: str, shape: tuple[int, ...], row: Row) -> tuple[Arrays, str, tuple[int, ...]]:
    """The parts with the axes of the tree, the roles of these axes, and the shape of one weight there."""
    split, split_roles = _split(shape, roles, row)
    order = _transpose(row, len(split))
    tree_roles = "".join(split_roles[axis] for axis in order)
    tree_shape = tuple(split[axis] for axis in order)
    sizes = {role: tuple(n for n, r in zip(split, split_roles, strict=True) if r == role) for role in "bio"}
    b, i, o = (_order(split_roles, order, role) for role in "bio")
    nb, ni = len(b), len(i)
    placed: Arrays = {}
    for name, array in arrays.items():
        if name == "A":
            full = array.reshape(*sizes["b"], *sizes["i"], array.shape[-1])
            placed[name] = full.transpose(*b, *(nb + axis for axis in i), nb + ni)
        elif name == "B":
            full = array.reshape(*sizes["b"], array.shape[len(_axes(roles, "b"))], *sizes["o"])
            placed[name] = full.transpose(*b, nb, *(nb + 1 + axis for axis in o))
        elif name == "magnitude":
            full = array.reshape(*sizes["b"], *sizes["o"])
            placed[name] = full.transpose(*b, *(nb + axis for axis in o))
        else:
            placed[name] = array.reshape(split).transpose(order)
    return placed, tree_roles, tree_shape


def to_model(arrays: Arrays, kind: str, row: Row) -> Arrays:
    """The inverse of `to_tree`: the parts with the axes of the Hugging Face weight."""
    if kind == "whole":
        if row.reshape is not None and not row.name.endswith("bias"):
            raise DataError(f"the shape of a whole tensor is not known through the reshape of the row {row.name}")
        back = {name: _untransposed(array, row) for name, array in arrays.items()}
        return back if row.reshape is None else {name: array.reshape(-1) for name, array in back.items()}
    if kind == "conv" and row.reshape is not None:
        raise DataError(f"a convolution is not written through the reshape of the row {row.name}")
    nb = _batch_axes(arrays, row) if kind.startswith("experts") else 0
    split_batch_axes(arrays["A"].shape, arrays["B"].shape, nb)
    ni, no = arrays["A"].ndim - 1 - nb, arrays["B"].ndim - 1 - nb
    roles = {"o": "o" * no, "i": "i" * ni, "b": "b" * nb}
    split_roles = "".join(roles[role] for role in dict.fromkeys(roles_of(kind, 2)))
    order = _transpose(row, len(split_roles))
    inverse_b, inverse_i, inverse_o = (np.argsort(_order(split_roles, order, role)) for role in "bio")
    window = kind == "conv"
    placed: Arrays = {}
    for name, array in arrays.items():
        if name == "A":
            full = array.transpose(*inverse_b, *(nb + axis for axis in inverse_i), nb + ni)
            placed[name] = full if window else full.reshape(*_joined(full.shape[:nb]), -1, full.shape[-1])
        elif name == "B":
            full = array.transpose(*inverse_b, nb, *(nb + 1 + axis for axis in inverse_o))
            placed[name] = full.reshape(*_joined(full.shape[:nb]), full.shape[nb], -1)
        elif name == "magnitude":
            placed[name] = array.transpose(inverse_o).reshape(-1)
        else:
            placed[name] = _merged(_untransposed(array, row), split_roles, window)
    return placed


def _batch_axes(arrays: Arrays, row: Row) -> int:
    """How many axes of the tree's weight are batch axes, those of the experts split."""
    return arrays["A"].ndim + arrays["B"].ndim - 2 - (3 if row.reshape is None else len(row.reshape))


def _joined(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return (math.prod(sizes),) if sizes else ()


def _check(kind: str, a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], rank: int) -> None:
    found = f"lora_A {a.shape} and lora_B {b.shape}"
    if not a.size or not b.size:
        raise DataError(f"{found} hold no numbers: {NOT_GATHERED}")
    if kind.startswith("experts"):
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] % rank:
            raise DataError(f"{found} do not fit: wanted (experts * {rank}, in) and (out, experts * {rank})")
        return
    if kind == "conv" and b.ndim == a.ndim > 2 and b.shape[1] != rank == a.shape[0]:
        raise DataError(
            f"{found}: a grouped convolution, whose update is no product of A and B; PEFT cannot merge it either"
        )
    wanted = a.ndim == b.ndim >= 2 and a.shape[0] == b.shape[1] == rank and set(b.shape[2:]) <= {1}
    if not wanted or (a.ndim > 2) != (kind == "conv"):
        raise DataError(
            f"{found} do not fit: wanted ({rank}, in...) and (out, {rank}), as the configuration's rank says"
        )


def _split(shape: tuple[int, ...], roles: str, row: Row) -> tuple[tuple[int, ...], str]:
    """The axes after `reshape`, and the role of each: that of the axis of which it is a part."""
    if row.reshape is None:
        return shape, roles
    known = -math.prod(row.reshape) if -1 in row.reshape else 0
    split = tuple(math.prod(shape) // known if n == -1 and known else n for n in row.reshape)
    split_roles, axis, size = "", 0, 1
    for n in split:
        split_roles += roles[min(axis, len(shape) - 1)]
        size *= n
        if axis < len(shape) and size == shape[axis]:
            axis, size = axis + 1, 1
    if axis < len(shape) or math.prod(split) != math.prod(shape):
        raise DataError(f"reshape {row.reshape} of the row {row.name} does not fit a weight {shape}")
    return split, split_roles


def _transpose(row: Row, ndim: int) -> tuple[int, ...]:
    order = row.transpose or tuple(range(ndim))
    if sorted(order) != list(range(ndim)):
        raise DataError(f"transpose {order} of the row {row.name} does not fit a weight of {ndim} axes")
    return order


def _order(split_roles: str, order: tuple[int, ...], role: str) -> list[int]:
    """In the tree's order, which of the axes with this role each is."""
    own = _axes(split_roles, role)
    return [own.index(axis) for axis in order if split_roles[axis] == role]


def _axes(roles: str, role: str) -> tuple[int, ...]:
    return tuple(axis for axis, found in enumerate(roles) if found == role)


def _untransposed(array: np.ndarray[Any, Any], row: Row) -> np.ndarray[Any, Any]:
    return array if row.transpose is None else array.transpose(np.argsort(row.transpose))


def _merged(array: np.ndarray[Any, Any], split_roles: str, window: bool) -> np.ndarray[Any, Any]:
    """The axes of one role joined, but those of a window."""
    if window:
        return array
    runs = [math.prod(array.shape[axis] for axis in _axes(split_roles, role)) for role in dict.fromkeys(split_roles)]
    return array.reshape(runs)


def check_numbers(at: str | Path, arrays: Mapping[str, Arrays]) -> None:
    """Raises a DataError for numbers that are not finite, and for those of adapters that are not floating, all at once.

    What is read and what is written are held to the same. Each array comes to memory on its own.
    """
    found = ((name, part, _problem(part, array)) for name, parts in arrays.items() for part, array in parts.items())
    raise_all((f"{part} of {name} {problem}" for name, part, problem in found if problem), DataError, str(at))


def _problem(part: str, array: Any) -> str | None:
    if is_floating(array.dtype):
        with np.errstate(invalid="ignore"):  # of NaNs that signal
            return None if np.isfinite(np.asarray(array)).all() else "holds a NaN or an infinity"
    if part != "value" or array.dtype.kind == "c":
        return f"has the dtype {array.dtype}: wanted a floating one"
    return None
