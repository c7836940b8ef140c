"""The static configuration of an adaptation: what is adapted, and how."""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from jlora.arrays import is_floating
from jlora.contraction import Factorization
from jlora.disk import MOST_CONFIG, parse_json_value, parse_toml, read_bytes, write_whole
from jlora.errors import AdapterError, ConfigError, DataError, shortened
from jlora.fields import check_keys, choice, integer, number, refusal
from jlora.paths import PatternIndex

__all__ = [
    "CUSTOM_INIT",
    "INITS",
    "KINDS",
    "MATRIX_INITS",
    "RANDOM_INITS",
    "SCALINGS",
    "LoraConfig",
    "effective_alpha",
    "read_mapping",
    "write_mapping",
]

SCALINGS = ("standard", "rslora")
RANDOM_INITS = ("gaussian", "kaiming_uniform", "normal")
MATRIX_INITS = ("pissa", "olora", "mica", "orthogonal")  # of the weights themselves: `jlora.start`
CUSTOM_INIT = "custom"  # a user's own that changed the base
INITS = (*RANDOM_INITS, *MATRIX_INITS, CUSTOM_INIT)
KINDS = ("lora", "dora", "vera", "xs")

Pairs = tuple[tuple[str, Any], ...]


def effective_alpha(alpha: Any, rank: int, scaling: str) -> Any:
    """The alpha for which alpha / rank is the scaling of the update.

    "standard" is alpha / rank (Hu et al. 2021, arXiv 2106.09685), "rslora" alpha / sqrt(rank) (Kalajdzievski 2023,
    arXiv 2312.03732).
    """
    choice("scaling", scaling, SCALINGS)
    return alpha if scaling == "standard" else alpha * math.sqrt(rank)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class LoraConfig:
    """What is adapted and how; frozen, hashable, and so a static argument of jit.

    Attributes:
      kind: "lora", an A and a B of each weight; "dora", a magnitude for each of its outputs too, which begins at the
        norm of the weight (Liu et al. 2024, arXiv 2402.09353); "vera" or "xs", where a smaller tree is trained, of
        which A and B are made (`jlora.variants`).
      rank: the rank r of every adapter, at least 1.
      alpha: the update is scaling * A@B with scaling = alpha / rank, or alpha / sqrt(rank) for "rslora".
      dropout: the share of the adapter's input that is dropped in training, 0 <= dropout < 1.
      target_modules: glob patterns on paths; `*` stays within a level, `**` spans levels. One that names a module
        adapts the weights inside it, one that names a leaf adapts that leaf.
      exclude_modules: patterns of what is left alone although a target matches it.
      seed: gives the key of `init_lora` when none is passed, 0 <= seed < 2^32.
      scaling: "standard" or "rslora".
      init: how A begins; B begins at zero. "gaussian" is N(0, init_std^2), "kaiming_uniform" U(-b, b) with
        b = 1/sqrt(in) (PEFT's default), "normal" N(0, 1/rank^2) (PEFT's "gaussian"). "pissa", "olora", "mica" and
        "orthogonal" begin at the weights (`jlora.start`); "custom" says that a start of a user's own changed the base.
      init_std: the standard deviation of the "gaussian" init.
      rank_pattern: pattern -> rank, alpha_pattern: pattern -> alpha, for paths that differ; the first that matches
        wins.
      dtype: the adapters' dtype, such as "bfloat16"; None for float32, of 16-bit weights too, and float64 for float64
        weights.
      factorizations: pattern -> one letter per axis of the weight, b (batch), i (in), o (out), such as "ioo"; the
        first that matches wins over what is known of Flax's parameters.
      extras: name -> text that other libraries' files say and jlora does not read; kept in every file.

    >>> config = LoraConfig(rank=4, target_modules=("**/query", "**/value"))
    >>> config.replace(alpha=32)
    LoraConfig(rank=4, alpha=32.0, target_modules=('**/query', '**/value'))

    Raises:
      ConfigError: an unknown key, or a value that is not allowed.
    """

    kind: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("**",)
    exclude_modules: tuple[str, ...] = ()
    seed: int = 0
    scaling: str = "standard"
    init: str = "gaussian"
    init_std: float = 0.01
    rank_pattern: Mapping[str, int] | Pairs = ()
    alpha_pattern: Mapping[str, float] | Pairs = ()
    dtype: str | None = None
    factorizations: Mapping[str, str] | Pairs = ()
    extras: Mapping[str, str] | Pairs = ()

    def __new__(cls, *_: Any, **fields: Any) -> "LoraConfig":
        check_keys(fields, field_names(cls), cls.__name__)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("rank", integer("rank", self.rank, 1))
        put("alpha", number("alpha", self.alpha))
        put("dropout", number("dropout", self.dropout, 0.0, 1.0, "0 <= dropout < 1"))
        put("target_modules", _patterns("target_modules", self.target_modules))
        if not self.target_modules:
            raise refusal("target_modules", (), "at least one path pattern, such as '**/attention'")
        put("exclude_modules", _patterns("exclude_modules", self.exclude_modules))
        put("seed", integer("seed", self.seed, 0, 2**32))
        choice("scaling", self.scaling, SCALINGS)
        choice("init", self.init, INITS)
        choice("kind", self.kind, KINDS)
        put("init_std", number("init_std", self.init_std, 0.0, wanted="a finite number of at least 0"))
        put("rank_pattern", _pairs("rank_pattern", self.rank_pattern, lambda name, value: integer(name, value, 1)))
        put("alpha_pattern", _pairs("alpha_pattern", self.alpha_pattern, number))
        put("dtype", _dtype_name(self.dtype))
        put("factorizations", _pairs("factorizations", self.factorizations, _roles))
        put("extras", _pairs("extras", self.extras, _text, _text))

    def __repr__(self) -> str:
        return f"LoraConfig({', '.join(f'{name}={value!r}' for name, value in self._changed().items())})"

    def _changed(self) -> dict[str, Any]:
        """The fields that differ from their defaults, pairs of patterns as dicts."""
        changed = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                changed[field.name] = dict(value) if field.name in _PAIR_FIELDS else value
        return changed

    def replace(self, **changes: Any) -> "LoraConfig":
        """A copy with these fields changed."""
        check_keys(changes, field_names(type(self)), "LoraConfig.replace")
        return dataclasses.replace(self, **changes)

    @property
    def changes_base(self) -> bool:
        """Whether the adapters began with a part of the base, which is not in it any more."""
        return self.init in ("pissa", "olora", CUSTOM_INIT)

    def check_portable(self) -> None:
        """Raises a ConfigError for adapters that are of no use without the base that their start changed."""
        if self.changes_base:
            raise ConfigError(
                f"init = {self.init!r}: the start took a part out of the base, so that these adapters are wrong over "
                "any other: write what started.plain(adapters) returns, plain LoRA over the original base "
                "(started = jlora.start(...))"
            )

    def matches(self, field: str, path: str) -> list[tuple[str, Any]]:
        """The patterns of a field that match the leaf at `path`, or a module that holds it, with their values."""
        return self._indices[field].matches(path)

    def check_work(self, paths: int) -> None:
        """Raises a ConfigError where this many paths and the patterns with wildcards are too many to compare."""
        count = sum(index.wildcards for index in self._indices.values())
        if count > _MOST_WILDCARDS or count * paths > _MOST_COMPARED:
            raise ConfigError(
                f"{count:,} patterns with wildcards for {paths:,} paths: wanted {_MOST_WILDCARDS:,} at most, and "
                f"{_MOST_COMPARED:,} comparisons; of paths without wildcards there may be any number"
            )

    @functools.cached_property
    def _indices(self) -> dict[str, PatternIndex]:
        plain = ("target_modules", "exclude_modules")
        indices = {name: PatternIndex((pattern, None) for pattern in getattr(self, name)) for name in plain}
        return indices | {name: PatternIndex(dict(getattr(self, name)).items()) for name in _PATTERN_FIELDS}

    def rank_of(self, path: str) -> int:
        """The rank of the adapter at `path`."""
        return next((rank for _, rank in self.matches("rank_pattern", path)), self.rank)

    def alpha_of(self, path: str) -> float:
        """The alpha of the adapter at `path`."""
        return next((alpha for _, alpha in self.matches("alpha_pattern", path)), self.alpha)

    def effective_alpha_of(self, path: str) -> float:
        """The alpha that, divided by the rank, is the scaling of the update at `path`."""
        return effective_alpha(self.alpha_of(path), self.rank_of(path), self.scaling)

    def scaling_of(self, path: str) -> float:
        """What A@B is multiplied with at `path`."""
        return self.effective_alpha_of(path) / self.rank_of(path)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for TOML and JSON: every field, but for a dtype of None."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data = {name: dict(value) if name in _PAIR_FIELDS else value for name, value in data.items()}
        data = {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()}
        return {name: value for name, value in data.items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LoraConfig":
        """The configuration that `to_dict` wrote, or one that a person did."""
        if not isinstance(data, Mapping):
            raise refusal("LoraConfig", data, "a mapping of field names to values")
        check_keys(data, field_names(cls), cls.__name__)
        return cls(**data)

    def write(self, path: str | Path) -> None:
        """Writes a `.toml` or `.json` file."""
        write_mapping(path, self.to_dict())

    @classmethod
    def read(cls, path: str | Path) -> "LoraConfig":
        """Reads a `.toml` or `.json` file."""
        data = read_mapping(path)
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None


_MOST_WILDCARDS, _MOST_COMPARED = 10_000, 5_000_000
_PATTERN_FIELDS = ("rank_pattern", "alpha_pattern", "factorizations")
_PAIR_FIELDS = (*_PATTERN_FIELDS, "extras")


def field_names(cls: Any) -> tuple[str, ...]:
    """The names of a dataclass's fields."""
    return tuple(field.name for field in dataclasses.fields(cls))


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The contents of a `.toml` or `.json` file.

    Raises:
      ConfigError: no such file, another ending, or a text that does not parse; the message names the file.
    """
    file = Path(path)
    suffix = _suffix(file)
    try:
        text = read_bytes(file, MOST_CONFIG)
    except DataError as error:
        raise ConfigError(str(error)) from None
    if not text:
        raise ConfigError(f"{file}: is empty: wanted a table of field names and values, {{}} in JSON for none")
    try:
        data = parse_toml(text) if suffix == ".toml" else parse_json_value(text, constants=True)
    except ValueError as error:
        raise ConfigError(f"{file}: not valid {suffix[1:].upper()}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: wanted a table of field names and values, found {type(data).__name__}")
    return data


def write_mapping(path: str | Path, data: Mapping[str, Any]) -> None:
    """Writes plain data as a `.toml` or `.json` file, whole or not at all."""
    file = Path(path)
    try:
        text = (
            tomli_w.dumps(data) if _suffix(file) == ".toml" else json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        )
        contents = text.encode("utf-8")
    except (TypeError, UnicodeEncodeError) as error:
        raise ConfigError(f"{file}: cannot be written as {file.suffix[1:].upper()}: {error}") from None
    try:
        write_whole(file, contents)
    except DataError as error:
        raise ConfigError(str(error)) from None


def _suffix(file: Path) -> str:
    if file.suffix not in (".toml", ".json"):
        raise ConfigError(f"{file}: wanted a file that ends in .toml or .json")
    return file.suffix


def _pattern(field: str, value: Any) -> str:
    if not isinstance(value, str) or not all(value.split("/")):
        raise refusal(field, value, "a path pattern such as 'encoder/**/query', no leading, trailing or double slash")
    return value


def _patterns(field: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, list | tuple):
        raise refusal(field, value, "a path pattern or a list of them")
    return tuple(_pattern(field, item) for item in value)


def _pairs(field: str, value: Any, check: Any, check_key: Any = _pattern) -> Pairs:
    keys = "path patterns" if check_key is _pattern else "names"
    if not isinstance(value, Mapping | tuple | list):
        raise refusal(field, value, f"a mapping from {keys} to values")
    items = list(value.items() if isinstance(value, Mapping) else value)
    if any(not isinstance(item, tuple | list) or len(item) != 2 for item in items):
        raise refusal(field, value, f"a mapping from {keys} to values")
    pairs = tuple((check_key(field, key), check(f"{field}[{shortened(key)}]", item)) for key, item in items)
    if len(dict(pairs)) < len(pairs):
        raise refusal(field, value, "each pattern once" if check_key is _pattern else "each name once")
    return pairs


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise refusal(field, value, "a string")
    return value


def _roles(field: str, value: Any) -> str:
    try:
        return Factorization(value).roles
    except AdapterError as error:
        raise ConfigError(f"{field}: {error}") from None


def _dtype_name(value: Any) -> str | None:
    if value is None:
        return None
    try:
        dtype = np.dtype(value)
    except (TypeError, ValueError, SyntaxError):
        dtype = None
    if dtype is None or not is_floating(dtype):
        raise refusal("dtype", value, "a floating dtype such as 'float32' or 'bfloat16', or None for float32")
    return dtype.name
