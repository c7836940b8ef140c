"""The commands on a folder of `jlora.variants.save`: it is expanded, whatever they do with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import LoraConfig, load_adapters, merge_params, variants
from jlora.checkpoints import combine, convert, diff, inspect, merge, resize
from jlora.disk import Checkpoint, write_tensors
from jlora.errors import DataError
from jlora.interop.peft import read_peft
from tests.reference import as64, random_array, randomize

UP, DOWN = "model.layers.0.up_proj.weight", "model.layers.0.down_proj.weight"


@pytest.fixture(params=variants.KINDS)
def made(request, rng, tmp_path):
    """The base, what is merged into it, and the folder of the small tree."""
    params = {UP: random_array(rng, (13, 7)), DOWN: random_array(rng, (7, 13))}
    config = LoraConfig(rank=3, alpha=5, kind=request.param, factorizations={"**": "oi"})
    trained, frozen = variants.init(None, params, config)
    trained = randomize(rng, trained)
    variants.save(tmp_path / "small", trained, frozen, params, config)
    with (tmp_path / "base.safetensors").open("wb") as file:
        write_tensors(file, {name: np.asarray(array) for name, array in params.items()})
    merged = merge_params(params, variants.adapters(trained, frozen, params, config), config)
    return params, merged, tmp_path


def assert_merges(adapters, merged, folder):
    out = folder / f"merged of {adapters.name}"
    merge(folder / "base.safetensors", adapters, out)
    for name, wanted in merged.items():
        np.testing.assert_allclose(Checkpoint(out).read(name), as64(wanted), rtol=0, atol=1e-5)


def test_it_is_merged_and_inspected(made):
    _, merged, folder = made
    assert_merges(folder / "small", merged, folder)
    table = str(inspect(folder / "small"))
    assert "up_proj" in table
    assert "down_proj" in table


def test_it_is_converted_to_every_format(made):
    params, merged, folder = made
    convert(folder / "small", folder / "own", "own")
    convert(folder / "small", folder / "peft", "peft")
    adapters, config = load_adapters(folder / "own", params=params)
    assert config.kind == "lora"
    for path, found in merge_params(params, adapters, config).items():
        np.testing.assert_allclose(found, merged[path], rtol=0, atol=1e-5)
    adapters, config = read_peft(folder / "peft", params=params)
    for path, found in merge_params(params, adapters, config).items():
        np.testing.assert_allclose(found, merged[path], rtol=0, atol=1e-5)
    assert_merges(folder / "own", merged, folder)


def test_it_is_resized_combined_and_compared(made):
    _, merged, folder = made
    resize(folder / "small", folder / "larger", 5)
    assert_merges(folder / "larger", merged, folder)
    combine([folder / "small", folder / "larger"], folder / "both", [0.5, 0.5], method="cat")
    assert_merges(folder / "both", merged, folder)
    convert(folder / "small", folder / "own", "own")
    assert diff(folder / "small", folder / "own").is_identical


def test_one_without_what_is_frozen_is_refused(rng, tmp_path):
    params = {UP: random_array(rng, (13, 7))}
    config = LoraConfig(rank=3, kind="vera", factorizations={"**": "oi"})
    trained, frozen = variants.init(None, params, config)
    variants.save(tmp_path / "small", trained, frozen, params, config, with_frozen=False)
    with pytest.raises(DataError, match=r"left out when it was saved.*jlora.variants.load\(path, params\)"):
        inspect(tmp_path / "small")
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, variants.load(tmp_path / "small", params)[1], frozen)))
