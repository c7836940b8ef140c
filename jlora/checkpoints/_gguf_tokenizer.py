"""The tokenizer of a GGUF file as Hugging Face's tokenizer.json, built with the library `tokenizers`.

A file holds the tokens, their types and merges or scores; of how a text is cut before the merges it holds a name only
(tokenizer.ggml.pre), and what llama.cpp does under it (src/llama-vocab.cpp) is here a row of a table. Two kinds:

    gpt2    byte-level BPE: text is cut by a regular expression, its bytes are merged in the order of the merges
    llama   BPE over characters, as SentencePiece does: a space is U+2581, unknown characters become bytes, and the
            merge with the best score comes first
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jlora.checkpoints._gguf_file import imported
from jlora.checkpoints._gguf_settings import text
from jlora.errors import DataError, listed, shortened

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # ggml's types of tokens
_MOST_CHARACTERS = 1000
_SPACE = "\u2581"
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_GEMMAS = ("gemma", "gemma2", "gemma3")

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How a byte-level tokenizer cuts a text before its merges.

    Attributes:
      pattern: the regular expression of a piece; GPT-2's where it is None.
      lone_digits: whether each digit is first a piece of its own.
      normal_form: whether the text is brought to Unicode's NFC.
      whole_words: whether a piece that is a token is taken as it is, whatever the merges say.
      bos: whether a text begins with the token bos where the file does not say it.
    """

    pattern: str | None = None
    lone_digits: bool = False
    normal_form: bool = False
    whole_words: bool = False
    bos: bool = False


_LLAMA3_CUT = _Cut(_LLAMA3, whole_words=True, bos=True)
CUTS: Mapping[str, _Cut] = MappingProxyType(
    {
        "gpt-2": _Cut(),
        "olmo": _Cut(),
        "smollm": _Cut(lone_digits=True),
        "llama-bpe": _LLAMA3_CUT,
        "llama3": _LLAMA3_CUT,
        "llama-v3": _LLAMA3_CUT,
        "falcon3": _LLAMA3_CUT,
        "dbrx": _Cut(_LLAMA3),
        "smaug-bpe": _Cut(_LLAMA3),
        "qwen2": _Cut(_QWEN2, normal_form=True),
        "deepseek-r1-qwen": _Cut(_QWEN2),
        "tekken": _Cut(_TEKKEN, whole_words=True, bos=True),
        "gpt-4o": _Cut(_GPT4O),
        "llama4": _Cut(_GPT4O),
    }
)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What lies in a folder for its tokenizer.

    Attributes:
      files: name -> contents: tokenizer.json, tokenizer_config.json, and the chat template where there is one.
      count: how many tokens there are.
      ids: bos, eos and pad -> their numbers, of those that there are.
      ends: the numbers of all tokens that end an answer.
    """

    files: Mapping[str, bytes]
    count: int
    ids: Mapping[str, int]
    ends: tuple[int, ...]


def read_tokens(path: Path, metadata: Mapping[str, Any], context: int) -> Tokens:
    """The tokenizer of a file, of which `metadata` is what it says; texts have up to `context` tokens.

    Raises:
      DataError: tokenizers is not installed; a kind or a pre-tokenizer that is not known here; keys that are missing;
        tokens, types, merges and numbers that do not fit.
    """
    library = imported("tokenizers", "lm")
    kind = text(path, metadata, "tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise DataError(f"{path}: tokenizer.ggml.model = {kind!r}; known here are gpt2 and llama")
    tokens = _strings(path, metadata, "tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise DataError(f"{path}: tokenizer.ggml.token_type: {_size(types)} for {len(tokens):,} tokens")
    if len(set(tokens)) < len(tokens):
        twice, _ = Counter(tokens).most_common(1)[0]
        raise DataError(f"{path}: tokenizer.ggml.tokens: {shortened(twice)} stands twice")
    roles = {role: tokens[number] for role, number in _numbers(path, metadata, len(tokens)).items()}
    if kind == "gpt2":
        tokenizer, has_bos = _byte_level(library, path, metadata, tokens)
    else:
        tokens = _spelled(metadata, tokens)
        tokenizer, has_bos = _sentencepiece(library, path, metadata, tokens, types, roles.get("unk"))
    _add_tokens(library, tokenizer, tokens, types)
    _add_ends(library, path, metadata, tokenizer, roles, has_bos)
    if tokenizer.get_vocab_size() != len(tokens):
        raise DataError(f"{path}: {len(tokens):,} tokens make a tokenizer of {tokenizer.get_vocab_size():,}")
    return _tokens(path, metadata, tokenizer, roles, context)


def _byte_level(library: Any, path: Path, metadata: Mapping[str, Any], tokens: list[str]) -> tuple[Any, bool]:
    """A byte-level BPE, and whether texts begin with bos where the file does not say it."""
    name = text(path, metadata, "tokenizer.ggml.pre")
    cut = CUTS.get(name)
    if cut is None:
        known = f"how it cuts a text is not known here; known are {listed(CUTS, 20)}"
        raise DataError(f"{path}: tokenizer.ggml.pre = {shortened(name)}: {known}")
    merges = []
    for merge in _strings(path, metadata, "tokenizer.ggml.merges"):
        left, space, right = merge.partition(" ")
        if not (left and space and right) or " " in right:
            raise DataError(f"{path}: tokenizer.ggml.merges: {shortened(merge)}: wanted two tokens and a space between")
        merges.append((left, right))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = _bpe(library, path, vocab=vocabulary, merges=merges, ignore_merges=cut.whole_words)
    tokenizer = library.Tokenizer(model)
    if cut.normal_form:
        tokenizer.normalizer = library.normalizers.NFC()
    before = library.pre_tokenizers
    parts = [before.ByteLevel(add_prefix_space=False, use_regex=cut.pattern is None)]
    if cut.pattern is not None:
        parts.insert(0, before.Split(library.Regex(cut.pattern), behavior="isolated"))
    if cut.lone_digits:
        parts.insert(0, before.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = before.Sequence(parts)
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer, cut.bos


def _sentencepiece(
    library: Any, path: Path, metadata: Mapping[str, Any], tokens: list[str], types: list[int], unknown: str | None
) -> tuple[Any, bool]:
    """A BPE over characters, and whether texts begin with bos where the file does not say it."""
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in set(tokens)]
    if missing:
        raise DataError(f"{path}: tokenizer.ggml.tokens: no tokens for the bytes {listed(missing)}")
    if (longest := max(map(len, tokens))) > _MOST_CHARACTERS:  # all its splits are tried
        raise DataError(f"{path}: tokenizer.ggml.tokens: one of {longest:,} characters; at most {_MOST_CHARACTERS:,}")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = _merges_by_score(vocabulary, _scores(path, metadata, len(tokens)))
    model = _bpe(library, path, vocab=vocabulary, merges=merges, fuse_unk=True, byte_fallback=True, unk_token=unknown)
    tokenizer = library.Tokenizer(model)
    before, after = library.normalizers, library.decoders
    normalizers = [before.Replace(" ", _SPACE)]
    decoders = [after.Replace(_SPACE, " "), after.ByteFallback(), after.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        normalizers.insert(0, before.Prepend(_SPACE))
        decoders.append(after.Strip(content=" ", left=1, right=0))
    tokenizer.normalizer = before.Sequence(normalizers)
    tokenizer.decoder = after.Sequence(decoders)
    return tokenizer, True


def _scores(path: Path, metadata: Mapping[str, Any], count: int) -> list[float]:
    """The score of each token; Gemma's say nothing of the order of its merges, which is that of its tokens."""
    if metadata.get("general.architecture") in _GEMMAS:
        return [-float(number) for number in range(count)]
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != count:
        raise DataError(f"{path}: tokenizer.ggml.scores: {_size(scores)} for {count:,} tokens")
    return scores


def _spelled(metadata: Mapping[str, Any], tokens: list[str]) -> list[str]:
    """Tokens with their spaces as U+2581; Gemma's of several spaces have real ones in the file."""
    if metadata.get("general.architecture") not in _GEMMAS:
        return tokens
    return [_SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]


def _merges_by_score(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """All pairs of tokens that join to a token, those of the best score first."""
    found: list[tuple[float, int, int, str, str]] = []
    for token, number in vocabulary.items():
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in vocabulary and right in vocabulary:
                found.append((-scores[number], vocabulary[left], vocabulary[right], left, right))
    found.sort(key=lambda pair: pair[:3])
    return [(left, right) for *_, left, right in found]


def _bpe(library: Any, path: Path, **how: Any) -> Any:
    try:
        return library.models.BPE(**how)
    except Exception as error:  # the library has no class of its own
        raise DataError(f"{path}: its tokens and merges do not fit: {error}") from None


def _add_tokens(library: Any, tokenizer: Any, tokens: list[str], types: list[int]) -> None:
    """Tokens that are found in a text before all else: control tokens, which are special, and those of users."""

    def those(wanted: int, special: bool) -> list[Any]:
        return [
            library.AddedToken(token, normalized=False, special=special)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ == wanted and token
        ]

    tokenizer.add_special_tokens(those(_CONTROL, True))
    tokenizer.add_tokens(those(_USER_DEFINED, False))


def _add_ends(
    library: Any, path: Path, metadata: Mapping[str, Any], tokenizer: Any, roles: Mapping[str, str], has_bos: bool
) -> None:
    """The tokens before and behind a text."""
    bos = ["bos"] if metadata.get("tokenizer.ggml.add_bos_token", has_bos) else []
    eos = ["eos"] if metadata.get("tokenizer.ggml.add_eos_token", False) else []
    if missing := [role for role in (*bos, *eos) if role not in roles]:
        if "tokenizer.ggml.add_bos_token" not in metadata and missing == ["bos"]:
            return
        raise DataError(f"{path}: tokenizer.ggml.add_{missing[0]}_token is true, and there is no such token")
    if not bos and not eos:
        return
    before, behind = [[roles[role] for role in ends] for ends in (bos, eos)]
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single=[*before, "$A", *behind],
        pair=[*before, "$A", *behind, *(f"{token}:1" for token in before), "$B:1", *(f"{t}:1" for t in behind)],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*before, *behind}],
    )


def _tokens(path: Path, metadata: Mapping[str, Any], tokenizer: Any, roles: Mapping[str, str], context: int) -> Tokens:
    ids = {role: tokenizer.token_to_id(token) for role, token in roles.items() if role != "unk"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        **{f"{role}_token": token for role, token in roles.items()},
    }
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode("utf-8"),
        "tokenizer_config.json": _json(config),
    }
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        files["chat_template.jinja"] = text(path, metadata, "tokenizer.chat_template").encode("utf-8")
    ends = [ids["eos"]] if "eos" in ids else []
    for name in ("eot", "eom"):
        number = _number(path, metadata, f"tokenizer.ggml.{name}_token_id", tokenizer.get_vocab_size())
        ends += [number] if number is not None and number not in ends else []
    return Tokens(files, tokenizer.get_vocab_size(), ids, tuple(ends))


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _numbers(path: Path, metadata: Mapping[str, Any], count: int) -> dict[str, int]:
    """bos, eos, unk and pad -> their numbers, of those that the file names."""
    found = {role: _number(path, metadata, f"tokenizer.ggml.{key}_token_id", count) for role, key in _ROLES.items()}
    return {role: number for role, number in found.items() if number is not None}


def _number(path: Path, metadata: Mapping[str, Any], key: str, count: int) -> int | None:
    number = metadata.get(key)
    if number is not None and (type(number) is not int or not 0 <= number < count):
        raise DataError(f"{path}: {key} = {shortened(number)}; there are {count:,} tokens")
    return number


def _strings(path: Path, metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
        raise DataError(f"{path}: {key}: wanted a list of strings, found {_size(value)}")
    return value


def _size(value: Any) -> str:
    return f"{len(value):,}" if isinstance(value, list) else "none"
