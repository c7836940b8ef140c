"""Weights that a checkpoint holds packed, or in other units than the model's: nothing can be added to them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.checkpoints._memory import settings_of
from jlora.disk import Checkpoint

_FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_WAY_OUT = "dequantize the checkpoint first, or merge into the one that it was made from"
_METHODS = {  # quant_method of transformers' quantization_config
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fbgemm_fp8": "FBGEMM's float8",
    "fp8": "float8 with scales",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "mxfp4": "MXFP4",
}
_PACKED = {  # the end of a tensor's name, in place of the weight's, and the format that has it
    ".qweight": "GPTQ or AWQ",
    ".W_q": "HQQ",
    ".weight_packed": "compressed-tensors",
    ".weight._data": "quanto",
    ".codes": "AQLM",
    "_blocks": "MXFP4",
}
_PARAMETERS = ("_blocks",)  # of which the weight is a parameter by its own name, no module's `weight`
_BESIDE = {  # what stands beside a weight that is packed under its own name
    ".weight.absmax": "bitsandbytes",
    ".weight.quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
}


class Quantized:
    """What is known of a checkpoint's packed weights.

    Attributes:
      weights: the tensor that holds a packed weight, by the name that the weight would have.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._entries = checkpoint.entries
        self._method = _method_of(settings_of(checkpoint))
        self.weights: dict[str, str] = {}
        self._packed: dict[str, tuple[str, str]] = {}
        self._modules: dict[str, list[str]] = {}
        self._marks = [name for name in self._entries if name.rpartition(".")[2] == "scaled_fp8"]
        for name in self._entries:
            self._modules.setdefault(name.rpartition(".")[0], []).append(name)
            for end, form in _PACKED.items():
                if name.endswith(end) and name != end:
                    weight = name.removesuffix(end) + ("" if end in _PARAMETERS else ".weight")
                    self.weights[weight] = name
                    self._packed[name] = weight, form

    def problem(self, tensor: str, value: np.dtype[Any] | None = None) -> str | None:
        """Why nothing can be added to a tensor that the checkpoint has; None where it is an ordinary weight.

        `value` is the dtype of what takes its place as a whole, which a buffer of integers allows too.
        """
        code = self._entries[tensor].code
        if tensor in self._packed and (code not in _FLOATING or code.startswith("F8")):
            weight, form = self._packed[tensor]
            return f"{weight}: the checkpoint has it packed, as {tensor}{self._as(form)}; {_WAY_OUT}"
        if code not in _FLOATING:
            if value is not None and self._is_buffer(tensor):
                own = self._entries[tensor].dtype
                return None if value == own else f"{tensor}: the value for it is {value}, wanted {own}"
            return f"{tensor}: dtype {code} is not floating{self._as(self._beside(tensor))}; {_WAY_OUT}"
        if not code.startswith("F8"):
            return None
        others = self._companions(tensor)
        if self._method or others:
            reason = f", with {others[0]} beside it" if others else ""
            return f"{tensor}: {code} is in other units than the model's{reason}{self._as('')}; {_WAY_OUT}"
        return None

    def _is_buffer(self, tensor: str) -> bool:
        """Whether a tensor that is not floating counts or points at something, as the batches of a BatchNorm do."""
        is_packed = tensor.rpartition(".")[2] == "weight" or tensor.endswith(tuple(_PACKED))
        return not is_packed and not self._beside(tensor)

    def _companions(self, tensor: str) -> list[str]:
        """What stands beside a weight and is no part of an ordinary module, such as its scale."""
        module, _, last = tensor.rpartition(".")
        siblings = [name for name in self._modules[module] if name != tensor]
        named = [name for name in siblings if name.startswith(f"{tensor}_")]  # weight_scale_inv
        below = self._modules.get(tensor, [])  # weight.absmax
        others = []  # scale_weight, scale, input_scale
        if last == "weight":
            others = [name for name in siblings if not name.endswith("bias") and not self._is_weight(name)]
        return list(dict.fromkeys([*named, *below, *others, *self._marks]))

    def _is_weight(self, name: str) -> bool:
        """Whether a tensor is another weight of its module, as experts and fused projections are."""
        entry = self._entries[name]
        return entry.code.startswith("F8") and len(entry.shape) > 1

    def _beside(self, tensor: str) -> str:
        module = tensor.removesuffix(".weight")
        return next((form for end, form in _BESIDE.items() if module + end in self._entries), "")

    def _as(self, form: str) -> str:
        known = self._method or form
        return f" ({known})" if known else ""


def _method_of(settings: Mapping[str, Any]) -> str:
    """The format that config.json names; "" where it names none."""
    config = settings.get("quantization_config") or settings.get("compression_config")
    if not isinstance(config, Mapping):
        return ""
    if config.get("load_in_4bit") or config.get("load_in_8bit"):
        return "bitsandbytes"
    method = str(config.get("quant_method") or config.get("quant_algo") or "a quantization_config without a method")
    return _METHODS.get(method, method[:40])


def problems_of(checkpoint: Checkpoint, tensors: Mapping[str, np.dtype[Any] | None]) -> list[str]:
    """What stands against adding to each of these tensors, or putting a value of this dtype in its place."""
    quantized = Quantized(checkpoint)
    found = [quantized.problem(tensor, value) for tensor, value in tensors.items()]
    return [problem for problem in found if problem]
