"""PEFT's starts: those that leave the base as it is are read and merged, those that change it are refused."""

import re

import numpy as np
import pytest

import jlora
from jlora import DataError
from jlora.interop.peft import read_peft

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")


def live_model(init):
    """A model with one adapted layer, and what its weight was before."""
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("layer", torch.nn.Linear(5, 7, bias=False))
    before = model.layer.weight.detach().numpy().copy()
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["layer"], init_lora_weights=init)
    try:
        return peft.get_peft_model(model, config), before
    except (ValueError, TypeError) as error:
        pytest.skip(f"this PEFT has no {init}: {error}")


@pytest.mark.parametrize("init", [True, False, "gaussian", "mica", "orthogonal"])
def test_a_start_that_leaves_the_base_is_read_and_merged(init, rng, tmp_path):
    live, before = live_model(init)
    np.testing.assert_array_equal(live.base_model.model.layer.weight.detach().numpy(), before)
    with torch.no_grad():  # as training leaves them
        for name, array in live.named_parameters():
            if "lora_" in name:
                array += torch.from_numpy(rng.standard_normal(array.shape).astype(np.float32))
    live.save_pretrained(tmp_path)
    params = {"layer.weight": before}
    adapters, config = read_peft(tmp_path, params=params)
    merged = jlora.merge_params(params, adapters, config)["layer.weight"]
    x = rng.standard_normal((11, 5)).astype(np.float32)
    with torch.no_grad():
        wanted = live(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(x @ np.asarray(merged).T, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_a_start_that_changes_the_base_is_refused(init, tmp_path):
    live, before = live_model(init)
    assert np.abs(live.base_model.model.layer.weight.detach().numpy() - before).max() > 0.01
    live.save_pretrained(tmp_path)
    message = f"init_lora_weights = '{init}' changes the base, so that the adapter alone is not portable"
    with pytest.raises(DataError, match=re.escape(message)):
        read_peft(tmp_path, params={"layer.weight": before})
