"""Adapters of a decoder as PEFT's files, and back: what `jlora.interop.peft` does, told of the model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.adapter import is_entry
from jlora.config import LoraConfig
from jlora.errors import DataError, listed
from jlora.interop.peft import Row, is_vera_folder, kept_of, of_model, read_peft, read_vera, to_tensors, write_peft
from jlora.models._config import DecoderConfig
from jlora.models._names import EMBEDDING_PATH, HEAD, HEAD_PATH, factorizations, mapping
from jlora.models._shapes import param_shapes
from jlora.paths import leaves_by_path, literal_pattern, nest
from jlora.tree import bind
from jlora.variants import vera

_HEAD_ROW = Row(HEAD, HEAD_PATH)


def write_adapter(
    folder: str | Path, adapters: Any, config: LoraConfig, model: DecoderConfig, *, base: str | None = None
) -> None:
    """Writes the adapters of a decoder as PEFT has them, for PEFT, vLLM and all else that reads its files.

    Each layer becomes a module with tensors of its own; the experts of a layer stay one, which PEFT calls a parameter.
    An adapter of the embedding that is the head too is written for both: PEFT adapts every module on its own.

    Args:
      folder: as for `jlora.interop.peft.write_peft`.
      adapters: entries at the paths of the params, None or nothing elsewhere.
      config: the configuration that they were made with; how axes split need not be in it.
      model: the configuration of the model.
      base: the name or the folder of the base model, which PEFT's file names; None for what the file said that the
        configuration was read from.

    Raises:
      TargetError: adapters that do not fit the model.
      DataError: as of `write_peft`; a magnitude (DoRA) of an embedding that is the head too.
    """
    write_peft(folder, *_as_peft(adapters, config, model, base))


def adapter_tensors(
    adapters: Any, config: LoraConfig, model: DecoderConfig, *, base: str | None = None
) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """What `write_adapter` writes, in memory: PEFT's name -> array, and PEFT's configuration.

    Arguments and errors are those of `write_adapter`.

    >>> from jlora.models import parse_config
    >>> sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> model = parse_config({"model_type": "llama", **sizes})
    >>> q_proj = {"weight": {"A": np.ones((2, 8, 3), np.float32), "B": np.ones((2, 3, 8), np.float32)}}
    >>> adapters = {"model": {"layers": {"self_attn": {"q_proj": q_proj}}}}
    >>> tensors, data = adapter_tensors(adapters, LoraConfig(rank=3), model)
    >>> min(tensors), tensors[min(tensors)].shape
    ('base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight', (3, 8))
    """
    return to_tensors(*_as_peft(adapters, config, model, base))


def _as_peft(
    adapters: Any, config: LoraConfig, model: DecoderConfig, base: str | None
) -> tuple[Any, LoraConfig, tuple[Row, ...]]:
    """What `write_peft` takes: the adapters, a configuration that tells of the model, and the mapping."""
    entries = leaves_by_path(adapters, is_leaf=is_entry)
    settled = _first(config, "factorizations", {p: roles for p, roles in factorizations(model).items() if p in entries})
    bind(param_shapes(model), adapters, settled)
    rows = mapping(model)
    if model.tied and EMBEDDING_PATH in entries:
        entries[HEAD_PATH] = _of_head(entries[EMBEDDING_PATH])
        settled = _with_head(settled)
        rows = (*rows, _HEAD_ROW)
    if base is not None or kept_of(settled).config is None:
        targets = [name for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj") if model.experts]
        settled = of_model(
            settled, base_model_name_or_path=base, task_type="CAUSAL_LM", kinds={}, target_parameters=targets
        )
    return nest(entries), settled, rows


def read_adapter(folder: str | Path, model: DecoderConfig) -> tuple[Any, LoraConfig]:
    """The adapters of a decoder and their configuration, from a folder that PEFT or `write_adapter` wrote.

    A VeRA of PEFT's is expanded to ordinary adapters.

    Args:
      folder: as for `jlora.interop.peft.read_peft`.
      model: the configuration of the model.

    Returns:
      `(adapters, config)`: adapters in the structure of the params, for `jlora.lora(decoder(model), config)`.

    Raises:
      DataError: as of `read_peft`; an adapter of another model; layers that differ in rank or alpha, which one array
        cannot hold; one of an embedding that is the head too which changes only one of them, or both differently.
    """
    if is_vera_folder(folder):
        trained, frozen, config = read_vera(folder, param_shapes(model), mapping(model))
        return vera.adapters(trained, frozen, param_shapes(model), config), config.replace(kind="lora")
    if not model.tied:
        return read_peft(folder, mapping(model), params=param_shapes(model), transposed_experts=False)
    shapes = param_shapes(model)
    table = shapes["model"]["embed_tokens"]["weight"]
    params = {**shapes, "lm_head": {"weight": table}}
    adapters, config = read_peft(folder, (*mapping(model), _HEAD_ROW), params=params, transposed_experts=False)
    head = adapters.pop("lm_head")["weight"]
    embedding = adapters["model"]["embed_tokens"]["weight"]
    if head is None and embedding is None:
        return adapters, config
    scalings = {config.scaling_of(path) for path in (EMBEDDING_PATH, HEAD_PATH)}
    if head is None or embedding is None or len(scalings) > 1 or not _are_one(head, embedding):
        raise DataError(
            f"{folder}: the head of this model is its embedding, and the adapter changes them differently, as PEFT's "
            "do without ensure_weight_tying: give the model a head of its own: lm_head.weight as a copy of "
            "model.embed_tokens.weight, and tie_word_embeddings = false in config.json"
        )
    return adapters, _without_head(config)


def _of_head(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a head (vocabulary, hidden) that changes as its embedding does: A (hidden, r), B (r, vocabulary)."""
    if not entry.keys() <= {"A", "B", "value"}:
        more = listed(sorted(entry.keys() - {"A", "B", "value"}))
        raise DataError(f"{EMBEDDING_PATH}: {more} of an embedding that is the head too: PEFT has it for neither alone")
    swapped = {"A": "B", "B": "A"}
    return {swapped.get(name, name): part if name == "value" else part.T for name, part in entry.items()}


def _are_one(head: Mapping[str, Any], embedding: Mapping[str, Any]) -> bool:
    """Whether the entries of the head and of the embedding are the same change of one weight."""
    if head.keys() != embedding.keys() or not embedding.keys() <= {"A", "B", "value"}:
        return False
    return all(np.array_equal(head[name], part) for name, part in _of_head(embedding).items())


def _with_head(config: LoraConfig) -> LoraConfig:
    """A configuration that says of the head what it says of the embedding."""
    config = _first(config, "factorizations", {HEAD_PATH: "oi"})
    config = _first(config, "rank_pattern", {HEAD_PATH: config.rank_of(EMBEDDING_PATH)})
    return _first(config, "alpha_pattern", {HEAD_PATH: config.alpha_of(EMBEDDING_PATH)})


def _without_head(config: LoraConfig) -> LoraConfig:
    """A configuration that says nothing of the head."""
    kept = {
        name: {pattern: value for pattern, value in getattr(config, name) if pattern != literal_pattern(HEAD_PATH)}
        for name in ("factorizations", "rank_pattern", "alpha_pattern")
    }
    targets = tuple(pattern for pattern in config.target_modules if pattern != literal_pattern(HEAD_PATH))
    return config.replace(target_modules=targets, **kept)


def _first(config: LoraConfig, field: str, values: Mapping[str, Any]) -> LoraConfig:
    """The configuration with a value for each path before the patterns that it has."""
    own = {literal_pattern(path): value for path, value in values.items()}
    others = {pattern: value for pattern, value in getattr(config, field) if pattern not in own}
    return config.replace(**{field: own | others})
