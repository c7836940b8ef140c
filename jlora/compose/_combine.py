"""Several adapters of one base as one."""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.compose._factors import (
    Held,
    balanced,
    common_dtype,
    is_slot,
    padded,
    read_entries,
    replaced,
    truncated,
    unit_config,
)
from jlora.compose._rules import MAGNITUDES, METHODS, RULES, SIGNS, VALUES
from jlora.compose._svd import cut, leading_triples
from jlora.compose._tasks import Task
from jlora.compose._wholes import (
    Member,
    is_taken_whole,
    joined_magnitude,
    joined_offset,
    joined_value,
    whole_problems,
    with_factors,
)
from jlora.config import LoraConfig
from jlora.errors import AdapterError, ConfigError, JloraWarning, listed, raise_all
from jlora.fields import choice, integer, number, refusal
from jlora.paths import path_number
from jlora.pytrees import structure as tree_structure
from jlora.tree import check_config

Part = tuple[Any, LoraConfig]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What `combine` was asked for, checked."""

    method: str
    task: Task
    rank: int | None
    seed: int
    values: str
    magnitudes: str

    @property
    def on_factors(self) -> bool:
        """Whether A is combined with A and B with B, so that all ranks have to be the same."""
        return self.method in RULES

    def streams(self, path: str, members: Sequence[Member]) -> list[np.random.Generator]:
        return [np.random.default_rng([self.seed, path_number(path), member.part]) for member in members]


def combine(
    parts: Sequence[Part],
    weights: Sequence[float] | None = None,
    *,
    method: str = "linear",
    density: float | None = None,
    rank: int | None = None,
    majority_sign: str = "total",
    seed: int = 0,
    values: str = "same",
    magnitudes: str = "same",
) -> tuple[Any, LoraConfig]:
    """One adapter per weight from those of several parts; the methods of PEFT's `add_weighted_adapter`.

    With w the weight of a part, s its scaling there, and the sums over the parts that adapt the weight:

    - "cat": sum w s A@B exactly; the ranks add.
    - "svd": the best approximation of that sum of rank `rank`, from the factors; the dense delta is never built.
    - "linear": (sum sign(w s) sqrt|w s| A) @ (sum sqrt|w s| B), which has products of one part's A with another's B.
    - "magnitude_prune": "linear" of A and B of which the largest `density` are kept and the rest is zero.
    - "dare_linear": "linear" of A and B of which a random `density` is kept and divided by it (Yu et al. 2023).
    - "ties": pruned as by "magnitude_prune"; a sign is elected for each scalar of A and of B, and the mean is taken
      over the parts that have it (Yadav et al. 2023). "dare_ties": the same, pruned as by "dare_linear".
    - "magnitude_prune_svd", "dare_linear_svd", "ties_svd", "dare_ties_svd": the same done to the deltas s A@B in place
      of A and B, then "svd". These build the dense delta of every part, one weight (one entry of its batch axes) at a
      time; where its smaller side is above 512 its singular vectors may come from a random sketch.

    A weight that one part alone adapts gets that one's update; parts with no weight in common give all of theirs. What
    an entry holds beside A and B:

    - an offset is a delta: sum w s offset, pruned and elected as the deltas are.
    - a value takes the weight's place, and is not multiplied with the weight of its part: a warning says so. It is kept
      where one part has it or all agree; `values` says what else. The A and B of other parts are added to it.
    - the magnitude m of DoRA: m V/||V||, V = W + s A@B, is no sum of updates. With weights w that sum to 1,
      sum w V_i is a mean of the directions V_i, and where all have the same m it stays: so does an entry that one part
      alone has, with weight 1. `magnitudes` says what else.

    Args:
      parts: pairs (adapters, config). Ranks, alphas, scaling modes and adapted weights may differ; ranks may not where
        A is combined with A and B with B.
      weights: one number per part, negative ones too; all 1 unless given.
      method: one of the above.
      density: the share that is kept, 0 < density <= 1; for the methods that prune, and needed by them.
      rank: of the result of "svd" and "..._svd", cut to the smaller side of each weight, beyond which it has no use;
        the largest of the parts at each weight unless given.
      majority_sign: the sign of the "total" of the values, or of most ("frequency").
      seed: of the random pruning, which draws from `default_rng([seed, path_number(path), part])`, A before B.
      values: "same" refuses values of one weight that differ; "first" and "last" take that part's, "mean" takes
        sum w value / sum w over the parts that have one, "leave_out" none, so that the base's own weight stays.
      magnitudes: "same" refuses what is not exact; "mean" takes sum w m / sum w over the parts that have one, and
        combines A and B as any.

    Returns:
      Adapters and a configuration with a scaling of 1, that targets each adapted weight by its path and has all else of
      the first part. The structure is the one that the parts share; else nested dicts with the keys of all. The dtypes
      are those of the parts, float32 (float64 where a part has it) where they differ; the arithmetic is in float64, the
      dense one in float32 where no part has float64.

    Raises:
      ConfigError: an argument that is not allowed.
      AdapterError: with the path: a node that is no entry; shapes, ranks, factorizations, values or magnitudes of the
        parts that do not go together; a number that is not finite.

    >>> part = {'up': {'A': np.ones((2, 1), 'float32'), 'B': np.ones((1, 3), 'float32')}}, LoraConfig(rank=1, alpha=2)
    >>> adapters, config = combine([part, part], [1.0, 0.5], method="cat")
    >>> adapters['up']['A'].tolist(), config.rank, config.alpha
    ([[2.0, 1.0], [2.0, 1.0]], 2, 2.0)

    Yadav et al. 2023, "TIES-Merging", arXiv 2306.01708. Yu et al. 2023, "Language Models are Super Mario" (DARE),
    arXiv 2311.03099.
    """
    parts = _checked_parts(parts)
    shares = _checked_shares(weights, len(parts))
    plan = _Plan(
        choice("method", method, METHODS),
        _task(method, density, majority_sign),
        _checked_rank(rank, method),
        integer("seed", seed, 0, 2**32),
        choice("values", values, VALUES),
        choice("magnitudes", magnitudes, MAGNITUDES),
    )
    read = [read_entries(adapters, config, f"parts[{i}], ") for i, (adapters, config) in enumerate(parts)]
    paths = dict.fromkeys(itertools.chain.from_iterable(read))
    members = {path: _members(path, parts, read, shares) for path in paths}
    if not members:
        raise AdapterError("parts: none of them holds an adapter")
    problems: list[str] = []
    for path, here in members.items():
        problems += _problems(path or "the root", here, plan.on_factors)
        problems += whole_problems(path or "the root", here, plan.values, plan.magnitudes)
    raise_all(problems, AdapterError)
    by_path = {path: entry for path, here in members.items() if (entry := _combined(path, here, plan))}
    if not by_path:
        raise AdapterError("nothing is left: all that the parts hold is values, and values='leave_out' leaves them out")
    _warn_of_values([path for path, here in members.items() if is_taken_whole(here, plan.values)])
    ranks = {path: int(entry["A"].shape[-1]) for path, entry in by_path.items() if "A" in entry}
    roles = {path: next(iter(given)) for path, here in members.items() if (given := _roles(here))}
    structure = _joined([adapters for adapters, _ in parts], "")
    return replaced(structure, by_path), unit_config(parts[0][1], ranks, roles, list(by_path))


def _warn_of_values(paths: Sequence[str]) -> None:
    if paths:
        text = "values take the place of weights as a whole, whatever the weight of the part that holds them"
        warnings.warn(f"{listed(paths, 3)}: {text}", JloraWarning, stacklevel=3)


def _checked_parts(parts: Any) -> list[Part]:
    found = list(parts)
    if not found:
        raise AdapterError("parts: wanted at least one (adapters, config), found none")
    for i, part in enumerate(found):
        if not isinstance(part, tuple | list) or len(part) != 2:
            raise AdapterError(f"parts[{i}]: found {type(part).__name__}, wanted (adapters, config)")
        check_config(part[1])
    return found


def _checked_shares(weights: Any, count: int) -> list[float]:
    found = [1.0] * count if weights is None else [number(f"weights[{i}]", w) for i, w in enumerate(weights)]
    if len(found) != count:
        raise ConfigError(f"weights: found {len(found)} for {count} parts; wanted one for each")
    return found


def _checked_rank(rank: Any, method: str) -> int | None:
    if rank is None:
        return None
    if not method.endswith("svd"):
        raise refusal("rank", rank, f"none with method={method!r}, whose rank follows from the parts; use method='svd'")
    return integer("rank", rank, 1)


def _task(method: str, density: Any, majority_sign: str) -> Task:
    rule = RULES.get(method.removesuffix("_svd"), RULES["linear"])
    choice("majority_sign", majority_sign, SIGNS)
    if not rule.prune:
        if density is not None:
            raise refusal("density", density, f"none with method={method!r}, which does not prune")
        return Task(rule)
    share = math.nan if density is None else number("density", density)
    if not 0 < share <= 1:
        raise refusal("density", density, f"a share 0 < density <= 1 with method={method!r}, which prunes")
    return Task(rule, share, majority_sign)


def _members(
    path: str, parts: Sequence[Part], read: Sequence[Mapping[str, Held]], shares: Sequence[float]
) -> list[Member]:
    return [
        Member(i, found[path], share, config.scaling_of(path))
        for i, ((_, config), found, share) in enumerate(zip(parts, read, shares, strict=True))
        if path in found
    ]


def _roles(members: Sequence[Member]) -> dict[str, None]:
    found = with_factors(members)
    return dict.fromkeys(member.factors.roles for member in found if member.factors.roles is not None)


def _problems(path: str, members: Sequence[Member], same_rank: bool) -> Iterator[str]:
    """What keeps the parts' A and B of one weight from going together."""
    members = with_factors(members)
    sides = {f"parts[{m.part}] batch {m.factors.batch}, in {m.factors.ins}, out {m.factors.outs}" for m in members}
    if len({member.factors.sides for member in members}) > 1:
        yield f"{path}: the parts are of different weights: {'; '.join(sorted(sides))}"
    if len(roles := _roles(members)) > 1:
        yield f"{path}: the parts have different factorizations: {', '.join(map(repr, roles))}"
    if same_rank and len({member.factors.rank for member in members}) > 1:
        ranks = ", ".join(f"{member.factors.rank} in parts[{member.part}]" for member in members)
        yield f"{path}: found ranks {ranks}; wanted one rank, or method='cat' or 'svd', which take any"


def _combined(path: str, members: Sequence[Member], plan: _Plan) -> dict[str, Any]:
    """The entry of one weight, with the parts that there are."""
    found = with_factors(members)
    entry = _combined_factors(path, found, plan) if found else {}
    others = {
        "value": joined_value(path, members, plan.values),
        "offset": joined_offset(path, members, plan.task, plan.streams(path, members)),
        "magnitude": joined_magnitude(path, members),
    }
    return entry | {name: part for name, part in others.items() if part is not None}


def _combined_factors(path: str, members: Sequence[Member], plan: _Plan) -> dict[str, Any]:
    own = [member.factors for member in members]
    dtypes = {"a_dtype": common_dtype(f.a_dtype for f in own), "b_dtype": common_dtype(f.b_dtype for f in own)}
    like = dataclasses.replace(own[0], **dtypes, is_jax=any(f.is_jax for f in own))
    if plan.on_factors:
        return like.adapter(path, *_on_factors(path, members, plan))
    rank = min(plan.rank or max(factors.rank for factors in own), like.smaller_side)
    if plan.method != "cat" and not plan.task.is_linear:
        return like.adapter(path, *_on_deltas(path, members, plan, rank))
    a = np.concatenate([member.scale * member.factors.a for member in members], axis=-1)
    b = np.concatenate([factors.b for factors in own], axis=-2)
    return like.adapter(path, *((a, b) if plan.method == "cat" else truncated(a, b, rank)))


def _on_factors(path: str, members: Sequence[Member], plan: _Plan) -> tuple[np.ndarray, np.ndarray]:
    """A with A and B with B; the sign of a weight goes to A alone, as the two would cancel."""
    streams = plan.streams(path, members)
    roots = [math.sqrt(abs(member.scale)) for member in members]
    signed = [math.copysign(root, member.scale) for root, member in zip(roots, members, strict=True)]
    a = plan.task.join([member.factors.a for member in members], signed, streams)
    return a, plan.task.join([member.factors.b for member in members], roots, streams)


def _on_deltas(path: str, members: Sequence[Member], plan: _Plan, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The deltas joined as dense matrices, then the best approximation of their rank."""
    streams = plan.streams(path, members)
    sketch = np.random.default_rng([plan.seed, path_number(path), len(members), 1])
    dtypes = [np.dtype(np.float32)]
    for member in members:
        dtypes += [member.factors.a_dtype, member.factors.b_dtype]
    wide = common_dtype(dtypes)
    shares = [member.share for member in members]
    done = []
    for entry in range(len(members[0].factors.a)):
        deltas = [(m.scaling * m.factors.a[entry] @ m.factors.b[entry]).astype(wide)[None] for m in members]
        joined = plan.task.join(deltas, shares, streams)  # (1, in, out)
        u, s, vh = cut(leading_triples(joined[0], rank, sketch), rank)
        done.append(balanced(u.astype(np.float64), s.astype(np.float64), vh.astype(np.float64)))
    return padded(np.stack([a for a, _ in done]), np.stack([b for _, b in done]), rank)


def _joined(nodes: Sequence[Any], path: str) -> Any:
    """One structure that holds the adapters of all: the shared one, else nested dicts with the keys of all."""
    present = [node for node in nodes if node is not None]
    if not present:
        return None
    if len({tree_structure(node, is_slot) for node in present}) == 1:
        return present[0]
    if any(is_slot(node) or not isinstance(node, Mapping) for node in present):
        kinds = ", ".join("an adapter" if is_slot(node) else f"a {type(node).__name__}" for node in present)
        raise AdapterError(
            f"{path or 'the root'}: the parts are built differently here ({kinds}) and are no dicts to join; bring "
            "them to one structure first"
        )
    joined = {}
    for key in dict.fromkeys(itertools.chain.from_iterable(present)):
        below = [node.get(key) for node in present]
        joined[key] = _joined(below, f"{path}/{key}".lstrip("/"))
    return joined
