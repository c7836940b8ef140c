"""Rows of several examples give the loss and the gradients that the examples give alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.models import decoder
from jlora.text import Example, Examples, bucket, pack
from tests.models.sizes import config_of, random_params
from tests.reference import assert_close, randomize


@pytest.mark.parametrize("kind", ["plain", pytest.param("alternating", marks=pytest.mark.slow)])
def test_packed_rows(kind, rng):
    """The sums over all tokens that count, and their gradients: packed, alone in rows, and by hand from the logits."""
    config = config_of(kind)
    params = random_params(rng, config)
    model = decoder(config)
    lora_config = jlora.LoraConfig(rank=2, alpha=4, target_modules=("model/layers/self_attn/*", "model/layers/mlp/*"))
    lora_config = jlora.resolve_config(model, lora_config, params, jnp.zeros((1, 5), jnp.int32))
    adapters = randomize(rng, jlora.init_lora(jax.random.key(0), params, lora_config))
    adapted = jlora.lora(model, lora_config)

    def total(adapters, rows):
        logits = adapted(params, adapters, **rows["inputs"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows["labels"])
        return (losses * rows["weights"]).sum()

    def of_all(groups):
        found = [jax.jit(jax.value_and_grad(total))(adapters, rows) for rows in groups]
        return jax.tree.map(lambda *parts: sum(map(np.asarray, parts)), *found)

    sizes = (7, 3, 11, 5, 2)
    examples = Examples.of(Example(rng.integers(0, 37, n), rng.random(n) < 0.7) for n in sizes)
    packed, report = pack(examples, 13, pad=1)
    alone, _ = bucket(examples, (11,), pad=2)
    assert report.rows == {13: 3}
    loss, gradients = of_all([packed])
    wanted, wanted_gradients = of_all(alone)
    assert_close(loss, wanted)
    jax.tree.map(lambda a, b: assert_close(a, b, factor=5), gradients, wanted_gradients)
    (rows,) = alone
    logits = np.asarray(jax.jit(adapted)(params, adapters, rows["inputs"]["tokens"]), np.float64)
    said = 0.0
    for number, example in enumerate(examples):
        for i in range(1, len(example.tokens)):
            if example.counts[i]:
                row = logits[number, i - 1]  # (V,)
                said += np.log(np.exp(row).sum()) - row[example.tokens[i]]
    assert_close(loss, np.array(said))
