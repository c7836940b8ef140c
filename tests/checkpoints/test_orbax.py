"""`convert --names` of what Orbax saved: the adapters of gemma and of qwix in params, in each kind of folder."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jlora import DataError, checkpoints, cli
from jlora.adapter import is_entry
from jlora.disk import write_tensors
from jlora.paths import leaves_by_path
from tests.interop.files import Rng

SHAPES = {"attention/q": (7, 3, 5), "mlp/up": (7, 11)}
FOLDERS = ("tree", "one item", "params beside", "train state", "only params", "variables")


def normal(rng: Rng, *shape: int) -> Any:
    return rng.standard_normal(shape).astype("float32")


def made(rng: Rng, names: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Params with the LoRA of a library, and the update of each weight by path, with a scaling of 1, in float64."""
    params: dict[str, Any] = {}
    updates = {}
    for path, shape in SHAPES.items():
        a, b = normal(rng, shape[0], 2), normal(rng, 2, *shape[1:])
        updates[f"{path}/kernel"] = np.tensordot(a.astype(np.float64), b.astype(np.float64), 1)
        group, name = path.split("/")
        flat = b.reshape(2, -1)
        lora = {"lora": {"a": a, "b": b}} if names == "gemma" else {"kernel_lora_a": a, "kernel_lora_b": flat}
        params.setdefault(group, {})[name] = {"kernel": normal(rng, *shape), **lora}
    return params, updates


def saved(folder: Path, params: dict[str, Any], kind: str) -> Path:
    """The folder to give, for params in a folder of one kind."""
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    if kind == "variables":
        params = with_values(params)
    if kind in ("one item", "params beside"):
        with ocp.CheckpointManager(folder, options=options) as manager:
            if kind == "one item":
                manager.save(3, args=ocp.args.StandardSave(params))
            else:
                items = {"params": ocp.args.StandardSave(params), "opt": ocp.args.PyTreeSave({"mu": params})}
                manager.save(3, args=ocp.args.Composite(**items))
        return folder / "3"
    tree = {
        "train state": {"params": params, "opt_state": {"mu": params}, "step": jnp.int32(3)},
        "only params": {"params": params},
    }.get(kind, params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)
        checkpointer.wait_until_finished()
    return folder


def with_values(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: with_values(child) for key, child in tree.items()}
    return {"value": tree}


@pytest.mark.parametrize("names", ["gemma", "qwix"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_adapters_come_out_of_it(kind: str, names: str, tmp_path: Path, rng: Rng) -> None:
    params, updates = made(rng, names)
    given = saved(tmp_path / "orbax", params, kind)
    alpha = 2.0 if names == "qwix" else None
    checkpoints.convert(given, tmp_path / "own", "own", names=names, alpha=alpha)
    tree, config, _ = checkpoints.read_adapters(tmp_path / "own")
    found = {path: entry for path, entry in leaves_by_path(tree, is_leaf=is_entry).items() if is_entry(entry)}
    assert found.keys() == updates.keys()
    for path, update in updates.items():
        a, b = (np.asarray(found[path][part], np.float64) for part in "AB")
        np.testing.assert_allclose(config.scaling_of(path) * np.tensordot(a, b, 1), update, rtol=0, atol=1e-6)


def without_weights(tree: Any) -> Any:
    kept = {key: without_weights(child) if isinstance(child, dict) else child for key, child in tree.items()}
    return {
        key: child for key, child in kept.items() if key != "kernel" and not (isinstance(child, dict) and not child)
    }


@pytest.mark.parametrize("names", ["gemma", "qwix"])
@pytest.mark.parametrize("kind", ["tree", "only params", "safetensors"])
def test_lora_alone_and_the_base_beside_it(kind: str, names: str, tmp_path: Path, rng: Rng) -> None:
    """As tunix saves it (save_only_lora_params), or gemma's split_params leaves it."""
    params, updates = made(rng, names)
    alpha = 2.0 if names == "qwix" else None
    if kind == "safetensors":
        flat = {path.replace("/", "."): leaf for path, leaf in leaves_by_path(params).items()}
        given, base = tmp_path / "lora", tmp_path / "base"
        for folder, is_lora in ((given, True), (base, False)):
            folder.mkdir()
            with (folder / "model.safetensors").open("wb") as file:
                write_tensors(file, {name: leaf for name, leaf in flat.items() if ("lora" in name) == is_lora})
    else:
        given = saved(tmp_path / "lora", without_weights(params), "tree")
        base = saved(tmp_path / "base", params, kind)
    with pytest.raises(DataError, match=r"no weight beside it; .*--base"):
        checkpoints.convert(given, tmp_path / "own", "own", names=names, alpha=alpha)
    checkpoints.convert(given, tmp_path / "own", "own", names=names, alpha=alpha, base=base)
    assert len(checkpoints.inspect(given, names=names, alpha=alpha, base=base).entries) == len(updates)
    tree, config, _ = checkpoints.read_adapters(tmp_path / "own")
    found = {path: entry for path, entry in leaves_by_path(tree, is_leaf=is_entry).items() if is_entry(entry)}
    assert found.keys() == updates.keys()
    for path, update in updates.items():
        a, b = (np.asarray(found[path][part], np.float64) for part in "AB")
        np.testing.assert_allclose(config.scaling_of(path) * np.tensordot(a, b, 1), update, rtol=0, atol=1e-6)


def test_where_it_is_not_clear_what_is_meant(tmp_path: Path, rng: Rng, capsys: pytest.CaptureFixture[str]) -> None:
    params, _ = made(rng, "gemma")
    saved(tmp_path / "run", params, "one item")
    with pytest.raises(DataError, match=r"run: holds 1 checkpoints: give one of them, such as .*run/3$"):
        checkpoints.convert(tmp_path / "run", tmp_path / "out", "own", names="gemma")
    with ocp.StandardCheckpointer() as checkpointer:
        for name in ("one", "two"):
            checkpointer.save(tmp_path / "two" / name, params)
        checkpointer.save(tmp_path / "state", {"model": params, "opt_state": {"mu": params}})
        checkpointer.save(tmp_path / "list", [np.ones(3, np.float32)])
    with pytest.raises(DataError, match=r"two: holds the trees one(,| and) two: give one of them, such as .*two/one$"):
        checkpoints.convert(tmp_path / "two", tmp_path / "out", "own", names="gemma")
    with pytest.raises(DataError, match="state: holds opt_state beside its params, whose names are the same"):
        checkpoints.convert(tmp_path / "state", tmp_path / "out", "own", names="gemma")
    with pytest.raises(DataError, match="list: holds 'list': wanted a tree of named params"):
        checkpoints.convert(tmp_path / "list", tmp_path / "out", "own", names="gemma")
    arguments = ["convert", tmp_path / "run" / "3", "--names", "gemma", "--to", "own", "--out", tmp_path / "out"]
    assert cli.main([*map(str, arguments)]) == 0
    assert "WARNING" not in capsys.readouterr().err


def test_a_damaged_folder_is_refused(tmp_path: Path, rng: Rng) -> None:
    folder = saved(tmp_path / "orbax", made(rng, "gemma")[0], "tree")
    (folder / "_METADATA").write_text("{")
    with pytest.raises(DataError, match="orbax: Orbax cannot read it: "):
        checkpoints.convert(folder, tmp_path / "out", "own", names="gemma")
