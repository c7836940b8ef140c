"""The folder of a model, and which of its tensors make up which param."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jlora.disk import Checkpoint, TensorFile
from jlora.errors import shortened
from jlora.models._config import DecoderConfig
from jlora.models._names import EMBEDDING, EMBEDDING_PATH, HEAD, HEAD_PATH, Piece, naming_of, pieces_of
from jlora.models._shapes import param_shapes
from jlora.paths import leaves_by_path, nearest

BLOCK = 16 << 20
"""Bytes that are read at once, where they do not go straight to their place."""
_FLOATING = ("F32", "BF16", "F16", "F64")
_BUFFERS = (".rotary_emb.inv_freq",)  # which old files hold, and transformers computes
_MOST_SHOWN = 12


class Source:
    """The folder of a model, and which of its tensors make up which param; nothing is read but the headers.

    Attributes:
      checkpoint: the tensors of the folder.
      naming: how they are called.
      pieces: path -> the tensors that make up the param.
    """

    def __init__(self, folder: str | Path, config: DecoderConfig) -> None:
        self.folder, self.checkpoint = Path(folder), Checkpoint(folder)
        self.shapes = leaves_by_path(param_shapes(config))
        there = self.checkpoint.entries
        self.naming = naming_of(self.shapes, there)
        self.pieces = {path: pieces_of(path, leaf.shape, there, self.naming) for path, leaf in self.shapes.items()}
        self.tied = {self.naming(EMBEDDING), self.naming(HEAD)} if HEAD_PATH not in self.shapes else set()
        embedding = self.naming(EMBEDDING)
        if self.tied and embedding not in there and self.naming(HEAD) in there:  # of the two, this one was saved
            shape = self.shapes[EMBEDDING_PATH].shape
            self.pieces[EMBEDDING_PATH] = pieces_of(EMBEDDING_PATH, shape, there, lambda _: self.naming(HEAD))

    @contextlib.contextmanager
    def opened(self) -> Iterator[dict[str, TensorFile]]:
        """The files of the folder, open for reading, by name."""
        with contextlib.ExitStack() as stack:
            yield {shard: stack.enter_context(self.checkpoint.open(shard)) for shard in self.checkpoint.shards}

    def problems(self) -> list[str]:
        """All that keeps the params from being made of the tensors."""
        there = self.checkpoint.entries
        prefixes = [name.removesuffix(EMBEDDING) for name in there if name.endswith(f".{EMBEDDING}")]
        if prefixes and not any(piece.name in there for pieces in self.pieces.values() for piece in pieces):
            return [
                f"the names of its tensors begin with {prefixes[0]}: wanted {EMBEDDING} and so on; take the model as "
                "it was saved by its own save_pretrained, or rename them"
            ]
        found = [self._problem(piece) for pieces in self.pieces.values() for piece in pieces]
        return [*(problem for problem in found if problem), *self._unexpected()]

    def dtypes_of(self, path: str) -> set[np.dtype[Any]]:
        """The dtypes of the tensors that make up a param, of those that can be read."""
        names = [piece.name for piece in self.pieces[path]]
        found = [self.checkpoint.entries[name] for name in names if name in self.checkpoint.entries]
        return {entry.dtype for entry in found if entry.code in _FLOATING}

    def _problem(self, piece: Piece) -> str | None:
        """What keeps a piece from being read."""
        entry = self.checkpoint.entries.get(piece.name)
        if entry is None:
            way_out = "; where the head is the embedding, config.json says tie_word_embeddings = true"
            return f"{piece.name} {list(piece.shape)} is missing{way_out if piece.name == self.naming(HEAD) else ''}"
        if entry.code not in _FLOATING:
            return (
                f"{piece.name} has the dtype {entry.code}: wanted {', '.join(_FLOATING)}; take the model as it was "
                "before it was quantised"
            )
        if entry.shape != piece.shape:
            return f"{piece.name} has the shape {list(entry.shape)}: wanted {list(piece.shape)}, as config.json says"
        return None

    def _unexpected(self) -> Iterator[str]:
        known = {piece.name for pieces in self.pieces.values() for piece in pieces}
        count = 0
        for name in self.checkpoint.entries:
            if name in known or name.endswith(_BUFFERS) or self.naming.is_of_others(name):
                continue
            if name in self.tied:
                yield from self._problem_of_head(name)
                continue
            near = nearest(name, known, 1)[0] if count < _MOST_SHOWN else "not sought"
            yield f"{shortened(name)} is no tensor of this model; nearest: {near}"
            count += 1

    def _problem_of_head(self, name: str) -> Iterator[str]:
        """A head beside the embedding that it is to be: nothing to tell where they are equal."""
        (other,) = self.tied - {name}
        if other in self.checkpoint.entries and not self._are_equal(name, other):
            yield (
                f"{name} is there and differs from {other}, and config.json says that they are one: set "
                "tie_word_embeddings = false there to have both, or take the tensor out"
            )

    def _are_equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same bytes; block by block."""
        entries = [self.checkpoint.entries[name] for name in (one, other)]
        if entries[0][:2] != entries[1][:2]:
            return False
        size = entries[0].stop - entries[0].start
        with self.opened() as files:
            for start in range(0, size, BLOCK):
                blocks = [np.empty(min(BLOCK, size - start), np.uint8) for _ in entries]
                for name, entry, block in zip((one, other), entries, blocks, strict=True):
                    files[self.checkpoint.shard_of[name]].read_into(entry.start + start, block)
                if not np.array_equal(blocks[0], blocks[1]):
                    return False
        return True
