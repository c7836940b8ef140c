"""GGUF adapters: read back by gguf's own reader, and by what llama.cpp computes with them, in float64."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora import LoraConfig, checkpoints, cli
from jlora.errors import DataError
from jlora.interop import gguf as ours
from jlora.interop.gguf import write_gguf
from jlora.interop.peft import write_peft
from tests.interop.files import Rng

gguf = pytest.importorskip("gguf")

HEADS, KV_HEADS, HEAD, WIDTH, VOCABULARY = 3, 1, 10, 7, 13
SETTINGS = {
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
}
LAYER = "model.layers.1"
SHAPES = {  # Hugging Face's name -> llama.cpp's, and the shape
    f"{LAYER}.self_attn.q_proj.weight": ("blk.1.attn_q.weight", (HEADS * HEAD, WIDTH)),
    f"{LAYER}.self_attn.k_proj.weight": ("blk.1.attn_k.weight", (KV_HEADS * HEAD, WIDTH)),
    f"{LAYER}.self_attn.v_proj.weight": ("blk.1.attn_v.weight", (KV_HEADS * HEAD, WIDTH)),
    f"{LAYER}.self_attn.o_proj.weight": ("blk.1.attn_output.weight", (WIDTH, HEADS * HEAD)),
    f"{LAYER}.mlp.gate_proj.weight": ("blk.1.ffn_gate.weight", (11, WIDTH)),
    f"{LAYER}.mlp.up_proj.weight": ("blk.1.ffn_up.weight", (11, WIDTH)),
    f"{LAYER}.mlp.down_proj.weight": ("blk.1.ffn_down.weight", (WIDTH, 11)),
    "lm_head.weight": ("output.weight", (VOCABULARY, WIDTH)),
}
EMBED = "model.embed_tokens.weight"
RANKS = (2, 3, 2, 2, 5, 2, 2, 2)
ALPHAS = (4.0, 6.0, 4.0, 4.0, 10.0, 7.0, 0.0, -3.0)


def normal(rng: Rng, *shape: int) -> Any:
    return rng.standard_normal(shape).astype("float32")


def base_of(folder: Path, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SETTINGS | settings))
    return folder


def made(rng: Rng) -> tuple[dict[str, Any], LoraConfig]:
    entries = {
        name: {"A": normal(rng, shape[1], rank), "B": normal(rng, rank, shape[0])}
        for (name, (_, shape)), rank in zip(SHAPES.items(), RANKS, strict=True)
    }
    entries[EMBED] = {"A": normal(rng, VOCABULARY, 2), "B": normal(rng, 2, WIDTH)}
    config = LoraConfig(
        rank=2,
        alpha=4,
        rank_pattern=dict(zip(SHAPES, RANKS, strict=True)),
        alpha_pattern=dict(zip(SHAPES, ALPHAS, strict=True)),
        factorizations={EMBED: "io", "**": "oi"},
    )
    return entries, config


def delta(entry: dict[str, Any], alpha: float) -> Any:
    """The update of a weight (out, in), in float64."""
    a, b = (entry[part].astype(np.float64) for part in "AB")
    return alpha / a.shape[1] * (a @ b).T


def written(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields and the tensors of a file, as gguf reads them; the axes as NumPy has them."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def in_llama_cpp(tensors: dict[str, Any], name: str, alpha: float) -> Any:
    """What llama.cpp adds to a matrix: alpha / r * b@a, and with an alpha of 0 b@a."""
    a, b = (tensors[f"{name}.lora_{part}"].astype(np.float64) for part in "ab")
    return (alpha / b.shape[1] if alpha else 1.0) * (b @ a)


def rotated_pairs_together(weight: Any, heads: int) -> Any:
    """Rows as llama.cpp has them: i and i + half, which rotate together, behind each other."""
    half = weight.shape[0] // heads // 2
    order = [head * 2 * half + part * half + i for head in range(heads) for i in range(half) for part in range(2)]
    return weight[order]


def test_llama_cpp_adds_what_the_adapter_says(tmp_path: Path, rng: Rng) -> None:
    entries, config = made(rng)
    write_gguf(tmp_path / "x.gguf", entries, config, base=base_of(tmp_path / "base"))
    fields, tensors = written(tmp_path / "x.gguf")
    assert fields["general.architecture"] == "llama"
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    alpha = fields["adapter.lora.alpha"]
    assert alpha == 10
    assert len(tensors) == 2 * len(entries)
    for (name, (there, _)), given in zip(SHAPES.items(), ALPHAS, strict=True):
        assert tensors[f"{there}.lora_b"].shape[1] == 5
        wanted = delta(entries[name], given)
        if ".q_proj" in name or ".k_proj" in name:
            wanted = rotated_pairs_together(wanted, HEADS if ".q_proj" in name else KV_HEADS)
        found = in_llama_cpp(tensors, there, alpha)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5, err_msg=name)
    a, b = (tensors[f"token_embd.weight.lora_{part}"].astype(np.float64) for part in "ab")
    assert (a.shape, b.shape) == ((VOCABULARY, 5), (WIDTH, 5))
    wide = {part: array.astype(np.float64) for part, array in entries[EMBED].items()}
    np.testing.assert_allclose(alpha / 5 * a @ b.T, 2 * wide["A"] @ wide["B"], rtol=0, atol=2e-5)


def test_attention_says_the_same_with_reordered_rows(tmp_path: Path, rng: Rng) -> None:
    """Scores after rotation: Hugging Face's, halves apart, and llama.cpp's of Llama, pairs behind each other."""
    entries, config = made(rng)
    write_gguf(tmp_path / "x.gguf", entries, config, base=base_of(tmp_path / "base"))
    fields, tensors = written(tmp_path / "x.gguf")
    x = rng.standard_normal((4, WIDTH))
    angles = np.outer(np.arange(4), 0.7 ** np.arange(HEAD // 2))[:, None]  # position, head, pair
    cos, sin = np.cos(angles), np.sin(angles)

    def rotated(first: Any, second: Any) -> tuple[Any, Any]:
        return first * cos - second * sin, first * sin + second * cos

    scores = []
    for layout in ("halves", "pairs"):
        turned = []
        for part, heads in (("q", HEADS), ("k", KV_HEADS)):
            name = f"{LAYER}.self_attn.{part}_proj.weight"
            if layout == "halves":
                weight = delta(entries[name], dict(zip(SHAPES, ALPHAS, strict=True))[name])
                split = (x @ weight.T).reshape(4, heads, 2, HEAD // 2)
                turned.append(np.stack(rotated(split[:, :, 0], split[:, :, 1]), axis=-1))
            else:
                weight = in_llama_cpp(tensors, f"blk.1.attn_{part}.weight", fields["adapter.lora.alpha"])
                split = (x @ weight.T).reshape(4, heads, HEAD // 2, 2)
                turned.append(np.stack(rotated(split[..., 0], split[..., 1]), axis=-1))
        q, k = turned
        scores.append(np.einsum("shdp,tgdp->hst", q, k))
    assert np.abs(scores[0]).max() > 1
    np.testing.assert_allclose(scores[1], scores[0], rtol=0, atol=1e-4 * np.abs(scores[0]).max())


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("Qwen2ForCausalLM", "qwen2"),
        ("Qwen3ForCausalLM", "qwen3"),
        ("GemmaForCausalLM", "gemma"),
        ("Gemma2ForCausalLM", "gemma2"),
        ("Gemma3ForCausalLM", "gemma3"),
    ],
)
def test_others_keep_the_order_of_their_rows(architecture: str, name: str, tmp_path: Path, rng: Rng) -> None:
    entries, config = made(rng)
    entries = {path: entry for path, entry in entries.items() if LAYER in path}
    write_gguf(tmp_path / "x.gguf", entries, config, base=base_of(tmp_path / "base", architectures=[architecture]))
    fields, tensors = written(tmp_path / "x.gguf")
    assert fields["general.architecture"] == name
    for path, entry in entries.items():
        wanted = delta(entry, dict(zip(SHAPES, ALPHAS, strict=True))[path])
        found = in_llama_cpp(tensors, SHAPES[path][0], fields["adapter.lora.alpha"])
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5, err_msg=path)


def test_an_alpha_of_zero_adds_nothing(tmp_path: Path, rng: Rng) -> None:
    """llama.cpp takes an alpha of 0 for none, and scales by 1 then."""
    name = f"{LAYER}.mlp.up_proj.weight"
    entry = {"A": normal(rng, WIDTH, 2), "B": normal(rng, 2, 11)}
    config = LoraConfig(rank=2, alpha=0, factorizations={"**": "oi"})
    write_gguf(tmp_path / "x.gguf", {name: entry}, config, base=base_of(tmp_path / "base"))
    fields, tensors = written(tmp_path / "x.gguf")
    assert not in_llama_cpp(tensors, SHAPES[name][0], fields["adapter.lora.alpha"]).any()


def test_the_command(tmp_path: Path, rng: Rng, capsys: pytest.CaptureFixture[str]) -> None:
    entries, config = made(rng)
    write_peft(tmp_path / "peft", entries, config)
    base = base_of(tmp_path / "base")
    arguments = ["convert", tmp_path / "peft", "--to", "gguf", "--out", tmp_path / "out", "--base", base]
    assert cli.main([*map(str, arguments)]) == 0
    write_gguf(tmp_path / "x.gguf", entries, config, base=base)
    found, wanted = written(tmp_path / "out" / "adapter.gguf"), written(tmp_path / "x.gguf")
    assert found[0]["adapter.lora.alpha"] == wanted[0]["adapter.lora.alpha"]
    assert found[1].keys() == wanted[1].keys()
    for name, array in wanted[1].items():
        np.testing.assert_allclose(found[1][name], array, rtol=1e-6, err_msg=name)
    assert cli.main([*map(str, arguments)]) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.main([*map(str, arguments), "--force"]) == 0
    with pytest.raises(DataError, match="give its folder as base"):
        checkpoints.convert(tmp_path / "peft", tmp_path / "y", "gguf")


ENTRY = {"A": (WIDTH, 2), "B": (2, 11)}
UP = f"{LAYER}.mlp.up_proj.weight"
REFUSED: dict[str, tuple[dict[str, Any], str, dict[str, Any], str]] = {
    "architecture": (
        {UP: ENTRY},
        "oi",
        {"architectures": ["FalconH1ForCausalLM"]},
        "how llama.cpp lays out its weights",
    ),
    "draft": ({UP: ENTRY}, "oi", {"draft_vocab_size": 7}, "how llama.cpp lays out its weights"),
    "layers": ({UP: ENTRY}, "oi", {"num_hidden_layers": None}, "num_hidden_layers = None: wanted a whole number"),
    "no such layer": ({UP.replace(".1.", ".2."): ENTRY}, "oi", {}, "llama has no tensor for model.layers.2.mlp"),
    "no such module": ({"model.layers.1.what.weight": ENTRY}, "oi", {}, "llama has no tensor for model.layers.1.what"),
    "DoRA": ({UP: ENTRY | {"magnitude": (11,)}}, "oi", {}, "a part magnitude"),
    "value": ({UP: {"value": (11, WIDTH)}}, "oi", {}, "a part value"),
    "transposed": ({UP: ENTRY}, "io", {}, "conv1d; wanted a matrix"),
    "tied head": (
        {"lm_head.weight": {"A": (WIDTH, 2), "B": (2, VOCABULARY)}},
        "oi",
        {"tie_word_embeddings": True},
        "the embedding is the head too",
    ),
    "tied embedding": (
        {EMBED: {"A": (VOCABULARY, 2), "B": (2, WIDTH)}},
        "io",
        {"architectures": ["Gemma2ForCausalLM"], "tie_word_embeddings": None},
        "the embedding is the head too",
    ),
    "heads": (
        {f"{LAYER}.self_attn.q_proj.weight": {"A": (WIDTH, 2), "B": (2, 14)}},
        "oi",
        {},
        "B has 14 rows, for 3 heads in",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_has_no_place_for_is_refused(case: str, tmp_path: Path, rng: Rng) -> None:
    shapes, roles, settings, message = REFUSED[case]
    base = base_of(tmp_path / "base")
    data = {key: value for key, value in (SETTINGS | settings).items() if value is not None}
    (base / "config.json").write_text(json.dumps(data))
    entries = {path: {part: normal(rng, *shape) for part, shape in parts.items()} for path, parts in shapes.items()}
    with pytest.raises(DataError, match=message):
        write_gguf(tmp_path / "x.gguf", entries, LoraConfig(rank=2, factorizations={"**": roles}), base=base)
    assert not (tmp_path / "x.gguf").exists()


def test_without_gguf_the_way_to_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DataError, match=r"gguf is not installed: pip install 'jlora\[gguf\]'"):
        ours.write_gguf(tmp_path / "x.gguf", {}, LoraConfig(), base=tmp_path)


def test_nothing_imports_gguf_before_it_is_needed() -> None:
    program = "import sys, jlora.checkpoints; jlora.checkpoints.convert; assert 'gguf' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
