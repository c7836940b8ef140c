"""The settings of a GGUF file, `{architecture}.*`, each asked for by a name and checked; none is passed over."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jlora.errors import DataError, listed, shortened

_Default = TypeVar("_Default")
_MISSING: Any = object()
_MOST = 1 << 40


class Settings:
    """What a file says under its architecture.

    Attributes:
      path: the file, for errors.
      architecture: llama.cpp's name.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any], factors: "np.ndarray[Any, Any] | None" = None) -> None:
        self.path, self._metadata, self._factors = path, metadata, factors
        self.architecture: str = text(path, metadata, "general.architecture")
        self._asked: set[str] = set()

    def count(self, key: str, default: Any = _MISSING, least: int = 1) -> Any:
        """A whole number that is not less than `least`."""
        value = self._get(key, default)
        if value is not default and (type(value) is not int or not least <= value < _MOST):
            wanted = f"one whole number of at least {least}"
            raise DataError(f"{self.path}: {self._name(key)} = {shortened(value)}: wanted {wanted}")
        return value

    def number(self, key: str, default: Any = _MISSING) -> Any:
        """A positive number, of which float32 keeps the file's digits: 1e-05 and not 9.999999747378752e-06."""
        value = self._get(key, default)
        if value is default:
            return value
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise DataError(f"{self.path}: {self._name(key)} = {shortened(value)}: wanted a positive number")
        return float(str(np.float32(value)))

    def same(self, key: str, wanted: Any) -> None:
        """Refuses a setting that is another than what this architecture is known with."""
        value = self._get(key, wanted)
        if value != wanted:
            raise DataError(f"{self.path}: {self._name(key)} = {shortened(value)}: known here with {wanted} only")

    def rope_scaling(self, pairs: int) -> dict[str, Any] | None:
        """How positions are stretched, as config.json has it; `pairs` of numbers rotate in a head."""
        kind = self._get("rope.scaling.type", "none")
        factor = self.number("rope.scaling.factor", 1.0)
        self._asked |= {"rope.scaling.finetuned", "rope.scaling.original_context_length"}
        if kind not in ("none", "linear"):
            raise DataError(
                f"{self.path}: {self._name('rope.scaling.type')} = {shortened(kind)}: known here are none and linear"
            )
        if self._factors is not None:
            if kind != "none":
                raise DataError(f"{self.path}: rope_freqs.weight beside {self._name('rope.scaling.type')} = {kind!r}")
            if self.architecture != "llama" or len(self._factors) != pairs:
                found = f"{len(self._factors):,} numbers in a {self.architecture} with {pairs:,} pairs in a head"
                raise DataError(f"{self.path}: rope_freqs.weight: {found}; known here of llama, one for each pair")
            return self._llama3()
        return {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1 else None

    def check_all_asked(self) -> None:
        """Refuses settings that nobody asked for: they may change what the model computes."""
        start = f"{self.architecture}."
        left = [key for key in self._metadata if key.startswith(start) and key[len(start) :] not in self._asked]
        if left:
            found = listed(f"{key} = {shortened(self._metadata[key], 40)}" for key in left)
            raise DataError(f"{self.path}: settings that are not known here, and may change the model: {found}")

    def _llama3(self) -> dict[str, Any]:
        """What made rope_freqs.weight: Llama 3's rule, of which the file holds the numbers only."""
        assert self._factors is not None
        theta = self.number("rope.freq_base", 10000.0)
        context = 8192
        largest = float(self._factors.max(initial=0))
        for factor in (8.0, 16.0, 32.0, largest):
            if np.allclose(llama3_factors(len(self._factors), theta, factor, 1.0, 4.0, context), self._factors, 1e-5):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": context,
                }
        raise DataError(
            f"{self.path}: rope_freqs.weight is not what Llama 3.1 and 3.2 make it of a factor (low_freq_factor 1, "
            f"high_freq_factor 4, original_max_position_embeddings {context}); its largest is {largest:g}"
        )

    def _get(self, key: str, default: Any) -> Any:
        self._asked.add(key)
        value = self._metadata.get(self._name(key), default)
        if value is _MISSING:
            raise DataError(f"{self.path}: no {self._name(key)}, which every {self.architecture} has")
        return value

    def _name(self, key: str) -> str:
        return f"{self.architecture}.{key}"


def text(path: Path, metadata: Mapping[str, Any], key: str) -> str:
    """A string that a file has to have."""
    value = metadata.get(key)
    if not isinstance(value, str):
        found = "no" if value is None else f"{shortened(value)} for"
        raise DataError(f"{path}: {found} {key}; wanted a file for llama.cpp with one model")
    return value


def llama3_factors(
    count: int, theta: float, factor: float, low: float, high: float, context: int
) -> np.ndarray[Any, Any]:
    """By what Llama 3 divides each of `count` frequencies: from 1 for short waves to `factor` for long ones.

    wave = 2 pi theta^(i/count);  1 / ((1-s)/factor + s), s = (context/wave - low) / (high - low) held within 0 and 1.
    """
    wave = 2 * np.pi * theta ** (np.arange(count) / count)
    smooth = np.clip((context / wave - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth))
