"""The tensors of a Hugging Face folder and of PEFT's files, and their places in the params of a decoder.

A path of the params is the name that the weight has in transformers' memory, with slashes, and without the number of
the layer: all layers lie in one array, one upon the other. On the disk two kinds of weights have other names: those of
experts, each of which has tensors of its own there, and all weights of a model that was saved as a part of another.
"""

import dataclasses
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

from jlora.interop.peft import Row
from jlora.models._config import DecoderConfig
from jlora.models._shapes import param_shapes
from jlora.paths import leaves_by_path

LAYERS = "model/layers/"
_EXPERTS = "experts"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
EMBEDDING_PATH, HEAD_PATH = EMBEDDING.replace(".", "/"), HEAD.replace(".", "/")


def mapping(config: DecoderConfig) -> tuple[Row, ...]:
    """How the names of the model in transformers, which are those of PEFT's files, meet the paths of its params.

    Args:
      config: of the model.

    Returns:
      one `jlora.interop.peft.Row` for each path of the params; for `jlora.interop.peft.read_peft` and `write_peft`.
      A path below `model/layers/` is a stack of all layers.
    """
    rows = []
    for path, leaf in leaves_by_path(param_shapes(config)).items():
        name = path.replace("/", ".")
        if path.startswith(LAYERS):
            inner = name.removeprefix("model.layers.")
            rows.append(Row(f"model.layers.{{i}}.{inner}", path, stack=(("{i}", leaf.shape[0]),)))
        else:
            rows.append(Row(name, path))
    return tuple(rows)


def factorizations(config: DecoderConfig) -> dict[str, str]:
    """How the axes of each weight split, by path: those of a layer are (layers, out, in), of experts one axis more.

    The table of the embedding is (vocabulary, hidden), which is in and out. For `jlora.LoraConfig`, where nothing is
    traced that would tell.
    """
    found = {}
    for path, leaf in leaves_by_path(param_shapes(config)).items():
        name = path.replace("/", ".")
        stacked = 1 if path.startswith(LAYERS) else 0
        if name == EMBEDDING:
            found[path] = "io"
        elif len(leaf.shape) - stacked >= 2:
            found[path] = "b" * (len(leaf.shape) - 2) + "oi"
    return found


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor on the disk, and the part of a param that it holds.

    Attributes:
      name: of the tensor.
      index: of the part in the param: a number for each axis that the tensor does not have, and slices.
      shape: of the tensor.
    """

    name: str
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]


def pieces_of(path: str, shape: tuple[int, ...], there: Container[str], named: Callable[[str], str]) -> list[Piece]:
    """The tensors that a param is read from.

    Args:
      path: of the param.
      shape: of the param.
      there: the names on the disk, which decide whether each expert has a tensor of its own.
      named: a name in memory -> the name on the disk.
    """
    name = path.replace("/", ".")
    if not path.startswith(LAYERS):
        return [Piece(named(name), _whole(shape), shape)]
    inner = name.removeprefix("model.layers.")
    found = []
    for layer in range(shape[0]):
        in_memory = named(f"model.layers.{layer}.{inner}")
        if _EXPERTS not in path.split("/") or in_memory in there:
            found.append(Piece(in_memory, (layer, *_whole(shape[1:])), shape[1:]))
        else:
            found += _pieces_of_experts(in_memory, layer, shape)
    return found


def _pieces_of_experts(in_memory: str, layer: int, shape: tuple[int, ...]) -> Iterator[Piece]:
    """The tensors of the single experts that are one array in memory (layers, experts, out, in)."""
    module, _, array = in_memory.rpartition(".")
    _, experts, outs, ins = shape
    parts = ("gate_proj", "up_proj") if array == "gate_up_proj" else (array,)
    rows = outs // len(parts)
    for expert in range(experts):
        for number, part in enumerate(parts):
            place = slice(number * rows, (number + 1) * rows)
            yield Piece(f"{module}.{expert}.{part}.weight", (layer, expert, place, slice(0, ins)), (rows, ins))


def _whole(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)


@dataclasses.dataclass(frozen=True)
class Naming:
    """How the names on the disk differ from those of the model on its own.

    Attributes:
      body: what stands before the names of the body in place of `model.`.
      head: what stands before the name of the head.
      others: whether the folder holds other parts of a larger model too.
    """

    body: str
    head: str
    others: bool

    def __call__(self, name: str) -> str:
        """The name on the disk of a name in memory."""
        if name.startswith("model."):
            return self.body + name.removeprefix("model.")
        return self.head + name

    def is_of_others(self, name: str) -> bool:
        """Whether a tensor belongs to another part of a larger model, such as the one that sees."""
        return self.others and not name.startswith((self.body, self.head + HEAD))


_NAMINGS = (
    Naming("model.", "", False),
    Naming("", "", False),  # saved as the body alone
    Naming("model.language_model.", "", True),  # of a model that sees, by transformers since 4.52
    Naming("language_model.model.", "language_model.", True),  # and before
)


def naming_of(paths: Mapping[str, Any], there: Container[str]) -> Naming:
    """The naming by which the folder has most of the params, the plain one first."""
    plain = [path.replace("/", ".").replace("model.layers.", "model.layers.0.") for path in paths]
    return max(_NAMINGS, key=lambda naming: sum(naming(name) in there for name in plain))
