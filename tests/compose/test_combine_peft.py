"""`combine` beside PEFT's `add_weighted_adapter`, in float64, on the layers that PEFT combines."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from jlora import LoraConfig
from jlora.compose import METHODS, combine
from jlora.paths import path_number
from tests.compose import deltas, matrices
from tests.reference import assert_close

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

# The paths in jlora, and the factorizations of their weights.
ROLES = {"lin/kernel": "io", "conv/kernel": "iiio", "emb/embedding": "io"}
PRUNING = [method for method in METHODS if method not in ("linear", "cat", "svd")]
SAME_RANK = {"one": {"r": 3, "lora_alpha": 5}, "two": {"r": 3, "lora_alpha": 2, "use_rslora": True}}
SAME_RANK["three"] = {"r": 3, "lora_alpha": 4, "alpha_pattern": {"conv": 7}}
ANY_RANK = {
    "one": {"r": 2, "lora_alpha": 5},
    "two": {"r": 4, "lora_alpha": 2, "use_rslora": True, "rank_pattern": {"conv": 3}},
    "three": {"r": 1, "lora_alpha": 4, "alpha_pattern": {"conv": 7}},
}
WEIGHTS = [0.7, -1.3, 0.4]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = torch.nn.Linear(11, 7)
        self.conv = torch.nn.Conv2d(5, 13, (3, 2))
        self.emb = torch.nn.Embedding(17, 5)


def model_of(adapters: dict[str, dict[str, Any]], targets: tuple[str, ...] = ("lin", "conv", "emb")) -> Any:
    """A PEFT model with these adapters, all random; `targets` in a configuration's fields wins."""
    torch.manual_seed(3)
    model = None
    for name, fields in adapters.items():
        given = {"target_modules": list(targets), "init_lora_weights": False, **fields}
        config = peft.LoraConfig(**given)
        if model is None:
            model = peft.PeftModel(Net(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model.base_model


def adapter_at(model: Any, layer: str, name: str) -> dict[str, np.ndarray] | None:
    """One PEFT adapter with its axes as in jlora."""
    module = getattr(model.model, layer)
    if layer == "emb" and name in getattr(module, "lora_embedding_A", {}):
        a, b = module.lora_embedding_A[name], module.lora_embedding_B[name]
    elif name in getattr(module, "lora_A", {}):
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
    else:
        return None
    a, b = a.detach().numpy(), b.detach().numpy()
    if layer == "conv":
        return {"A": a.transpose(2, 3, 1, 0), "B": b[:, :, 0, 0].T}
    return {"A": a.T, "B": b.T}


def tree_of(model: Any, name: str) -> dict[str, Any]:
    leaves = (path.split("/") for path in ROLES)
    return {layer: {leaf: adapter_at(model, layer, name)} for layer, leaf in leaves}


def config_of(fields: dict[str, Any]) -> LoraConfig:
    return LoraConfig(
        rank=fields["r"],
        alpha=fields["lora_alpha"],
        scaling="rslora" if fields.get("use_rslora") else "standard",
        rank_pattern=fields.get("rank_pattern", {}),
        alpha_pattern=fields.get("alpha_pattern", {}),
        factorizations={"conv": "iiio"},
    )


def masks(method: str, model: Any, adapters: dict[str, Any], density: float, seed: int) -> list[np.ndarray]:
    """jlora's random masks in the order in which PEFT asks for its own, with the axes of PEFT."""
    result: list[np.ndarray] = []
    for path in ROLES:
        layer = path.split("/")[0]
        streams = [np.random.default_rng([seed, path_number(path), part]) for part in range(len(adapters))]
        found = [adapter_at(model, layer, name) for name in adapters]
        if method.endswith("_svd"):
            for adapter, stream in zip(found, streams, strict=True):
                shape = (*adapter["A"].shape[:-1], adapter["B"].shape[-1])
                mask = stream.random(shape) < density
                result.append(mask if layer == "emb" else mask.transpose(3, 2, 0, 1) if layer == "conv" else mask.T)
            continue
        for part in "AB":
            for adapter, stream in zip(found, streams, strict=True):
                mask = stream.random(adapter[part].shape) < density
                is_conv = layer == "conv"
                result.append(mask.transpose(3, 2, 0, 1) if is_conv and part == "A" else mask.T)
                if is_conv and part == "B":
                    result[-1] = mask.T[:, :, None, None]
    return result


def compare(
    model: Any, adapters: dict[str, Any], method: str, rank: int | None = None, weights: Any = None, **options: Any
) -> None:
    """The deltas of PEFT's combined adapter and of jlora's are the same."""
    weights = WEIGHTS[: len(adapters)] if weights is None else weights
    parts = [(tree_of(model, name), config_of(fields)) for name, fields in adapters.items()]
    found, config = combine(parts, weights, method=method, rank=rank, **options)
    if "majority_sign" in options:
        options["majority_sign_method"] = options.pop("majority_sign")
    options.pop("seed", None)
    model.add_weighted_adapter(list(adapters), weights, "all", combination_type=method, svd_rank=rank, **options)
    ours = deltas(found, config, ROLES)
    theirs = tree_of(model, "all")
    for path, roles in ROLES.items():
        layer, leaf = path.split("/")
        if path in ours:
            # PEFT's own scaling is sqrt(rank) and not 1 where the first adapter has rslora: the bare product is meant.
            assert_close(ours[path], matrices(theirs[layer][leaf], 1.0, roles))
        else:
            assert theirs[layer][leaf] is None


@pytest.mark.parametrize("adapters", [SAME_RANK, ANY_RANK], ids=["same rank", "any rank"])
@pytest.mark.parametrize("method", ["cat", "svd"])
@pytest.mark.parametrize("rank", [2, 4])
def test_cat_and_svd(adapters, method, rank):
    compare(model_of(adapters), adapters, method, rank if method == "svd" else None)


@pytest.mark.parametrize("weights", [WEIGHTS, [1, 1, 1], [0.0, 0.5, -2.0]], ids=str)
def test_linear(weights):
    compare(model_of(SAME_RANK), SAME_RANK, "linear", weights=weights)


@pytest.mark.parametrize("adapters", [dict(list(SAME_RANK.items())[:2]), SAME_RANK], ids=["two", "three"])
@pytest.mark.parametrize("density", [0.29, 0.7])
@pytest.mark.parametrize("method", ["magnitude_prune", "magnitude_prune_svd"])
def test_magnitude_prune(method, adapters, density):
    compare(model_of(adapters), adapters, method, density=density)


@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.29, 0.7])
@pytest.mark.parametrize("method", ["ties", "ties_svd"])
def test_ties(method, majority_sign, density):
    compare(model_of(SAME_RANK), SAME_RANK, method, density=density, majority_sign=majority_sign)


@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
@pytest.mark.parametrize("method", [method for method in PRUNING if method.startswith("dare")])
def test_dare_with_the_same_masks(monkeypatch, method, majority_sign):
    model = model_of(SAME_RANK)
    queue = masks(method, model, SAME_RANK, 0.6, seed=11)

    def bernoulli(share: Any) -> Any:
        assert float(share.flatten()[0]) == 0.6
        return torch.tensor(queue.pop(0).reshape(share.shape), dtype=share.dtype)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    compare(model, SAME_RANK, method, density=0.6, seed=11, majority_sign=majority_sign)
    assert not queue


@pytest.mark.filterwarnings("ignore:The density 1.* no pruning will be performed:UserWarning")
@pytest.mark.parametrize("method", PRUNING)
def test_nothing_is_pruned_at_a_density_of_1(method):
    compare(model_of(SAME_RANK), SAME_RANK, method, density=1.0)


@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
def test_a_weight_that_some_adapt_is_combined_from_those(method):
    adapters = {
        "one": {"r": 2, "lora_alpha": 5, "target_modules": ["lin"]},
        "two": {"r": 2, "lora_alpha": 3, "target_modules": ["lin", "emb"]},
    }
    compare(model_of(adapters), adapters, method, 2 if method == "svd" else None)


def test_one_adapter():
    adapters = {"one": {"r": 2, "lora_alpha": 5, "use_rslora": True}}
    compare(model_of(adapters), adapters, "linear", weights=[-0.7])
    compare(model_of(adapters), adapters, "cat", weights=[0.3])


def test_the_scaling_is_1_also_where_the_first_part_has_rslora():
    adapters = {"one": {"r": 2, "lora_alpha": 5, "use_rslora": True}, "two": {"r": 2, "lora_alpha": 3}}
    compare(model_of(adapters), adapters, "cat")
    parts = [(tree_of(model_of(adapters), name), config_of(fields)) for name, fields in adapters.items()]
    result = combine(parts, [1.0, 1.0], method="cat")
    each = [deltas(*part, ROLES) for part in parts]
    for path, found in deltas(*result, ROLES).items():
        assert_close(found, each[0][path] + each[1][path])
