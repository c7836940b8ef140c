"""Which inputs of a program reach its outputs: what an equation reads that something else depends on."""

from collections.abc import Sequence
from typing import Any

from jax.extend.core import JaxprEqn, Literal

from jlora.transform._jax import jaxpr_and_consts, scan_counts
from jlora.transform._primitives import name_of_primitive

Flags = Sequence[bool]
_ONE_PROGRAM = ("jaxpr", "call_jaxpr")


def live_inputs(jaxpr: Any, live_outputs: Flags | None = None) -> list[bool]:
    """For each input of a jaxpr, closed or open, whether an output depends on it, or an effect.

    Programs within are looked into: what is handed to one that does not read it is not live. An input that is returned
    as it is, is. The derivative of a function is none of its outputs.

    Args:
      jaxpr: the program.
      live_outputs: which of the outputs count; all of them where None.
    """
    program, _ = jaxpr_and_consts(jaxpr)
    wanted = [True] * len(program.outvars) if live_outputs is None else live_outputs
    live = {id(atom) for atom, is_live in zip(program.outvars, wanted, strict=True) if is_live}
    for eqn in reversed(program.eqns):
        outputs = [id(var) in live for var in eqn.outvars]
        if any(outputs) or eqn.effects:
            read = zip(eqn.invars, _read(eqn, outputs), strict=True)
            live.update(id(atom) for atom, is_read in read if is_read and not isinstance(atom, Literal))
    return [id(var) in live for var in program.invars]


def _read(eqn: JaxprEqn, live_outputs: Flags) -> list[bool]:
    """Which inputs of an equation its live outputs depend on."""
    name, params = name_of_primitive(eqn.primitive), eqn.params
    if name == "scan":
        return _of_scan(params, live_outputs)
    if name == "while":
        return _of_while(params, live_outputs)
    if name == "cond":
        branches = [live_inputs(branch, live_outputs) for branch in params["branches"]]
        return [True, *map(any, zip(*branches, strict=True))]
    program = next((jaxpr_and_consts(params[key])[0] for key in _ONE_PROGRAM if key in params), None)
    if program is None or (len(program.invars), len(program.outvars)) != (len(eqn.invars), len(eqn.outvars)):
        return [True] * len(eqn.invars)
    return live_inputs(program, live_outputs)


def _of_scan(params: Any, live_outputs: Flags) -> list[bool]:
    consts, carry = scan_counts(params)
    carried = list(live_outputs[:carry])
    while True:
        read = live_inputs(params["jaxpr"], [*carried, *live_outputs[carry:]])
        grown = _either(carried, read[consts : consts + carry])
        if grown == carried:
            return [*read[:consts], *carried, *read[consts + carry :]]
        carried = grown


def _of_while(params: Any, live_outputs: Flags) -> list[bool]:
    """The condition decides how often the body runs: what it reads of the carry is live too."""
    first, second = params["cond_nconsts"], params["body_nconsts"]
    asked = live_inputs(params["cond_jaxpr"])
    carried = _either(live_outputs, asked[first:])
    while True:
        read = live_inputs(params["body_jaxpr"], carried)
        grown = _either(carried, read[second:])
        if grown == carried:
            return [*asked[:first], *read[:second], *carried]
        carried = grown


def _either(left: Flags, right: Flags) -> list[bool]:
    return [one or other for one, other in zip(left, right, strict=True)]
