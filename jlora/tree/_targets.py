"""Which leaves of a params tree a configuration adapts, and how each: the one place where patterns meet paths."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from jlora.adapter import check_update, is_update
from jlora.config import LoraConfig
from jlora.contraction import Factorization, factorization_from_shapes
from jlora.errors import AdapterError, ConfigError, JloraError, TargetError
from jlora.paths import format_nearest, leaves_by_path, matched_depths, names_leaf
from jlora.tree._flax_rules import flax_factorization

_MOST_PROBLEMS = 12
_PAIRS = ("rank_pattern", "alpha_pattern", "factorizations")
_UNADAPTED = "excluded, or is a bias, a scale or a vector"


@dataclasses.dataclass(frozen=True)
class Target:
    """One weight that is adapted; `effective_alpha` / rank is the scaling of its update."""

    path: str
    shape: tuple[int, ...]
    factorization: Factorization
    rank: int
    alpha: float
    effective_alpha: float


def find_targets(params: Any, config: LoraConfig) -> dict[str, Target]:
    """The weights of `params` that `config` adapts, by path.

    A pattern that ends at a module, or in a last `*` or `**`, adapts the weights inside it: those with a
    factorization, never biases, scales or vectors. One that names a leaf adapts that leaf or fails.

    Raises:
      TargetError: with every problem at once: a pattern that matches or adapts nothing, a named leaf that is no
        weight, a weight whose factorization is not known, a rank larger than the smaller side.
    """
    check_config(config)
    leaves = leaves_by_path(params)
    shapes = _shapes(params)
    targets: dict[str, Target] = {}
    failed: dict[str, str] = {}
    for path in shapes:
        if not is_targeted(config, path):
            continue
        try:
            target = _target(path, shapes, config)
        except JloraError as error:
            failed[path] = str(error)
        else:
            if target is None:
                continue
            targets[path] = target
            if config.dtype is None and not is_floating(leaves[path]):
                failed[path] = f"{path}: dtype {leaves[path].dtype} is not floating; give the adapters one with dtype"
    raise_all([*failed.values(), *_unused_patterns(config, list(shapes), [*targets, *failed])])
    return targets


def adapted_targets(params: Any, adapters: Any, config: LoraConfig) -> dict[str, Target]:
    """What the A and B at hand adapt, by path, with `config` for rank, alpha, scaling and factorization.

    Entries that hold no A and B are checked, and not among the targets.

    Raises:
      TargetError: with every problem at once: an adapter where params has no leaf, a leaf that is no adapter, an
        adapter whose rank is not the configuration's, shapes that do not fit, a pattern of the configuration of which
        there is no adapter.
    """
    check_config(config)
    shapes = _shapes(params)
    problems: list[str] = []
    targets: dict[str, Target] = {}
    updates = leaves_by_path(adapters, is_leaf=is_update)
    for path, update in updates.items():
        if not is_update(update):
            problems.append(
                f"{path or 'adapters'}: found {type(update).__name__}, wanted an adapter {{'A', 'B'}} or None"
            )
        elif path not in shapes:
            near = format_nearest(path, shapes) if len(problems) < _MOST_PROBLEMS else "and no near path was sought"
            problems.append(f"{path}: an adapter where params has no leaf; {near}")
        else:
            try:
                if "A" in update:
                    targets[path] = _adapted(path, shapes, update, config)
                check_update(shapes[path], update, targets[path].factorization if "A" in update else None)
            except JloraError as error:
                problems.append(f"{path}: {error}")
    raise_all(problems or _unused_patterns(config, list(shapes), list(updates), "without an adapter at hand"))
    return targets


def check_config(config: Any) -> None:
    """Raises a ConfigError for what is no LoraConfig."""
    if not isinstance(config, LoraConfig):
        raise ConfigError(
            f"config: found {type(config).__name__}, wanted a LoraConfig; LoraConfig.from_dict reads a mapping"
        )


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the leaves by path; () for what is no array, such as the functions in an Equinox module."""
    return {path: tuple(getattr(leaf, "shape", ())) for path, leaf in leaves_by_path(params).items()}


def is_floating(leaf: Any) -> bool:
    """Whether a leaf can be adapted: its dtype is a floating one."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def check_floating(weights: Mapping[str, Any]) -> None:
    """Raises a TargetError for weights, by path, to which no update can be added."""
    raise_all(
        f"{path}: dtype {weight.dtype} is not floating; cast or dequantize the weight first"
        for path, weight in weights.items()
        if not is_floating(weight)
    )


def is_targeted(config: LoraConfig, path: str) -> bool:
    """Whether the patterns take in the leaf at `path`; whether it is a weight is another question."""
    return bool(config.matches("target_modules", path)) and not config.matches("exclude_modules", path)


def check_patterns(config: LoraConfig, paths: list[str], adapted: list[str], unadapted: str = _UNADAPTED) -> None:
    """Raises a TargetError for the patterns that have no effect on a tree with leaves at `paths`, some adapted.

    `unadapted` says what a leaf is that a pattern matches and that is not adapted.
    """
    raise_all(_unused_patterns(config, paths, adapted, unadapted))


def _target(path: str, shapes: Mapping[str, tuple[int, ...]], config: LoraConfig) -> Target | None:
    """The target at a path that the patterns match, or None where they only span something that is no weight."""
    shape = shapes[path]
    named = next((pattern for pattern, _ in config.matches("target_modules", path) if names_leaf(pattern, path)), None)
    if named is not None and len(shape) < 2:
        raise TargetError(f"{path} {shape}, named by {named!r}, has fewer than two axes: name weights only")
    factorization = _factorization(path, shapes, config)
    if factorization is None:
        if named is None:
            return None
        raise TargetError(
            f"{path} {shape}, named by {named!r}, is a bias, a scale or a vector; "
            f"to adapt it all the same, give factorizations={{{path!r}: '...'}}"
        )
    rank, most = config.rank_of(path), factorization.max_rank(shape)
    if rank > most:
        raise TargetError(
            f"{path} {shape}: rank {rank} is larger than the smaller side {most}; lower it, give "
            f"rank_pattern={{{path!r}: {most}}}, or leave the weight out with exclude_modules"
        )
    return Target(path, shape, factorization, rank, config.alpha_of(path), config.effective_alpha_of(path))


def _factorization(path: str, shapes: Mapping[str, tuple[int, ...]], config: LoraConfig) -> Factorization | None:
    """The factorization from the configuration, else from Flax's names; None where the leaf is no weight."""
    given = _given_factorization(path, shapes, config)
    if given is not None:
        return given
    try:
        return flax_factorization(path, shapes)
    except TargetError as error:
        raise TargetError(
            f"{error}: give one letter per axis, b (batch), i (in) or o (out), as "
            f"factorizations={{{path!r}: 'i...o'}}, or leave it out with exclude_modules"
        ) from None


def _given_factorization(path: str, shapes: Mapping[str, tuple[int, ...]], config: LoraConfig) -> Factorization | None:
    """The first factorization of the configuration that names the leaf, or a module of which it is a weight."""
    for pattern, roles in config.matches("factorizations", path):
        if names_leaf(pattern, path) or _is_weight(path, shapes):
            if len(roles) != len(shapes[path]):
                raise TargetError(
                    f"{path} {shapes[path]}: the factorization {roles!r} given by {pattern!r} has {len(roles)} axes"
                )
            return Factorization(roles)
    return None


def _is_weight(path: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    try:
        return flax_factorization(path, shapes) is not None
    except TargetError:
        return True


def _adapted(
    path: str, shapes: Mapping[str, tuple[int, ...]], adapter: Mapping[str, Any], config: LoraConfig
) -> Target:
    shape, a_shape, b_shape = shapes[path], jnp.shape(adapter["A"]), jnp.shape(adapter["B"])
    rank, given = config.rank_of(path), _given_factorization(path, shapes, config)
    if a_shape[-1:] != (rank,):
        raise AdapterError(f"A {a_shape} does not have the rank {rank} of the configuration")
    if given is not None and (a_shape, b_shape) != (wanted := given.adapter_shapes(shape, rank)):
        raise AdapterError(
            f"A {a_shape} and B {b_shape} do not fit the weight {shape} with factorization {given.roles!r}: "
            f"wanted A {wanted[0]} and B {wanted[1]}"
        )
    named = path.rpartition("/")[2] in ("kernel", "embedding")  # Flax's (in, out); others may be (out, in)
    factorization = given or factorization_from_shapes(shape, a_shape, b_shape, transposed=not named)
    return Target(path, shape, factorization, rank, config.alpha_of(path), config.effective_alpha_of(path))


def _unused_patterns(
    config: LoraConfig, paths: list[str], targets: list[str], unadapted: str = _UNADAPTED
) -> Iterator[str]:
    """A problem for every pattern of the configuration that has no effect."""

    def without(field: str, among: list[str]) -> list[str]:
        used = {pattern for path in among for pattern, _ in config.matches(field, path)}
        patterns = getattr(config, field)
        return [pattern for pattern in (dict(patterns) if field in _PAIRS else patterns) if pattern not in used]

    hints = itertools.count()

    def hint(pattern: str, among: list[str]) -> str:
        return format_nearest(pattern, among) if next(hints) < _MOST_PROBLEMS else "and no near path was sought"

    for pattern in without("target_modules", targets):
        found = [path for path in paths if matched_depths(pattern, path)][:3]
        if not found:
            yield f"target_modules: {pattern!r} matches nothing; {hint(pattern, paths)}"
        else:
            yield f"target_modules: {pattern!r} adapts nothing: what it matches is {unadapted} ({', '.join(found)})"
    for pattern in without("exclude_modules", paths):
        yield f"exclude_modules: {pattern!r} matches nothing; {hint(pattern, paths)}"
    for field in _PAIRS:
        for pattern in without(field, targets):
            yield f"{field}: {pattern!r} matches nothing that is adapted; {hint(pattern, targets or paths)}"


def raise_all(found: Iterable[str]) -> None:
    """Raises one TargetError for all problems, if there are any."""
    problems = list(found)
    if not problems:
        return
    shown = problems[:_MOST_PROBLEMS]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    raise TargetError("\n  ".join(shown) if len(shown) == 1 else "\n  ".join([f"{len(problems)} problems:", *shown]))
