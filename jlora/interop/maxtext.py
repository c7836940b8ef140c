"""The LoRA of MaxText: adapters and a configuration from its params.

    <module>/lora_a.kernel, <module>/lora_b.kernel    of adapters beside adapter_config.json, for its engine
    <module>/kernel_lora_a, <module>/kernel_lora_b    of what it trains with qwix; these may stand at {"value": array}

A has the in axes of the kernel and r for the last, B has r and the out axes; qwix joins all in axes to one, and all out
axes. Layers that are scanned have an axis at the place that it has in the kernel, in both: the second one by default.
The update is alpha / r * a@b (MaxText 0.2.5, utils/lora_utils.py, checkpoint_conversion/to_huggingface.py). The weights
of the base are not in these files.

    query (D, L, N, H)    a (D, L, r), b (r, L, N, H), of qwix (r, L, N * H)
    out   (N, L, H, D)    a (N, L, H, r), of qwix (N * H, L, r), b (r, L, D)
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jlora.config import LoraConfig
from jlora.errors import DataError, raise_all
from jlora.interop._beside import Keys, config_of, leaves_of, nested, path_of
from jlora.paths import format_nearest

__all__ = ["from_maxtext"]

_QWIX = re.compile(r"(.+)_lora_([ab])")
_OWN = re.compile(r"lora_([ab])")
_MOST_AXES = 8


class _Reading(NamedTuple):
    """One way in which a and b are those of a kernel.

    Attributes:
      roles: of the kernel's axes, b for layers and experts.
      layers: the places of these axes, in a, in b and in the kernel.
      ins, outs: the sizes of the other axes.
    """

    roles: str
    layers: tuple[int, ...]
    ins: tuple[int, ...]
    outs: tuple[int, ...]


def from_maxtext(
    params: Mapping[str, Any], *, alpha: float, base: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], LoraConfig]:
    """Params of MaxText as adapters and their configuration.

    Args:
      params: nested mappings, or flat ones by `a/b/c`, that hold LoRA; what else they hold is left out.
      alpha: that MaxText was given: lora_alpha of adapter_config.json or of its own configuration.
      base: the params of the model, or their shapes, where they are not among `params`. With them A and B have the axes
        of the kernels; without them those of qwix have one axis for all in axes and one for all out axes, and do not
        fit kernels that have more.

    Returns:
      `(adapters, config)`: adapters at the paths of the kernels, such as decoder/layers/self_attention/query/kernel,
      `A (*layers, *in, r)` and `B (*layers, r, *out)` in their own dtypes, and the configuration with which
      `jlora.merge_params(base, adapters, config)` is what MaxText computes. The numbers are those of MaxText's model:
      where it changed weights as it took them from Hugging Face (the order of the rows of query and key, the scale of
      query), adapters do not fit the weights there.

    Raises:
      DataError: LoRA params that cannot be mapped, all paths named: one without the other, shapes that do not fit each
        other or the base, or fit in several ways; no LoRA params at all.

    >>> from jax.numpy import ones
    >>> query = {"kernel_lora_a": ones((7, 3, 2)), "kernel_lora_b": ones((2, 3, 20))}
    >>> kernels = {"query": {"kernel": ones((7, 3, 4, 5))}}
    >>> adapters, config = from_maxtext({"query": query}, alpha=4, base=kernels)
    >>> adapters["query"]["kernel"]["B"].shape, dict(config.factorizations)
    ((3, 2, 4, 5), {'query/kernel': 'iboo'})
    """
    leaves = {_without_params(keys): leaf for keys, leaf in leaves_of(params).items()}
    there = leaves if base is None else {_without_params(keys): leaf for keys, leaf in leaves_of(base).items()}
    pairs: dict[Keys, dict[str, Any]] = {}
    for keys, leaf in leaves.items():
        if found := _taken_apart(keys):
            pairs.setdefault(found[0], {})[found[1]] = leaf
    problems: list[str] = []
    adapters: dict[Keys, Any] = {}
    ranks: dict[str, int] = {}
    roles: dict[str, str] = {}
    for keys, pair in pairs.items():
        path = path_of(keys)
        if len(pair) < 2:
            problems.append(f"{path}: has an {min(pair)} of LoRA alone")
            continue
        if base is not None and keys not in there:
            problems.append(f"{path}: the base has none; {format_nearest(path, map(path_of, there))}")
            continue
        shape = tuple(there[keys].shape) if keys in there else None
        if shape is None and keys[-1] != "kernel":
            problems.append(f"{path}: no kernel, the order of whose axes is known: give the base (--base)")
            continue
        try:
            reading = _read(tuple(pair["a"].shape), tuple(pair["b"].shape), shape)
        except DataError as error:
            problems.append(f"{path}: {error}")
            continue
        adapters[keys] = _adapter(pair["a"], pair["b"], reading)
        ranks[path], roles[path] = pair["a"].shape[-1], reading.roles
    if not problems and not adapters:
        problems.append(f"no params of MaxText's LoRA among {len(leaves)} leaves")
    raise_all(problems, DataError, "MaxText")
    return nested(adapters), config_of(ranks, dict.fromkeys(ranks, alpha), roles)


def _without_params(keys: Keys) -> Keys:
    """A path without the collections of Flax's around it: params/params/decoder is decoder."""
    while len(keys) > 1 and keys[0] == "params":
        keys = keys[1:]
    return keys


def _taken_apart(keys: Keys) -> tuple[Keys, str] | None:
    """The kernel that a leaf is an a or a b of, and which of them."""
    if keys[-1] == "value" and len(keys) > 1:
        keys = keys[:-1]
    last = str(keys[-1])
    if last == "kernel" and len(keys) > 1:  # names with dots for slashes are taken apart before they come here
        keys, last = keys[:-1], f"{keys[-2]}.kernel"
    if own := _OWN.fullmatch(last.removesuffix(".kernel")):
        return ((*keys[:-1], "kernel"), own[1]) if last.endswith(".kernel") else None
    if qwix := _QWIX.fullmatch(last):
        return (*keys[:-1], qwix[1]), qwix[2]
    return None


def _read(a: tuple[int, ...], b: tuple[int, ...], shape: tuple[int, ...] | None) -> _Reading:
    """The one way in which a and b are those of a kernel, of this shape where it is known."""
    text = f"lora a {a} and b {b}"
    if not 2 <= min(len(a), len(b)) <= max(len(a), len(b)) <= _MOST_AXES:
        raise DataError(f"{text}: wanted two axes or more")
    found = list(_readings(a, b))
    if not found:
        raise DataError(f"{text} do not fit each other: wanted (in, r) and (r, out), both with an axis for the layers")
    if shape is not None:
        found = [split for reading in found if (split := _split(reading, a, shape))]
        if not found:
            raise DataError(f"{text} do not fit the weight {shape}")
    if len(found) > 1:
        ways = ", ".join(reading.roles for reading in found)
        raise DataError(
            f"{text} fit each other in several ways, {ways}, as the rank is the number of layers too; MaxText does not "
            "tell them apart either: save them with scan_layers=false"
        )
    return found[0]


def _readings(a: tuple[int, ...], b: tuple[int, ...]) -> Iterator[_Reading]:
    """Every choice of axes for layers that leaves a matrix on one of the sides."""
    count = min(len(a), len(b)) - 2
    for layers in itertools.combinations(range(count + 1), count):
        ins = tuple(size for axis, size in enumerate(a) if axis not in layers)
        outs = tuple(size for axis, size in enumerate(b) if axis not in layers)
        if ins[-1] == outs[0] and all(a[axis] == b[axis] for axis in layers):
            yield _Reading(_roles(layers, len(ins) - 1, len(outs) - 1), layers, ins[:-1], outs[1:])


def _roles(layers: tuple[int, ...], ins: int, outs: int) -> str:
    others = iter("i" * ins + "o" * outs)
    return "".join("b" if axis in layers else next(others) for axis in range(len(layers) + ins + outs))


def _split(reading: _Reading, a: tuple[int, ...], shape: tuple[int, ...]) -> _Reading | None:
    """A reading with the axes of the kernel for those that qwix has joined; None where they are not its own."""
    layers, ins, outs = reading.layers, math.prod(reading.ins), math.prod(reading.outs)
    if len(shape) <= max(layers, default=0) or any(shape[axis] != a[axis] for axis in layers):
        return None
    others = tuple(size for axis, size in enumerate(shape) if axis not in layers)
    for count in range(1, len(others)):
        if math.prod(others[:count]) == ins and math.prod(others[count:]) == outs:
            own = others[:count], others[count:]
            return _Reading(_roles(layers, count, len(others) - count), layers, *own)
    return None


def _adapter(a: Any, b: Any, reading: _Reading) -> dict[str, Any]:
    """A (*layers, *in, r) and B (*layers, r, *out)."""
    rank, sizes = a.shape[-1], tuple(a.shape[axis] for axis in reading.layers)
    shapes = (*sizes, *reading.ins, rank), (*sizes, rank, *reading.outs)
    parts = []
    for array, shape in zip((a, b), shapes, strict=True):
        order = (*reading.layers, *(axis for axis in range(array.ndim) if axis not in reading.layers))
        parts.append(array.transpose(order).reshape(shape))
    return {"A": parts[0], "B": parts[1]}
