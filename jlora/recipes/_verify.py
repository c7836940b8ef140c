"""Whether adapters change what a language model answers, and as the merged model would."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import lora, merge_params
from jlora.checkpoints import Check
from jlora.errors import ConfigError, DataError, JloraError
from jlora.interop.peft import is_peft_folder
from jlora.models import DecoderConfig, decoder, read_adapter, read_config, read_params

_TOKENS = 32
_SAME, _CHANGED = 1e-4, 1e-6  # of the largest logit, in float32


def verify_logits(base: str | Path, adapters: str | Path, *, prompt: str | None = None) -> Check:
    """Whether the logits of a language model with adapters differ from its own, and equal those of the merged model.

    All three are computed in float32: the memory holds the base and its merged copy, 8 bytes a parameter. Merged and
    unmerged are the same where they differ by no more than 1e-4 of the largest logit.

    Args:
      base: the Hugging Face folder of a family in `jlora.models.FAMILIES`; of others nothing is computed, and the
        check says so.
      adapters: a folder in PEFT's format.
      prompt: a text for the folder's tokenizer; without one 32 tokens are drawn.

    Raises:
      DataError: a prompt without a tokenizer, one that is longer than the model's positions.
    """
    if not is_peft_folder(adapters):
        return _not_asked("wanted PEFT's format: jlora convert --to peft writes it")
    try:
        model = read_config(base)
    except (ConfigError, DataError) as error:
        return _not_asked(str(error))
    tokens = _tokens(base, model, prompt)
    try:
        params = read_params(base, dtype=jnp.float32)
        entries, config = read_adapter(adapters, model)
    except JloraError as error:
        return _not_asked(str(error))
    fn = decoder(model)
    own = _computed(fn, params, tokens)
    adapted = _computed(lora(fn, config), params, entries, tokens)
    merged = _computed(fn, merge_params(params, entries, config), tokens)
    largest = float(np.abs(own).max())
    changed, apart = float(np.abs(adapted - own).max()) / largest, float(np.abs(adapted - merged).max()) / largest
    problems = []
    if not changed > _CHANGED:
        problems.append(f"the adapters change the logits by {changed:.1e} of the largest: nothing but rounding")
    if not apart <= _SAME:
        problems.append(f"the merged model's logits differ by {apart:.1e} of the largest: wanted {_SAME:.0e} at most")
    found = f"changed by {changed:.1e} of the largest, merged apart by {apart:.1e}, {tokens.shape[1]} tokens"
    return Check("logits", found, tuple(problems))


def _tokens(base: str | Path, model: DecoderConfig, prompt: str | None) -> np.ndarray[Any, Any]:
    """The tokens of the prompt, int32 (1, T)."""
    if prompt is None:
        count = min(_TOKENS, model.max_positions)
        return np.random.default_rng(0).integers(0, model.vocab_size, (1, count), dtype=np.int32)
    from jlora.text import read_tokenizer

    tokens = np.asarray([read_tokenizer(base).prompt(prompt)], np.int32)
    if not 0 < tokens.shape[1] <= model.max_positions:
        raise DataError(f"the prompt has {tokens.shape[1]:,} tokens: wanted 1 to {model.max_positions:,}")
    return tokens


def _computed(fn: Any, *args: Any) -> np.ndarray[Any, Any]:
    """The logits, float32 (1, T, vocabulary)."""
    return np.asarray(jax.jit(fn)(*args))


def _not_asked(why: str) -> Check:
    return Check("logits", why, asked=False)
