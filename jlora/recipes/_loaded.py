"""A language model of a folder with adapters of other folders: what `jlora generate` and `jlora eval` work on."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jlora import variants
from jlora.config import LoraConfig
from jlora.disk import read_json
from jlora.errors import DataError, JloraError, JloraWarning
from jlora.interop.peft import base_model_of, is_peft_folder
from jlora.models import read_adapter
from jlora.recipes._language import LanguageModel, read_language_model
from jlora.storage import load_adapters, read_metadata
from jlora.transform import lora
from jlora.tree import merge_params


@dataclasses.dataclass(frozen=True)
class FolderAdapters:
    """Adapters of a language model, read from a folder.

    Attributes:
      name: the folder, as it was given.
      adapters: in the structure of the params.
      config: of them.
    """

    name: str
    adapters: Any
    config: LoraConfig


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A language model with its params, and what is computed beside them.

    Attributes:
      language: the model.
      fn: `decoder(config)`, or with adapters `jlora.lora` of it, for `jlora.models.generate`.
      params: of the model; with adapters in them where they were merged.
      adapters: beside the params; None for none.
      name: of the adapters, beside the params or in them; None for none.
    """

    language: LanguageModel
    fn: Callable[..., Any]
    params: Any
    adapters: Any = None
    name: str | None = None

    def adapted(self, found: FolderAdapters, *, merged: bool = False) -> "LoadedModel":
        """The base with adapters: beside its params, or added to a copy of those that they adapt."""
        if merged:
            params = merge_params(self.params, found.adapters, found.config)
            return dataclasses.replace(self, params=params, name=found.name)
        return dataclasses.replace(self, fn=lora(self.fn, found.config), adapters=found.adapters, name=found.name)

    def __call__(self, tokens: Any, **options: Any) -> Any:
        """Logits float32 (B, T, vocabulary) of tokens int32 (B, T); options are those of `jlora.models.decoder`."""
        weights = (self.params,) if self.adapters is None else (self.params, self.adapters)
        return self.fn(*weights, tokens, **options)


def load_language_model(
    folder: str | Path, adapter: str | Path | None = None, *, merged: bool = False, dtype: str | None = None
) -> LoadedModel:
    """A language model, with an adapter or without; the adapter is checked against it before the params are read.

    Args:
      folder: of the model, in Hugging Face's layout.
      adapter: a folder of adapters, PEFT's or jlora's own.
      merged: whether the adapters are added to the params, which rounds them to their dtype once.
      dtype: of the params; None as they are in the folder.

    Raises:
      ConfigError, DataError: as of `read_language_model`; adapters that do not fit the model.
    """
    language = read_language_model(folder, dtype=dtype)
    found = None if adapter is None else read_adapter_folder(adapter, language)
    base = base_of(language)
    return base if found is None else base.adapted(found, merged=merged)


def base_of(language: LanguageModel) -> LoadedModel:
    """A language model without adapters, its params read."""
    return LoadedModel(language, language.function(), language.read_params())


def read_adapter_folder(path: str | Path, language: LanguageModel) -> FolderAdapters:
    """Adapters for a language model, of PEFT's format or of jlora's own.

    An adapter that says that it is for another model is warned of.

    Raises:
      DataError: no adapters there, damaged ones, or ones for weights that the model does not have.
    """
    folder = Path(path).expanduser()
    if not (folder / "adapter_config.json").exists():
        inside = next((folder / name for name in ("adapter", "adapters") if (folder / name).is_dir()), None)
        way_out = f"give {inside}" if inside else "wanted a folder that PEFT or jlora wrote"
        raise DataError(f"{path}: holds no adapters: found no adapter_config.json; {way_out}")
    try:
        if is_peft_folder(folder):
            adapters, config = read_adapter(folder, language.config)
            base = base_model_of(config)
        elif variants.is_variant_folder(folder):
            trained, frozen, config = variants.load(folder)
            adapters = variants.adapters(trained, frozen, language.shapes(), config)
            base = None
        else:
            adapters, config = load_adapters(folder, params=language.shapes())
            base = read_metadata(folder).get("base")
    except JloraError as error:
        raise DataError(f"{path}: cannot be used with {language.folder}: {error}") from None
    if isinstance(base, str) and base and not _is_named(base, language.folder):
        warnings.warn(
            JloraWarning(
                f"{path}: says that it is for {base}, and is used with {language.folder}: all shapes fit, but what it "
                "learned does not where the weights are others"
            ),
            stacklevel=2,
        )
    return FolderAdapters(str(path), adapters, config)


def _is_named(base: str, folder: Path) -> bool:
    """Whether a base, as an adapter names it, may be the one in a folder: by its place, or by the last part of it."""
    place = Path(base).expanduser()
    if place.is_dir():
        return place.resolve() == folder.resolve()
    own = read_json(folder / "config.json").get("_name_or_path")
    # Hugging Face's cache has a model at models--ORGANISATION--NAME/snapshots/HASH
    names = [part.rpartition("--")[2] for part in folder.resolve().parts[-3:]]
    names += [Path(own).name] if isinstance(own, str) else []
    return place.name.lower() in {name.lower() for name in names}
