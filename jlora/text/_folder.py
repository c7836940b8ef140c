"""The files of a model's folder that say how texts become numbers."""

import datetime
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jlora.disk import read_bytes, read_json
from jlora.errors import DataError, listed, raise_all, shortened
from jlora.text._imports import imported, told_as
from jlora.text._template import ChatTemplate
from jlora.text._tokenizer import Tokenizer

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MOST_TOKENIZER, _MOST_TEMPLATE = 256 << 20, 1 << 20


def read_tokenizer(folder: str | Path, *, now: datetime.datetime | None = None) -> Tokenizer:
    """The tokenizer of a model's folder: the numbers that transformers' AutoTokenizer gives by its tokenizer.json.

    It reads tokenizer.json, which says whether BOS is put before a text; tokenizer_config.json, special_tokens_map.json
    and added_tokens.json for the special tokens; generation_config.json and config.json for the tokens that end an
    answer; chat_template.jinja, or what the older places hold. Only tokenizer.json must be there.

    Args:
      folder: of the model, as Hugging Face lays it out.
      now: the time that a template is told which asks for it; None is the time at which it asks.

    Raises:
      DataError: a file that is missing, damaged, or says what is not possible; `tokenizers` is not installed.
    """
    folder = Path(folder)
    config = _optional(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # files older than that have them in two of their own
        config |= _optional(folder / "special_tokens_map.json")
    special = _special_tokens(config, folder)
    backend = _backend(folder / "tokenizer.json")
    _add_tokens(backend, config, special, folder)
    told = {name: token for name, token in special.items() if name.endswith("_token")}
    templates = {
        name: ChatTemplate(source, path, told, now) for name, (source, path) in _templates(folder, config).items()
    }
    if templates and "default" not in templates:
        raise DataError(f"{folder}: chat templates {listed(templates)}, and none of them is the default")
    ends = sorted(set(_ends(folder)))
    return Tokenizer(folder, backend, special, ends, templates.get("default"), templates.get("tool_use"))


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _backend(path: Path) -> Any:
    """The tokenizer that a file describes, without the lengths that it may cut or fill texts to."""
    tokenizers = imported("tokenizers")
    if not path.exists():
        others = [name for name in ("tokenizer.model", "vocab.json", "tekken.json") if (path.parent / name).exists()]
        way_out = f"make one of {listed(others)} with transformers" if others else "copy it from the model's folder"
        raise DataError(f"{path}: no such file: {way_out}")
    contents = read_bytes(path, _MOST_TOKENIZER)
    with told_as(f"{path}: not a tokenizer"):
        backend = tokenizers.Tokenizer.from_str(contents.decode("utf-8"))
        backend.no_truncation()
        backend.no_padding()
        backend.encode("a")
    return backend


def _special_tokens(config: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The named tokens, each as the text that stands for it, in the order in which transformers adds them."""
    found, problems = {}, []
    for name in sorted(config, key=lambda name: _NAMES.index(name) if name in _NAMES else len(_NAMES)):
        value = config[name]
        if not name.endswith("_token") or isinstance(value, bool) or value is None:
            continue
        token = value.get("content") if isinstance(value, dict) else value
        if isinstance(token, str):
            found[name] = token
        else:
            problems.append(f"{name} = {shortened(value)}: wanted a token's text")
    raise_all(problems, DataError, str(folder / "tokenizer_config.json"))
    return found


def _add_tokens(backend: Any, config: Mapping[str, Any], special: Mapping[str, str], folder: Path) -> None:
    """Adds the tokens that are not in tokenizer.json but beside it."""
    added = imported("tokenizers").AddedToken
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    more: dict[str, tuple[int | None, dict[str, bool]]] = dict(_tokens_beside(config, special, folder))
    for value in [*(config[name] for name in special), *_extra(config)]:
        token, options = _options(value)
        more.setdefault(token, (None, options | {"special": True}))
    problems = []
    for text, (number, options) in more.items():
        if text in known or not text:
            continue
        backend.add_tokens([added(text, **options)])
        if number is not None and backend.token_to_id(text) != number:
            problems.append(f"token {shortened(text)} is {backend.token_to_id(text)} by tokenizer.json, not {number}")
    raise_all(problems, DataError, str(folder))


def _tokens_beside(
    config: Mapping[str, Any], special: Mapping[str, str], folder: Path
) -> Iterator[tuple[str, tuple[int, dict[str, bool]]]]:
    """The text of each token of another file, with its number and how it is looked for, in order of the numbers."""
    decoder = config.get("added_tokens_decoder", {})
    found = []
    if isinstance(decoder, dict):
        for number, token in decoder.items():
            if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not _is_number(number):
                path = folder / "tokenizer_config.json"
                raise DataError(f"{path}: added_tokens_decoder: {shortened(number)}: {shortened(token)}")
            found.append((int(number), *_options(token)))
    if not decoder:
        for text, number in _optional(folder / "added_tokens.json").items():
            if isinstance(number, bool) or not isinstance(number, int):
                raise DataError(f"{folder / 'added_tokens.json'}: {shortened(text)}: {shortened(number)} is no number")
            is_special = text in special.values()
            found.append((number, text, {"special": is_special, "normalized": not is_special}))
    for number, text, options in sorted(found, key=lambda row: row[0]):
        yield text, (number, options)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def _options(token: Any) -> tuple[str, dict[str, bool]]:
    """The text of a token, and how it is looked for."""
    if isinstance(token, str):
        return token, {}
    return token["content"], {flag: token[flag] is True for flag in _FLAGS if flag in token}


def _extra(config: Mapping[str, Any]) -> list[Any]:
    """The special tokens without a name."""
    tokens = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    values = list(tokens.values()) if isinstance(tokens, dict) else tokens if isinstance(tokens, list) else []
    return [value for value in values if isinstance(value.get("content") if isinstance(value, dict) else value, str)]


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[str, Path]]:
    """The chat templates by name, each with the file that it is from; files of their own go first."""
    path = folder / "tokenizer_config.json"
    value = config.get("chat_template")
    found: dict[str, tuple[str, Path]] = {}
    for entry in value if isinstance(value, list) else [{"name": "default", "template": value}]:
        name, source = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, entry)
        if source is None and value is None:
            continue
        if not isinstance(source, str) or not isinstance(name, str):
            raise DataError(f"{path}: chat_template: {shortened(source)}: wanted a text, or a list of names and texts")
        found[name] = (source, path)
    alone = folder / "chat_template.jinja"
    if alone.exists():
        others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        found = {other.stem: (_text(other), other) for other in others}
        found["default"] = (_text(alone), alone)
    elif not found and (folder / "chat_template.json").exists():
        source = read_json(folder / "chat_template.json").get("chat_template")
        if not isinstance(source, str):
            raise DataError(f"{folder / 'chat_template.json'}: chat_template = {shortened(source)}: wanted a text")
        found["default"] = (source, folder / "chat_template.json")
    return found


def _text(path: Path) -> str:
    try:
        return read_bytes(path, _MOST_TEMPLATE).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error.reason} at byte {error.start:,}") from None


def _ends(folder: Path) -> Iterator[int]:
    """The tokens that end an answer, as generation_config.json has them, or config.json."""
    for name in ("generation_config.json", "config.json"):
        value = _optional(folder / name).get("eos_token_id")
        if value is None:
            continue
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise DataError(f"{folder / name}: eos_token_id = {shortened(value)}: wanted the number of a token")
            yield number
        return
