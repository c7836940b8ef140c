"""Params read from folders: every tensor in its place, every problem in one error, no more memory than they take."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from jlora.errors import ConfigError, DataError
from jlora.models import read_params
from jlora.paths import leaves_by_path
from tests.models.folders import LLAMA, MOE, run_program, tensors_of, write_folder

TIED = LLAMA | {"tie_word_embeddings": True}


def assert_holds(params: Any, tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    """Each tensor is in its place, bit by bit, and there is nothing else."""
    arrays = leaves_by_path(params)
    count = 0
    for name, tensor in tensors.items():
        layer = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        if layer is None:
            found = arrays[name.replace(".", "/")]
        else:
            rest = layer[2].replace(".", "/")
            expert = re.match(r"mlp/experts/(\d+)/(\w+)/weight", rest)
            if expert is None:
                found = arrays[f"model/layers/{rest}"][int(layer[1])]
            elif expert[2] == "down_proj":
                found = arrays["model/layers/mlp/experts/down_proj"][int(layer[1]), int(expert[1])]
            else:
                both = arrays["model/layers/mlp/experts/gate_up_proj"][int(layer[1]), int(expert[1])]
                found = both[: len(both) // 2] if expert[2] == "gate_proj" else both[len(both) // 2 :]
        np.testing.assert_array_equal(np.asarray(found), tensor, err_msg=name)
        assert found.dtype == tensor.dtype
        count += tensor.size
    assert count == sum(array.size for array in arrays.values())


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_each_layer_is_in_its_place(tmp_path: Path, dtype: Any, files: int) -> None:
    tensors = tensors_of(LLAMA, dtype)
    params = read_params(write_folder(tmp_path, LLAMA, tensors, files))
    assert params["model"]["layers"]["mlp"]["down_proj"]["weight"].shape == (3, 12, 22)
    assert_holds(params, tensors)


def test_experts_are_one_array(tmp_path: Path) -> None:
    tensors = tensors_of(MOE)
    params = read_params(write_folder(tmp_path, MOE, tensors, 2))
    assert params["model"]["layers"]["mlp"]["experts"]["gate_up_proj"].shape == (3, 5, 14, 12)
    assert_holds(params, tensors)


def test_experts_that_are_one_tensor_on_the_disk(tmp_path: Path) -> None:
    tensors = tensors_of(MOE)
    stacked = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(3):
        at = f"model.layers.{layer}.mlp.experts"
        gates, ups, downs = (
            np.stack([tensors[f"{at}.{expert}.{name}_proj.weight"] for expert in range(5)])
            for name in ("gate", "up", "down")
        )
        stacked |= {f"{at}.gate_up_proj": np.concatenate([gates, ups], 1), f"{at}.down_proj": downs}
    assert_holds(read_params(write_folder(tmp_path, MOE, stacked)), tensors)


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        (ml_dtypes.bfloat16, "float32"),
        (np.float32, "bfloat16"),
        (np.float16, "bfloat16"),
        (ml_dtypes.bfloat16, "float16"),
        (np.float64, "float32"),
    ],
)
def test_numbers_are_rounded_once_to_a_dtype(tmp_path: Path, source: Any, wanted: str) -> None:
    tensors = tensors_of(LLAMA, source)
    params = read_params(write_folder(tmp_path, LLAMA, tensors), dtype=wanted)
    assert_holds(params, {name: tensor.astype(wanted) for name, tensor in tensors.items()})


def test_bfloat16_is_widened_bit_by_bit(tmp_path: Path) -> None:
    tensors = tensors_of(TIED, ml_dtypes.bfloat16)
    odd = np.arange(37 * 12, dtype=np.uint16).view(ml_dtypes.bfloat16)  # subnormal numbers
    odd[:5] = [np.nan, np.inf, -np.inf, -0.0, 3e38]
    tensors["model.embed_tokens.weight"] = odd.reshape(37, 12)
    params = read_params(write_folder(tmp_path, TIED, tensors), dtype=np.float32)
    found = np.asarray(params["model"]["embed_tokens"]["weight"])
    np.testing.assert_array_equal(found, odd.reshape(37, 12).astype(np.float32))
    assert np.signbit(found[0, 3])


def test_numbers_that_float16_cannot_hold(tmp_path: Path) -> None:
    tensors = tensors_of(LLAMA)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    folder = write_folder(tmp_path, LLAMA, tensors)
    with pytest.raises(DataError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: numbers above 65,504.*give bfloat16"):
        read_params(folder, dtype="float16")


def test_layers_of_several_dtypes(tmp_path: Path) -> None:
    tensors = tensors_of(LLAMA)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float16)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)  # on its own it may differ
    folder = write_folder(tmp_path, LLAMA, tensors)
    with pytest.raises(
        DataError, match=r"mlp/up_proj/weight: its layers have the dtypes float16 and float32.*give dtype"
    ):
        read_params(folder)
    assert_holds(read_params(folder, dtype="float32"), {n: t.astype(np.float32) for n, t in tensors.items()})


def test_float64_needs_x64(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, LLAMA, tensors_of(LLAMA, np.float64))
    with pytest.raises(DataError, match="model/norm/weight: float64 needs jax_enable_x64, or give dtype"):
        read_params(folder)
    with pytest.raises(ConfigError, match="dtype = int8: wanted a floating one"):
        read_params(folder, dtype="int8")


def test_all_problems_are_one_error(tmp_path: Path) -> None:
    tensors = tensors_of(LLAMA)
    del tensors["model.layers.2.mlp.up_proj.weight"], tensors["lm_head.weight"]
    tensors["model.norm.weight"] = np.ones(13, np.float32)
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.ones((12, 12), np.int8)
    tensors["model.layers.3.mlp.up_proj.weight"] = np.ones((22, 12), np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(12, np.float32)
    with pytest.raises(DataError) as caught:
        read_params(write_folder(tmp_path, LLAMA, tensors))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: 6 problems:")
    for part in (
        "model.layers.2.mlp.up_proj.weight [22, 12] is missing",
        "lm_head.weight [37, 12] is missing; where the head is the embedding, config.json says tie_word_embeddings",
        "model.norm.weight has the shape [13]: wanted [12], as config.json says",
        "model.layers.0.self_attn.q_proj.weight has the dtype I8: wanted F32, BF16, F16, F64",
        "'model.layers.3.mlp.up_proj.weight' is no tensor of this model; nearest: model.layers.",
        "'model.layers.0.self_attn.q_proj.bias' is no tensor of this model; nearest: model.layers.0.self_attn.",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("body", "head"),
    [("", ""), ("model.language_model.", ""), ("language_model.model.", "language_model.")],
)
def test_a_model_within_another(tmp_path: Path, body: str, head: str) -> None:
    tensors = tensors_of(LLAMA)

    def named(name: str) -> str:
        return body + name.removeprefix("model.") if name.startswith("model.") else head + name

    renamed = {named(name): tensor for name, tensor in tensors.items()}
    if body:
        renamed["vision_tower.patch.weight"] = np.ones((3, 2), np.float32)
    assert_holds(read_params(write_folder(tmp_path, LLAMA, renamed)), tensors)


def test_a_prefix_that_is_not_known_is_named(tmp_path: Path) -> None:
    tensors = {f"base_model.model.{name}": tensor for name, tensor in tensors_of(LLAMA).items()}
    with pytest.raises(DataError, match=r"names of its tensors begin with base_model\.model\.: wanted model\."):
        read_params(write_folder(tmp_path, LLAMA, tensors))


def test_buffers_that_transformers_computes_are_left(tmp_path: Path) -> None:
    tensors = tensors_of(LLAMA)
    buffer = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32) for layer in range(3)}
    assert_holds(read_params(write_folder(tmp_path, LLAMA, tensors | buffer)), tensors)


def test_a_head_beside_a_tied_embedding(tmp_path: Path) -> None:
    tensors = tensors_of(TIED)
    embedding = tensors["model.embed_tokens.weight"]
    assert_holds(read_params(write_folder(tmp_path / "equal", TIED, tensors | {"lm_head.weight": embedding})), tensors)

    other = embedding.copy()
    other[36, 11] += 1e-3
    folder = write_folder(tmp_path / "other", TIED, tensors | {"lm_head.weight": other})
    with pytest.raises(DataError, match=r"lm_head\.weight is there and differs.*tie_word_embeddings = false"):
        read_params(folder)

    alone = {name: tensor for name, tensor in tensors.items() if name != "model.embed_tokens.weight"}
    folder = write_folder(tmp_path / "alone", TIED, alone | {"lm_head.weight": embedding})
    assert_holds(read_params(folder), tensors)


def test_damaged_files(tmp_path: Path) -> None:
    tensors = tensors_of(LLAMA)
    folder = write_folder(tmp_path / "cut", LLAMA, tensors)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-40])
    with pytest.raises(DataError, match=r"model\.safetensors: .*cut short"):
        read_params(folder)
    folder = write_folder(tmp_path / "missing", LLAMA, tensors, 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(DataError, match=r"1 files of the index are missing: .*model-00002-of-00003"):
        read_params(folder)
    with pytest.raises(DataError, match=r"config\.json"):
        read_params(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(DataError, match="no safetensors file"):
        read_params(tmp_path / "empty")


def test_shardings_that_do_not_fit(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, LLAMA, tensors_of(LLAMA))
    with pytest.raises(ConfigError, match="sharding: it is no sharding, nor a tree of them that begins as params do"):
        read_params(folder, sharding={"model": None})
    with pytest.raises(ConfigError, match="sharding: at lm_head/weight found 'data', wanted a jax"):
        read_params(folder, sharding={"model": None, "lm_head": "data"})


def test_memory_belongs_to_the_params(tmp_path: Path) -> None:
    """What was read is not changed by donating it, nor by what is read later."""
    tensors = tensors_of(LLAMA)
    params = read_params(write_folder(tmp_path, LLAMA, tensors))
    doubled = jax.jit(lambda tree: jax.tree.map(lambda array: 2 * array, tree), donate_argnums=0)(params)
    assert_holds(doubled, {name: 2 * tensor for name, tensor in tensors.items()})


def test_each_device_has_its_part_alone(tmp_path: Path) -> None:
    config = LLAMA | {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
    program = """
        import sys
        import jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from jlora.models import param_shapes, parse_config, read_config, read_params, init_params, write_model
        from jlora.disk import write_tensors
        from jlora.paths import leaves_by_path
        from tests.models.folders import write_folder
        from pathlib import Path
        import json

        folder, config = Path(sys.argv[1]), json.loads(sys.argv[2])
        rng = np.random.default_rng(0)
        tensors = {}
        for path, leaf in leaves_by_path(param_shapes(parse_config(config))).items():
            whole = rng.standard_normal(leaf.shape).astype(np.float32)
            name = path.replace("/", ".")
            if path.startswith("model/layers/"):
                tensors |= {name.replace("layers", f"layers.{i}"): whole[i] for i in range(3)}
            else:
                tensors[name] = whole
        write_folder(folder, config, tensors, 2)
        mesh = jax.make_mesh((2, 4), ("data", "model"))

        def of(*axes):
            return NamedSharding(mesh, P(*axes))

        layers = {
            "self_attn": {name: {"weight": of(None, "model")} for name in ("q_proj", "k_proj", "v_proj")}
            | {"o_proj": {"weight": of(None, None, "model")}},
            "mlp": {
                "gate_proj": of(None, "model", "data"),
                "up_proj": of(None, "model"),
                "down_proj": of(None, "data", "model"),
            },
            "input_layernorm": of(),
            "post_attention_layernorm": of(),
        }
        model = {"embed_tokens": of(("data", "model")), "layers": layers, "norm": None}
        tree = {"model": model, "lm_head": of("model")}
        put, device_put = {}, jax.device_put

        def counting(array, device, **options):
            (own,) = device.device_set
            put[own.id] = put.get(own.id, 0) + array.nbytes
            return device_put(array, device, **options)

        jax.device_put = counting
        params = read_params(folder, sharding=tree)
        whole = read_params(folder)
        jax.device_put = device_put
        assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), params, whole))
        sizes = {}
        for path, array in leaves_by_path(params).items():
            for shard in array.addressable_shards:
                sizes[shard.device.id] = sizes.get(shard.device.id, 0) + shard.data.nbytes
        sizes[0] += sum(array.nbytes for array in leaves_by_path(whole).values())  # the second reading
        assert put == sizes, (put, sizes)
        table = params["model"]["embed_tokens"]["weight"]
        assert table.sharding.spec == P(("data", "model")) and table.addressable_shards[3].data.shape == (5, 16)
        try:
            read_params(folder, sharding=of(None, None, "model"))
        except Exception as error:
            print(type(error).__name__, error)
        write_model(folder.parent / "back", params, read_config(folder), folder)
        names = sorted(file.name for file in folder.iterdir())
        assert all((folder / name).read_bytes() == (folder.parent / "back" / name).read_bytes() for name in names)
    """
    flags = "--xla_force_host_platform_device_count=8"
    printed = run_program(program, tmp_path / "folder", json.dumps(config), flags=flags)
    assert "DataError" in printed
    assert "model/norm/weight [16]: the sharding" in printed


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
def test_memory_while_reading_is_that_of_the_params(tmp_path: Path) -> None:
    sizes = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    config = LLAMA | sizes | {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    program = """
        import json, sys
        from pathlib import Path
        import jax, ml_dtypes, numpy as np
        from jlora.models import param_shapes, parse_config, read_params
        from jlora.paths import leaves_by_path
        from tests.models.folders import write_folder

        folder, config = Path(sys.argv[1]), json.loads(sys.argv[2])
        shapes = leaves_by_path(param_shapes(parse_config(config)))
        if sys.argv[3] == "write":
            tensors = {}
            for path, leaf in shapes.items():
                name = path.replace("/", ".")
                if path.startswith("model/layers/"):
                    one = np.ones(leaf.shape[1:], ml_dtypes.bfloat16)
                    tensors |= {name.replace("layers", f"layers.{i}"): one for i in range(leaf.shape[0])}
                else:
                    tensors[name] = np.ones(leaf.shape, ml_dtypes.bfloat16)
            write_folder(folder, config, tensors, 2)
            raise SystemExit


        def highest():  # not ru_maxrss, which begins at that of the process that started this one
            (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
            return 1024 * int(line.split()[1])

        jax.block_until_ready(jax.numpy.ones(3) + 1)
        before = highest()
        params = read_params(folder, dtype="float32")
        peak = highest() - before
        arrays = leaves_by_path(params).values()
        print(peak, sum(array.nbytes for array in arrays), max(array.nbytes for array in arrays))
    """
    arguments = (tmp_path / "folder", json.dumps(config))
    run_program(program, *arguments, "write")
    peak, params, largest = map(int, run_program(program, *arguments, "read").split())
    assert 0.9 * params < peak < params + largest
