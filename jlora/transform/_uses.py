"""How a function uses its weights: the factorizations that follow, and adapters made with them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax

from jlora import tree
from jlora.config import LoraConfig
from jlora.cost import CostModel
from jlora.errors import ConfigError
from jlora.paths import literal_pattern, names_leaf
from jlora.transform._keywords import check_keywords
from jlora.transform._lazy import as_lazy
from jlora.transform._probe import probe
from jlora.transform._program import Program
from jlora.transform._registry import registry
from jlora.transform._run import Run, Settings, Use
from jlora.tree import Known, LeftOut, Survey, check_config, is_floating, is_targeted, survey

_ADDED = ("add", "sub", "add_any")
_UNUSED = "the function never uses it"
_NEVER_MERGED = CostModel(merge_from=float("inf"))


def resolve_config(
    fn: Callable[..., Any], config: LoraConfig, params: Any, /, *args: Any, strict: bool = False, **kwargs: Any
) -> LoraConfig:
    """`config` with the factorization of every weight written out as `fn` uses it.

    What is contracted is an in axis, what is looked up by index too, what the other operand shares is a batch axis,
    and so is what a scan or an index takes apart; the rest are out axes. Of several uses a lookup counts, then the
    first. With this configuration `lora`, `init_lora`, `merge_params` and `summary` read the axes alike without
    guessing. Weights that `fn` never uses, only adds, or that are vectors where it uses them, are excluded unless a
    pattern names them; `adapt` and `explain` say which.

    Args:
      fn: a function whose first argument is params.
      config: what is adapted and how; its own factorizations go first.
      params: arrays or shapes; nothing is computed.
      *args: of `fn`, arrays or shapes.
      strict: whether a weight that is left out is an error.
      **kwargs: of `fn`.

    Raises:
      TargetError: a pattern matches or adapts nothing; with `strict`, a weight that a pattern spans is left out.
      ConfigError: `fn` has an argument `strict`, which is not given by position.

    >>> def fn(params, x):
    ...     return jax.numpy.einsum('btd,hdk->bthk', x, params['query'])
    >>> shape = jax.ShapeDtypeStruct
    >>> params, x = {'query': shape((3, 5, 7), 'float32')}, shape((2, 11, 5), 'float32')
    >>> resolve_config(fn, LoraConfig(rank=2), params, x).factorizations
    (('query', 'oio'),)
    """
    check_handed_on("jlora.resolve_config", fn, ["strict"], args)
    return resolve(fn, config, params, args, kwargs, strict=strict)[0]


def resolve(
    fn: Callable[..., Any], config: LoraConfig, params: Any, args: Any, kwargs: Any, *, strict: bool = False
) -> tuple[LoraConfig, tuple[LeftOut, ...]]:
    """What `resolve_config` returns, and the weights that are left out, with the reasons."""
    resolved, found = survey_uses(fn, config, params, *args, **kwargs)
    return resolved, found.checked(strict=strict).left_out


def survey_uses(
    fn: Callable[..., Any], config: LoraConfig, params: Any, /, *args: Any, **kwargs: Any
) -> tuple[LoraConfig, Survey]:
    """What `resolve_config` returns, and what it makes of the weights; problems stand in the survey, none is raised."""
    check_config(config)
    known = _known(config, _uses_by_path(fn, config, params, args, kwargs))
    found = survey(params, config, known)
    given = dict(config.factorizations)
    new = {literal_pattern(path): roles for path, roles in known.roles.items() if path in found.targets}
    resolved = config.replace(factorizations=given | {path: new[path] for path in new if path not in given})
    alone = survey(params, resolved).targets
    exclude = [*known.left_out, *(one.path for one in found.left_out if one.path in alone)]
    patterns = dict.fromkeys([*config.exclude_modules, *map(literal_pattern, exclude)])
    return resolved.replace(exclude_modules=tuple(patterns)), found


def _known(config: LoraConfig, uses_by_path: Mapping[str, Sequence[Use]]) -> Known:
    """What the uses of the weights say of them; what the configuration says of a very leaf goes first."""
    roles: dict[str, str] = {}
    left_out: dict[str, str] = {}
    whole: dict[str, str] = {}
    for path, uses in uses_by_path.items():
        reading, why = _reading(uses), _why_left_out(uses)
        if reading is not None:
            roles[path] = reading
        elif why is None:
            whole[path] = f"{uses[0].primitive} at {uses[0].place}" if uses[0].place else "the output"
        elif not _names(config, path):
            left_out[path] = why
    return Known(roles, left_out, whole)


def _reading(uses: Sequence[Use]) -> str | None:
    """The roles of a weight's axes by its uses, in params; None where they do not say.

    A weight that is used as a whole has two readings, which are the same but for the names of A and B, where scans and
    indices leave two axes of it.
    """
    split = [use for use in uses if {"i", "o"} <= set(use.roles)]
    if split:
        return min(split, key=lambda use: use.primitive != "gather").roles
    left = next((use.roles for use in uses if not _is_vector(use)), "")
    return left.replace("o", "i", 1) if "b" in left and left.count("o") == 2 else None


def _why_left_out(uses: Sequence[Use]) -> str | None:
    """Why a weight of these uses is no target, if it is none."""
    if not uses:
        return _UNUSED
    if all(use.primitive in _ADDED for use in uses):
        return "the function only adds it"
    return "it is a vector where the function uses it" if all(map(_is_vector, uses)) else None


def _is_vector(use: Use) -> bool:
    return sum(size != 1 for size in use.shape) < 2 or use.primitive in _ADDED


def _names(config: LoraConfig, path: str) -> bool:
    """Whether the configuration speaks of this very leaf, as a target or with a factorization."""
    patterns = [*config.matches("target_modules", path), *config.matches("factorizations", path)]
    return any(names_leaf(pattern, path) for pattern, _ in patterns)


def _uses_by_path(
    fn: Callable[..., Any], config: LoraConfig, params: Any, args: Any, kwargs: Any
) -> dict[str, list[Use]]:
    """The uses of every leaf of two or more axes that the patterns take in, by path, in the order of the program.

    One on which nothing depends has none.
    """
    program = Program(fn, params, args, kwargs)
    uses: list[Use] = []
    run = Run(Settings(registry(), _NEVER_MERGED), uses=uses, keeps_rows=True)
    probed: list[str] = []

    def evaluated(*arrays: jax.Array) -> Any:
        probes = {}
        for path, array in zip(program.paths, arrays, strict=True):
            if path is not None and is_targeted(config, path) and len(array.shape) > 1 and is_floating(array):
                probes[path] = probe(path, as_lazy(array, path))
        probed.extend(probes)
        return program.evaluate(run, probes, arrays)

    jax.eval_shape(evaluated, *program.leaves)
    read = program.read()
    by_path: dict[str, list[Use]] = {path: [] for path in [*(use.path for use in uses), *probed]}
    for use in uses:
        if use.path in read:
            by_path[use.path].append(use)
    return by_path


def check_handed_on(taker: str, fn: Callable[..., Any], own: Sequence[str], args: Sequence[Any]) -> None:
    """Raises a ConfigError where `fn`, called with params and `args`, has an argument named as a keyword of jlora's."""
    way_out = "pass it by position, or in a function of your own: lambda params, *args: fn(params, *args, {name}=...)"
    check_keywords(taker, fn, own, 1 + len(args), way_out)


def check_args(args: Any) -> None:
    """Raises a ConfigError for an argument that stands where a tuple of them is wanted."""
    if not isinstance(args, tuple | list):
        raise ConfigError(f"args: found {type(args).__name__}, wanted a tuple of the arguments, such as (x,)")


def init_lora(
    key: chex.PRNGKey | None,
    params: Any,
    config: LoraConfig,
    *,
    fn: Callable[..., Any] | None = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    strict: bool = False,
) -> Any:
    """The adapters of a params tree, with B zero: the model is unchanged.

    Args:
      key: PRNG key; `None` for `jax.random.key(config.seed)`. Each adapter's key is derived from it and the path,
        so that another target does not change the others.
      params: a pytree of arrays or of `jax.ShapeDtypeStruct`: dicts, lists, FrozenDicts, dataclasses.
      config: what is adapted and how.
      fn: a function `fn(params, *args, **kwargs)` that says how the axes of each weight split, by how it uses them;
        without it the names of Flax's parameters do. It is traced, not run.
      args: the arguments of `fn` after params, arrays or shapes.
      kwargs: its keyword arguments.
      strict: whether a weight that a pattern spans and that cannot be adapted is an error; else it is left out, and
        `summary`, `explain` and `adapt` say why.

    Returns:
      A pytree of the structure of `params`: an adapter where a weight is adapted, `None` elsewhere.

    Raises:
      ConfigError: `args` is no tuple.
      TargetError: the configuration does not fit the tree; every problem is named with its path.

    >>> params = {'up': {'kernel': jax.numpy.ones((5, 7)), 'bias': jax.numpy.ones(7)}}
    >>> jax.tree.map(jax.numpy.shape, init_lora(jax.random.key(0), params, LoraConfig(rank=2)))
    {'up': {'bias': None, 'kernel': {'A': (5, 2), 'B': (2, 7)}}}
    """
    check_args(args)
    if fn is not None:
        config, _ = resolve(fn, config, params, args, kwargs or {}, strict=strict)
    return tree.init_lora(key, params, config, strict=strict and fn is None)
