"""The forms of a rule: what a primitive that meets a weight does with it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import JaxprEqn
from jax.sharding import NamedSharding, PartitionSpec

from jlora.products import common_dtype
from jlora.transform import _structure as structure
from jlora.transform._lazy import bind, on_dense
from jlora.transform._products import Product, Update, cost, known
from jlora.transform._run import Rule, Run
from jlora.transform._weight import Weight, bare, base_of, is_weight, of_params

MOVED = "what it makes of the weight is no product of factors"


def moves(rule: Callable[..., Any], *, either_side: bool = False, several: bool = False) -> Rule:
    """The primitive moves the weight about: the result is a weight again.

    `either_side` says that the weight may be the second operand too, `several` that there are several results.
    """

    def apply(run: Run, eqn: JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any]:
        of_data = not all(map(of_params, inputs))
        inputs = list(map(bare, inputs))
        place = 1 if either_side and not is_weight(inputs[0]) else 0
        weight, others = inputs[place], [value for number, value in enumerate(inputs) if number != place]
        found: Any = None
        if is_weight(weight) and not any(map(is_weight, others)):
            found = rule(weight, *others, **eqn.params)
        if found is None or isinstance(found, str):
            why = found or MOVED
            return bind(eqn, run.merge_all(eqn, inputs, why))
        values = bind(eqn, [value.value if value is weight else value for value in inputs])
        return [
            weight.with_parts(value, of_value, of_data=of_data)
            for value, of_value in zip(values, found if several else [found], strict=True)
        ]

    return apply


def each(run: Run, eqn: JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any]:
    """The primitive does the same to every number: to those of the factors too."""
    (weight,) = inputs
    (value,) = bind(eqn, [weight.value])
    factors = [factor.changed(bind(eqn, [factor.array])[0]) for factor in weight.factors]
    return [weight.with_parts(value, [*factors, *weight.gains])]


def places(run: Run, eqn: JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any]:
    """The primitive places the weight on a mesh: every part as the axes of the weight that it has."""
    (weight,) = inputs
    (value,) = bind(eqn, [weight.value])
    sharding = eqn.params["dst_sharding"]
    spec = [*sharding.spec, *[None] * (len(weight.shape) - len(sharding.spec))]
    arrays = []
    for part in weight.parts:
        of_axes = PartitionSpec(*(spec[axis] for axis in part.axes), None)
        params = eqn.params | {"dst_sharding": NamedSharding(sharding.mesh, of_axes)}
        arrays.append(eqn.primitive.bind(part.array, **params))
    return [weight.with_arrays(value, arrays)]


def joins(rule: Callable[..., Any], *, besides: tuple[int, ...] = ()) -> Rule:
    """The primitive makes one weight of its operands, of which those without an update follow from params alone.

    `besides` are the places of those that say how.
    """

    def apply(run: Run, eqn: JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any]:
        outvar: Any = eqn.outvars[0]
        operands = [value for place, value in enumerate(inputs) if place not in besides]
        others = [bare(inputs[place]) for place in besides]
        parts: Any = "what it meets depends on the arguments of the function, or on arrays that it closes over"
        if all(map(_can_join, operands)) and any(map(is_weight, operands)):
            parts = rule(operands, outvar.aval.shape, *others, **eqn.params)
        if isinstance(parts, str):
            return bind(eqn, run.merge_all(eqn, inputs, parts))
        weights = [operand for operand in operands if is_weight(operand)]
        paths = dict.fromkeys(path for weight in weights for path in weight.paths)
        (value,) = bind(eqn, list(map(base_of, inputs)))
        like = next((weight for weight in weights if weight.gains), weights[0])
        return [like.with_parts(value, parts, paths=tuple(paths), of_data=not all(map(of_params, inputs)))]

    return apply


def _can_join(value: Any) -> bool:
    """Whether a value may be joined with a weight: not an activation, of which a looked-up row is one."""
    if isinstance(value, Weight):
        return not value.looked_up and (value.is_matrix or not value.of_data)
    return of_params(value) or jnp.ndim(value) == 0


def looks_up(run: Run, eqn: JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any]:
    """Looking up by a batch axis gives a weight again; by another one, as embeddings do, rows of A times B."""
    of_data = not all(map(of_params, inputs))
    weight, indices = map(bare, inputs)
    parts = structure.gather(weight, indices, **eqn.params) if is_weight(weight) else "the indices are a weight"
    if isinstance(parts, str):
        return bind(eqn, run.merge_all(eqn, inputs, parts))
    values = bind(eqn, [weight.value, indices])
    rows = weight.with_parts(values[0], parts, of_data=of_data)
    indexed = structure.indexed_axes(weight.shape, eqn.params)
    by_batch_axis = set(indexed) <= set(weight.shared) if indexed else rows.is_matrix
    if run.keeps_rows or indices.ndim == 1 or by_batch_axis:
        return [rows]
    roles = "".join("i" if axis in indexed else "o" for axis in range(len(weight.shape)))
    flops = 2.0 * rows.rank * known(rows.value.size)
    run.record(eqn, weight, roles=roles, factored=True, why="rows of A, times B", adapter_flops=flops)
    return [rows.merged()]


def multiplies(rule: Callable[..., Product | str]) -> Rule:
    """The primitive is linear in the weight: its product with the factors is added, or the weight merged first."""

    def apply(run: Run, eqn: JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any]:
        place = _place_of_weight(inputs)
        inputs = [
            run.merge(eqn, value, "the other side of the product is an adapted weight too")
            if is_weight(value) and number != place
            else bare(value)
            for number, value in enumerate(inputs)
        ]
        weight, x, rest = inputs[place], inputs[1 - place], inputs[2:]
        params = eqn.params | {"weight_first": place == 0, "flatten": run.settings.cost.flattens()}
        product = rule(weight, x, *rest, **params)
        if isinstance(product, str):
            return bind(eqn, run.merge_all(eqn, inputs, product))
        gained = _gained(product, weight)
        if isinstance(gained, str):
            return bind(eqn, run.merge_all(eqn, inputs, gained))

        def bound(x: jax.Array, value: jax.Array) -> jax.Array:
            return bind(eqn, [*((value, x) if place == 0 else (x, value)), *rest])[0]

        base = product.base or bound
        y: Any = eqn.outvars[0].aval
        size, choice = cost(weight, product.roles, known(y.size)), run.settings.cost
        merge = product.mergeable and run.key is None and choice.merges(size.rows, size.ins, weight.value.dtype)
        run.record(
            eqn,
            weight,
            roles=product.roles,
            factored=not merge,
            why="A@B costs less than (x@A)@B here" if merge else "",
            base_flops=size.base,
            adapter_flops=size.merged if merge else size.factored,
        )
        of_x, of_y = gained
        x, own = _scaled(x, of_x), weight.without_gains()
        if merge:
            merged = functools.partial(_merged, base, product.update, keep=choice.keeps(size.rows, size.outs))
            return [_scaled(on_dense(merged, x, own), of_y)]
        output = on_dense(base, x, own.value)
        return [_scaled(output + own.product(product.update, run.with_dropout(x, own.path)).astype(output.dtype), of_y)]

    return apply


_Gains = list[jax.Array]


def _gained(product: Product, weight: Weight) -> tuple[_Gains, _Gains] | str:
    """What the input and the output of a product are multiplied with for the gains of the weight, or why that fails."""
    of_x: _Gains = []
    of_y: _Gains = []
    for gain in weight.gains:
        used = {product.roles[axis] for axis in gain.axes}
        if used <= {"b", "o"}:
            of_y.append(product.along_y(gain))
        elif used <= {"b", "i"} and product.along_x is not None:
            of_x.append(product.along_x(gain))
        else:
            return "it contracts some of the axes of a magnitude (DoRA)"
    return of_x, of_y


def _scaled(array: jax.Array, gains: _Gains) -> jax.Array:
    """The array times the gains, each product rounded once."""
    for gain in gains:
        wide = common_dtype(array.dtype, gain.dtype)
        array = (array.astype(wide) * gain.astype(wide)).astype(array.dtype)
    return array


def _place_of_weight(inputs: Sequence[Any]) -> int:
    """Which of the first two operands is followed; of two weights the one that was not looked up, or is not a sum."""
    if not is_weight(inputs[0]):
        return 1
    if not is_weight(inputs[1]):
        return 0
    first, second = ((weight.looked_up, len(weight.paths)) for weight in inputs[:2])
    return int(first > second)


def _merged(base: Callable[..., jax.Array], update: Update, x: jax.Array, weight: Weight, *, keep: bool) -> jax.Array:
    """The product with the merged weight; the derivatives by A and B are those of the factored form.

    So is that by x, unless the merged weight is kept for it. No gradient of the dense weight is formed, unless the base
    itself is differentiated.
    """
    arrays, tree = jax.tree.flatten(weight)
    treedef: Any = tree  # JAX keeps the functions below: they hold no array of the trace

    @jax.custom_jvp
    def product(x: jax.Array, *arrays: jax.Array) -> jax.Array:
        return base(x, treedef.unflatten(arrays).merged())

    @functools.partial(product.defjvp, symbolic_zeros=True)
    def derivative(primals: Any, tangents: Any) -> Any:
        x, value, a, b = primals
        dx, dvalue, da, db = tangents
        own = treedef.unflatten([value, a, b])
        merged = own.merged()
        terms = [
            (dx, lambda dx: base(dx, merged if keep else value)),
            (dvalue, lambda dvalue: base(x, dvalue)),
            (da, lambda da: own.with_arrays(value, [da, b]).product(update, x)),
            (db, lambda db: own.with_arrays(value, [a, db]).product(update, x)),
        ]
        if not keep:
            terms.append((dx, lambda dx: own.product(update, dx)))
        y = base(x, merged)
        dy = jnp.zeros_like(y)
        for tangent, term in terms:
            if not isinstance(tangent, SymbolicZero):
                dy = dy + term(tangent).astype(y.dtype)
        return y, dy

    return product(x, *arrays)
