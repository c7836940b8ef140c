"""What is written says what is in the file, whatever the file that was read said: PEFT computes the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import compose
from jlora.checkpoints import combine, convert
from jlora.interop.peft import read_peft, write_peft
from tests.interop.files import Rng, embedding_pair, pair, write_folder
from tests.interop.models import load_file, peft, quiet, randomized, torch

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(2, 7, 7))

    def forward(self, x: Any) -> Any:
        return torch.einsum("...i,eoi->...o", x, self.w)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = torch.nn.Linear(7, 7), torch.nn.Linear(7, 7)
        self.norm, self.experts = torch.nn.LayerNorm(7), Experts()

    def forward(self, x: Any) -> Any:
        return x + self.v(torch.tanh(self.q(self.norm(x)))) + self.experts(x)


class Net(torch.nn.Module):
    """Square weights, that nothing but their names tells apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(7, 7)
        self.m = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([Layer(), Layer(), Layer()])})
        self.head = torch.nn.Linear(7, 7)
        randomized(self)

    def forward(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        for layer in self.m.layers:
            x = layer(x)
        return self.head(x)


def says(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.arange(7)).numpy()


READ: dict[str, dict[str, Any]] = {
    "the ends of names": {"target_modules": ["q"]},
    "a pattern": {"target_modules": r"m\.layers\.\d\.q"},
    "all-linear": {"target_modules": "all-linear", "exclude_modules": ["v", "head"]},
    "layers": {"target_modules": ["q"], "layers_to_transform": [0, 1]},
    "a list of layers": {"target_modules": ["q"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
    "ranks": {"target_modules": ["q"], "rank_pattern": {"1.q": 3}, "alpha_pattern": {r"^m\.layers\.[01]\.q": 1.5}},
    "saved": {"target_modules": ["q"], "modules_to_save": ["head", "0.norm"]},
    "orthogonal": {"target_modules": ["q"], "init_lora_weights": "orthogonal"},
    "parameters": {"target_modules": ["q"], "target_parameters": ["0.experts.w"]},
    "parameters alone": {"target_modules": [], "target_parameters": ["experts.w"]},
    "biases": {"target_modules": ["q"], "bias": "lora_only"},
    "all biases": {"target_modules": ["q"], "bias": "all"},
}


def factors(rng: Rng, rank: int, batch: tuple[int, ...] = ()) -> dict[str, Any]:
    shapes = {"A": (*batch, 7, rank), "B": (*batch, rank, 7)}
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def added(rng: Rng, found: dict[str, Any], config: Any) -> tuple[Any, Any]:
    """A Linear, an embedding and an expert more, and a norm as a whole."""
    roles = {"m.layers.2.v.weight": "oi", "embed.weight": "io", "m.layers.1.experts.w": "boi"}
    more = {path: factors(rng, config.rank, (2,) * ("b" in letters)) for path, letters in roles.items()}
    norm = {f"m.layers.1.norm.{last}": {"value": jnp.asarray(rng.standard_normal(7), jnp.float32)} for last in WHOLE}
    given = dict(config.factorizations) | roles
    return found | more | norm, config.replace(target_modules=("**",), factorizations=given)


WHOLE = ("weight", "bias")


def removed(rng: Rng, found: dict[str, Any], config: Any) -> tuple[Any, Any]:
    """Without the first adapter, and without what is there as a whole."""
    gone = next(path for path, entry in found.items() if "A" in entry)
    left = {path: entry for path, entry in found.items() if path != gone and "A" in entry}
    of_left = {
        key: {path: value for path, value in getattr(config, key) if path in left}
        for key in ("factorizations", "rank_pattern", "alpha_pattern")
    }
    return left, config.replace(target_modules=tuple(left), **of_left)


def resized(rng: Rng, found: dict[str, Any], config: Any) -> tuple[Any, Any]:
    """An odd rank, another for the last."""
    plain = {path: entry for path, entry in found.items() if "A" in entry}
    return compose.resize(plain, config, 5, rank_pattern={list(plain)[-1]: 1})


def combined(rng: Rng, found: dict[str, Any], config: Any) -> tuple[Any, Any]:
    """With an adapter of other weights."""
    plain = {path: entry for path, entry in found.items() if "A" in entry}
    roles = {"m.layers.2.v.weight": "oi", "m.layers.0.q.weight": "oi", "embed.weight": "io"}
    other = {path: factors(rng, 3) for path in roles}
    parts = [(plain, config), (other, jlora.LoraConfig(rank=3, alpha=2, factorizations=roles))]
    return compose.combine(parts, method="cat")


CHANGES: dict[str, Callable[[Rng, dict[str, Any], Any], tuple[Any, Any]]] = {
    change.__name__: change for change in (added, removed, resized, combined)
}


def loaded(folder: Path) -> Any:
    """The live model, all of whose adapters are in the file and all of the file's in it; warnings are errors."""
    with quiet():
        live = peft.PeftModel.from_pretrained(Net(), str(folder)).eval()
        live.save_pretrained(str(folder / "again"), save_embedding_layers=False)
    there, again = ({key for key in load_file(f / TENSORS) if "lora_" in key} for f in (folder, folder / "again"))
    assert there == again
    return live


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", READ)
def test_what_is_changed_after_it_was_read(name: str, change: str, tmp_path: Path, rng: Rng) -> None:
    with quiet():
        live = peft.get_peft_model(Net(), peft.LoraConfig(r=2, lora_alpha=5, **READ[name]))
        randomized(live, trained=True)
        live.save_pretrained(str(tmp_path / "a"))
    params = {path: value.numpy() for path, value in Net().state_dict().items()}
    found, kept = read_peft(tmp_path / "a", params=params, transposed_experts=False)
    entries, config = CHANGES[change](rng, {path: entry for path, entry in found.items() if entry}, kept)
    write_peft(tmp_path / "b", entries, config)
    merged = Net()
    adapters = {path: entries.get(path) for path in params}
    merged.load_state_dict(
        {path: torch.tensor(np.asarray(v)) for path, v in jlora.merge_params(params, adapters, config).items()}
    )
    wanted = says(merged)
    assert np.abs(wanted - says(Net())).max() > 0.1
    np.testing.assert_allclose(says(loaded(tmp_path / "b")), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_names_of_modules_that_hold_what_is_saved_stay(tmp_path: Path, rng: Rng) -> None:
    saved = {
        name: np.ones(3, "float32") for name in ("score.out.weight", "score.out.bias", "norm.weight", "gone.weight")
    }
    tensors = pair(rng, "m.q", 3, 5) | saved
    fields = {"target_modules": ["q"], "modules_to_save": ["score", "gone"]}
    entries, config = read_peft(write_folder(tmp_path / "a", tensors, **fields))
    del entries["gone.weight"]
    write_peft(tmp_path / "b", entries, config)
    data = json.loads((tmp_path / "b" / CONFIG).read_text())
    assert data["modules_to_save"] == ["score"]  # the norm was of the base, and loads into it


def test_what_is_not_changed_is_written_as_it_was_read(tmp_path: Path, rng: Rng) -> None:
    fields = {"target_modules": r".*q", "exclude_modules": ["v"], "init_lora_weights": "gaussian", "tomorrow": None}
    folder = write_folder(tmp_path / "a", pair(rng, "m.0.q", 3, 5), **fields)
    write_peft(tmp_path / "b", *read_peft(folder))
    assert [(tmp_path / "b" / name).read_bytes() for name in (CONFIG, TENSORS)] == [
        (folder / name).read_bytes() for name in (CONFIG, TENSORS)
    ]


def test_a_parameter_goes_with_no_dropout_that_was_read(tmp_path: Path, rng: Rng) -> None:
    entries, config = read_peft(write_folder(tmp_path / "a", pair(rng, "m.0.q", 3, 5), lora_dropout=0.25))
    config = config.replace(factorizations=dict(config.factorizations) | {"m.0.w": "boi"})
    with pytest.raises(jlora.DataError, match=r"m\.0\.w is a parameter, beside which PEFT does not have dropout"):
        write_peft(tmp_path / "b", entries | {"m.0.w": factors(rng, 2, (2,))}, config)


@pytest.mark.parametrize("first", ["peft", "own"])
def test_combined_weights_are_of_the_kinds_of_their_files(first: str, tmp_path: Path, rng: Rng) -> None:
    """An embedding by no such name, and the weight of a module that PEFT adapts as a parameter: in the second alone."""
    q, router = pair(rng, "m.q", 3, 5), pair(rng, "m.gate", 3, 5)
    one = write_folder(tmp_path / "a", q, target_modules=["q"])
    if first == "own":
        convert(one, tmp_path / "own", "own")
        one = tmp_path / "own"
    more = {"target_modules": ["q", "words"], "target_parameters": ["gate.weight"], "peft_version": "0.20.0"}
    other = write_folder(tmp_path / "b", q | router | embedding_pair(rng, "words", 11, 5), **more)
    combine([one, other], tmp_path / "c", method="cat", form="peft")
    data, tensors = json.loads((tmp_path / "c" / CONFIG).read_text()), load_file(tmp_path / "c" / TENSORS)
    assert data["target_modules"] == ["m.q", "words"]
    assert (data["target_parameters"], data["peft_version"]) == (["m.gate.weight"], "0.20.0")
    assert tensors["base_model.model.words.lora_embedding_A"].shape == (2, 11)
    assert tensors["base_model.model.m.q.lora_A.weight"].shape == (4, 5)
    assert read_peft(tmp_path / "c")[0].keys() == {"m.q.weight", "m.gate.weight", "words.weight"}
