"""Which leaves of a params tree a configuration adapts, and how each: the one place where patterns meet paths."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jlora import arrays
from jlora.config import LoraConfig
from jlora.contraction import Factorization
from jlora.errors import ConfigError, TargetError, listed, raise_all
from jlora.paths import format_nearest, leaves_by_path, literal_pattern, matched_depths, names_leaf
from jlora.tree._flax_rules import flax_factorization

MOST_PROBLEMS = 12
_MOST_PATHS = 3
_PAIRS = ("rank_pattern", "alpha_pattern", "factorizations")
_UNADAPTED = "excluded, or is a bias, a scale or a vector, or added with broadcasting as a first axis of size 1 says"


@dataclasses.dataclass(frozen=True)
class Target:
    """One weight that is adapted."""

    path: str
    shape: tuple[int, ...]
    factorization: Factorization
    rank: int
    alpha: float


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A weight that is not adapted although a pattern spans it, and why."""

    path: str
    shape: tuple[int, ...]
    why: str

    def __str__(self) -> str:
        return f"{self.path} {self.shape}: {self.why}"


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a configuration makes of the weights of a tree.

    Attributes:
      targets: the weights that are adapted, by path.
      left_out: those that a pattern spans and that are not; biases, scales and vectors are no weights.
      problems: what is an error.
    """

    targets: dict[str, Target]
    left_out: tuple[LeftOut, ...]
    problems: tuple[str, ...]

    def checked(self, *, strict: bool = False) -> "Survey":
        """The survey itself, if there are no problems; with `strict`, if nothing is left out either."""
        raise_all(
            [*self.problems, *(f"strict, and not adapted: {one}" for one in self.left_out if strict)], TargetError
        )
        return self


@dataclasses.dataclass(frozen=True)
class Known:
    """What the use of the weights of a tree says of them, by path.

    Attributes:
      roles: how the axes split, where the configuration does not say.
      left_out: why a weight is not adapted.
      whole: where a weight is used as a whole, which does not say how its axes split.
    """

    roles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    whole: Mapping[str, str] = dataclasses.field(default_factory=dict)


def survey(params: Any, config: LoraConfig, known: Known | None = None) -> Survey:
    """The weights of `params` that `config` adapts, those that it leaves out, and every problem.

    A pattern that ends at a module, or in a last `*` or `**`, spans the weights inside it: what cannot be adapted is
    left out. One that names a leaf adapts that leaf, or it is a problem.

    Args:
      params: arrays or shapes.
      config: what is adapted and how.
      known: what is known of the weights beside their names and shapes.
    """
    known = known or Known()
    check_config(config)
    leaves = leaves_by_path(params)
    config.check_work(len(leaves))
    shapes = shapes_by_path(params)
    targets: dict[str, Target] = {}
    left_out: dict[str, LeftOut] = {}
    failed: dict[str, str] = {}
    for path, leaf in leaves.items():
        if not is_targeted(config, path):
            continue
        named = _naming_pattern(config, path)
        try:
            found = _read(path, leaf, shapes, config, known)
        except TargetError as error:
            failed[path] = str(error)
            continue
        if isinstance(found, Target):
            targets[path] = found
        elif named is not None:
            failed[path] = _refusal(path, shapes[path], named, found)
        elif found is not None:
            left_out[path] = found
    without = tuple(left_out.values())
    unused = unused_patterns(config, list(shapes), [*targets, *failed], left_out=without)
    return Survey(targets, without, (*failed.values(), *unused))


def find_targets(params: Any, config: LoraConfig) -> dict[str, Target]:
    """The weights of `params` that `config` adapts, by path; see `survey`.

    Raises:
      TargetError: with every problem at once: a pattern that matches or adapts nothing, a named leaf that is no
        weight or cannot be adapted.
    """
    return survey(params, config).checked().targets


def check_config(config: Any) -> None:
    """Raises a ConfigError for what is no LoraConfig."""
    if not isinstance(config, LoraConfig):
        raise ConfigError(
            f"config: found {type(config).__name__}, wanted a LoraConfig; LoraConfig.from_dict reads a mapping"
        )


def shapes_by_path(params: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the leaves by path; () for what is no array, such as the functions in an Equinox module."""
    return {path: tuple(getattr(leaf, "shape", ())) for path, leaf in leaves_by_path(params).items()}


def is_floating(leaf: Any) -> bool:
    """Whether a leaf can be adapted: its dtype is a floating one."""
    return arrays.is_floating(leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype)


def check_floating(weights: Mapping[str, Any]) -> None:
    """Raises a TargetError for weights, by path, to which no update can be added."""
    raise_all(
        (
            f"{path}: dtype {weight.dtype} is not floating; cast or dequantize the weight first"
            for path, weight in weights.items()
            if not is_floating(weight)
        ),
        TargetError,
    )


def is_targeted(config: LoraConfig, path: str) -> bool:
    """Whether the patterns take in the leaf at `path`; whether it is a weight is another question."""
    return bool(config.matches("target_modules", path)) and not config.matches("exclude_modules", path)


def check_patterns(config: LoraConfig, paths: list[str], adapted: list[str], unadapted: str = _UNADAPTED) -> None:
    """Raises a TargetError for the patterns that have no effect on a tree with leaves at `paths`, some adapted.

    `unadapted` says what a leaf is that a pattern matches and that is not adapted.
    """
    raise_all(unused_patterns(config, paths, adapted, unadapted), TargetError)


def _naming_pattern(config: LoraConfig, path: str) -> str | None:
    """The first target that names the leaf at `path`, and does not only span it."""
    return next((pattern for pattern, _ in config.matches("target_modules", path) if names_leaf(pattern, path)), None)


def _read(
    path: str, leaf: Any, shapes: Mapping[str, tuple[int, ...]], config: LoraConfig, known: Known
) -> Target | LeftOut | None:
    """The leaf as a target, or why it cannot be one; None for what is no weight."""
    shape = shapes[path]
    factorization = given_factorization(path, shapes, config)
    if factorization is None and path in known.roles:
        factorization = Factorization(known.roles[path])
    if factorization is None and not _is_weight(path, shapes):
        return None
    if path in known.left_out:
        return LeftOut(path, shape, known.left_out[path])
    if not is_floating(leaf):
        return LeftOut(path, shape, f"dtype {leaf.dtype} is not floating, nothing can be added to it")
    if factorization is None:
        try:
            factorization = flax_factorization(path, shapes)
        except TargetError as error:
            return LeftOut(path, shape, f"{error}{_way_out(path, known.whole.get(path))}")
    assert factorization is not None
    rank, most = config.rank_of(path), factorization.max_rank(shape)
    if rank > most and config.kind != "vera":  # whose d has a use for more
        way_out = f"lower it, or give rank_pattern={{{literal_pattern(path)!r}: {most}}}"
        return LeftOut(path, shape, f"rank {rank} is larger than the smaller side {most}; {way_out}")
    return Target(path, shape, factorization, rank, config.alpha_of(path))


def _way_out(path: str, whole: str | None) -> str:
    """How to say how the axes of a weight split; the function that uses it does not where it uses it as a whole."""
    pattern = literal_pattern(path)
    letters = f"one letter per axis, b (batch), i (in) or o (out), as factorizations={{{pattern!r}: 'i...o'}}"
    if whole is not None:
        return f", and is used as a whole in {whole}: give {letters}"
    return f": give the function that uses it (jlora.adapt, or init_lora with fn= and args=), or {letters}"


def _refusal(path: str, shape: tuple[int, ...], named: str, found: LeftOut | None) -> str:
    """What is wrong with a leaf that a pattern names and that is not adapted."""
    at = f"{path} {shape}, named by {named!r}"
    if found is not None:
        return f"{at}: {found.why}; or leave it out with exclude_modules"
    if len(shape) < 2:
        return f"{at}, has fewer than two axes: name weights only"
    given = f"factorizations={{{literal_pattern(path)!r}: '...'}}"
    return f"{at}, is a bias, a scale or a vector; to adapt it all the same, give {given}"


def given_factorization(path: str, shapes: Mapping[str, tuple[int, ...]], config: LoraConfig) -> Factorization | None:
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


def unused_patterns(
    config: LoraConfig,
    paths: list[str],
    targets: list[str],
    unadapted: str = _UNADAPTED,
    *,
    left_out: Sequence[LeftOut] = (),
) -> Iterator[str]:
    """A problem for every pattern of the configuration that has no effect, with the reasons of what is left out."""

    def without(field: str, among: list[str]) -> list[str]:
        used = {pattern for path in among for pattern, _ in config.matches(field, path)}
        patterns = getattr(config, field)
        return [pattern for pattern in (dict(patterns) if field in _PAIRS else patterns) if pattern not in used]

    told = itertools.count()

    def problem(field: str, pattern: str, say: Callable[[str], str]) -> str:
        """What is wrong with a pattern; of thousands only those that are shown are looked into."""
        return f"{field}: {pattern!r} {say(pattern) if next(told) < MOST_PROBLEMS else 'has no effect'}"

    def reasons(pattern: str) -> str:
        found = [one for one in left_out if matched_depths(pattern, one.path)]
        more = [f"and {len(found) - _MOST_PATHS:,} more"] if len(found) > _MOST_PATHS else []
        return "".join(f"\n    {line}" for line in [*map(str, found[:_MOST_PATHS]), *more])

    def untargeted(pattern: str) -> str:
        found = list(itertools.islice((path for path in paths if matched_depths(pattern, path)), _MOST_PATHS))
        if not found:
            return f"matches nothing; {format_nearest(pattern, paths)}"
        if why := reasons(pattern):
            return f"adapts nothing:{why}"
        return f"adapts nothing: what it matches is {unadapted} ({listed(found)})"

    def unadapting(pattern: str) -> str:
        why = reasons(pattern)
        return (
            f"matches nothing that is adapted{f':{why}' if why else f'; {format_nearest(pattern, targets or paths)}'}"
        )

    for pattern in without("target_modules", targets):
        yield problem("target_modules", pattern, untargeted)
    for pattern in without("exclude_modules", paths):
        yield problem("exclude_modules", pattern, lambda p: f"matches nothing; {format_nearest(p, paths)}")
    for field in _PAIRS:
        for pattern in without(field, targets):
            yield problem(field, pattern, unadapting)
