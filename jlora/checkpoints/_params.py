"""Adapters out of the params of other libraries, as they lie on the disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.checkpoints._orbax import is_orbax_folder, read_orbax_params, read_orbax_shapes
from jlora.config import LoraConfig
from jlora.disk import CONFIG, Checkpoint, read_json
from jlora.errors import DataError, shortened
from jlora.fields import choice
from jlora.interop.gemma import from_gemma
from jlora.interop.maxtext import from_maxtext
from jlora.interop.openpi import from_openpi
from jlora.interop.qwix import from_qwix

NAMES = ("gemma", "qwix", "openpi", "maxtext")

_ITEMS = Path("0", "items")  # where MaxText has the params of an adapter, below its adapter_config.json
_CHECKPOINT = "_CHECKPOINT_METADATA"  # of Orbax; MaxText keeps its configuration of LoRA in it
_NOT_MAXTEXT = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def read_params(
    source: str | Path, names: str, alpha: float | None = None, base: str | Path | None = None
) -> tuple[Any, LoraConfig]:
    """The adapters in params that hold another library's LoRA, and their configuration.

    Args:
      source: a folder of Orbax, or a checkpoint of safetensors; of MaxText the folder with its adapter_config.json too.
      names: the library, one of `NAMES`.
      alpha: that the library was given, where the files do not say it.
      base: the checkpoint of the model, where its weights are not among the params, safetensors or Orbax's: its shapes
        say how the axes of the weights split.

    Raises:
      DataError: what cannot be read, params that hold no such LoRA, no alpha where one is needed.
    """
    choice("names", names, NAMES)
    if names == "maxtext":
        return _from_maxtext(Path(source), alpha, base)
    params = _params_in(source)
    if base is not None:
        weights = _weights_in(base)
        params = _joined(params, weights if "params" in params else weights.get("params", weights))
    if names == "gemma":
        _, adapters, config = from_gemma(params)
    elif names == "openpi":
        _, adapters, config = from_openpi(params, alpha=alpha)
    elif alpha is None:
        raise DataError("qwix keeps alpha outside of the params: give alpha (--alpha)")
    else:
        _, adapters, config = from_qwix(params, alpha=alpha)
    return adapters, config


def _params_in(source: str | Path) -> Mapping[str, Any]:
    if is_orbax_folder(source):
        return read_orbax_params(source)
    checkpoint = Checkpoint(source)
    return {name: checkpoint.read(name) for name in checkpoint.entries}


def _from_maxtext(source: Path, alpha: float | None, base: str | Path | None) -> tuple[Any, LoraConfig]:
    folder = source / _ITEMS if (source / CONFIG).is_file() and (source / _ITEMS).is_dir() else source
    said = _said_by_maxtext(folder)
    if alpha is None:
        alpha = said.get("alpha")
    if alpha is None:
        raise DataError(
            f"{source}: neither {CONFIG} nor Orbax's metadata says the alpha that MaxText was given: give alpha "
            "(--alpha)"
        )
    adapters, config = from_maxtext(_params_in(folder), alpha=alpha, base=None if base is None else _weights_in(base))
    found = {config.rank, *dict(config.rank_pattern).values()}
    if "rank" in said and found != {said["rank"]}:
        raise DataError(
            f"{source}: the rank is {min(found)} in the params, and {said['rank']} in what lies beside them"
        )
    return adapters, config


def _weights_in(base: str | Path) -> Any:
    """The weights of a checkpoint, zeros that take no memory in their place."""

    def stand_in(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: stand_in(child) for key, child in node.items()}
        return np.broadcast_to(np.float32(0), tuple(getattr(node, "shape", ())))

    return stand_in(read_orbax_shapes(base) if is_orbax_folder(base) else Checkpoint(base).entries)


def _joined(params: Any, weights: Any) -> Any:
    """The params, and what they lack of the weights."""
    if not isinstance(params, Mapping) or not isinstance(weights, Mapping):
        return params
    return {**weights, **{key: _joined(child, weights.get(key)) for key, child in params.items()}}


def _said_by_maxtext(folder: Path) -> dict[str, Any]:
    """The rank and the alpha that lie beside params of MaxText, as far as they do."""
    for place in (folder, folder.parent, folder.parent.parent):
        if (place / CONFIG).is_file():
            data = read_json(place / CONFIG)
            if found := [key for key in _NOT_MAXTEXT if data.get(key)]:
                raise DataError(
                    f"{place / CONFIG}: {found[0]} = {shortened(data[found[0]])}, which MaxText does not apply: "
                    "convert the PEFT adapter that it was made from"
                )
            return _checked(place / CONFIG, data, "r", "lora_alpha")
        if (place / _CHECKPOINT).is_file():
            custom = read_json(place / _CHECKPOINT).get("custom_metadata")
            lora = custom.get("lora") if isinstance(custom, dict) else None
            if isinstance(lora, dict):
                return _checked(place / _CHECKPOINT, lora, "lora_rank", "lora_alpha")
    return {}


def _checked(path: Path, data: Mapping[str, Any], rank: str, alpha: str) -> dict[str, Any]:
    for key in (rank, alpha):
        value = data.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < abs(value) < 1e300:
            raise DataError(f"{path}: {key} = {shortened(value)}: wanted a number other than 0")
    return {"rank": data[rank], "alpha": float(data[alpha])}
