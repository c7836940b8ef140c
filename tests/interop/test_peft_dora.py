"""DoRA by `lora`, factored: the outputs and the gradients of PEFT's own layers, for every kind of layer that has it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.interop.peft import read_peft
from tests.reference import assert_close

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

LAYERS = {
    "linear": lambda: torch.nn.Linear(5, 7),
    "conv": lambda: torch.nn.Conv2d(3, 7, (2, 3), stride=2, padding=1),
    "conv1d": lambda: torch.nn.Conv1d(3, 7, 2),
    "embedding": lambda: torch.nn.Embedding(11, 7),
}
INPUTS = {"linear": (13, 5), "conv": (2, 3, 9, 8), "conv1d": (2, 3, 9), "embedding": (13,)}


class Model(torch.nn.Module):
    """A layer, and what makes its output matter."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer = LAYERS[name]()

    def forward(self, x: Any) -> Any:
        return self.layer(x)


def forward(name: str, params: Any, x: Any) -> Any:
    """The same layer in JAX, on PyTorch's weights."""
    weight = params["layer.weight"]
    if name == "embedding":
        return jnp.take(weight, x, 0)
    if name == "linear":
        return x @ weight.T + params["layer.bias"]
    window = weight.ndim - 2
    stride, padding = ((2, 2), [(1, 1), (1, 1)]) if window == 2 else ((1,), [(0, 0)])
    y = jax.lax.conv_general_dilated(x, weight, stride, padding)
    return y + params["layer.bias"].reshape(-1, *[1] * window)


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_pefts(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Model(name)
    params = {path: jnp.asarray(array.detach().numpy()) for path, array in base.named_parameters()}
    live = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["layer"], use_dora=True))
    with torch.no_grad():
        for path, array in live.named_parameters():
            if "lora_" in path:  # the magnitude is another one than the norm
                array.copy_(torch.from_numpy(rng.standard_normal(array.shape).astype(np.float32)))
    live.save_pretrained(tmp_path)
    adapters, config = read_peft(tmp_path, params=params)
    assert "magnitude" in adapters["layer.weight"]

    x = rng.integers(0, 11, INPUTS[name]) if name == "embedding" else rng.standard_normal(INPUTS[name])
    x = x.astype(np.int32 if name == "embedding" else np.float32)
    tensor = torch.from_numpy(x)
    output = live(tensor)
    direction = rng.standard_normal(output.shape).astype(np.float32)
    (output * torch.from_numpy(direction)).sum().backward()
    adapted = jlora.lora(lambda params, x: forward(name, params, x), config, strict=True)

    def loss(adapters: Any) -> Any:
        y = adapted(params, adapters, x)
        return jnp.sum(direction * y), y

    grads, found = jax.jit(jax.grad(loss, has_aux=True))(adapters)
    assert_close(found, output.detach().double().numpy(), factor=4)
    with torch.no_grad():
        for path, array in live.named_parameters():
            if "lora_" in path:
                array.copy_(array.grad)
    live.save_pretrained(tmp_path / "gradients")
    wanted, _ = read_peft(tmp_path / "gradients", params=params)
    for part, gradient in grads["layer.weight"].items():
        assert_close(gradient, np.asarray(wanted["layer.weight"][part], np.float64), factor=10)
        assert np.any(gradient)


@pytest.mark.parametrize("name", LAYERS)
def test_it_begins_and_learns_as_pefts(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Model(name)
    params = {path: jnp.asarray(array.detach().numpy()) for path, array in base.named_parameters()}
    live = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["layer"], use_dora=True))
    live.save_pretrained(tmp_path)
    adapters, config = read_peft(tmp_path, params=params)
    assert config.kind == "dora"
    begun = jlora.init_lora(None, params, config)["layer.weight"]
    np.testing.assert_allclose(begun["magnitude"], adapters["layer.weight"]["magnitude"], rtol=1e-6)

    x = rng.integers(0, 11, INPUTS[name]) if name == "embedding" else rng.standard_normal(INPUTS[name])
    x = x.astype(np.int32 if name == "embedding" else np.float32)
    direction = rng.standard_normal(live(torch.from_numpy(x)).shape).astype(np.float32)
    adapted = jlora.lora(lambda params, x: forward(name, params, x), config, strict=True)
    grad = jax.jit(jax.grad(lambda adapters: jnp.sum((adapted(params, adapters, x) + direction) ** 2)))
    rate = 1e-3
    trained = [array for path, array in live.named_parameters() if "lora_" in path]
    for _ in range(3):
        adapters = jax.tree.map(lambda part, change: part - rate * change, adapters, grad(adapters))
        (live(torch.from_numpy(x)) + torch.from_numpy(direction)).square().sum().backward()
        with torch.no_grad():
            for array in trained:
                array -= rate * array.grad
                array.grad = None
    live.save_pretrained(tmp_path / "trained")
    wanted, _ = read_peft(tmp_path / "trained", params=params)
    for part, array in adapters["layer.weight"].items():
        np.testing.assert_allclose(array, wanted["layer.weight"][part], rtol=1e-4, atol=1e-5)
    assert np.abs(adapters["layer.weight"]["magnitude"] - begun["magnitude"]).max() > 1e-3

    jlora.interop.peft.write_peft(tmp_path / "written", adapters, config)
    again = peft.PeftModel.from_pretrained(Model(name), tmp_path / "written")
    with torch.no_grad():
        again.base_model.model.load_state_dict(
            {f"layer.base_layer.{path[6:]}": torch.from_numpy(np.array(array)) for path, array in params.items()},
            strict=False,
        )
        found = again(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, adapted(params, adapters, x), rtol=1e-4, atol=1e-4)
