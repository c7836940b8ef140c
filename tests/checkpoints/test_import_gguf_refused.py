"""GGUF files with something wrong: one clear error, and nothing is left behind."""

import contextlib
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora import DataError
from jlora.checkpoints import import_gguf
from tests.ggufs import TOKENS, byte_level, llama_settings, llama_tensors, sentencepiece, write_file, write_llama


def changed(**changes: Any) -> Any:
    """Writes a Llama with other metadata; a value of None leaves a key out."""

    def write(path: Path, rng: np.random.Generator) -> None:
        tokenizer = byte_level("smollm")
        tensors = llama_tensors(rng, len(tokenizer[TOKENS]))
        new = {key.replace("__", "."): value for key, value in changes.items()}
        metadata = llama_settings() | tokenizer | new
        write_file(path, "llama", {key: value for key, value in metadata.items() if value is not None}, tensors)

    return write


def with_tensors(change: Any, architecture: str = "llama", **types: str) -> Any:
    """Writes a Llama with other tensors."""

    def write(path: Path, rng: np.random.Generator) -> None:
        tokenizer = byte_level("smollm")
        tensors = llama_tensors(rng, len(tokenizer[TOKENS]))
        change(tensors)
        metadata = llama_settings() | tokenizer
        write_file(path, architecture, metadata, tensors, {f"{name}.weight": kind for name, kind in types.items()})

    return write


def bytes_changed(change: Any) -> Any:
    """Writes a Llama whose bytes are others."""

    def write(path: Path, rng: np.random.Generator) -> None:
        write_llama(path, rng)
        path.write_bytes(change(path.read_bytes()))

    return write


def set_at(place: int, contents: bytes) -> Any:
    return bytes_changed(lambda data: data[:place] + contents + data[place + len(contents) :])


PRE = "tokenizer.ggml."
WRONG: dict[str, tuple[Any, str]] = {
    "nothing": (lambda path, rng: None, "x.gguf: cannot be read: No such file"),
    "a folder": (lambda path, rng: path.mkdir(), "x.gguf: cannot be read: no regular file"),
    "empty": (bytes_changed(lambda data: b""), "x.gguf: is no GGUF file of a model$"),
    "text": (bytes_changed(lambda data: b"words, words"), "x.gguf: is no GGUF file of a model$"),
    "a zip file": (bytes_changed(lambda data: b"PK\3\4" + data), "is no GGUF file of a model; it is a zip file"),
    "git-lfs": (bytes_changed(lambda data: b"version https://git-lfs\n"), "it is a pointer of git-lfs"),
    "version 1": (set_at(4, b"\1"), "x.gguf: GGUF version 1; versions 2, 3 are known here"),
    "big-endian": (set_at(4, b"\0\0\0\3"), "x.gguf: is big-endian; give the little-endian"),
    "cut in the header": (bytes_changed(lambda data: data[:200]), "x.gguf: cut short or damaged: its header goes on"),
    "cut in the counts": (bytes_changed(lambda data: data[:13]), "x.gguf: cut short or damaged: its header goes on"),
    "cut in the tensors": (bytes_changed(lambda data: data[:-1]), "x.gguf: cut short: .*ends at byte"),
    "too many pairs": (set_at(16, b"\xff" * 8), "x.gguf: (cut short or damaged|.* is not UTF-8|.* type )"),
    "too many tensors": (set_at(8, b"\xff" * 8), "x.gguf: "),
    "architecture": (changed(general__architecture="falcon"), ""),
    "an adapter": (changed(general__type="adapter"), "general.type = 'adapter'; wanted a model"),
    "a part": (changed(split__count=3), "is one of 3 parts; join them first"),
    "alignment": (changed(general__alignment="wide"), "general.alignment = 'wide': wanted a power of two"),
    "no layers": (changed(llama__block_count=None), "x.gguf: no llama.block_count, which every llama has"),
    "many layers": (changed(llama__block_count=1 << 31), "2,147,483,648 layers .llama.block_count. in 20 tensors"),
    "odd heads": (changed(llama__rope__dimension_count=5), "x.gguf: heads of 5 numbers, which cannot rotate in pairs"),
    "another layout": (
        changed(llama__tensor_data_layout="rows"),
        "tensor_data_layout = 'rows': known here with Meta AI",
    ),
    "a count that is none": (changed(llama__block_count="two"), "llama.block_count = 'two': wanted one whole number"),
    "a layer of its own": (
        changed(llama__feed_forward_length=[22, 22]),
        r"feed_forward_length = \[22, 22\]: wanted one",
    ),
    "zero": (changed(llama__embedding_length=0), "llama.embedding_length = 0: wanted one whole number of at least 1"),
    "a negative number": (changed(llama__rope__freq_base=-1.0), "rope.freq_base = -1.0: wanted a positive number"),
    "experts": (changed(llama__expert_count=8), "llama.expert_count = 8: known here with 0 only"),
    "half rotated": (changed(llama__attention__key_length=12), "rope.dimension_count = 6: known here with 12 only"),
    "yarn": (changed(llama__rope__scaling__type="yarn"), "rope.scaling.type = 'yarn': known here are none and linear"),
    "a setting": (changed(llama__logit_scale=2.0), "settings that are not known here.*: llama.logit_scale = 2.0"),
    "vocabulary": (changed(llama__vocab_size=7), "llama.vocab_size = 7: known here with 421 only"),
    "missing tensors": (
        with_tensors(lambda tensors: [tensors.pop(f"blk.{i}.ffn_up.weight") for i in range(2)]),
        "2 problems:\n  blk.0.ffn_up.weight is missing\n  blk.1.ffn_up.weight is missing",
    ),
    "no embedding": (with_tensors(lambda tensors: tensors.pop("token_embd.weight")), "token_embd.weight is missing"),
    "another tensor": (
        with_tensors(lambda tensors: tensors.update(extra=np.ones((3, 5), np.float32))),
        r"'extra' \[3, 5\] is not known here",
    ),
    "a wrong shape": (
        with_tensors(lambda tensors: tensors.update({"blk.1.attn_k.weight": np.ones((10, 24), np.float32)})),
        r"blk.1.attn_k.weight \[10, 24\]: wanted \[12, 24\]",
    ),
    "transposed": (
        with_tensors(lambda tensors: tensors.update({"blk.0.ffn_up.weight": np.ones((24, 22), np.float32)})),
        r"blk.0.ffn_up.weight \[24, 22\]: wanted \[22, 24\]",
    ),
    "too many frequencies": (
        with_tensors(lambda tensors: tensors.update({"rope_freqs.weight": np.ones(4, np.float32)})),
        "rope_freqs.weight: 4 numbers in a llama with 3 pairs in a head",
    ),
    "frequencies in a matrix": (
        with_tensors(lambda tensors: tensors.update({"rope_freqs.weight": np.ones((3, 1), np.float32)})),
        r"rope_freqs.weight \[3, 1\]: wanted one number for each pair of a head",
    ),
    "frequencies": (
        with_tensors(lambda tensors: tensors.update({"rope_freqs.weight": np.array([1, 2, 3], np.float32)})),
        "rope_freqs.weight is not what Llama 3.1 and 3.2 make it of a factor",
    ),
    "not a number": (
        with_tensors(lambda tensors: tensors["blk.1.ffn_up.weight"].__setitem__((3, 5), np.nan)),
        "'blk.1.ffn_up.weight' holds NaN or infinity: damaged, or badly quantised",
    ),
    "whole numbers": (
        with_tensors(lambda tensors: tensors.update(odd=np.ones(4, np.int8))),
        r"odd \(I8\): gguf makes no numbers of this type",
    ),
    "no tokenizer": (changed(tokenizer__ggml__model=None), "no tokenizer.ggml.model; wanted a file"),
    "another tokenizer": (changed(tokenizer__ggml__model="bert"), "model = 'bert'; known here are gpt2 and llama"),
    "another pre-tokenizer": (
        changed(tokenizer__ggml__pre="viking"),
        "tokenizer.ggml.pre = 'viking': how it cuts a text is not known here; known are gpt-2, ",
    ),
    "no pre-tokenizer": (changed(tokenizer__ggml__pre=None), "no tokenizer.ggml.pre; wanted"),
    "no merges": (changed(tokenizer__ggml__merges=None), "tokenizer.ggml.merges: wanted a list of strings, found none"),
    "a merge that is none": (
        changed(tokenizer__ggml__merges=["a b", "ab"]),
        "merges: 'ab': wanted two tokens and",
    ),
    "a merge of no tokens": (changed(tokenizer__ggml__merges=["z zzz"]), "its tokens and merges do not fit"),
    "types": (changed(tokenizer__ggml__token_type=[1, 1]), "token_type: 2 for 421 tokens"),
    "no scores": (changed(tokenizer__ggml__model="llama"), "no tokens for the bytes <0x00>, <0x01>, "),
    "the end": (changed(tokenizer__ggml__eos_token_id=421), "eos_token_id = 421; there are 421 tokens"),
    "no beginning": (
        changed(tokenizer__ggml__bos_token_id=None, tokenizer__ggml__add_bos_token=True),
        "add_bos_token is true, and there is no such token",
    ),
    "a template of numbers": (changed(tokenizer__chat_template=3), "3 for tokenizer.chat_template"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(tmp_path, rng, case):
    write, message = WRONG[case]
    (tmp_path / "in").mkdir()
    if case == "architecture":
        write, message = with_tensors(lambda tensors: None, "falcon"), "architecture = 'falcon'; known here are llama, "
    write(tmp_path / "in" / "x.gguf", rng)
    with pytest.raises(DataError, match=message) as error:
        import_gguf(tmp_path / "in" / "x.gguf", tmp_path / "out")
    assert "x.gguf" in str(error.value)
    assert os.listdir(tmp_path) == ["in"]


def test_tokens_that_are_not_those_of_the_embedding(tmp_path, rng):
    tokenizer = byte_level("smollm")
    tensors = llama_tensors(rng, 420)
    write_file(tmp_path / "x.gguf", "llama", llama_settings() | tokenizer, tensors)
    with pytest.raises(DataError, match=r"a tokenizer of 421 tokens, and token_embd.weight has 420 rows"):
        import_gguf(tmp_path / "x.gguf", tmp_path / "out")
    tokens = [*tokenizer[TOKENS][:-2], "a", tokenizer[TOKENS][-1]]
    write_file(tmp_path / "x.gguf", "llama", llama_settings() | tokenizer | {TOKENS: tokens}, tensors)
    with pytest.raises(DataError, match=r"tokenizer.ggml.tokens: 'a' stands twice"):
        import_gguf(tmp_path / "x.gguf", tmp_path / "out")


def test_a_token_that_is_endless(tmp_path, rng):
    tokenizer = sentencepiece()
    tokenizer = tokenizer | {TOKENS: [*tokenizer[TOKENS][:-1], "x" * 1001]}
    tensors = llama_tensors(rng, len(tokenizer[TOKENS]))
    write_file(tmp_path / "x.gguf", "llama", llama_settings() | tokenizer, tensors)
    with pytest.raises(DataError, match=r"tokenizer.ggml.tokens: one of 1,001 characters; at most 1,000"):
        import_gguf(tmp_path / "x.gguf", tmp_path / "out")


def test_an_array_that_says_it_is_endless(tmp_path, rng):
    path = write_llama(tmp_path / "x.gguf", rng)
    data = path.read_bytes()
    at = data.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8
    assert struct.unpack_from("<Q", data, at) == (421,)
    for count in (422 << 40, 1 << 63, 10**6):
        path.write_bytes(data[:at] + struct.pack("<Q", count) + data[at + 8 :])
        with pytest.raises(DataError, match=r"x.gguf: (cut short or damaged|.*not UTF-8|.*type)"):
            import_gguf(path, tmp_path / "out")


def test_damaged_headers(tmp_path, rng):
    data = write_llama(tmp_path / "x.gguf", rng).read_bytes()
    header = data.index(b"blk.1.ffn_down.weight") + 60
    for _ in range(150):
        damaged = bytearray(data)
        for place in rng.integers(0, header, rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        (tmp_path / "y.gguf").write_bytes(bytes(damaged))
        with contextlib.suppress(DataError):
            import_gguf(tmp_path / "y.gguf", tmp_path / "out", force=True)
        assert sorted(os.listdir(tmp_path)) in (["x.gguf", "y.gguf"], ["out", "x.gguf", "y.gguf"])
