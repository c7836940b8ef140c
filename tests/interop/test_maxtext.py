"""The LoRA of MaxText, in folders that Orbax saves as MaxText does, against sums in float64."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jlora import checkpoints, cli, merge_params
from jlora.errors import DataError
from jlora.interop.maxtext import from_maxtext
from jlora.interop.peft import NESTED, read_peft
from jlora.paths import leaves_by_path
from tests.interop import real_maxtext
from tests.interop.files import Rng

LAYERS, RANK, ALPHA = 3, 2, 5.0
# The module -> how many axes of its kernel are in axes, and the sizes of one layer's kernel.
KERNELS = {
    "self_attention/query": (1, (7, 4, 5)),
    "self_attention/key": (1, (7, 2, 5)),
    "self_attention/out": (2, (4, 5, 7)),
    "mlp/wi_0": (1, (7, 11)),
}


def normal(rng: Rng, *shape: int) -> Any:
    return rng.standard_normal(shape).astype("float32")


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *above, last = path.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def made(rng: Rng, form: str, axis: int | None) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """LoRA as MaxText keeps it, the kernels, and these with the updates in float64, layer by layer.

    Args:
      form: "own" (lora_a.kernel; of the attention alone) or "qwix" (kernel_lora_a, with joined axes).
      axis: of the scanned layers in each array; None for one layer.
    """
    lora: dict[str, Any] = {}
    kernels: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    place = "decoder/layers_0" if axis is None else "decoder/layers"
    for name, (count, shape) in KERNELS.items():
        if form == "own" and name.startswith("mlp"):
            continue
        a, b, w, total = [], [], [], []
        for _ in range(1 if axis is None else LAYERS):
            ins, outs = shape[:count], shape[count:]
            a.append(normal(rng, *ins, RANK))
            b.append(normal(rng, RANK, *outs))
            w.append(normal(rng, *shape))
            update = np.tensordot(a[-1].astype(np.float64), b[-1].astype(np.float64), 1)
            total.append(w[-1] + ALPHA / RANK * update)
            if form == "qwix":
                a[-1], b[-1] = a[-1].reshape(-1, RANK), b[-1].reshape(RANK, -1)
        stacked = [part[0] if axis is None else np.stack(part, axis) for part in (a, b, w, total)]
        keys = ("lora_a.kernel", "lora_b.kernel") if form == "own" else ("kernel_lora_a", "kernel_lora_b")
        for key, part in zip(keys, stacked, strict=False):
            lora[f"{place}/{name}/{key}"] = part
        kernels[f"{place}/{name}/kernel"], merged[f"{place}/{name}/kernel"] = stacked[2], stacked[3]
    return nested(lora), nested(kernels), merged


def saved(folder: Path, tree: Any) -> Path:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)
    return folder


def check(adapters: Any, config: Any, kernels: dict[str, Any], merged: dict[str, Any]) -> None:
    found = leaves_by_path(merge_params(kernels, adapters, config))
    assert found.keys() == merged.keys()
    for path, value in merged.items():
        np.testing.assert_allclose(found[path], value, rtol=0, atol=1e-4, err_msg=path)


@pytest.mark.parametrize("axis", [None, 1, 0])
@pytest.mark.parametrize("form", ["own", "qwix"])
def test_merged_it_is_what_maxtext_computes(form: str, axis: int | None, rng: Rng) -> None:
    lora, kernels, merged = made(rng, form, axis)
    adapters, config = from_maxtext(lora, alpha=ALPHA, base=kernels)
    check(adapters, config, kernels, merged)
    if form == "own":  # whose axes are those of the kernels
        check(*from_maxtext(lora, alpha=ALPHA), kernels, merged)


@pytest.mark.parametrize("axis", [None, 1])
def test_joined_axes_stay_where_the_base_is_not_known(axis: int | None, rng: Rng) -> None:
    lora, kernels, merged = made(rng, "qwix", axis)
    adapters, config = from_maxtext(lora, alpha=ALPHA)
    rows = {"query": (7, LAYERS, 20), "key": (7, LAYERS, 10), "out": (20, LAYERS, 7), "wi_0": (7, LAYERS, 11)}

    def joined(path: str, array: Any) -> Any:
        shape = rows[path.split("/")[-2]]
        return np.asarray(array).reshape(shape if axis == 1 else (shape[0], shape[2]))

    def heads_beside(path: str, array: Any) -> Any:
        """(N, L, H, D) as (N * H, L, D)."""
        return array.swapaxes(1, 2) if axis == 1 and path.endswith("out/kernel") else array

    flat = leaves_by_path(kernels)
    plain = {path: joined(path, heads_beside(path, array)) for path, array in flat.items()}
    wanted = {path: joined(path, heads_beside(path, array)) for path, array in merged.items()}
    check(adapters, config, nested(plain), wanted)


@pytest.mark.parametrize("kind", ["adapter", "given items", "step", "value", "model_params"])
def test_the_commands_on_folders_of_orbax(
    kind: str, tmp_path: Path, rng: Rng, capsys: pytest.CaptureFixture[str]
) -> None:
    form = "own" if kind in ("adapter", "given items") else "qwix"
    lora, kernels, merged = made(rng, form, 1)
    arguments: list[Any] = []
    if form == "own":  # as generate_param_only_checkpoint.py leaves it
        lora["decoder"]["layers"]["mlp"] = {"wi_0": {"kernel": None}}
        saved(tmp_path / "x" / "0" / "items", {"params": {"params": lora}})
        said = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "k_proj", "o_proj"]}
        (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(said))
        source = tmp_path / "x" if kind == "adapter" else tmp_path / "x" / "0" / "items"
    elif kind == "value":
        values = jax.tree.map(lambda leaf: {"value": leaf}, lora)
        source, arguments = saved(tmp_path / "x", values), ["--alpha", ALPHA]
    else:  # as checkpointing.py saves a step, and tunix's trainer
        item = "items" if kind == "step" else kind
        state = {"params": {"params": lora}, "opt_state": {"mu": lora}, "step": np.int32(7)}
        tree = state if kind == "step" else lora
        items = {item: ocp.args.PyTreeSave(tree), "iter": ocp.args.JsonSave({"seen": 3})}
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        said = {"lora": {"lora_rank": RANK, "lora_alpha": ALPHA, "enable_lora": True}, "scan_layers": True}
        with ocp.CheckpointManager(tmp_path / "x", options=options) as manager:
            manager.save(7, args=ocp.args.Composite(**items), custom_metadata=said)
        source = tmp_path / "x" / "7"
    base = saved(tmp_path / "base", {"params": {"params": kernels}})
    command = ["convert", source, "--names", "maxtext", "--to", "own", "--out", tmp_path / "own", "--base", base]
    assert cli.main([*map(str, [*command, *arguments])]) == 0
    tree, config, _ = checkpoints.read_adapters(tmp_path / "own")
    check(tree, config, kernels, merged)
    capsys.readouterr()
    for more in ([], ["--base", base]):
        assert cli.main([*map(str, ["inspect", source, "--names", "maxtext", *more, *arguments])]) == 0
        assert "decoder/layers/self_attention/query/kernel" in capsys.readouterr().out


def test_a_mapping_leads_to_the_names_of_hugging_face(tmp_path: Path, rng: Rng) -> None:
    lora, _, _ = made(rng, "qwix", 1)
    saved(tmp_path / "x", lora)
    names = {"self_attention/query": "self_attn.q_proj", "self_attention/key": "self_attn.k_proj"}
    names |= {"self_attention/out": "self_attn.o_proj", "mlp/wi_0": "mlp.gate_proj"}
    rows = [
        f'[[row]]\nname = "model.layers.{{i}}.{name}.weight"\npath = "decoder/layers/{path}/kernel"\n'
        f'transpose = [1, 0]\nstack = [["{{i}}", {LAYERS}]]\n'
        for path, name in names.items()
    ]
    (tmp_path / "rows.toml").write_text("".join(rows))
    command = ["convert", tmp_path / "x", "--names", "maxtext", "--to", "peft", "--out", tmp_path / "peft"]
    assert cli.main([*map(str, [*command, "--alpha", ALPHA, "--mapping", tmp_path / "rows.toml"])]) == 0
    adapters, config = read_peft(tmp_path / "peft")
    assert len(adapters["model"]["layers"] if "model" in adapters else adapters) == 4 * LAYERS
    for path, name in names.items():
        group, module = path.split("/")
        own = lora["decoder"]["layers"][group][module]
        for layer in range(LAYERS):
            weight = f"model.layers.{layer}.{name}.weight"
            wanted = ALPHA / RANK * own["kernel_lora_a"][:, layer].astype(np.float64) @ own["kernel_lora_b"][:, layer]
            a, b = (np.asarray(adapters[weight][part], np.float64) for part in "AB")
            np.testing.assert_allclose(config.scaling_of(weight) * a @ b, wanted, rtol=0, atol=1e-5, err_msg=weight)


def test_names_of_maxtext_are_none_of_peft(tmp_path: Path, rng: Rng) -> None:
    saved(tmp_path / "x", made(rng, "qwix", 1)[0])
    with pytest.raises(DataError, match="give a mapping whose row has its name in the Hugging Face model"):
        checkpoints.convert(tmp_path / "x", tmp_path / "peft", "peft", names="maxtext", alpha=2.0)
    with pytest.raises(DataError, match="params are inspected by their own names"):
        checkpoints.inspect(tmp_path / "x", names="maxtext", alpha=2.0, mapping=NESTED)


Q = "decoder/layers/q"
WRONG = {
    "nothing": ({f"{Q}/kernel": (7, 5)}, None, "no params of MaxText's LoRA among 1 leaves"),
    "alone": ({f"{Q}/kernel_lora_a": (7, 2)}, None, f"{Q}/kernel: has an a of LoRA alone"),
    "shapes": (
        {f"{Q}/kernel_lora_a": (7, 2), f"{Q}/kernel_lora_b": (3, 5)},
        None,
        r"\(7, 2\) and b \(3, 5\) do not fit",
    ),
    "axes": ({f"{Q}/kernel_lora_a": (7,), f"{Q}/kernel_lora_b": (2, 5)}, None, "wanted two axes or more"),
    "layers": ({f"{Q}/lora_a.kernel": (7, 3, 2), f"{Q}/lora_b.kernel": (2, 4, 2, 5)}, None, "do not fit each other"),
    "several": (
        {f"{Q}/kernel_lora_a": (3, 3, 3), f"{Q}/kernel_lora_b": (3, 3, 5)},
        None,
        "several ways, bio, ibo, as",
    ),
    "base": ({f"{Q}/kernel_lora_a": (7, 2), f"{Q}/kernel_lora_b": (2, 5)}, {f"{Q}/kernel": (5, 7)}, r"weight \(5, 7\)"),
    "no kernel": (
        {"q/w_lora_a": (7, 2), "q/w_lora_b": (2, 5)},
        None,
        "q/w: no kernel, the order of whose axes is known",
    ),
    "no base": (
        {f"{Q}/kernel_lora_a": (7, 2), f"{Q}/kernel_lora_b": (2, 5)},
        {"k/kernel": (7, 5)},
        "the base has none",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_it_does_not_read_it_names(case: str, rng: Rng) -> None:
    shapes, base, message = WRONG[case]
    trees = [nested({path: normal(rng, *shape) for path, shape in each.items()}) for each in (shapes, base or {})]
    with pytest.raises(DataError, match=message):
        from_maxtext(trees[0], alpha=1.0, base=None if base is None else trees[1])


SAID = {
    "none": (None, "neither adapter_config.json nor Orbax's metadata says the alpha"),
    "rslora": ({"use_rslora": True}, "use_rslora = True, which MaxText does not apply: convert the PEFT adapter"),
    "rank": ({"r": 3}, "the rank is 2 in the params, and 3 in what lies beside them"),
    "alpha": ({"lora_alpha": "5"}, "lora_alpha = '5': wanted a number other than 0"),
    "json": ("{", "adapter_config.json"),
}


@pytest.mark.parametrize("case", SAID)
def test_what_lies_beside_the_params_is_checked(case: str, tmp_path: Path, rng: Rng) -> None:
    more, message = SAID[case]
    saved(tmp_path / "x" / "0" / "items", {"params": made(rng, "own", 1)[0]})
    said = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj"]}
    if more is not None:
        (tmp_path / "x" / "adapter_config.json").write_text(more if isinstance(more, str) else json.dumps(said | more))
    source = tmp_path / "x" / "0" / "items" if more is None else tmp_path / "x"
    with pytest.raises(DataError, match=message):
        checkpoints.convert(source, tmp_path / "own", "own", names="maxtext")


@pytest.mark.slow
def test_what_maxtext_and_qwix_make_and_compute(tmp_path: Path) -> None:
    if not hasattr(pytest.importorskip("flax.core.spmd"), "logical_axis_rules"):
        pytest.skip("this Flax is older than MaxText wants")
    if not real_maxtext.install(tmp_path / "packages"):
        pytest.skip("pip cannot install MaxText here")
    command = [sys.executable, "-W", "ignore", real_maxtext.__file__, str(tmp_path / "packages"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]

    def read(name: str, alpha: float | None = None) -> tuple[Any, dict[str, Any]]:
        """Base and merged params."""
        folder, base = tmp_path / name, tmp_path / f"{name}_base"
        checkpoints.convert(folder, tmp_path / f"{name}_own", "own", names="maxtext", alpha=alpha, base=base)
        tree, config, _ = checkpoints.read_adapters(tmp_path / f"{name}_own")
        with ocp.PyTreeCheckpointer() as checkpointer:
            params = checkpointer.restore(base)
        params = params["params"]["params"] if "params" in params else params
        return params, leaves_by_path(merge_params(params, tree, config))

    base, found = read("scanned")
    changed = [path for path, leaf in leaves_by_path(base).items() if np.abs(found[path] - leaf).max() > 0.1]
    assert len(changed) == 4
    base, found = read("unscanned")
    with ocp.PyTreeCheckpointer() as checkpointer:
        wanted = leaves_by_path(checkpointer.restore(tmp_path / "unscanned_merged")["params"]["params"])
    for path, value in wanted.items():
        np.testing.assert_allclose(found[path], value, rtol=0, atol=1e-4, err_msg=path)
    _, found = read("qwix", real_maxtext.ALPHA)
    said = np.load(tmp_path / "qwix.npz")
    y = np.einsum("bd,dnh,nhe,ef->bf", said["x"], *(found[f"{name}/kernel"] for name in ("query", "out", "wi_0")))
    assert np.abs(said["plain"] - said["y"]).max() > 1
    np.testing.assert_allclose(y, said["y"], rtol=1e-4, atol=1e-3)
