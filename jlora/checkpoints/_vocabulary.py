"""A vocabulary that grew or shrank: an embedding and a head of an adapter that have other rows than a checkpoint's."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jlora.adapter import Entry
from jlora.checkpoints._memory import settings_of
from jlora.disk import Checkpoint, bytes_of, dump_json, read_json, write_whole
from jlora.errors import DataError

Shapes = Mapping[str, tuple[int, ...]]

_CONFIG, _KEY = "config.json", "vocab_size"
_OF_VOCABULARY = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "lm_head.weight", "lm_head.bias")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def other_rows(entry: Mapping[str, Any], shape: tuple[int, ...], settings: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape of a weight with the rows that an entry has for another vocabulary; None where they are the same."""
    value = entry.get("value")
    if value is None or value.shape == shape or not shape or value.shape[1:] != shape[1:]:
        return None
    return tuple(value.shape) if shape[0] in _sizes(settings) else None


def resized_by(source: Checkpoint, changes: Mapping[str, Sequence[Entry]]) -> dict[str, tuple[int, ...]]:
    """The tensors that get other rows, and their shapes.

    Raises:
      DataError: tensors of the vocabulary that would differ in rows.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, own in changes.items():
        value = own[0].parts.get("value")
        if value is not None and name in source.entries and value.shape != source.entries[name].shape:
            found[name] = tuple(value.shape)
    if not found:
        return {}
    (first, shape), before = next(iter(found.items())), {source.entries[name].shape[0] for name in found}
    for name, entry in source.entries.items():
        rows = found.get(name, entry.shape)[:1]
        if name.endswith(_OF_VOCABULARY) and entry.shape[0] in before and rows != shape[:1]:
            raise DataError(f"{name} would have {rows[0]:,} rows, and {first} {shape[0]:,}: the adapter has not both")
    return found


def bytes_more(source: Checkpoint, resized: Shapes) -> int:
    """By how much an output is larger."""
    entries = source.entries
    return sum(
        bytes_of(shape, entries[name].dtype) - (entries[name].stop - entries[name].start)
        for name, shape in resized.items()
    )


def write_vocabulary(source: Checkpoint, resized: Shapes, adapters: Sequence[Path], new: Path) -> None:
    """Says in an output's config.json and index what is resized, and takes the tokenizer from the adapters' folders."""
    rows = next(iter(resized.values()))[0]
    if (new / _CONFIG).is_file():
        settings, sizes = dict(read_json(new / _CONFIG)), _sizes(settings_of(source))
        if settings.get(_KEY) in sizes:
            settings[_KEY] = rows
        text = settings.get("text_config")
        if isinstance(text, dict) and text.get(_KEY) in sizes:
            settings["text_config"] = {**text, _KEY: rows}
        write_whole(new / _CONFIG, dump_json(settings, sort_keys=False), sync=False)
    if (new / source.index_name).is_file():
        index = dict(read_json(new / source.index_name))
        metadata = dict(index.get("metadata") or {})
        if isinstance(metadata.get("total_size"), int):
            metadata["total_size"] += bytes_more(source, resized)
            index["metadata"] = metadata
            write_whole(new / source.index_name, dump_json(index), sync=False)
    for name in tokenizer_files(adapters):
        shutil.copy2(name, new / name.name)


def tokenizer_files(adapters: Sequence[Path]) -> list[Path]:
    """The files of a tokenizer and its template that lie in the adapters' folders; of several the last counts."""
    return [folder / name for folder in adapters for name in _TOKENIZER if (folder / name).is_file()]


def _sizes(settings: Mapping[str, Any]) -> set[int]:
    """The sizes of the vocabulary that a config.json names."""
    text = settings.get("text_config")
    found = [settings.get(_KEY), text.get(_KEY) if isinstance(text, Mapping) else None]
    return {size for size in found if isinstance(size, int)}
