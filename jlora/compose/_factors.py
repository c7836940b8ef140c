"""Adapters as stacks of matrices in float64, and back; what resizing and combining share."""

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from jlora.adapter import PARTS, is_entry, matrices_of
from jlora.arrays import is_floating, is_jax_array, on_device
from jlora.boxes import unboxed
from jlora.config import LoraConfig
from jlora.errors import AdapterError, JloraError, raise_all
from jlora.paths import leaves_by_path, literal_pattern, path_string
from jlora.pytrees import map_with_path
from jlora.tree import batch_dims_of, given_split


@dataclasses.dataclass(frozen=True)
class Factors:
    """One adapter, the batch axes joined to one: `a (n, in, r)` and `b (n, r, out)` in float64.

    `roles` is the factorization that the configuration gives, if it gives one; `is_jax` says whose arrays A and B were.
    """

    a: np.ndarray
    b: np.ndarray
    batch: tuple[int, ...]
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    a_dtype: Any
    b_dtype: Any
    roles: str | None = None
    is_jax: bool = False

    @property
    def rank(self) -> int:
        return int(self.a.shape[-1])

    @property
    def smaller_side(self) -> int:
        return min(math.prod(self.ins), math.prod(self.outs))

    @property
    def sides(self) -> tuple[tuple[int, ...], ...]:
        """The sizes of the batch, in and out axes."""
        return self.batch, self.ins, self.outs

    def adapter(self, path: str, a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
        """The adapter of these matrices in the shapes and dtypes of this one."""
        rank = a.shape[-1]
        return {
            "A": rounded(path, a.reshape(*self.batch, *self.ins, rank), self.a_dtype, self.is_jax),
            "B": rounded(path, b.reshape(*self.batch, rank, *self.outs), self.b_dtype, self.is_jax),
        }


@dataclasses.dataclass(frozen=True)
class Held:
    """What an entry holds: the factors of its A and B where it has these, and its other parts as they are, by name."""

    factors: Factors | None
    others: Mapping[str, Any]


def read_entries(adapters: Any, config: LoraConfig, where: str = "") -> dict[str, Held]:
    """What every entry of the adapters holds, by path.

    Raises:
      AdapterError: with every problem at once: a node that is no entry, a dtype that is not floating, a value that is
        not finite, parts that do not fit each other or the configuration's rank.
    """
    found: dict[str, Held] = {}
    problems: list[str] = []
    for path, node in leaves_by_path(unboxed(adapters), is_leaf=_is_node).items():
        try:
            found[path] = _read(path, node, config)
        except JloraError as error:
            problems.append(f"{where}{path or 'the root'}: {error}")
    raise_all(problems, AdapterError)
    return found


def replaced(adapters: Any, by_path: Mapping[str, Any]) -> Any:
    """The tree with the entries of `by_path` in it, `None` at the other paths."""

    def at(key_path: Any, _: Any) -> Any:
        return by_path.get(path_string(key_path))

    return map_with_path(at, adapters, is_slot)


def is_slot(node: Any) -> bool:
    """Whether a node stands where a weight does: an entry, or None."""
    return node is None or is_entry(node)


def rounded(path: str, array: np.ndarray, dtype: Any, is_jax: bool) -> Any:
    """The array in this dtype: of NumPy, or where it is to be one of JAX, and JAX does not narrow it, of JAX."""
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(dtype)
    if not np.isfinite(result.astype(np.float64)).all():
        raise AdapterError(
            f"{path or 'the root'}: values up to {np.max(np.abs(array)):.3g} do not fit the dtype {dtype}"
        )
    placed = on_device(result) if is_jax else None
    return result if placed is None else placed


def truncated(a: np.ndarray, b: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The best approximation of a@b of this rank, the roots of the singular values on each side.

    With a = Q_a R_a and b^T = Q_b R_b, the SVD of a@b is that of the small core R_a R_b^T (Eckart and Young 1936).
    Columns beyond the rank of a@b are zero.
    """
    q_a, r_a = np.linalg.qr(a)
    q_b, r_b = np.linalg.qr(b.swapaxes(-1, -2))
    u, s, vh = np.linalg.svd(r_a @ r_b.swapaxes(-1, -2), full_matrices=False)
    return padded(*balanced(q_a @ u[..., :rank], s[..., :rank], vh[..., :rank, :] @ q_b.swapaxes(-1, -2)), rank)


def balanced(u: np.ndarray, s: np.ndarray, vh: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The factors of u diag(s) vh with the roots of the singular values on each side."""
    root = np.sqrt(s)
    return u * root[..., None, :], root[..., :, None] * vh


def padded(a: np.ndarray, b: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The factors with zero columns up to this rank."""
    more = rank - a.shape[-1]
    return np.pad(a, ((0, 0), (0, 0), (0, more))), np.pad(b, ((0, 0), (0, more), (0, 0)))


def unit_config(
    config: LoraConfig, ranks: Mapping[str, int], roles: Mapping[str, str], paths: Collection[str] = ()
) -> LoraConfig:
    """The configuration for adapters at exactly these paths, of these ranks, with a scaling of 1.

    `roles` holds the factorizations to write down, `paths` those of all entries, which are the targets where none has
    A and B. The rank that most have needs no pattern. Everything else is as in `config`.
    """
    counts = Counter(ranks.values() or [config.rank])
    rank = max(counts, key=lambda value: (counts[value], value))
    others = {literal_pattern(path): own for path, own in ranks.items() if own != rank}
    return config.replace(
        rank=rank,
        alpha=rank,
        scaling="standard",
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=tuple(literal_pattern(path) for path in ranks or paths),
        exclude_modules=(),
        factorizations={literal_pattern(path): given for path, given in roles.items()},
    )


def common_dtype(dtypes: Iterable[Any]) -> Any:
    """The dtype that all share, else float32, or float64 where one of them is."""
    found = dict.fromkeys(dtypes)
    if len(found) == 1:
        return next(iter(found))
    return np.dtype(np.float64 if any(np.dtype(dtype) == np.float64 for dtype in found) else np.float32)


def _is_node(node: Any) -> bool:
    """Whether a node is an entry or was meant as one: a mapping in which a part is an array."""
    return isinstance(node, Mapping) and any(hasattr(node.get(name), "ndim") for name in PARTS)


def _read(path: str, node: Any, config: LoraConfig) -> Held:
    if not is_entry(node):
        raise AdapterError(
            f"found {_described(node)}, wanted an entry of 'A' and 'B', 'value', 'offset' or 'magnitude', or None"
        )
    factors = _factors(path, node, config) if "A" in node else None
    others = {name: part for name, part in node.items() if name not in "AB"}
    for name, part in others.items():
        if name == "value" and not is_floating(part.dtype):  # a buffer, such as a count of steps, passes through
            continue
        _array(name, part)
        if factors is not None:
            _check_fits(name, tuple(part.shape), factors)
    return Held(factors, others)


def _check_fits(name: str, shape: tuple[int, ...], factors: Factors) -> None:
    """Raises an AdapterError for a part of other axes than the factors say; of which order they are, is not known."""
    batch, ins, outs = factors.sides
    if name == "magnitude":
        if shape != batch + outs:
            raise AdapterError(f"magnitude {shape} does not fit A and B: wanted {batch + outs}")
    elif sorted(shape) != sorted(batch + ins + outs):
        raise AdapterError(f"{name} {shape} does not fit A and B of batch {batch}, in {ins}, out {outs}")


def _factors(path: str, node: Mapping[str, Any], config: LoraConfig) -> Factors:
    a, b = (_array(name, node[name]) for name in "AB")
    n = batch_dims_of(path, node, config)
    split = given_split(path, node, config)
    rank = a.shape[-1]
    if rank != config.rank_of(path):
        raise AdapterError(f"A {a.shape} does not have the rank {config.rank_of(path)} of the configuration")
    return Factors(
        *matrices_of({"A": a, "B": b}, n),
        a.shape[:n],
        a.shape[n:-1],
        b.shape[n + 1 :],
        a.dtype,
        b.dtype,
        None if split is None else split.roles,
        any(is_jax_array(node[name]) for name in "AB"),
    )


def _described(node: Any) -> str:
    if isinstance(node, Mapping):
        return f"a mapping of {', '.join(repr(str(key)) for key in sorted(node, key=str))}"
    return f"an array {tuple(node.shape)}" if hasattr(node, "shape") else type(node).__name__


def _array(name: str, leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    if not is_floating(array.dtype):
        raise AdapterError(f"{name} is of dtype {array.dtype}: wanted a floating dtype; cast or dequantize it first")
    if 0 in array.shape:
        raise AdapterError(f"{name} {array.shape} is empty")
    if not np.isfinite(array.astype(np.float64)).all():
        raise AdapterError(f"{name} holds values that are not finite")
    return array
