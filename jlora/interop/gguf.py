"""Adapters as GGUF files for llama.cpp, written with the package `gguf` (`pip install 'jlora[gguf]'`).

    <tensor>.lora_a (r, in), <tensor>.lora_b (out, r)            of a matrix (out, in)
    token_embd.weight.lora_a (vocabulary, r), .lora_b (dim, r)   of the embedding

The update is adapter.lora.alpha / r * b@a, where alpha is not 0 (llama.cpp, src/llama-adapter.h). Only architectures
are written whose conversion is known: llama.cpp has its own names and orders of rows (conversion/llama.py).
"""

import importlib
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.config import LoraConfig
from jlora.disk import check_can_hold, read_json, write_whole
from jlora.errors import DataError, listed, raise_all, shortened
from jlora.interop._named import alike
from jlora.interop.peft import FLAT, ModelEntry, model_entries
from jlora.interop.peft import Mapping as Table
from jlora.pytrees import leaves
from jlora.storage import write_once

__all__ = ["gguf_file", "write_gguf"]

# The class in config.json -> llama.cpp's architecture, whether it orders the rows of q and k anew, and whether the head
# is tied where config.json does not say it (llama.cpp, conversion/llama.py, qwen.py and gemma.py).
_ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", True, False),
    "MistralForCausalLM": ("llama", True, False),
    "Qwen2ForCausalLM": ("qwen2", False, False),
    "Qwen3ForCausalLM": ("qwen3", False, False),
    "GemmaForCausalLM": ("gemma", False, True),
    "Gemma2ForCausalLM": ("gemma2", False, True),
    "Gemma3ForCausalLM": ("gemma3", False, True),
}
_ENDS = ("token_embd.weight", "output.weight")


def gguf_file(out: str | Path) -> Path:
    """The file that is written for `out`, which is a name that ends with .gguf or a folder."""
    path = Path(out)
    return path if path.suffix == ".gguf" else path / "adapter.gguf"


def write_gguf(path: str | Path, adapters: Any, config: LoraConfig, mapping: Table = FLAT, *, base: str | Path) -> None:
    """Writes a GGUF file that llama.cpp loads with `--lora`.

    llama.cpp has one alpha for all: smaller ranks are padded with zeros, other scalings go into B. The numbers are
    float32.

    Args:
      path: the file, or a folder, in which it is `adapter.gguf`; written whole or not at all.
      adapters, config, mapping: as of `jlora.interop.peft.write_peft`.
      base: the folder of the Hugging Face model, of which config.json is read.

    Raises:
      DataError: gguf is not installed, an architecture that is not known here, adapters that llama.cpp has no place
        for: DoRA, whole values, biases of a B, convolutions, experts, the embedding or the head where they are tied.
    """
    gguf = _imported()
    model = _Model(base)
    names = gguf.get_tensor_name_map(model.key_of(gguf.MODEL_ARCH_NAMES), model.layers)
    entries = model_entries(path, adapters, config, mapping)
    found = {entry.name: names.get_name(entry.name, (".weight",)) for entry in entries}
    problems = [problem for entry in entries if (problem := _problem(entry, found[entry.name], model))]
    raise_all(problems, DataError, f"{path}: llama.cpp has no place for")
    entries, rank, scaling = alike(entries, config)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for entry in entries:
        a, b = (np.asarray(entry.parts[part], np.float32) for part in "AB")
        if entry.kind == "linear":
            a, b = a.T, model.rows(entry.name, b.T)
        else:
            b = b.T
        tensors |= {
            f"{found[entry.name]}.lora_{part}": np.ascontiguousarray(array)
            for part, array in zip("ab", (a, b), strict=True)
        }
    target, contents = gguf_file(path), _bytes(gguf, model.architecture, scaling * rank, tensors)
    if target.is_dir():
        raise DataError(f"{target}: is a folder; wanted the name of a file, or of a folder for it")

    def write() -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, contents)

    write_once(leaves(adapters), write, lambda: check_can_hold(target.parent, len(contents)))


def _imported() -> Any:
    try:
        return importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        raise DataError(f"{error.name} is not installed: pip install 'jlora[gguf]'") from None


def _bytes(gguf: Any, architecture: str, alpha: float, tensors: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    """The contents of the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, array in tensors.items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


class _Model:
    """What the base's config.json says."""

    def __init__(self, base: str | Path) -> None:
        self._path = Path(base) / "config.json"
        data = read_json(self._path)
        classes = data.get("architectures")
        name = classes[0] if isinstance(classes, list) and classes else None
        if name not in _ARCHITECTURES or "draft_vocab_size" in data:
            raise DataError(
                f"{self._path}: architectures = {shortened(classes)}: how llama.cpp lays out its weights is known here "
                f"of {listed(_ARCHITECTURES)}; convert to PEFT, and that with llama.cpp's convert_lora_to_gguf.py"
            )
        self.architecture, self._is_reordered, tied = _ARCHITECTURES[name]
        self._data = data
        self.is_tied = bool(data.get("tie_word_embeddings", tied))
        self.layers = self._count("num_hidden_layers")

    def key_of(self, names: Mapping[Any, str]) -> Any:
        """gguf's own key of the architecture."""
        return next(key for key, name in names.items() if name == self.architecture)

    def rows(self, name: str, b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """B (out, r) with its rows as llama.cpp has those of the weight.

        Of each head of q and k it pairs the numbers that rotate together: (2, half) becomes (half, 2).
        """
        part = re.search(r"\.(q|k)_proj\.weight$", name)
        if not self._is_reordered or part is None:
            return b
        heads = self._count("num_attention_heads")
        if part[1] == "k" and self._data.get("num_key_value_heads") is not None:
            heads = self._count("num_key_value_heads")
        if b.shape[0] % (2 * heads):
            raise DataError(f"{name}: B has {b.shape[0]} rows, for {heads} heads in {self._path}")
        return b.reshape(heads, 2, -1, b.shape[1]).swapaxes(1, 2).reshape(b.shape)

    def _count(self, key: str) -> int:
        value = self._data.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DataError(f"{self._path}: {key} = {shortened(value)}: wanted a whole number of at least 1")
        return value


def _problem(entry: ModelEntry, name: str | None, model: _Model) -> str | None:
    """Why llama.cpp has no place for an entry; None where it has one."""
    if more := set(entry.parts) - {"A", "B"}:
        return f"{entry.path}: a part {min(more)}"
    if name is None or not name.endswith(".weight"):
        return f"{entry.path}: {model.architecture} has no tensor for {entry.name}; wanted Hugging Face's names"
    if model.is_tied and name in _ENDS:
        return (
            f"{entry.path}: the embedding is the head too (tie_word_embeddings), and llama.cpp cannot adapt one alone"
        )
    wanted = "embedding" if name == "token_embd.weight" else "linear"
    return None if entry.kind == wanted else f"{entry.path}: {entry.kind}; wanted a matrix (out, in), or the embedding"
