"""Primitives that run a program: the weights go into it, with their factors."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import JaxprEqn, jaxpr_as_fun
from jax.sharding import PartitionSpec, Sharding

from jlora.transform import _combine as combine
from jlora.transform._compiled import evaluate_compiled
from jlora.transform._jax import jaxpr_and_consts, mapped_axes, scan_counts, scan_options, varied, varying_axes
from jlora.transform._lazy import bind, densified, element, is_packed, packed
from jlora.transform._run import Run
from jlora.transform._weight import Factor, Plain, Weight, bare, base_of, is_marked, is_weight, of_params


def jit(run: Run, eqn: JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any]:
    """Compiled on its own where the program was; the shardings that were given are those of the weight's value."""
    params = eqn.params
    key = run.next_key()
    inputs = [_placed(value, sharding) for value, sharding in zip(inputs, params["in_shardings"], strict=True)]
    if run.uses is None:
        outputs = evaluate_compiled(run, eqn, key, inputs)
    else:
        outputs = run.inner(eqn, key).evaluate(params["jaxpr"], inputs)
    return [_placed(value, sharding) for value, sharding in zip(outputs, params["out_shardings"], strict=True)]


RETURNED = "a function with a derivative of its own returns a weight with a magnitude (DoRA)"


def _placed(value: Any, sharding: Any) -> Any:
    if not isinstance(sharding, Sharding) or is_packed(base_of(value)):
        return value  # the packed arrays of a lazy base lie where they lie
    if is_weight(value):
        arrays = [part.array for part in value.parts]
        return value.with_arrays(lax.with_sharding_constraint(value.value, sharding), arrays)
    return lax.with_sharding_constraint(value, sharding)


def checkpoint(run: Run, eqn: JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any]:
    """Rematerialized under the same policy."""
    params = eqn.params

    def program(key: Any, inputs: Any) -> Any:
        return run.inner(eqn, key).evaluate(params["jaxpr"], inputs)

    remat = jax.checkpoint(program, prevent_cse=params["prevent_cse"], policy=params["policy"])
    return remat(run.next_key(), list(inputs))


def custom_derivative(run: Run, eqn: JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any]:
    """A function with a derivative of its own: its value from the factors, its derivative at the merged weight.

    Where it returns a weight, the derivative of that is one of its value. Dropout would take the value away from its
    derivative; there is none within.
    """
    if run.key is not None:
        return bind(eqn, run.merge_all(eqn, inputs, "a function with a derivative of its own"))
    program = eqn.params["call_jaxpr"]
    leaves, tree = jax.tree.flatten(list(inputs))
    treedef: Any = tree
    inner = run.inner(eqn, None)

    @jax.custom_jvp
    def function(*leaves: Any) -> Any:
        outputs = []
        for output in inner.evaluate(program, treedef.unflatten(leaves)):
            inner.note_unpacked(eqn, output, "a function with a derivative of its own returns it")
            output = densified(output)
            has_gain = is_weight(output) and output.gains  # which would multiply the derivative, too
            outputs.append(inner.merge(eqn, output, RETURNED) if has_gain else bare(output))
        return outputs

    @functools.partial(function.defjvp, symbolic_zeros=True)
    def derivative(primals: Any, tangents: Any) -> Any:
        moving = [n for n, tangent in enumerate(tangents) if not isinstance(tangent, SymbolicZero)]

        def merged(*moved: Any) -> Any:
            leaves = list(primals)
            for n, leaf in zip(moving, moved, strict=True):
                leaves[n] = leaf
            values = treedef.unflatten(leaves)
            return list(bind(eqn, [value.merged() if is_weight(value) else bare(value) for value in values]))

        outputs, moved = jax.jvp(merged, [primals[n] for n in moving], [tangents[n] for n in moving])
        for n, output in enumerate(function(*primals)):
            if is_weight(output):
                still = [jnp.zeros_like(part.array) for part in output.parts]
                outputs[n], moved[n] = output, output.with_arrays(moved[n], still)
        return outputs, moved

    return function(*leaves)


def cond(run: Run, eqn: JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any]:
    """Every branch has the weights; a weight that comes out of it, whichever is taken, is followed on."""
    index, key = bare(inputs[0]), run.next_key()
    operands = [_varied(value, varying_axes(index)) for value in inputs[1:]]
    given = jax.tree.leaves((key, operands))
    traced = []
    for program in eqn.params["branches"]:

        def evaluated(key: Any, operands: Any, program: Any = program) -> Any:
            return run.inner(eqn, key).evaluate(program, operands)

        traced.append(jax.make_jaxpr(evaluated, return_shape=True)(key, operands))
    frames = []
    for parts in zip(*(shapes for _, shapes in traced), strict=True):
        frame = combine.common_frame(parts)
        frames.append(frame and dataclasses.replace(frame, of_data=frame.of_data or not of_params(inputs[0])))

    def branch(closed: Any, shapes: Any) -> Callable[..., Any]:
        def taken(*leaves: Any) -> Any:
            found = jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(closed)(*leaves))
            outputs = []
            for output, frame in zip(found, frames, strict=True):
                if frame:
                    run.note_unpacked(eqn, output, "a branch returns it")
                outputs.append(combine.fitted(output, frame) if frame else _arrays(run, eqn, [output])[0])
            return outputs

        return taken

    return lax.switch(index, [branch(*pair) for pair in traced], *given)


def _varied(value: Any, axes: Sequence[str]) -> Any:
    """The value; if it is a weight, with factors that vary over these axes of the mesh.

    So they go into branches that differ from device to device: what made them vary within a branch would sum their
    gradients there, over devices of which not all take it.
    """
    if not is_weight(value):
        return value
    return value.with_arrays(value.value, [varied(part.array, axes) for part in value.parts])


def while_(run: Run, eqn: JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any]:
    """Weights that the loop does not change stay outside of what it carries.

    Under vmap the condition may hold for some examples only: the loop goes on while it holds for any, and the others
    keep what they have.
    """
    params = eqn.params
    first = params["cond_nconsts"]
    second = first + params["body_nconsts"]
    cond_consts, body_consts, carry = inputs[:first], inputs[first:second], inputs[second:]
    body = params["body_jaxpr"]
    loop = _Carry(run, eqn, body, params["body_nconsts"], carry)
    key = run.next_key()

    def keyed(step: Any) -> Run:
        return run.inner(eqn, None if key is None else jax.random.fold_in(key, step))

    def going(state: Any) -> Any:
        step, carried = state
        return bare(keyed(step).evaluate(params["cond_jaxpr"], [*cond_consts, *loop.joined(carried)])[0])

    def advanced(state: Any) -> Any:
        step, carried = state
        outputs = loop.changing(keyed(step).evaluate(body, [*body_consts, *loop.joined(carried)]))
        if jnp.ndim(on := going(state)):
            outputs = [
                jnp.where(lax.expand_dims(on, range(on.ndim, new.ndim)), new, old)
                for new, old in zip(outputs, carried, strict=True)
            ]
        return step + 1, outputs

    _, carried = lax.while_loop(lambda state: jnp.any(going(state)), advanced, (jnp.uint32(0), loop.initial))
    return loop.joined(carried)


def scan(run: Run, eqn: JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any]:
    """Stacked weights are scanned with their factors; a factor without the axis of the stack stays outside."""
    params = eqn.params
    first, second = scan_counts(params)
    second += first
    consts, carry, stacks = inputs[:first], inputs[first:second], inputs[second:]
    body = params["jaxpr"]
    loop = _Carry(run, eqn, body, first, carry)
    key = run.next_key()
    length = params["length"]

    def step(carried: Any, scanned: Any) -> Any:
        number, slices = scanned
        inner = run.inner(eqn, None if key is None else jax.random.fold_in(key, number), length)
        elements = [_element(*pair) for pair in zip(stacks, slices, strict=True)]
        outputs = inner.evaluate(body, [*consts, *loop.joined(carried), *elements])
        count = len(carry)
        return loop.changing(outputs[:count]), _arrays(run, eqn, outputs[count:])

    slices = []
    for stack in stacks:
        if is_packed(base_of(stack)) and not base_of(stack).front:
            run.note_unpacked(eqn, stack, "its packed arrays do not have the axis that is scanned (batch_dims)")
        slices.append(_scanned(stack))
    steps = None if key is None else jnp.arange(length, dtype=jnp.uint32)
    carried, outputs = lax.scan(
        step, loop.initial, (steps, slices), length, params["reverse"], params["unroll"], **scan_options(params)
    )
    return [*loop.joined(carried), *outputs]


def _scanned(stack: Any) -> Any:
    """What is scanned of a stacked weight, or of any other value."""
    if not is_weight(stack):
        return packed(stack.value) if isinstance(stack, Plain) else packed(stack)
    return [packed(stack.value), *(part.array for part in stack.parts if 0 in part.axes)]


def _element(stack: Any, taken: Any) -> Any:
    """One element of a stack, from one of `_scanned`."""
    if isinstance(stack, Plain):
        return Plain(element(stack.value, taken))
    return _element_of_weight(stack, taken) if is_weight(stack) else element(stack, taken)


def _element_of_weight(weight: Weight, taken: Sequence[Any]) -> Weight:
    value, *rest = taken
    remaining: Iterator[jax.Array] = iter(rest)

    def one(factor: Factor) -> Factor:
        array = next(remaining) if 0 in factor.axes else factor.array
        return factor.changed(array, [axis - 1 for axis in factor.axes if axis])

    return weight.with_parts(element(weight.value, value), list(map(one, weight.parts)))


class _Carry:
    """What a loop carries, without the weights and other params that it hands on as they are."""

    def __init__(self, run: Run, eqn: JaxprEqn, body: Any, consts: int, carry: Sequence[Any]) -> None:
        program, _ = jaxpr_and_consts(body)
        inner = program.invars[consts : consts + len(carry)]
        self._fixed = {n: value for n, value in enumerate(carry) if is_marked(value) and program.outvars[n] is inner[n]}
        self._run, self._eqn = run, eqn
        self.initial = self.changing(carry)

    def changing(self, values: Sequence[Any]) -> list[Any]:
        """Those of the carried values that the loop changes, merged."""
        return _arrays(self._run, self._eqn, [value for n, value in enumerate(values) if n not in self._fixed])

    def joined(self, changing: Sequence[Any]) -> list[Any]:
        """All carried values."""
        remaining = iter(changing)
        count = len(self._fixed) + len(changing)
        return [self._fixed[n] if n in self._fixed else next(remaining) for n in range(count)]


def _arrays(run: Run, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    return run.merge_outputs(eqn, values, "the program returns or carries the weight itself")


def shard_map(run: Run, eqn: JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any]:
    """Every factor is split over the mesh as the axes of the weight that it has."""
    params = eqn.params
    for value in inputs:
        run.note_unpacked(eqn, value, "the axes of its packed arrays are not those that shard_map splits")
    inputs = densified(list(inputs))

    def program(key: Any, inputs: Any) -> Any:
        return _arrays(run, eqn, run.inner(eqn, key).evaluate(params["jaxpr"], inputs))

    specs = [_spec(value, spec) for value, spec in zip(inputs, params["in_specs"], strict=True)]
    mapped = jax.shard_map(
        program,
        mesh=params["mesh"],
        in_specs=(PartitionSpec(), specs),
        out_specs=list(params["out_specs"]),
        axis_names=mapped_axes(params),
        check_vma=params["check_vma"],
    )
    return mapped(run.next_key(), list(inputs))


def _spec(value: Any, spec: PartitionSpec) -> Any:
    if not is_weight(value):
        return spec
    of_axis = [*spec, *[None] * (len(value.shape) - len(spec))]
    specs = [PartitionSpec(*(of_axis[axis] for axis in part.axes), None) for part in value.parts]
    return value.with_arrays(spec, specs)


def side_by_side(run: Run, eqn: JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any]:
    """Every operand is placed, or meets the others at a barrier; the parts go past it."""
    values = bind(eqn, list(map(base_of, inputs)))
    return [
        old.with_arrays(new, [part.array for part in old.parts]) if is_weight(old) else new
        for old, new in zip(inputs, values, strict=True)
    ]
