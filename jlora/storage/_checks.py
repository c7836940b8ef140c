"""What adapters must be to be saved, and what is asked again of those that are loaded."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jlora.arrays import is_jax_array, is_tracer
from jlora.config import LoraConfig
from jlora.disk import can_store
from jlora.errors import AdapterError, ConfigError, raise_all
from jlora.storage._processes import unreachable
from jlora.storage._structure import Entries
from jlora.tree import check_patterns

MOST_CHARACTERS = 1000  # of a pattern; the time to translate one grows with the square


def check_fit(entries: Entries, config: LoraConfig) -> None:
    """Raises an error where the entries and the configuration disagree.

    What a pattern of `exclude_modules` matched is not among the adapters, and is not asked for.

    Raises:
      AdapterError: the ranks of entries.
      TargetError: patterns that match no entry.
      ConfigError: patterns of more than 1,000 characters, or too many with wildcards.
    """
    pairs = (*config.rank_pattern, *config.alpha_pattern, *config.factorizations)
    patterns = (*config.target_modules, *config.exclude_modules, *(pattern for pattern, _ in pairs))
    if longest := [pattern for pattern in patterns if len(pattern) > MOST_CHARACTERS]:
        raise ConfigError(
            f"{longest[0][:40]!r}...: a pattern of {len(longest[0]):,} characters, wanted {MOST_CHARACTERS:,} at most"
        )
    config.check_work(len(entries))
    problems = [
        f"{path or 'the root'}: {problem}"
        for path, update in entries.values()
        for problem in _misfits(path, update, config)
    ]
    raise_all(problems, AdapterError)
    paths = [path for path, _ in entries.values()]
    check_patterns(config.replace(exclude_modules=()), paths, paths)


def check_arrays(entries: Entries) -> None:
    """Raises an AdapterError with every part of an entry that is no array at hand which a file can hold."""
    problems = [f"{place}: {problem}" for place, part in _parts(entries) if (problem := _array_problem(part))]
    raise_all(problems, AdapterError)


def not_finite(entries: Entries) -> list[str]:
    """The places of the arrays that hold a NaN or an infinity; each comes to the host on its own."""
    return [place for place, part in _parts(entries) if not _is_finite(np.asarray(part))]


def _parts(entries: Entries) -> Iterator[tuple[str, Any]]:
    for path, update in entries.values():
        for part, array in update.items():
            yield f"{path}/{part}" if path else part, array


def _misfits(path: str, update: Mapping[str, Any], config: LoraConfig) -> Iterator[str]:
    if "A" not in update:
        return
    a, b, rank = tuple(update["A"].shape), tuple(update["B"].shape), config.rank_of(path)
    if a[-1:] != (rank,):
        yield f"A {a} does not have the rank {rank} of the configuration"
    elif not any(a[:batch] == b[:batch] and b[batch] == rank for batch in range(min(len(a), len(b)) - 1)):
        yield f"B {b} does not fit A {a}: wanted (*batch, {rank}, *out)"


def _array_problem(part: Any) -> str | None:
    if is_tracer(part):
        return "found a tracer, wanted numbers: save outside of jit, grad and vmap"
    if not (is_jax_array(part) or isinstance(part, np.ndarray | np.generic)):
        return f"found {type(part).__name__}, wanted an array"
    if is_jax_array(part) and part.is_deleted():
        return "found an array that was deleted, perhaps by donation to a jitted function; save what that returned"
    if problem := unreachable(part):
        return problem
    if not can_store(part.dtype):
        return f"dtype {part.dtype} has no place in a safetensors file"
    return None


def _is_finite(array: np.ndarray[Any, Any]) -> bool:
    with np.errstate(invalid="ignore"):  # casts of a signalling NaN warn
        return array.dtype.kind in "biu" or bool(np.isfinite(array).all())
