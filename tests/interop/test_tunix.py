"""The mappings to tunix's trees: beside NumPy, and beside tunix itself where it is installed."""

import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.interop.peft import read_peft, write_peft
from jlora.interop.tunix import gemma3, qwen3
from jlora.paths import leaves_by_path, nest
from tests.interop.files import delta, embedding_pair, experts_pair, pair, write_folder
from tests.reference import assert_close

Rng = np.random.Generator
N, K, H, D, F, V, E = 4, 2, 6, 16, 22, 37, 3
SIZES = {"num_heads": N, "num_kv_heads": K, "head_dim": H}
SHAPES = {
    "self_attn.q_proj": (N * H, D),
    "self_attn.k_proj": (K * H, D),
    "self_attn.v_proj": (K * H, D),
    "self_attn.o_proj": (D, N * H),
    "mlp.gate_proj": (F, D),
    "mlp.up_proj": (F, D),
    "mlp.down_proj": (D, F),
}


def layer_tensors(rng: Rng, names: tuple[str, ...] = tuple(SHAPES)) -> dict[str, Any]:
    """A and B of a layer's weights."""
    return {k: v for name in names for k, v in pair(rng, f"model.layers.1.{name}", *SHAPES[name]).items()}


def merged_with_zeros(folder: Path, mapping: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The updates by path, in the tree."""
    params = nest({path: jnp.zeros(shape) for path, shape in shapes.items()})
    adapters, config = read_peft(folder, mapping, params=params)
    return leaves_by_path(jlora.merge_params(params, adapters, config))


def assert_tree(folder: Path, mapping: Any, wanted: dict[str, Any]) -> None:
    """The updates in the tree are these, and the file comes back to the byte."""
    found = merged_with_zeros(folder, mapping, {path: value.shape for path, value in wanted.items()})
    for path, value in wanted.items():
        assert_close(found[path], value)
    write_peft(folder.parent / "again", *read_peft(folder, mapping), mapping)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder.parent / "again" / file).read_bytes() == (folder / file).read_bytes()


def updates(tensors: dict[str, Any], kind: str = "linear") -> Any:
    """Name in a layer -> its update as Hugging Face has it."""
    return lambda name: delta(tensors, f"model.layers.1.{name}", kind)


def test_qwen3(tmp_path: Path, rng: Rng) -> None:
    tensors = layer_tensors(rng) | embedding_pair(rng, "model.embed_tokens", V, D) | pair(rng, "lm_head", V, D)
    tensors |= {"model.norm.weight": rng.standard_normal(D).astype("float32")}
    of = updates(tensors)
    wanted = {f"mlp/{name}_proj/kernel": of(f"mlp.{name}_proj").T for name in ("gate", "up", "down")}
    for name, heads in (("q", N), ("k", K), ("v", K)):
        wanted[f"attn/{name}_proj/w"] = of(f"self_attn.{name}_proj").T.reshape(D, heads, H)
    wanted["attn/o_proj/w"] = of("self_attn.o_proj").T.reshape(N, H, D)
    wanted = {f"layers/1/{path}": value for path, value in wanted.items()}
    wanted["embedder/input_embedding"] = delta(tensors, "model.embed_tokens", "embedding")
    wanted["lm_head/w"] = delta(tensors, "lm_head", "linear").T
    wanted["final_norm/w"] = tensors["model.norm.weight"].astype("float64")
    assert_tree(write_folder(tmp_path / "a", tensors, modules_to_save=["norm"]), qwen3(**SIZES), wanted)


def test_qwen3_experts_of_transformers_5(tmp_path: Path, rng: Rng) -> None:
    name = "model.layers.1.mlp.experts"
    tensors = experts_pair(rng, name, E, D, F) | pair(rng, "model.layers.1.mlp.gate", E, D)
    folder = write_folder(tmp_path / "a", tensors, target_parameters=["experts.down_proj"])
    down = delta(tensors, name, "experts").transpose(0, 2, 1)
    router = delta(tensors, "model.layers.1.mlp.gate", "linear").T
    assert_tree(folder, qwen3(**SIZES), {"layers/1/mlp/down_proj": down, "layers/1/mlp/router/kernel": router})
    both = write_folder(tmp_path / "b", tensors, target_parameters=["experts.gate_up_proj"])
    with pytest.raises(jlora.DataError, match=r"mlp.experts.gate_up_proj: no row of the mapping has this name"):
        read_peft(both, qwen3(**SIZES))


def test_qwen3_experts_of_transformers_4(tmp_path: Path, rng: Rng) -> None:
    tensors: dict[str, Any] = {}
    wanted = {}
    for name, (out, ins) in {"gate": (F, D), "up": (F, D), "down": (D, F)}.items():
        modules = [f"model.layers.1.mlp.experts.{e}.{name}_proj" for e in range(E)]
        for module in modules:
            tensors |= pair(rng, module, out, ins)
        stacked = np.stack([delta(tensors, module, "linear").T for module in modules])
        wanted[f"layers/1/mlp/{name}_proj"] = stacked
    assert_tree(write_folder(tmp_path / "a", tensors), qwen3(**SIZES, num_experts=E), wanted)


@pytest.mark.parametrize("prefix", ["model", "model.language_model"])
def test_gemma3(prefix: str, tmp_path: Path, rng: Rng) -> None:
    tensors = layer_tensors(rng) | embedding_pair(rng, "model.embed_tokens", V, D)
    of = updates(tensors)
    wanted = {f"mlp/{name}_proj/kernel": of(f"mlp.{name}_proj").T for name in ("gate", "up", "down")}
    q, k, v = (of(f"self_attn.{n}_proj").reshape(-1, H, D).transpose(0, 2, 1) for n in "qkv")
    wanted |= {"attn/q_einsum/w": q, "attn/kv_einsum/w": np.stack([k, v])}
    wanted["attn/attn_vec_einsum/w"] = of("self_attn.o_proj").T.reshape(N, H, D)
    wanted = {f"layers/1/{path}": value for path, value in wanted.items()}
    wanted["embedder/input_embedding"] = delta(tensors, "model.embed_tokens", "embedding")
    tensors = {key.replace("model", prefix, 1): value for key, value in tensors.items()}
    assert_tree(write_folder(tmp_path / "a", tensors), gemma3(**SIZES, prefix=prefix), wanted)


def test_gemma3_with_as_many_key_heads(tmp_path: Path, rng: Rng) -> None:
    shapes = dict.fromkeys("qv", (N * H, D))
    tensors = {k: v for n, s in shapes.items() for k, v in pair(rng, f"model.layers.1.self_attn.{n}_proj", *s).items()}
    of = updates(tensors)
    q, v = (of(f"self_attn.{n}_proj").reshape(N, H, D).transpose(0, 2, 1) for n in "qv")
    mapping = gemma3(num_heads=N, num_kv_heads=N, head_dim=H)
    wanted = {"layers/1/attn/qkv_einsum/w": np.stack([q, np.zeros_like(q), v])}
    assert_tree(write_folder(tmp_path / "a", tensors), mapping, wanted)


def test_the_head_of_gemma3_is_its_embedding(tmp_path: Path, rng: Rng) -> None:
    with pytest.raises(jlora.DataError, match=r"lm_head.weight: no row of the mapping has this name"):
        read_peft(write_folder(tmp_path / "a", pair(rng, "lm_head", V, D)), gemma3(**SIZES))


def tunix_tree(kind: str, folder: Path, **sizes: Any) -> Any:
    """The params of a tunix model that tunix loaded from a checkpoint of Hugging Face's."""
    name, hidden_dim = kind.removesuffix("_moe"), 20 if kind.endswith("moe") else F
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tunix and what it imports
        model_lib = pytest.importorskip(f"tunix.models.{name}.model")
        module = "params_safetensors" if name == "gemma3" else "params"
        loader = pytest.importorskip(f"tunix.models.{name}.{module}")
        from flax import nnx

        config = model_lib.ModelConfig(
            num_layers=2, embed_dim=D, hidden_dim=hidden_dim, **SIZES, param_dtype=jnp.float32, **sizes
        )
        model = loader.create_model_from_safe_tensors(str(folder), config, dtype=jnp.float32)
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"]
LIVE = {
    "qwen3": (
        "qwen3",
        {"target_modules": [*ALL, "lm_head"], "modules_to_save": ["norm", "q_norm"], "use_rslora": True},
        {"vocab_size": V, "rope_theta": 10_000, "norm_eps": 1e-6},
        qwen3(**SIZES),
    ),
    "qwen3 dora": (
        "qwen3",
        {"target_modules": ["q_proj", "o_proj", "down_proj"], "use_dora": True},
        {"vocab_size": V, "rope_theta": 10_000, "norm_eps": 1e-6},
        qwen3(**SIZES),
    ),
    "qwen3 moe": (
        "qwen3_moe",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
        {"vocab_size": V, "rope_theta": 10_000, "norm_eps": 1e-6, "num_experts": E, "num_experts_per_tok": 2},
        qwen3(**SIZES),
    ),
    "gemma3": (
        "gemma3",
        {"target_modules": ALL[:-1], "modules_to_save": ["k_norm", "post_feedforward_layernorm"]},
        {"num_embed": V, "sliding_window_size": 4},
        gemma3(**SIZES),
    ),
}


@pytest.mark.parametrize("name", LIVE)
def test_beside_tunix(name: str, tmp_path: Path) -> None:
    """Merged by jlora in tunix's tree: what tunix loads of the model that PEFT merged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("tunix.models.qwen3.model")
    models = pytest.importorskip("tests.interop.models")
    kind, fields, sizes, mapping = LIVE[name]
    case = models.Case(getattr(models, kind), fields, {"tie_word_embeddings": kind == "gemma3"})
    base = models.base_of(case)
    with models.quiet():
        base.save_pretrained(str(tmp_path / "base"))
    _, live = models.adapted(case)
    folder = models.save(case, live, tmp_path / "adapter")
    with models.quiet():
        live.merge_and_unload().save_pretrained(str(tmp_path / "merged"))
    params = tunix_tree(kind, tmp_path / "base", **sizes)
    wanted = leaves_by_path(tunix_tree(kind, tmp_path / "merged", **sizes))
    adapters, config = read_peft(folder, mapping, params=params)
    merged = jlora.merge_params(params, adapters, config)
    changed = [path for path, value in leaves_by_path(params).items() if not np.array_equal(value, wanted[path])]
    assert len(changed) >= 2 * len(set(fields["target_modules"]) - {"embed_tokens", "lm_head", "k_proj"})
    for path, value in leaves_by_path(merged).items():
        np.testing.assert_allclose(value, wanted[path], rtol=0, atol=1e-5, err_msg=path)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
