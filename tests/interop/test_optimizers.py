"""Optimizers of adapters against PEFT's own: the same A and B after five steps of the same loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jlora import LoraConfig, lora
from jlora.optim import freeze_parts, lora_fa, lora_plus, riemannian

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

CONFIG = LoraConfig(rank=2, alpha=3, target_modules="layer", factorizations={"layer": "oi"})
STEPS = 5


def of_peft(live, monkeypatch, name):
    from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
    from peft.optimizers import lorafa as module

    if name == "plus":
        return create_loraplus_optimizer(
            live, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=8, loraplus_weight_decay=0.1
        )
    if name == "fa":
        monkeypatch.setattr(module, "is_bf16_available", lambda: False)  # else it multiplies in bfloat16
        return create_lorafa_optimizer(live, r=2, lora_alpha=3, lr=0.01)
    riemannian_of_peft = pytest.importorskip("peft.optimizers.riemannian")  # since PEFT 0.21
    return riemannian_of_peft.create_riemannian_optimizer(live, torch.optim.AdamW, lr=0.01, reg=0.01, weight_decay=0.1)


OURS = {
    "plus": lambda: lora_plus(optax.adamw(0.01, weight_decay=0.1), 8),
    "fa": lambda: lora_fa(optax.adam(0.01, eps=1e-6), CONFIG),
    "riemannian": lambda: riemannian(optax.adamw(0.01, weight_decay=0.1), CONFIG, damping=0.01),
}


@pytest.mark.parametrize("name", OURS)
def test_five_steps_are_pefts(name, rng, monkeypatch):
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("layer", torch.nn.Linear(5, 7, bias=False))
    weight = model.layer.weight.detach().numpy().copy()
    live = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["layer"]))
    parts = {name: getattr(live.base_model.model.layer, f"lora_{name}")["default"].weight for name in "AB"}
    with torch.no_grad():
        parts["B"].copy_(torch.from_numpy(rng.standard_normal((7, 2)).astype(np.float32)))
    adapters = {"layer": {name: jnp.asarray(part.detach().numpy().T) for name, part in parts.items()}}
    x, y = (rng.standard_normal((11, size)).astype(np.float32) for size in (5, 7))

    theirs = of_peft(live, monkeypatch, name)
    for _ in range(STEPS):
        theirs.zero_grad()
        (live(torch.from_numpy(x)) - torch.from_numpy(y)).square().sum().backward()
        theirs.step()

    adapted = lora(lambda params, x: x @ params["layer"].T, CONFIG)

    def loss(adapters):
        adapters = freeze_parts(adapters, "A") if name == "fa" else adapters
        return jnp.square(adapted({"layer": weight}, adapters, x) - y).sum()

    ours = OURS[name]()
    state = ours.init(adapters)
    for _ in range(STEPS):
        updates, state = ours.update(jax.grad(loss)(adapters), state, adapters)
        adapters = optax.apply_updates(adapters, updates)
    for part in "AB":
        np.testing.assert_allclose(adapters["layer"][part], parts[part].detach().numpy().T, rtol=1e-5, atol=1e-5)
