"""Answers beside those of transformers: greedy ones token for token, and the distributions that others come from."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models import decoder, filtered, generate, read_config, read_params
from tests.interop.decoders import FAMILY_SIZES, random_tokens, torch_model
from tests.interop.models import quiet, torch, transformers
from tests.marks import some

CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 5},
    "gemma3_text": {"sliding_window": 5},
    "qwen3": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("family", some(list(FAMILY_SIZES), 3))
def test_greedy_is_that_of_transformers(tmp_path: Path, family: str) -> None:
    """Prompts of several lengths, from the folder that transformers writes."""
    model = torch_model(family, **CHANGES.get(family, {}))
    with quiet():
        model.save_pretrained(tmp_path)
    config, params = read_config(tmp_path), read_params(tmp_path)
    prompts = [random_tokens(np.random.default_rng(7), (length,)).tolist() for length in (9, 1, 4)]
    stop = 2
    answers = generate(decoder(config), params, prompts, config=config, max_new_tokens=30, stop=[stop])
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad(), quiet():
            rows = model.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=30, eos_token_id=stop, pad_token_id=0
            )
        wanted = rows[0, len(prompt) :].tolist()
        assert answer.tokens.tolist() == [token for token in wanted if token != stop]
        assert answer.stopped == (wanted[-1] == stop)


@pytest.mark.parametrize("temperature", [0.6, 1.3])
@pytest.mark.parametrize("top_k", [None, 1, 7, 60])
@pytest.mark.parametrize("top_p", [None, 0.2, 0.9, 0.999])
def test_filters_are_those_of_transformers(temperature: float, top_k: int | None, top_p: float | None) -> None:
    logits = 4 * np.random.default_rng(8).standard_normal((6, 53)).astype(np.float32)
    logits[2, 10:20] = logits[2].max()  # as likely as one another
    scores = torch.from_numpy(logits)
    scores = transformers.TemperatureLogitsWarper(temperature)(None, scores)
    if top_k is not None:
        scores = transformers.TopKLogitsWarper(top_k)(None, scores)
    if top_p is not None:
        scores = transformers.TopPLogitsWarper(top_p)(None, scores)
    found = np.asarray(filtered(jnp.asarray(logits), temperature, top_k, top_p))
    rows = [0, 1, 3, 4, 5] if top_p is not None else slice(None)  # of equal ones transformers keeps some, jlora all
    np.testing.assert_allclose(found[rows], scores.numpy()[rows], rtol=1e-6)
