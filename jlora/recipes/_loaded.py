"""A language model of a folder with adapters of other folders: what `jlora generate` and `jlora eval` work on."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jlora.compose import combine
from jlora.config import LoraConfig
from jlora.errors import DataError, JloraError, JloraWarning
from jlora.interop.peft import base_model_of, is_peft_folder
from jlora.models import read_adapter
from jlora.recipes._language import LanguageModel, read_language_model
from jlora.storage import load_adapters, read_metadata
from jlora.transform import lora
from jlora.tree import merge_params


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A language model with its params, and adapters of them.

    Attributes:
      language: the model.
      params: its params; with the adapters in them where they were merged.
      adapters, config: what is to be computed beside the params; None where there is nothing.
      fn: `decoder(config)`, or with adapters `jlora.lora` of it, for `jlora.models.generate`.
    """

    language: LanguageModel
    params: Any
    adapters: Any
    config: LoraConfig | None
    fn: Callable[..., Any]

    def base(self) -> "LoadedModel":
        """The same without the adapters; those that were merged stay in the params."""
        return LoadedModel(self.language, self.params, None, None, self.language.function())


def load_language_model(
    folder: str | Path, adapters: Sequence[str | Path] = (), *, merged: bool = False, dtype: str | None = None
) -> LoadedModel:
    """Reads a language model and adapters for it, each checked against it before the params are read.

    Args:
      folder: of the model, in Hugging Face's layout.
      adapters: folders of adapters, PEFT's or jlora's own; the updates of several are added.
      merged: whether the updates are added to the params, which rounds them to their dtype once.
      dtype: of the params; None as they are in the folder.

    Raises:
      ConfigError, DataError: as of `read_language_model`; adapters that do not fit the model.
    """
    language = read_language_model(folder, dtype=dtype)
    parts = [_read_adapters(Path(path), language) for path in adapters]
    if len(parts) > 1:
        parts = [combine(parts, method="cat")]
    params = language.read_params()
    fn = language.function()
    if not parts:
        return LoadedModel(language, params, None, None, fn)
    found, config = parts[0]
    if merged:
        return LoadedModel(language, merge_params(params, found, config), None, None, fn)
    return LoadedModel(language, params, found, config, lora(fn, config))


def _read_adapters(path: Path, language: LanguageModel) -> tuple[Any, LoraConfig]:
    """Adapters in the structure of the model's params, and their configuration."""
    if not (path / "adapter_config.json").exists():
        inside = next((path / name for name in ("adapter", "adapters") if (path / name).is_dir()), None)
        way_out = f"; give {inside}" if inside else ""
        raise DataError(f"{path}: holds no adapters: found no adapter_config.json{way_out}")
    try:
        if is_peft_folder(path):
            adapters, config = read_adapter(path, language.config)
            base = base_model_of(config)
        else:
            adapters, config = load_adapters(path, params=language.shapes())
            base = read_metadata(path).get("base")
    except JloraError as error:
        raise DataError(f"{path}: cannot be used with {language.folder}: {error}") from None
    if isinstance(base, str) and not _is_named(base, language.folder):
        warnings.warn(
            JloraWarning(
                f"{path}: says that it is for {base}, and is used with {language.folder}: all shapes fit, and if the "
                "weights are others what it learned does not"
            ),
            stacklevel=3,
        )
    return adapters, config


def _is_named(base: str, folder: Path) -> bool:
    """Whether a base, as an adapter names it, may be the one in a folder: by its place, or by the last part of it."""
    place = Path(base).expanduser()
    if place.is_dir():
        return place.resolve() == folder.resolve()
    return place.name.lower() == folder.resolve().name.lower()
