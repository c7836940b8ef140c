"""The LoRA of openpi: its two products by einsum in float64, as its modules take them, against the merged weight."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jlora import DataError, checkpoints, merge_params
from jlora.interop.openpi import from_openpi
from jlora.paths import leaves_by_path
from tests.interop.files import Rng

RANK = 3
# The module -> the shape of its weight, openpi's equation, and its two equations with LoRA (src/openpi/models/lora.py).
EINSUMS = {
    "q_einsum": ((2, 7, 5), "BTD,NDH->BTNH", "BTD,NDL->BTNL", "BTNL,NLH->BTNH"),
    "kv_einsum": ((2, 1, 7, 5), "BSD,XKDH->XBSKH", "BSD,XKDL->XBSKL", "XBSKL,XKLH->XBSKH"),
    "attn_vec_einsum": ((2, 5, 7), "BTNH,NHD->BTD", "BTNH,NHL->BTL", "BTL,NLD->BTD"),
    "attn_vec_einsum_1": ((2, 5, 11), "BTNH,NHD->BTD", "BTNH,NHL->BTL", "BTL,NLD->BTD"),
}
INPUTS = {"attn_vec_einsum": (4, 6, 2, 5), "attn_vec_einsum_1": (4, 6, 2, 5)}
FEED = {"gating_einsum": (2, 7, 13), "linear": (13, 7)}


def normal(rng: Rng, *shape: int) -> Any:
    return rng.standard_normal(shape).astype("float32")


def lora(rng: Rng, shape: tuple[int, ...], stack: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """The weight, a and b."""
    a, b = (*shape[:-1], RANK), (*shape[:-2], RANK, shape[-1])
    return normal(rng, *stack, *shape), normal(rng, *stack, *a), normal(rng, *stack, *b)


def made(rng: Rng, stack: tuple[int, ...] = ()) -> dict[str, Any]:
    attention = {
        name: dict(zip(("w", "lora_a", "lora_b"), lora(rng, shape, stack), strict=True))
        for name, (shape, *_) in EINSUMS.items()
    }
    feed: dict[str, Any] = {}
    for name, shape in FEED.items():
        keys = (name, f"{name}_lora_a", f"{name}_lora_b")
        feed |= dict(zip(keys, lora(rng, shape, stack), strict=True))
    return {"layers": {"attn": attention, "mlp": feed}, "norm": {"scale": normal(rng, 7)}}


@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize(("alpha", "rslora", "scaling"), [(None, False, 1), (6.0, False, 2), (6.0, True, 6 / 3**0.5)])
def test_merged_it_computes_what_openpi_does(
    stack: tuple[int, ...], alpha: float | None, rslora: bool, scaling: float, rng: Rng
) -> None:
    params = made(rng, stack)
    base, adapters, config = from_openpi(params, alpha=alpha, rslora=rslora)
    merged = leaves_by_path(merge_params(base, adapters, config))
    assert not [path for path in merged if "lora" in path]
    np.testing.assert_array_equal(merged["norm/scale"], params["norm"]["scale"])
    for index in np.ndindex(stack):
        for name, (_, plain, first, second) in EINSUMS.items():
            x = rng.standard_normal(INPUTS.get(name, (4, 6, 7)))
            w, a, b = (part[index].astype(np.float64) for part in params["layers"]["attn"][name].values())
            wanted = np.einsum(plain, x, w) + scaling * np.einsum(second, np.einsum(first, x, a), b)
            weight = np.asarray(merged[f"layers/attn/{name}/w"], np.float64)[index]
            np.testing.assert_allclose(np.einsum(plain, x, weight), wanted, rtol=0, atol=1e-4, err_msg=name)
        for name in FEED:
            own = params["layers"]["mlp"]
            w, a, b = (own[key][index].astype(np.float64) for key in (name, f"{name}_lora_a", f"{name}_lora_b"))
            found = np.asarray(merged[f"layers/mlp/{name}"], np.float64)[index]
            np.testing.assert_allclose(found, w + a @ b, rtol=0, atol=1e-5, err_msg=name)


def test_the_command_on_a_folder_of_orbax(tmp_path: Path, rng: Rng) -> None:
    params = made(rng)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", {"params": params})
    checkpoints.convert(tmp_path / "orbax", tmp_path / "own", "own", names="openpi", alpha=6.0)
    tree, config, _ = checkpoints.read_adapters(tmp_path / "own")
    base, adapters, wanted = from_openpi(params, alpha=6.0)
    found = merge_params(base, tree, config)
    for path, leaf in leaves_by_path(merge_params(base, adapters, wanted)).items():
        np.testing.assert_array_equal(leaves_by_path(found)[path], leaf, err_msg=path)


REFUSED = {
    "nothing": ({"q": {"w": (7, 5)}}, "no params of openpi's LoRA among 1 leaves"),
    "alone": ({"q": {"w": (7, 5), "lora_a": (7, 3)}}, "q/lora_a: stands without its b"),
    "no weight": ({"q": {"lora_a": (7, 3), "lora_b": (3, 5)}}, "q/lora_a: no weight beside it"),
    "shapes": ({"q": {"w": (7, 5), "lora_a": (5, 3), "lora_b": (3, 5)}}, r"q/w: lora a \(5, 3\) and b \(3, 5\) do not"),
    "no heads": (
        {"attn_vec_einsum": {"w": (7, 5), "lora_a": (7, 3), "lora_b": (3, 5)}},
        r"attn_vec_einsum/w: the weight \(7, 5\) has no axis for the heads",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_read_it_names(case: str) -> None:
    shapes, message = REFUSED[case]
    params = {name: {part: jnp.ones(shape) for part, shape in parts.items()} for name, parts in shapes.items()}
    with pytest.raises(DataError, match=message):
        from_openpi(params)
