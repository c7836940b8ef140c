"""`linen.LoRA` with entries of every kind, as PEFT's reader gives them: it is the model that `merge_params` gives."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import jlora
from jlora.interop.peft import Row, read_peft
from jlora.linen import LoRA
from tests.interop.files import pair, write_folder
from tests.reference import as64, assert_close, random_array, randomize

MAPPING = (
    Row("up.weight", "up/kernel", (1, 0)),
    Row("down.weight", "down/kernel", (1, 0)),
    Row("up.bias", "up/bias"),
    Row("down.bias", "down/bias"),
    Row("norm.weight", "norm/scale"),
)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="down")(nn.LayerNorm(name="norm")(nn.Dense(7, name="up")(x)))


MAGNITUDES = {"up.lora_magnitude_vector": (7,), "down.lora_magnitude_vector": (3,)}
BIASES = {"up.lora_B.bias": (7,), "down.lora_B.bias": (3,)}
PARTS = {  # PEFT has no bias of a B beside DoRA
    "plain": {},
    "dora": MAGNITUDES,
    "bias of B": BIASES,
    "whole": {"norm.weight": (7,)},
    "dora and whole": MAGNITUDES | {"norm.weight": (7,)},
    "bias of B and whole": BIASES | {"norm.weight": (7,)},
}


@pytest.mark.parametrize("name", PARTS)
def test_what_peft_trained_is_applied_whole(name, rng, tmp_path):
    tensors = pair(rng, "up", 7, 5) | pair(rng, "down", 3, 7)
    tensors |= {key: rng.uniform(0.5, 2, shape).astype("float32") for key, shape in PARTS[name].items()}
    fields = {"use_dora": "up.lora_magnitude_vector" in tensors, "lora_bias": "up.lora_B.bias" in tensors}
    folder = write_folder(tmp_path, tensors, target_modules=["up", "down"], modules_to_save=["norm"], **fields)
    x = random_array(rng, (2, 5))
    params = randomize(rng, Model().init(jax.random.key(0), x)["params"])
    adapters, config = read_peft(folder, MAPPING, params=params)

    wanted = Model().apply({"params": jlora.merge_params(params, adapters, config)}, x)
    assert np.any(as64(wanted) != as64(Model().apply({"params": params}, x)))
    both = jlora.combine_params(params, adapters)
    module = LoRA(Model(), config, strict=True)
    assert_close(module.apply({"params": both}, x), as64(wanted), factor=20)
    grads = jax.grad(lambda both: module.apply({"params": both}, x).var())(both)
    trained = jlora.split_params(grads)[1]
    assert all(np.any(as64(leaf) != 0) for leaf in jax.tree.leaves(trained["up"]))
    assert all(use.factored for use in module.explain({"params": both}, x).uses)
