"""The small tree of a variant in a folder: what is trained, and what is frozen or only its digest.

adapter_config.json         the configuration, the shapes of the weights, the digests of both
adapter_model.safetensors   trained/PATH/d, trained/PATH/b, frozen/A, ... (VeRA); trained/PATH/R, ... (LoRA-XS)
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.adapter import is_entry
from jlora.arrays import ShapeDtype, on_device
from jlora.config import LoraConfig
from jlora.disk import CONFIG, Pair, TensorFile, bytes_of_all, dump_json, parse_json, tensor_bytes, write_tensors
from jlora.errors import DataError, JloraError, raise_all
from jlora.paths import leaves_by_path, literal_pattern, nest
from jlora.storage import VARIANT, check_folder_to_write, folder_to_write, unreachable, write_once
from jlora.tree import find_targets
from jlora.variants._kinds import KINDS, adapters, variant_of

Tensors = dict[str, Any]
_DIGESTS = ("trained_sha256", "frozen_sha256")
_OWN = ("format", "shapes", *_DIGESTS)


def save(
    path: str | Path, trained: Any, frozen: Any, params: Any, config: LoraConfig, *, with_frozen: bool = True
) -> None:
    """Writes what is trained, and what is frozen, into a folder; both files or neither.

    Args:
      path: the folder; made where there is none.
      trained, frozen: as `init` returns them, or as training left them.
      params: the params, arrays or shapes.
      config: the configuration of `init`.
      with_frozen: whether what is frozen is written too. Without it the file holds what is trained alone; `load` makes
        the rest anew from `config.seed` (VeRA) or the weights (LoRA-XS), and checks by a digest that it is the same.
        Another version of JAX or NumPy may make it otherwise, and then refuses it.

    Raises:
      ConfigError, TargetError: as of `adapters`.
      DataError: arrays that are not finite; a folder that cannot be written; without what is frozen, one that would not
        be made again, as with another key than that of config.seed.

    >>> import tempfile
    >>> from jlora.variants import vera
    >>> params, config = {"up": np.ones((5, 7), "f4")}, LoraConfig(rank=2, kind="vera", factorizations={"up": "io"})
    >>> trained, frozen = vera.init(None, params, config)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, trained, frozen, params, config, with_frozen=False)
    ...     again, _, _ = load(folder, params)
    >>> again["up"]["d"].tolist() == trained["up"]["d"].tolist()
    True
    """
    adapters(trained, frozen, params, config)  # which checks that all fit
    tensors = _named(trained, frozen)
    _check_finite(path, tensors)
    digests = {f"{group}_sha256": _digest(tensors, group) for group in ("trained", "frozen")}
    if not with_frozen:
        made = _named({}, variant_of(config).init(None, params, config)[1])
        if _digest(made, "frozen") != digests["frozen_sha256"]:
            raise DataError(
                f"{path}: what is frozen does not follow from config.seed = {config.seed}, with which it would be made "
                "again: pass with_frozen=True, or None as the key of init"
            )
        tensors = {name: array for name, array in tensors.items() if name.startswith("trained/")}
    settled, shapes = _settled(trained, params, config)
    data = {"format": VARIANT, **settled.to_dict(), "shapes": shapes, **digests}
    folder, text = Path(path), dump_json(data, sort_keys=False)

    def write() -> None:
        with folder_to_write(folder):
            Pair(folder).replace(text, lambda file: write_tensors(file, tensors, {"format": VARIANT}))

    write_once(tensors.values(), write, lambda: check_folder_to_write(folder, bytes_of_all(tensors)))


def load(path: str | Path, params: Any = None) -> tuple[Any, Any, LoraConfig]:
    """What `save` wrote, as arrays of JAX: `(trained, frozen, config)`.

    Args:
      path: the folder.
      params: the params; needed where what is frozen was left out, shapes for VeRA, arrays for LoRA-XS.

    Raises:
      DataError: no such folder, damaged files, what is frozen is neither there nor made again as it was.
    """
    tensors, config, _, digest = _read(path)
    placed = {name: on_device(array) for name, array in tensors.items()}
    if narrowed := [name for name, array in placed.items() if array is None]:
        raise DataError(f"{path}: {narrowed[0]} has the dtype {tensors[narrowed[0]].dtype}: set jax_enable_x64")
    trained, frozen = _parts(placed, "trained"), _frozen(placed, config)
    if frozen is None:
        if params is None:
            raise DataError(f"{path}: {_LEFT_OUT}: give params, of which it is made again")
        frozen = _made_again(path, params, config, digest)
    return trained, frozen, config


def load_expanded(path: str | Path) -> tuple[dict[str, dict[str, np.ndarray]], LoraConfig]:
    """The ordinary adapters of what `save` wrote, by path, in NumPy, and a configuration of kind "lora".

    Raises:
      DataError: as of `load`.
    """
    tensors, config, shapes, _ = _read(path)
    frozen = _frozen(tensors, config)
    if frozen is None:
        raise DataError(
            f"{path}: {_LEFT_OUT}, and only its model can make it again: jlora.variants.load(path, params), then "
            "jlora.variants.save with it"
        )
    try:
        return expanded_entries(_parts(tensors, "trained"), frozen, shapes, config), config.replace(kind="lora")
    except JloraError as error:
        raise DataError(f"{path}: {error}") from None


def expanded_entries(
    trained: Any, frozen: Any, shapes: Mapping[str, tuple[int, ...]], config: LoraConfig
) -> dict[str, dict[str, Any]]:
    """The ordinary adapters by path, of weights that are known by their shapes alone."""
    params = {path: ShapeDtype(tuple(shape), np.dtype(np.float32)) for path, shape in shapes.items()}
    made = leaves_by_path(adapters(trained, frozen, nest(params), config), is_leaf=is_entry)
    return {path: {name: np.ascontiguousarray(part) for name, part in entry.items()} for path, entry in made.items()}


def is_variant_folder(path: str | Path) -> bool:
    """Whether a folder looks like one that `save` wrote.

    >>> is_variant_folder("no/such/folder")
    False
    """
    try:
        return bool(parse_json(Pair(path).read_config()).get("format") == VARIANT)
    except (ValueError, AttributeError):
        return False


_LEFT_OUT = "what is frozen was left out when it was saved"


def _named(trained: Any, frozen: Any) -> Tensors:
    """The arrays on the host by their names in the file."""
    trees = {"trained": trained, "frozen": frozen}
    found = leaves_by_path(trees)
    for name, array in found.items():
        if problem := unreachable(array):
            raise DataError(f"{name}: {problem}")
    return {name: np.asarray(array) for name, array in sorted(found.items())}


def _check_finite(path: str | Path, tensors: Tensors) -> None:
    wrong = [name for name, array in tensors.items() if not np.isfinite(array.astype(np.float64)).all()]
    raise_all((f"{name}: holds a NaN or an infinity" for name in wrong), DataError, str(path))


def _digest(tensors: Tensors, group: str) -> str:
    """The SHA-256 of what is trained or frozen: names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, array in sorted(tensors.items()):
        if name.startswith(f"{group}/"):
            digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
            digest.update(tensor_bytes(array))
    return digest.hexdigest()


def _settled(trained: Any, params: Any, config: LoraConfig) -> tuple[LoraConfig, dict[str, list[int]]]:
    """A configuration that reads the same without the rest of the params, and the shapes of the weights by path."""
    targets = {path: target for path, target in find_targets(params, config).items() if path in trained}
    settled = config.replace(
        target_modules=tuple(map(literal_pattern, targets)),
        exclude_modules=(),
        rank_pattern={literal_pattern(p): t.rank for p, t in targets.items() if t.rank != config.rank},
        alpha_pattern={literal_pattern(p): t.alpha for p, t in targets.items() if t.alpha != config.alpha},
        factorizations={literal_pattern(path): target.factorization.roles for path, target in targets.items()},
    )
    return settled, {path: list(target.shape) for path, target in targets.items()}


def _read(path: str | Path) -> tuple[Tensors, LoraConfig, dict[str, tuple[int, ...]], str]:
    """The tensors, the configuration, the shapes of the weights, and the digest of what is frozen.

    Raises:
      DataError: what is no such folder; damaged files.
    """
    folder = Path(path)
    with Pair(folder).opened() as (text, file):
        data = _parsed(folder, text)
        tensors = _tensors(folder, file)
    shapes, digest = data["shapes"], data["frozen_sha256"]
    try:
        config = LoraConfig.from_dict({key: value for key, value in data.items() if key not in _OWN})
    except JloraError as error:
        raise DataError(f"{folder / CONFIG}: {error}") from None
    if config.kind not in KINDS:
        raise DataError(f"{folder / CONFIG}: kind = {config.kind!r}: wanted {' or '.join(KINDS)}")
    for group in ("trained", "frozen"):
        left_out = group == "frozen" and not any(name.startswith("frozen/") for name in tensors)
        if not left_out and _digest(tensors, group) != data[f"{group}_sha256"]:
            raise DataError(f"{file.path}: what is {group} is not what it was when it was saved: damaged, or changed")
    _check_finite(folder, tensors)
    return tensors, config, shapes, digest


def _parsed(folder: Path, text: bytes) -> dict[str, Any]:
    try:
        data = parse_json(text)
    except ValueError as error:
        raise DataError(f"{folder / CONFIG}: not valid JSON: {error}") from None
    if data.get("format") != VARIANT:
        raise DataError(f"{folder / CONFIG}: does not name the format {VARIANT!r}")
    shapes = data.get("shapes")
    if not isinstance(shapes, dict) or not all(map(_is_shape, shapes.values())):
        raise DataError(f"{folder / CONFIG}: shapes: wanted the shape of each weight by its path")
    if wrong := [name for name in _DIGESTS if not isinstance(data.get(name), str)]:
        raise DataError(f"{folder / CONFIG}: {wrong[0]}: wanted the digest of what was saved")
    return data | {"shapes": {path: tuple(shape) for path, shape in shapes.items()}}


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 1 <= size < 2**48 for size in value)


def _tensors(folder: Path, file: TensorFile) -> Tensors:
    for name in file.entries:
        group, _, rest = name.partition("/")
        if group not in ("trained", "frozen") or not rest:
            raise DataError(f"{folder}: the tensor {name!r}: wanted trained/... and frozen/...")
    return {name: file.read(name) for name in file.entries}


def _parts(tensors: Tensors, group: str) -> dict[str, dict[str, Any]]:
    """Path -> the name of a part -> its array, of one of the two groups."""
    found: dict[str, dict[str, Any]] = {}
    for name, array in tensors.items():
        own, _, rest = name.partition("/")
        path, _, part = rest.rpartition("/")
        if own == group:
            found.setdefault(path, {})[part] = array
    return found


def _frozen(tensors: Tensors, config: LoraConfig) -> Any:
    """What is frozen, as `init` returns it; None where it was left out."""
    found = _parts(tensors, "frozen")
    return (found.get("") if config.kind == "vera" else found) or None


def _made_again(path: str | Path, params: Any, config: LoraConfig, digest: str) -> Any:
    frozen = variant_of(config).init(None, params, config)[1]
    if _digest(_named({}, frozen), "frozen") != digest:
        made_of = f"config.seed = {config.seed}" if config.kind == "vera" else "these weights"
        raise DataError(
            f"{path}: what is made again of {made_of} is not what it was trained with: other weights, or another "
            "version of JAX or NumPy; save it with what is frozen where it was trained"
        )
    return frozen
