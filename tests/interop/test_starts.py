"""Starts at the weights against PEFT's own: the same base and the same product, and the way back that PEFT reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import LoraConfig
from jlora.interop.peft import write_peft

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")


def linear(weight=None):
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("layer", torch.nn.Linear(19, 13, bias=False))
    if weight is not None:
        with torch.no_grad():
            model.layer.weight.copy_(torch.from_numpy(weight))
    return model


@pytest.mark.parametrize("init", ["pissa", "olora", "mica"])
def test_a_start_is_pefts(init):
    model = linear()
    params = {"layer.weight": jnp.asarray(model.layer.weight.detach().numpy().copy())}
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["layer"], init_lora_weights=init)
    layer = peft.get_peft_model(model, config).base_model.model.layer
    a, b = (getattr(layer, f"lora_{part}")["default"].weight.detach().double().numpy() for part in "AB")
    ours = LoraConfig(rank=3, alpha=5, init=init, factorizations={"layer.weight": "oi"})
    started = jlora.start(None, params, ours)
    entry = started.adapters["layer.weight"]
    found = (np.asarray(entry["A"], np.float64) @ np.asarray(entry["B"], np.float64)).T
    np.testing.assert_allclose(found, b @ a, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        started.params["layer.weight"], layer.base_layer.weight.detach().numpy(), rtol=1e-5, atol=1e-6
    )
    if init == "mica":
        np.testing.assert_allclose(np.abs(b.T @ np.asarray(entry["B"]).T), np.eye(3), atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_was_trained_is_a_plain_adapter_for_peft(init, rng, tmp_path):
    weight = linear().layer.weight.detach().numpy().copy()
    params = {"layer.weight": jnp.asarray(weight)}
    config = LoraConfig(rank=3, alpha=5, init=init, factorizations={"layer.weight": "oi"})
    started = jlora.start(None, params, config)
    trained = jax.tree.map(lambda part: part + 0.1 * rng.standard_normal(part.shape), started.adapters)
    x = rng.standard_normal((11, 19)).astype(np.float32)
    adapted = jlora.lora(lambda params, x: x @ params["layer.weight"].T, started.config)
    wanted = adapted(started.params, trained, x)
    write_peft(tmp_path, *started.plain(trained))
    live = peft.PeftModel.from_pretrained(linear(weight), tmp_path)
    with torch.no_grad():
        found = live(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
