"""What config.json says about positions, in the spelling of transformers 5 and in those of before."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jlora.errors import ConfigError, shortened
from jlora.fields import check_keys, choice, integer, number
from jlora.models._rope import Rope

__all__ = ["read_ropes"]

_ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_KEYS = {  # of each kind, beside those of all
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
}
_OLDER = {"su": "longrope"}


def read_ropes(said: Mapping[str, Any], head_dim: int, positions: int, sliding: Sequence[bool]) -> tuple[Rope, ...]:
    """One for each layer; `sliding` says which attend within a window."""
    full, local = _tables(said)
    wide = _rope("rope_parameters", full, said, head_dim, positions)
    near = wide if local is None else _rope("rope_parameters/sliding_attention", local, said, head_dim, positions)
    return tuple(near if slides else wide for slides in sliding)


def _tables(said: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What is said of all layers, or of those that attend to everything; and of those within a window, if anything."""
    tables, scaling = (_table(key, said[key]) for key in ("rope_parameters", "rope_scaling"))
    if "rope_local_base_freq" not in said:
        return {"rope_theta": said["rope_theta"], **(scaling or tables)}, None
    # Gemma 3 has one table for each kind of layer, and had rope_scaling for those without a window.
    check_keys(tables, ("full_attention", "sliding_attention"), "rope_parameters")
    full, local = (_table(f"rope_parameters/{key}", tables.get(key)) for key in ("full_attention", "sliding_attention"))
    return (
        {"rope_theta": said["rope_theta"], **full, **scaling},
        {"rope_theta": said["rope_local_base_freq"], **local},
    )


def _table(key: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{key} = {shortened(value)}: wanted an object or null")
    return dict(value or {})


def _rope(where: str, table: Mapping[str, Any], said: Mapping[str, Any], head_dim: int, positions: int) -> Rope:
    table = {key: value for key, value in table.items() if value is not None}
    kind = table.get("rope_type", table.get("type", "default"))
    kind = _OLDER.get(kind, kind) if isinstance(kind, str) else kind
    choice(f"{where}/rope_type", kind, tuple(_KEYS))
    check_keys(table, (*_ALWAYS, *_KEYS[kind]), f"{where} of rope_type {kind!r}")

    def value(key: str, default: float | None = None, low: float = 0.0) -> float:
        if key not in table and default is None:
            raise ConfigError(f"{where}: rope_type {kind!r} needs {key}, which is missing")
        return number(f"{where}/{key}", table.get(key, default), low, wanted=f"a number of at least {low:g}")

    share = value("partial_rotary_factor", said.get("partial_rotary_factor", 1.0))
    if not 0 < share <= 1 or (share < 1 and "partial_rotary_factor" not in said):
        wanted = "more than 0 and at most 1" if "partial_rotary_factor" in said else "1 for this family"
        raise ConfigError(f"{where}/partial_rotary_factor = {share}: wanted {wanted}")
    dims = int(head_dim * share)
    if dims == 0 or dims % 2:
        raise ConfigError(
            f"{where}: {dims} axes of head_dim = {head_dim} would be turned: wanted an even number of them"
        )
    plain = Rope("default", value("rope_theta", low=1.0), dims)
    if kind in ("default", "dynamic"):  # dynamic: the same up to max_position_embeddings, and no row is longer
        return plain
    if kind == "linear":
        return Rope("linear", plain.theta, dims, value("factor", low=1.0))

    original = said.get("original_max_position_embeddings", table.get("original_max_position_embeddings", positions))
    original = integer("original_max_position_embeddings", original, 2)
    if kind == "llama3":
        low, high = value("low_freq_factor"), value("high_freq_factor")
        if low >= high:
            raise ConfigError(
                f"{where}: low_freq_factor = {low} and high_freq_factor = {high}: wanted a smaller low one"
            )
        return Rope("llama3", plain.theta, dims, value("factor", low=1.0), original, low, high)
    if kind == "yarn":
        return _yarn(where, table, plain, value("factor", low=1.0), original)
    return _longrope(where, table, plain, value("factor", positions / original), original)


def _yarn(where: str, table: Mapping[str, Any], plain: Rope, factor: float, original: int) -> Rope:
    def value(key: str, default: float, low: float = 1e-9) -> float:
        return number(f"{where}/{key}", table.get(key) or default, low, wanted="a number above zero")

    def of_factor(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale = of_factor(1.0)
    if table.get("mscale") and table.get("mscale_all_dim"):
        scale = of_factor(value("mscale", 1)) / of_factor(value("mscale_all_dim", 1))
    truncate = table.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ConfigError(f"{where}/truncate = {shortened(truncate)}: wanted true or false")
    if plain.theta == 1:
        raise ConfigError(f"{where}/rope_theta = 1: wanted more, as the frequencies of rope_type 'yarn' differ")
    return Rope(
        "yarn",
        plain.theta,
        plain.dims,
        factor,
        original,
        low=value("beta_slow", 1),
        high=value("beta_fast", 32),
        truncate=truncate,
        scale=scale if table.get("attention_factor") is None else value("attention_factor", 1),
    )


def _longrope(where: str, table: Mapping[str, Any], plain: Rope, factor: float, original: int) -> Rope:
    def factors(key: str) -> tuple[float, ...]:
        numbers = table.get(key)
        if not isinstance(numbers, list) or len(numbers) != plain.dims // 2:
            found = f"{len(numbers)} numbers" if isinstance(numbers, list) else shortened(numbers)
            raise ConfigError(f"{where}/{key}: wanted a list of {plain.dims // 2} numbers, found {found}")
        return tuple(number(f"{where}/{key}", each, 1e-9) for each in numbers)

    scale = table.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return Rope(
        "longrope",
        plain.theta,
        plain.dims,
        factor,
        original,
        scale=number(f"{where}/attention_factor", scale, 0),
        short=factors("short_factor"),
        long=factors("long_factor"),
    )
