"""LoRA params that stand beside their weights in one params tree, as base, adapters and a configuration.

A batch axis of an einsum (an axis of the input, the weight and the output) stands in gemma.peft and in qwix in a alone:
in the weight's update it is one of the in axes. qwix flattens the in and the out axes of a dot_general, as in
DenseGeneral.
"""

import collections
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jlora.arrays import is_jax_shape
from jlora.boxes import is_box, unboxed
from jlora.config import LoraConfig
from jlora.contraction import Factorization
from jlora.errors import DataError, listed, raise_all
from jlora.interop._factorizations import possible_factorizations, preferred
from jlora.paths import format_nearest, literal_pattern, matched_depths

_MOST_AXES = 8

Keys = tuple[Any, ...]
Leaves = dict[Keys, Any]
Converted = tuple[dict[str, Any], dict[str, Any], LoraConfig]


class LoraParams(NamedTuple):
    """The keys of a weight, and those of its a and its b."""

    weight: Keys
    a: Keys
    b: Keys


def converted(
    library: str, leaves: Leaves, found: list[LoraParams], problems: list[str], given: Mapping[str, str], alpha: Any
) -> Converted:
    """The two trees and the configuration; one error for all that is in the way."""
    adapters: Leaves = {}
    roles: dict[str, str] = {}
    for each in found:
        if each.weight in adapters:
            problems.append(f"{path_of(each.a)}: a second LoRA of {path_of(each.weight)}")
            continue
        try:
            split, adapter = _adapter(each, leaves, given, flattened=library == "qwix")
        except DataError as error:
            problems.append(f"{path_of(each.weight)}: {error}")
        else:
            adapters[each.weight], roles[path_of(each.weight)] = adapter, split
    unused = [pattern for pattern in given if not any(matched_depths(pattern, path) for path in roles)]
    if not problems:
        for pattern in unused:
            near = format_nearest(pattern, roles)
            problems.append(f"factorizations: {pattern!r} matches nothing that is adapted; {near}")
    ranks = {path_of(keys): adapter["A"].shape[-1] for keys, adapter in adapters.items()}
    alphas = {path: _alpha(alpha, path, rank, problems) for path, rank in ranks.items()}
    if not problems and not adapters:
        problems.append(f"no params of {library} LoRA among {len(leaves)} leaves")
    raise_all(problems, DataError, library)
    lora = {each.a for each in found} | {each.b for each in found}
    base = {keys: leaf for keys, leaf in leaves.items() if keys not in lora}
    return nested(base), nested({keys: adapters.get(keys) for keys in base}), config_of(ranks, alphas, roles)


def paired(
    pairs: Mapping[Keys, Mapping[str, Keys]], leaves: Leaves, problems: list[str], weights: Any
) -> Iterator[LoraParams]:
    """The weight, a and b of every pair that is whole and has one weight."""
    for at, pair in pairs.items():
        if len(pair) < 2:
            (keys,) = pair.values()
            problems.append(f"{path_of(keys)}: stands without its {'a' if 'b' in pair else 'b'}")
            continue
        found = [keys for keys in weights(at, leaves) if keys in leaves]
        if not found:
            problems.append(
                f"{path_of(pair['a'])}: no weight beside it; pass the params of the base and of LoRA in one tree "
                "(--base reads them), or those of MaxText to from_maxtext (--names maxtext)"
            )
        elif len(found) > 1:
            problems.append(f"{path_of(pair['a'])}: several weights beside it: {listed(map(path_of, found))}")
        elif not _is_array(leaves[found[0]]):
            kind = type(leaves[found[0]]).__name__
            problems.append(f"{path_of(found[0])}: found {kind}, wanted an array; dequantize the weight first")
        else:
            yield LoraParams(found[0], pair["a"], pair["b"])


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A flat mapping by `a/b/c`, or by `a.b.c` where no name has a slash, as nested dicts.

    Raises:
      DataError: a name that is a leaf and a module at once.

    >>> nest({'up.kernel': 1, 'up.bias': 2})
    {'up': {'kernel': 1, 'bias': 2}}
    """
    separator = "/" if any("/" in name for name in flat) else "."
    return nested({tuple(name.split(separator)): leaf for name, leaf in flat.items()})


def nested(leaves: Mapping[Keys, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    modules = {keys[:depth] for keys in leaves for depth in range(len(keys))}
    for keys, leaf in leaves.items():
        if keys in modules:
            raise DataError(f"{path_of(keys)}: a leaf and a module at once")
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = leaf
    return tree


def leaves_of(params: Any) -> Leaves:
    """The arrays by their keys, out of nested mappings, an nnx.State, a flat mapping, and Flax's boxes."""
    params = _without_state(params)
    if not isinstance(params, Mapping):
        raise DataError(f"params: found {type(params).__name__}, wanted nested or flat mappings of arrays")
    names = [name for name, leaf in params.items() if isinstance(name, str) and not isinstance(leaf, Mapping)]
    if len(names) == len(params) and any("/" in name or "." in name for name in names):
        params = nest(params)
    return dict(_walk(params, ()))


def _without_state(params: Any) -> Any:
    """The dict of an nnx.State, of which there is none where Flax NNX is not loaded."""
    if "flax.nnx" not in sys.modules:
        return params
    from flax import nnx

    return nnx.to_pure_dict(params) if isinstance(params, nnx.State) else params


def _walk(node: Any, keys: Keys) -> Iterator[tuple[Keys, Any]]:
    if isinstance(node, Mapping):
        for key, child in node.items():
            yield from _walk(child, (*keys, key))
    elif node is not None:
        yield keys, unboxed(node) if is_box(node) else node


def path_of(keys: Iterable[Any]) -> str:
    return "/".join(map(str, keys))


def _shape(leaf: Any) -> tuple[int, ...]:
    return tuple(getattr(leaf, "shape", ()))


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "__array__") or is_jax_shape(leaf)


def _alpha(alpha: Any, path: str, rank: int, problems: list[str]) -> float:
    if alpha is None:
        return float(rank)
    if not isinstance(alpha, Mapping):
        return alpha
    for pattern, value in alpha.items():
        if matched_depths(pattern, path):
            return value
    problems.append(f"{path}: no pattern of alpha matches it ({listed(alpha)})")
    return 0.0


def config_of(ranks: Mapping[str, int], alphas: Mapping[str, float], roles: Mapping[str, str]) -> LoraConfig:
    """The configuration that gives each path its rank, alpha and factorization; the most frequent as the default."""
    rank = collections.Counter(ranks.values()).most_common(1)[0][0]
    alpha = collections.Counter(alphas.values()).most_common(1)[0][0]
    return LoraConfig(
        rank=rank,
        alpha=alpha,
        target_modules=tuple(map(literal_pattern, ranks)),
        rank_pattern={literal_pattern(path): n for path, n in ranks.items() if n != rank},
        alpha_pattern={literal_pattern(path): value for path, value in alphas.items() if value != alpha},
        factorizations={literal_pattern(path): split for path, split in roles.items() if split != "io"},
    )


def _adapter(
    found: LoraParams, leaves: Leaves, given: Mapping[str, str], *, flattened: bool
) -> tuple[str, dict[str, Any]]:
    """The factorization of a weight, and its adapter in the shapes of jlora."""
    shape, a, b = (tuple(leaves[keys].shape) for keys in found)
    text = f"lora a {a} and b {b} do not fit the weight {shape}"
    readings = list(possible_factorizations(shape, a, b, flattened)) if len(shape) <= _MOST_AXES else []
    path = path_of(found.weight)
    wanted = next((roles for pattern, roles in given.items() if matched_depths(pattern, path)), None)
    if wanted is not None:
        if wanted not in readings:
            raise DataError(f"{text} with the factorization {wanted!r}: {', '.join(readings) or 'nothing'} would")
        readings = [wanted]
    if not readings:
        raise DataError(text)
    if len(readings) > 1:
        readings = preferred(str(found.weight[-1]), _is_einsum(found), shape, readings)
    if len(readings) > 1:
        raise DataError(
            f"{text} in one way, but in several: {', '.join(readings)}; pass "
            f"factorizations={{{literal_pattern(path)!r}: '...'}}"
        )
    shapes = Factorization(readings[0]).adapter_shapes(shape, a[-1])
    arrays = (leaves[found.a], leaves[found.b])
    parts = [part if part.shape == size else _reshaped(part, size) for part, size in zip(arrays, shapes, strict=True)]
    return readings[0], {"A": parts[0], "B": parts[1]}


def _is_einsum(found: LoraParams) -> bool:
    """Whether a name next to the weight or to its LoRA says so, as `Einsum_0/kernel` and `_LoRAEinsum_0/lora/a`."""
    return "einsum" in path_of(found.weight[-2:] + found.a[-3:]).lower()


def _reshaped(part: Any, shape: tuple[int, ...]) -> Any:
    return type(part)(shape, part.dtype) if is_jax_shape(part) else part.reshape(shape)
