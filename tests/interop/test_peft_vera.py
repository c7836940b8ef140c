"""PEFT's VeRA: its outputs and gradients, its files read and written, and what of them cannot be read."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import DataError, LoraConfig, variants
from jlora.checkpoints import convert, inspect, merge
from jlora.interop.peft import Row, read_peft, read_vera, write_peft, write_vera
from jlora.variants import vera
from tests.interop.models import CASES, base_of, load_file, logits_of, peft, quiet, torch
from tests.reference import as64, assert_close, randomize

TARGETS = {"llama": ["q_proj", "v_proj", "up_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
RANK = 5


def live_of(name: str, **fields: Any) -> tuple[dict[str, Any], Any]:
    """The base's params, and PEFT's model with random vectors."""
    torch.manual_seed(0)
    model = base_of(CASES[name])
    params = {key: jnp.asarray(value.numpy()) for key, value in model.state_dict().items()}
    with quiet():
        live = peft.get_peft_model(model, peft.VeraConfig(r=RANK, target_modules=TARGETS[name], **fields)).eval()
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for path, array in live.named_parameters():
            if "vera_lambda_" in path:
                array.copy_(torch.from_numpy(rng.standard_normal(array.shape).astype(np.float32)))
    return params, live


def saved(live: Any, folder: Path) -> Path:
    with quiet():
        live.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def loaded(name: str, params: Any) -> Any:
    model = base_of(CASES[name])
    model.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in params.items()})
    return model


def assert_loads_whole(name: str, folder: Path) -> Any:
    with quiet():
        live = peft.PeftModel.from_pretrained(base_of(CASES[name]), str(folder)).eval()
        result = peft.set_peft_model_state_dict(live, load_file(folder / "adapter_model.safetensors"))
    assert not result.unexpected_keys
    held = ("vera_lambda_", "base_model.vera_")  # each layer shows the shared pair under a name of its own too
    assert not [key for key in result.missing_keys if any(name in key for name in held)]
    return live


class Two(torch.nn.Module):
    """Two layers of other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(5, 11), torch.nn.Linear(11, 7)

    def forward(self, x: Any) -> Any:
        return self.down(torch.tanh(self.up(x)))


def test_outputs_and_gradients_of_both_vectors_are_pefts(rng: np.random.Generator, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Two()
    params = {name: jnp.asarray(array.detach().numpy()) for name, array in base.named_parameters()}
    with quiet():
        live = peft.get_peft_model(base, peft.VeraConfig(r=3, target_modules=["up", "down"]))
    with torch.no_grad():
        for path, array in live.named_parameters():
            if "vera_lambda_" in path:
                array.copy_(torch.from_numpy(rng.standard_normal(array.shape).astype(np.float32)))
    trained, frozen, config = read_vera(saved(live, tmp_path), params)
    x = rng.standard_normal((13, 5)).astype(np.float32)
    output = live(torch.from_numpy(x))
    direction = rng.standard_normal(output.shape).astype(np.float32)
    (output * torch.from_numpy(direction)).sum().backward()

    def forward(params: Any, x: Any) -> Any:
        hidden = jnp.tanh(x @ params["up.weight"].T + params["up.bias"])
        return hidden @ params["down.weight"].T + params["down.bias"]

    model = jlora.lora(forward, config, strict=True)

    def loss(trained: Any) -> Any:
        y = model(params, vera.adapters(trained, frozen, params, config), x)
        return jnp.sum(direction * y), y

    grads, found = jax.jit(jax.grad(loss, has_aux=True))(trained)
    scale = output.abs().max().item()
    np.testing.assert_allclose(found, output.detach().numpy(), rtol=0, atol=1e-6 * max(1, scale))
    for path, array in live.named_parameters():
        if "vera_lambda_" in path:
            module, part = path.split(".")[2], "b" if "lambda_b" in path else "d"
            wanted = array.grad.numpy()
            assert np.abs(wanted).max() > 0
            atol = 1e-6 * max(1, np.abs(wanted).max())
            np.testing.assert_allclose(grads[f"{module}.weight"][part], wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("name", TARGETS)
def test_a_file_of_pefts_is_the_same_model(name: str, tmp_path: Path) -> None:
    params, live = live_of(name)
    trained, frozen, config = read_vera(saved(live, tmp_path), params)
    assert (config.kind, config.rank, {config.scaling_of(path) for path in trained}) == ("vera", RANK, {1.0})
    merged = jlora.merge_params(params, vera.adapters(trained, frozen, params, config), config)
    wanted = logits_of(live)
    assert np.abs(wanted - logits_of(base_of(CASES[name]))).max() > 1e-2
    np.testing.assert_allclose(
        logits_of(loaded(name, merged)), wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max())
    )


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_written_peft_loads_whole_and_comes_back_to_the_bit(name: str, tmp_path: Path) -> None:
    params, live = live_of(name)
    trained, frozen, config = read_vera(saved(live, tmp_path / "first"), params)
    write_vera(tmp_path / "second", trained, frozen, params, config)
    first, second = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)
    np.testing.assert_array_equal(logits_of(assert_loads_whole(name, tmp_path / "second")), logits_of(live))


def test_one_that_jlora_began_is_the_same_model_in_peft(rng: np.random.Generator, tmp_path: Path) -> None:
    params = {key: jnp.asarray(value.numpy()) for key, value in base_of(CASES["llama"]).state_dict().items()}
    targets = ("*.[qk]_proj.weight", "*.down_proj.weight")
    config = LoraConfig(rank=19, alpha=7, kind="vera", target_modules=targets, factorizations={"**": "oi"}, dropout=0.1)
    trained, frozen = vera.init(None, params, config)
    trained = randomize(rng, trained)
    write_vera(tmp_path, trained, frozen, params, config)
    merged = jlora.merge_params(params, vera.adapters(trained, frozen, params, config), config)
    wanted = logits_of(loaded("llama", merged))
    found = logits_of(assert_loads_whole("llama", tmp_path))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))
    data = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (data["peft_type"], data["r"], data["vera_dropout"], data["save_projection"]) == ("VERA", 19, 0.1, True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    sizes = {key: math.prod(tensor.shape) for key, tensor in tensors.items()}
    assert sum(sizes.values()) == jlora.count_params((trained, frozen))


def test_stacked_layers_are_modules_of_their_own(rng: np.random.Generator, tmp_path: Path) -> None:
    mapping = (Row("layers.{i}.{m}.weight", "layers/{m}/kernel", transpose=(1, 0), stack=(("{i}", 3),)),)
    params = {"layers": {"up": {"kernel": jnp.zeros((3, 5, 7))}, "down": {"kernel": jnp.zeros((3, 7, 5))}}}
    config = LoraConfig(rank=2, kind="vera", factorizations={"**": "bio"})
    trained, frozen = vera.init(None, params, config)
    trained = randomize(rng, trained)
    write_vera(tmp_path, trained, frozen, params, config, mapping)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert_close(
        tensors["base_model.model.layers.2.up.vera_lambda_b"].numpy(), as64(trained["layers/up/kernel"]["b"][2])
    )
    again, pair, _ = read_vera(tmp_path, params, mapping)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, (again, pair), (trained, frozen))))


def test_rows_that_split_axes_keep_their_order_or_are_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    params = {"query": jnp.zeros((5, 2, 3))}
    config = LoraConfig(rank=2, kind="vera", factorizations={"query": "ioo"})
    trained, frozen = vera.init(None, params, config)
    trained = randomize(rng, trained)
    heads = (Row("q.weight", "query", reshape=(2, 3, 5), transpose=(2, 0, 1)),)
    write_vera(tmp_path / "heads", trained, frozen, params, config, heads)
    again, _, _ = read_vera(tmp_path / "heads", params, heads)
    assert np.array_equal(again["query"]["b"], trained["query"]["b"])
    turned = (Row("q.weight", "query", reshape=(3, 2, 5), transpose=(2, 1, 0)),)
    with pytest.raises(DataError, match="q: a row of the mapping changes the order of its axes"):
        write_vera(tmp_path / "turned", trained, frozen, params, config, turned)
    with pytest.raises(DataError, match="a row of the mapping changes the order of its axes"):
        read_vera(tmp_path / "heads", params, turned)


@pytest.mark.parametrize("name", TARGETS)
def test_the_commands_expand_it_by_the_base(name: str, tmp_path: Path) -> None:
    params, live = live_of(name)
    folder = saved(live, tmp_path / "vera")
    with quiet():
        base_of(CASES[name]).save_pretrained(str(tmp_path / "base"))
    merge(tmp_path / "base", folder, tmp_path / "merged")
    with quiet():
        merged = type(base_of(CASES[name])).from_pretrained(str(tmp_path / "merged")).eval()
    wanted = logits_of(live)
    np.testing.assert_allclose(logits_of(merged), wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))
    table = str(inspect(folder, base=tmp_path / "base"))
    assert table.count("\n") > 4
    with pytest.raises(DataError, match=r"a VeRA of PEFT's.*give the model as base \(--base\)"):
        inspect(folder)
    convert(folder, tmp_path / "lora", "peft", base=tmp_path / "base")
    adapters, _ = read_peft(tmp_path / "lora", params=params)
    assert {entry["A"].shape[-1] for entry in adapters.values() if entry} == {RANK}
    with quiet():
        as_lora = peft.PeftModel.from_pretrained(base_of(CASES[name]), str(tmp_path / "lora")).eval()
    np.testing.assert_allclose(logits_of(as_lora), wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))


def test_lora_xs_is_written_expanded(rng: np.random.Generator, tmp_path: Path) -> None:
    params = {key: jnp.asarray(value.numpy()) for key, value in base_of(CASES["llama"]).state_dict().items()}
    config = LoraConfig(rank=3, alpha=7, kind="xs", target_modules=("*_proj.weight",), factorizations={"**": "oi"})
    trained, frozen = variants.init(None, params, config)
    adapters = variants.adapters(randomize(rng, trained), frozen, params, config)
    write_peft(tmp_path, adapters, config)
    with quiet():
        live = peft.PeftModel.from_pretrained(base_of(CASES["llama"]), str(tmp_path)).eval()
    wanted = logits_of(loaded("llama", jlora.merge_params(params, adapters, config)))
    np.testing.assert_allclose(logits_of(live), wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))


def test_read_peft_says_who_reads_it(tmp_path: Path) -> None:
    params, live = live_of("llama")
    saved(live, tmp_path)
    with pytest.raises(DataError, match=r"peft_type 'VERA': jlora.interop.peft.read_vera reads it; jlora convert"):
        read_peft(tmp_path, params=params)


def test_a_pair_that_torch_alone_can_draw_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, of what such a file lacks
        params, live = live_of("llama", save_projection=False, projection_prng_key=3)
        saved(live, tmp_path)
    with pytest.raises(DataError, match=r"draws it with torch from projection_prng_key = 3.*save_projection = True"):
        read_vera(tmp_path, params)


def test_what_is_no_vera_of_these_params_is_refused(tmp_path: Path) -> None:
    params, live = live_of("llama")
    saved(live, tmp_path)
    with pytest.raises(DataError, match=r"q_proj.weight: params has no leaf there; nearest"):
        read_vera(
            tmp_path, {path: leaf for path, leaf in params.items() if not path.endswith("0.self_attn.q_proj.weight")}
        )
    with pytest.raises(DataError, match="do not fit vera_A"):
        read_vera(tmp_path, params | {"model.layers.0.self_attn.q_proj.weight": jnp.zeros((24, 1000))})
    data = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, message in (
        ({"r": 4}, r"vera_A \(5, 22\) and vera_B \(24, 5\): wanted \(4, in\) and \(out, 4\)"),
        ({"peft_type": "LORA"}, "peft_type 'LORA': wanted VERA; read_peft reads LORA"),
        ({"vera_dropout": 2}, "vera_dropout = 2: wanted a number"),
        ({"target_modules": ["q_proj"]}, "is none of the modules that the configuration adapts"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(data | change))
        with pytest.raises(DataError, match=message):
            read_vera(tmp_path, params)


def test_weights_that_pefts_vera_does_not_have_are_refused(tmp_path: Path) -> None:
    params = {"embed.weight": jnp.zeros((11, 5)), "conv.weight": jnp.zeros((7, 3, 2))}
    for path, roles in (("embed.weight", "io"), ("conv.weight", "oii")):
        config = LoraConfig(rank=2, kind="vera", target_modules=(path,), factorizations={path: roles})
        with pytest.raises(DataError, match="PEFT has VeRA for Linear and Conv1D alone"):
            write_vera(tmp_path, *vera.init(None, params, config), params, config)
