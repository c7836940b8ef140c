"""llama.cpp itself, by the package xllamacpp, computes with a GGUF adapter what jlora computes with it."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.checkpoints import import_gguf
from jlora.cli import main
from jlora.models import decoder, read_config, read_params, write_adapter
from tests.ggufs import write_llama

pytest.importorskip("xllamacpp", reason="pip install xllamacpp, which has llama.cpp in it")

TOKENS = [5, 17, 101, 300, 42, 7]
RUN = """
import json, sys, xllamacpp
model, adapter, tokens, count = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup, params.cpuparams.n_threads = model, 256, False, 1
if adapter:
    lora = xllamacpp.CommonAdapterLoraInfo()
    lora.path, lora.scale = adapter, 1.0
    params.lora_adapters = [lora]
asked = {"prompt": tokens, "n_predict": 1, "temperature": 0, "n_probs": count}
answer = xllamacpp.Server(params).handle_completions(asked)
answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
print(json.dumps(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]))
"""


def log_probabilities(model: Path, adapter: Path | None, count: int) -> np.ndarray:
    """Of the token that follows, by llama.cpp."""
    words = json.dumps([str(model), adapter and str(adapter), TOKENS, count])
    done = subprocess.run([sys.executable, "-c", RUN, words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.full(count, np.nan)
    for row in json.loads(done.stdout.splitlines()[-1]):
        found[row["id"]] = row["logprob"]
    return found


@pytest.mark.slow
def test_the_next_token_with_an_adapter_and_without(tmp_path: Path, rng: np.random.Generator) -> None:
    file, folder, adapter = write_llama(tmp_path / "model.gguf", rng), tmp_path / "model", tmp_path / "adapter"
    import_gguf(file, folder, dtype="float32")
    model, params, tokens = read_config(folder), read_params(folder), jnp.array([TOKENS])
    config = jlora.LoraConfig(  # of several ranks, which llama.cpp divides one alpha by
        rank=5,
        alpha=15,
        rank_pattern={"**/down_proj": 3},
        alpha_pattern={"**/q_proj": 7},
        target_modules=("model/layers/**/*_proj",),
    )
    adapted, adapters, config, _ = jlora.adapt(decoder(model), config, params, tokens)
    adapters = jax.tree.map(lambda part: jnp.asarray(rng.normal(0, 0.3, part.shape), part.dtype), adapters)
    write_adapter(adapter, adapters, config, model)
    out = tmp_path / "adapter.gguf"
    assert main(["convert", str(adapter), "--to", "gguf", "--base", str(folder), "--out", str(out), "--quiet"]) == 0

    base = jax.nn.log_softmax(decoder(model)(params, tokens)[0, -1])
    wanted = jax.nn.log_softmax(adapted(params, adapters, tokens)[0, -1])
    assert np.abs(wanted - base).max() > 0.5
    for given, expected in ((None, base), (out, wanted)):
        found = log_probabilities(file, given, model.vocab_size)
        np.testing.assert_allclose(found, expected, atol=0.02)  # keys and values are float16 there
