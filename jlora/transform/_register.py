"""`register`: what a primitive of your own does to a weight."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Primitive

from jlora.errors import AdapterError, ConfigError
from jlora.products import factored_einsum
from jlora.transform import _products as products
from jlora.transform._lazy import bind, is_packed
from jlora.transform._liveness import live_inputs
from jlora.transform._primitives import name_of_primitive
from jlora.transform._registry import add_rule
from jlora.transform._rules import MOVED, multiplies
from jlora.transform._run import Run
from jlora.transform._weight import Weight, base_of, is_weight

PLACE = "the weight is none of its first two operands"
INTEGERS = "its other operand has no floating-point numbers; a rule that Moves follows a lookup"
SPLIT = "A and B split the axes of the weight in another way; jlora.resolve_config reads them from the rule"
SUMMED = "it sums over an axis that only the weight has"


@dataclasses.dataclass(frozen=True)
class Moves:
    """What a rule returns for a primitive that moves the axes of a weight about: the result is a weight again.

    Attributes:
      like: the same in jax.numpy, `like(*operands)`: transposes, reshapes, slices, lookups, concatenations. A and B are
        moved as it moves the weight; the value itself comes from the primitive. For a primitive of several results it
        returns them in a tuple.
    """

    like: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Multiplies:
    """What a rule returns for a primitive that is linear in the weight: the product with A and B is added.

    The input, of floating-point numbers, and the weight are its first two operands, in either order. It has one result.

    Attributes:
      equation: which axes meet, as an einsum of the input and the weight, in this order: `"...k,kn->...n"`.
      update: `update(x, a, b, *rest)`, the same product with A `(*batch, *in, r)` and B `(*batch, r, *out)`, which are
        parts of the weight's axes in its order, for the input and all operands but the first two. It is linear in A and
        in B. With None it is the einsum.
    """

    equation: str
    update: Callable[..., jax.Array] | None = None


UserRule = Callable[..., Moves | Multiplies | str]
_R = TypeVar("_R", bound=UserRule)


@overload
def register(primitive: Primitive, rule: _R, *, replace: bool = False) -> _R: ...


@overload
def register(primitive: Primitive, rule: None = None, *, replace: bool = False) -> Callable[[_R], _R]: ...


def register(primitive: Primitive, rule: Any = None, *, replace: bool = False) -> Any:
    """Says what a primitive does to a weight, so that `lora` follows A and B through it instead of merging them.

    `rule(*operands, **params)` is called where the primitive meets an adapted weight, with the shapes of its operands
    (`jax.ShapeDtypeStruct`) and with its parameters. It returns `Moves`, `Multiplies`, or the reason (a string) why the
    weight has to be merged here, which `explain` and `strict=True` tell. Register before the model is traced: what jit
    has compiled stays as it is.

    Args:
      primitive: the object, a `jax.extend.core.Primitive`. That of a Pallas kernel or of another library's function is
        in its jaxpr: `jax.make_jaxpr(fn)(*arguments).eqns[0].primitive`.
      rule: without it, `register` is a decorator of the rule.
      replace: whether the primitive may have a rule already, of yours or of jlora's; else that is an error.

    Returns:
      The rule; without one the decorator.

    Raises:
      ConfigError: `primitive` is no primitive, has a rule already, or the rule is no function.

    >>> from jax.core import ShapedArray
    >>> from jax.extend.core import Primitive
    >>> from jlora import LoraConfig, explain
    >>> from jlora.transform import Multiplies, register
    >>> scaled_matmul_p = Primitive('scaled_matmul')  # y = scale * x @ w, by a kernel
    >>> @scaled_matmul_p.def_abstract_eval
    ... def _(x, w, *, scale):
    ...     return ShapedArray((x.shape[0], w.shape[1]), x.dtype)
    >>> @register(scaled_matmul_p)
    ... def rule(x, w, *, scale):
    ...     return Multiplies('mk,kn->mn', lambda x, a, b: scale * (x @ a) @ b)
    >>> shape = jax.ShapeDtypeStruct
    >>> fn = lambda params, x: scaled_matmul_p.bind(x, params['w'], scale=2.0)
    >>> table = explain(fn, LoraConfig(rank=2), {'w': shape((5, 7), 'float32')}, shape((3, 5), 'float32'))
    >>> [(use.primitive, use.roles, use.factored) for use in table.uses]
    [('scaled_matmul', 'io', True)]
    """
    if not isinstance(primitive, Primitive):
        raise ConfigError(
            f"register: found {type(primitive).__name__} {primitive!r}, wanted a jax.extend.core.Primitive; that of a "
            "function is jax.make_jaxpr(fn)(*arguments).eqns[0].primitive"
        )
    if rule is None:
        return functools.partial(register, primitive, replace=replace)
    if not callable(rule):
        raise ConfigError(
            f"register: {primitive.name}: found the rule {rule!r}, wanted a function rule(*operands, **params)"
        )
    add_rule(primitive, functools.partial(_followed, rule), replace=replace)
    return rule


def _followed(rule: UserRule, run: Run, eqn: JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any]:
    """The outputs of an equation by the rule of its primitive."""
    avals: Any = [atom.aval for atom in eqn.invars]
    found = rule(*(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals), **eqn.params)
    if isinstance(found, Moves):
        return _moved(found, run, eqn, inputs)
    if isinstance(found, Multiplies):
        return _multiplied(found, run, eqn, inputs)
    if isinstance(found, str):
        return bind(eqn, run.merge_all(eqn, inputs, found))
    raise _wrong(eqn, f"found {type(found).__name__}, wanted Moves, Multiplies, or the reason why there is neither")


def _wrong(eqn: JaxprEqn, what: str) -> AdapterError:
    return AdapterError(f"the rule that is registered for {name_of_primitive(eqn.primitive)}: {what}")


def _moved(found: Moves, run: Run, eqn: JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any]:
    """The value from the primitive, the factors from what the function of the rule does to the weight."""
    values = list(map(base_of, inputs))
    shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) if is_packed(value) else value for value in values]
    program = jax.make_jaxpr(lambda *operands: jax.tree.leaves(found.like(*operands)))(*shapes)
    avals: Any = [var.aval for var in eqn.outvars]
    of_like, wanted = ([aval.shape for aval in group] for group in (program.out_avals, avals))
    if of_like != wanted:
        raise _wrong(eqn, f"its function of Moves returns the shapes {of_like}, the primitive {wanted}")
    settings = dataclasses.replace(run.settings, strict=False)
    quiet = dataclasses.replace(run.inner(eqn, None), settings=settings, uses=[], unpacked=None, keeps_rows=True)
    moved = quiet.evaluate(program, inputs)
    for number, output in enumerate(moved):
        live = live_inputs(program, [place == number for place in range(len(moved))])
        read = [value for value, is_live in zip(inputs, live, strict=True) if is_live]
        if any(map(is_weight, read)) and not is_weight(output):
            return bind(eqn, run.merge_all(eqn, inputs, MOVED))
    # Rows that were looked up, as of an embedding, are no weight any more: those of A, times B, are added to them here.
    usual = dataclasses.replace(quiet, uses=[], keeps_rows=run.keeps_rows)
    followed = usual.evaluate(program, inputs)
    if run.uses is not None:
        run.uses.extend(usual.uses or ())
    outputs = []
    for value, of_move, of_program in zip(bind(eqn, values), moved, followed, strict=True):
        output = dataclasses.replace(of_move, value=value) if is_weight(of_move) else value
        outputs.append(output.merged() if is_weight(output) and not is_weight(of_program) else output)
    return outputs


def _multiplied(found: Multiplies, run: Run, eqn: JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any]:
    if not any(map(is_weight, inputs[:2])) or len(inputs) < 2:
        return bind(eqn, run.merge_all(eqn, inputs, PLACE))
    avals: Any = [var.aval for var in eqn.outvars]
    if len(avals) > 1:
        raise _wrong(eqn, f"found Multiplies for {len(avals)} results, wanted one")
    shape = avals[0].shape

    def product(weight: Weight, x: jax.Array, /, *rest: Any, **_: Any) -> products.Product | str:
        try:
            einsum = factored_einsum(found.equation, x.ndim, len(weight.shape))
        except AdapterError as error:
            raise _wrong(eqn, str(error)) from error
        roles = einsum.factorization.roles
        order = weight.order(roles)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return INTEGERS
        if order is None:
            return SPLIT
        if not set(einsum.weight) - set(einsum.x) <= set(einsum.y):
            return SUMMED

        def update(x: jax.Array, weight: Weight) -> jax.Array:
            a, b = _factors(weight, order)
            y = (found.update or einsum.product)(x, a, b, *rest)
            if jnp.shape(y) != shape:
                raise _wrong(eqn, f"its update returns the shape {jnp.shape(y)}, the primitive {shape}")
            return y

        # It may not be linear in x, which the derivative of the merged form would need: that form is never chosen.
        return products.Product(roles, update, products.along(einsum.weight, einsum.y), mergeable=False)

    return multiplies(product)(run, eqn, inputs)


def _factors(weight: Weight, order: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """A `(*batch, *in, r)` and B `(*batch, r, *out)` of a weight, which are its factors in this order."""
    first, second = (weight.factors[n] for n in order)
    batch = weight.shared
    a = first.transposed((*batch, *weight.own(first)), len(first.axes))
    b = second.transposed((*batch, *weight.own(second)), len(batch))
    return a, b
