"""A language model in a folder, as a job has it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jlora.errors import DataError
from jlora.models import DecoderConfig, decoder, param_shapes, read_config, read_params
from jlora.text import Tokenizer, read_tokenizer


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A language model in a folder of Hugging Face's layout; its params are read when they are asked for.

    Attributes:
      folder: where config.json, the safetensors and tokenizer.json lie.
      config: what config.json says.
      tokenizer: of the folder.
      dtype: of the params; None as they are in the folder.
      remat: what a gradient computes again, as of `jlora.models.decoder`.
    """

    folder: Path
    config: DecoderConfig
    tokenizer: Tokenizer
    dtype: str | None = None
    remat: str | None = None

    def function(self) -> Callable[..., Any]:
        """`decoder(config)`."""
        return decoder(self.config, remat=self.remat)

    def read_params(self) -> Any:
        """The params, as `param_shapes(config)` has them."""
        return read_params(self.folder, dtype=self.dtype)

    def shapes(self) -> Any:
        """The shapes of the params, in the dtype of the folder's config, for adapters to be held against."""
        return param_shapes(self.config)


def read_language_model(folder: str | Path, *, dtype: str | None = None, remat: str | None = None) -> LanguageModel:
    """The language model in a folder, its params not read yet.

    Raises:
      ConfigError: a model that is not known, or a dtype or a remat that is not possible.
      DataError: files that are missing or damaged; a tokenizer with more tokens than the model has.
    """
    folder = Path(folder).expanduser()
    config = read_config(folder)
    tokenizer = read_tokenizer(folder)
    if tokenizer.vocabulary_size > config.vocab_size:
        raise DataError(
            f"{folder}: the tokenizer has {tokenizer.vocabulary_size:,} tokens, and the model's embedding has "
            f"{config.vocab_size:,}: they are of two models; put the model's own tokenizer.json there"
        )
    return LanguageModel(folder, config, tokenizer, dtype, remat)
