"""Sentences for whatever looks wrong in the rows of an inspection."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jlora.diagnostics._factors import count, short
from jlora.errors import listed, printable

_UNEVEN = 100

Entries = Sequence[Any]


def warnings_of(entries: Entries) -> Iterator[str]:
    """The warnings on `InspectedEntry` rows, the gravest first."""
    for check in _CHECKS:
        yield from map(printable, check(entries))


def _paths(entries: Entries) -> str:
    return listed(entry.path or "the root" for entry in entries)


def _empty(entries: Entries) -> Iterator[str]:
    if not entries:
        yield "there are no adapters"


def _not_finite(entries: Entries) -> Iterator[str]:
    if found := [f"{e.path or 'the root'} ({', '.join(e.not_finite)})" for e in entries if e.not_finite]:
        yield f"NaN or infinity in {listed(found)}"


def _dead(entries: Entries) -> Iterator[str]:
    if found := [e for e in entries if _all_zero(e, "a") and _all_zero(e, "b")]:
        yield f"A and B are both all zero, so that no gradient can reach them: {_paths(found)}"


def _untrained(entries: Entries) -> Iterator[str]:
    adapters = [e for e in entries if e.rank is not None]
    for name, other in ("ba", "ab"):
        found = [e for e in adapters if _all_zero(e, name) and not _all_zero(e, other)]
        if found:
            first = f"{len(found)} of {len(adapters)} adapters {'is' if len(found) == 1 else 'are'} untrained"
            yield f"{first}, {name.upper()} is all zero: {_paths(found)}"
        for e in adapters:
            if 0 < getattr(e, f"zero_{name}") < e.matrices:
                yield f"{e.path}: {name.upper()} is all zero in {getattr(e, f'zero_{name}')} of {e.matrices} matrices"


def _all_zero(entry: Any, name: str) -> bool:
    return entry.rank is not None and getattr(entry, f"zero_{name}") == entry.matrices


def _zero_alpha(entries: Entries) -> Iterator[str]:
    if found := [e for e in entries if e.alpha == 0]:
        yield f"alpha is 0, so that the update is zero whatever A and B are: {_paths(found)}"


def _other_rank(entries: Entries) -> Iterator[str]:
    if found := [e for e in entries if e.rank not in (None, e.configured_rank)]:
        texts = [f"{e.path or 'the root'} (A has {e.rank}, the configuration {e.configured_rank})" for e in found]
        yield f"the rank is not the configuration's: {listed(texts)}"


def _too_large(entries: Entries) -> Iterator[str]:
    if found := [e for e in entries if e.rank is not None and e.rank > e.side]:
        texts = [f"{e.path or 'the root'} (rank {e.rank}, side {e.side})" for e in found]
        yield f"the rank is larger than the smaller side of the weight: {listed(texts)}"


def _unused(entries: Entries) -> Iterator[str]:
    found = [e for e in entries if e.norm and e.rank is not None and not e.not_finite and _wastes(e)]
    if found:
        texts = [f"{e.path or 'the root'} ({e.used_rank} of {e.rank})" for e in found]
        yield f"ranks that are not used, singular values below 1e-6 of the largest: {listed(texts)}"


def _wastes(entry: Any) -> bool:
    partly_zero = entry.zero_a or entry.zero_b
    return not partly_zero and entry.used_rank < min(entry.rank, entry.side)


def _uneven(entries: Entries) -> Iterator[str]:
    norms = [e for e in entries if e.norm is not None and 0 < e.norm < float("inf")]
    if not norms:
        return
    middle = statistics.median(e.norm for e in norms)
    tests: tuple[tuple[str, Callable[[float], bool]], ...] = (
        (f"more than {_UNEVEN} times", lambda norm: norm > _UNEVEN * middle),
        (f"less than 1/{_UNEVEN} of", lambda norm: norm < middle / _UNEVEN),
    )
    for text, test in tests:
        if found := [f"{e.path} ({short(e.norm)})" for e in norms if test(e.norm)]:
            yield f"the norm of the update is {text} the median {short(middle)}: {listed(found)}"


def _dtypes(entries: Entries) -> Iterator[str]:
    by_dtype: dict[str, list[Any]] = {}
    for entry in entries:
        by_dtype.setdefault(entry.dtype, []).append(entry)
    if len(by_dtype) > 1 or any("/" in dtype for dtype in by_dtype):
        groups = sorted(by_dtype.items(), key=lambda item: -len(item[1]))
        texts: list[str] = []
        for dtype, found in groups:
            text = f"{dtype} in {count(len(found), 'entry', 'entries')}"
            if texts:  # of the most frequent dtype no entry needs a name
                text += f" ({listed((entry.path or 'the root' for entry in found), 3)})"
            texts.append(text)
        yield f"different dtypes: {'; '.join(texts)}"


_CHECKS: tuple[Callable[[Entries], Iterator[str]], ...] = (
    _empty,
    _not_finite,
    _dead,
    _untrained,
    _zero_alpha,
    _other_rank,
    _too_large,
    _unused,
    _uneven,
    _dtypes,
)
