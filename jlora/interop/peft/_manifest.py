"""A manifest of an adapter: a hash for each tensor, for who receives them to see that they are those that were sent."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.disk import dump_json, tensor_bytes
from jlora.errors import DataError, shortened

FORMAT = "jlora tensors 1"


def manifest_of(tensors: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """What there is to know of PEFT's tensors and configuration to tell them from all others.

    Args:
      tensors: PEFT's name -> array of NumPy, or what `np.asarray` makes one of; as from `to_tensors`.
      data: PEFT's configuration.

    Returns:
      plain data: "format"; "config", the SHA-256 of the configuration with sorted keys, however a file lays it out;
      "tensors", name -> {"dtype", "shape", "sha256"}, of the bytes in C order as safetensors has them.

    >>> tensors = {"base_model.model.up.lora_A.weight": np.ones((2, 7), np.float32)}
    >>> found = manifest_of(tensors, {"peft_type": "LORA"})["tensors"]["base_model.model.up.lora_A.weight"]
    >>> found["dtype"], found["shape"], found["sha256"][:8]
    ('float32', [2, 7], '6f913669')
    """
    return {
        "format": FORMAT,
        "config": hashlib.sha256(dump_json(dict(data))).hexdigest(),
        "tensors": {name: _of_tensor(np.asarray(tensors[name])) for name in sorted(tensors)},
    }


def differences(manifest: Mapping[str, Any], tensors: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    """What differs between a manifest and the tensors and the configuration that arrived; nothing where none does.

    Raises:
      DataError: what is no manifest.
    """
    told, found = manifest.get("tensors"), manifest_of(tensors, data)
    if manifest.get("format") != FORMAT or not isinstance(told, Mapping):
        raise DataError(f"no manifest of tensors: format = {shortened(manifest.get('format'))}, wanted {FORMAT!r}")
    problems = ["the configuration is another one"] if manifest.get("config") != found["config"] else []
    problems += [f"{name}: did not arrive" for name in told if name not in tensors]
    for name, own in found["tensors"].items():
        if name not in told:
            problems.append(f"{name}: was not sent")
        elif own != told[name]:
            problems.append(f"{name}: is not as it was sent")
    return problems


def _of_tensor(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    return {
        "dtype": str(array.dtype),
        "shape": list(array.shape),
        "sha256": hashlib.sha256(tensor_bytes(np.ascontiguousarray(array))).hexdigest(),
    }
