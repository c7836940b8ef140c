"""GGUF files for the tests, written with the package gguf: small tokenizers, and tensors of any type."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")

CORPUS = [
    "The quick brown fox jumps over the lazy dog, doesn't it? It'll be 12 o'clock, and the dog's there.",
    "def function(value):\n    return value + value * 128\n\n\nfor i in range(10):\n\tprint('the value', i)",
    "Été, déjà vu, 日本語のテキスト, naïve café, größer, 12345 67 8.90, the end of the text.",
    "the the the and and it it is is on on in in   spaces    here, and the other there",
]
# What the expressions cut at different places: digits, letters after capitals, contractions, marks and line ends.
EDGES = ["12345 678 a  12", "HelloWorld XMLHttp", "dog's I'D WE'RE", "x//x/ --\n\n\t\n!!\n x/\n", "  (x)  \r\n ½ Ⅳ"]
TEXTS = [
    "",
    " ",
    "the dog",
    " the dog",
    "   leading spaces, and trailing ones   ",
    "It's they'll WE'RE I'D the dog's",
    "def f(x):\n    return x + 1\n\n\n\tprint('ü')\r\n",
    "1 12 123 1234 12345.678 a  12 b   345",
    "日本語 テキスト größer \U0001f469\u200d\U0001f680 \u00a0 \u2003 ½ Ⅳ ١٢٣",
    "Hello/World//x -- <- >= != {} [] ... !!! ?? \\n",
    "<|start|>user\nthe question<|end|>\n<|start|>",
    "<|start|><|end|> the <think>hm</think> <|start|",
    "HelloWorld camelCaseName XMLHttpRequest",
    *EDGES,
    "".join(EDGES),
]
CHAT = "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
TOKENS = "tokenizer.ggml.tokens"
_CONTROL, _USER = 3, 4


@functools.cache
def byte_level(pre: str) -> dict[str, Any]:
    """tokenizer.* of a byte-level BPE that was trained on the corpus."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    # Merges across all edges, so that where a text is cut changes its ids.
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=419,
        show_progress=False,
        special_tokens=["<|end|>", "<|start|>", "<|unknown|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([*CORPUS, *3 * EDGES], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    types = [_CONTROL] * 3 + [1] * (len(tokens) - 3) + [_USER] * 2
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, "<think>", "</think>"],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT,
    }


@functools.cache
def sentencepiece() -> dict[str, Any]:
    """tokenizer.* of a BPE over characters with bytes to fall back on."""
    words = [word for line in CORPUS for word in line.replace(" ", " \u2581").split()]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.train_from_iterator(words, tokenizers.trainers.BpeTrainer(vocab_size=200, show_progress=False))
    learned = tokenizer.get_vocab()
    pieces = sorted(learned, key=lambda piece: (len(piece) == 1, learned[piece]))
    pieces += [piece for piece in ("\u2581\u2581", "\u2581\u2581\u2581\u2581", "\n") if piece not in learned]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*first, *pieces, "<|start|>", "<|end|>", "<think>", "</think>"]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces), _CONTROL, _CONTROL, _USER, _USER]
    scores = [0.0] * len(first) + [-float(number) for number in range(len(pieces))] + [0.0] * 4
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
    }


def write_file(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Any],
    types: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """A GGUF file; tensors are float32, or of the type that `types` names; bytes are packed already."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, array in tensors.items():
        kind = types.get(name, "F32")
        if array.dtype == np.int8:
            writer.add_tensor(name, array)
        elif kind == "F32" and array.dtype != np.uint8:
            writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
        else:
            type_ = gguf.GGMLQuantizationType[kind]
            packed = gguf.quantize(array, type_) if array.dtype != np.uint8 else array
            writer.add_tensor(name, packed, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    (writer.add_array if isinstance(value, list) else add[type(value)])(key, value)


def llama_settings(**changes: Any) -> dict[str, Any]:
    """The settings of a tiny Llama; None leaves one out."""
    settings = {
        "llama.block_count": 2,
        "llama.context_length": 64,
        "llama.embedding_length": 24,
        "llama.feed_forward_length": 22,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 5000.0,
        "llama.rope.dimension_count": 6,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return {key: value for key, value in settings.items() if value is not None}


def llama_tensors(rng: np.random.Generator, vocabulary: int, layers: int = 2) -> dict[str, Any]:
    """Random tensors of the tiny Llama under llama.cpp's names."""
    shapes = {
        "attn_norm": (24,),
        "attn_q": (24, 24),
        "attn_k": (12, 24),
        "attn_v": (12, 24),
        "attn_output": (24, 24),
        "ffn_norm": (24,),
        "ffn_gate": (22, 24),
        "ffn_up": (22, 24),
        "ffn_down": (24, 22),
    }
    names = {"token_embd.weight": (vocabulary, 24), "output_norm.weight": (24,)}
    names |= {f"blk.{layer}.{part}.weight": shape for layer in range(layers) for part, shape in shapes.items()}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in names.items()}


def write_llama(path: Path, rng: np.random.Generator, **changes: Any) -> Path:
    """A tiny Llama with a byte-level tokenizer; `changes` of its settings."""
    tokenizer = byte_level("smollm")
    tensors = llama_tensors(rng, len(tokenizer["tokenizer.ggml.tokens"]))
    return write_file(path, "llama", llama_settings(**changes) | tokenizer, tensors)
