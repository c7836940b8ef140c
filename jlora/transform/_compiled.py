"""A program within the program, compiled on its own: once for all the weights that it is called with.

The paths of a weight are static data of it. A layer that is called for many weights would be a program of its own for
each. So the weights have labels for paths inside, which are the same in every layer, and their paths again outside.
What the program says of its weights, it says while it is traced, and of those that it is traced for.
"""

import contextlib
import contextvars
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import jax
from jax.extend.core import JaxprEqn

from jlora.paths import path_number
from jlora.transform._run import Run, Settings
from jlora.transform._weight import is_weight


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Undropped:
    """The labels of the weights that are merged although there is a key: a part of the output that is no array."""

    labels: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Call:
    """Who calls a compiled program, for what it says while it is traced: a label is the path of its weight there."""

    run: Run
    eqn: JaxprEqn
    path_of: Mapping[str, str]


_CALL: contextvars.ContextVar[_Call] = contextvars.ContextVar("jlora_call")  # every thread has its own
_PROGRAMS: MutableMapping[Any, dict[Any, Callable[..., Any]]] = weakref.WeakKeyDictionary()


def evaluate_compiled(run: Run, eqn: JaxprEqn, key: jax.Array | None, inputs: Sequence[Any]) -> list[Any]:
    """The outputs of the program that a jit holds, from one that is compiled once for all weights alike.

    Its dropout differs from layer to layer by the key, in which the paths of the weights are.
    """
    given = dict.fromkeys(path for value in inputs if is_weight(value) for path in value.paths)
    path_of = {str(number): path for number, path in enumerate(given)}
    label_of = {path: label for label, path in path_of.items()}
    if key is not None:
        key = jax.random.fold_in(key, path_number(" ".join(given)))
    program = _compiled(eqn.params["jaxpr"], eqn.params["name"], run.settings)
    with _called(_Call(run, eqn, path_of)):
        outputs, undropped = program(key, [_renamed(value, label_of) for value in inputs])
    run.undropped.update((path_of[label], None) for label in undropped.labels)
    return [_renamed(value, path_of) for value in outputs]


def _compiled(jaxpr: Any, name: str, settings: Settings) -> Callable[..., Any]:
    """The program with weights in it under jit: the same function again, so that it is compiled once.

    A jaxpr holds the arrays that the program closes over. It is known to the function by a weak reference only, so that
    both are let go of with it; whoever calls the function has the jaxpr.
    """
    functions = _PROGRAMS.setdefault(jaxpr, {})
    if (name, settings) in functions:
        return functions[name, settings]
    known = weakref.ref(jaxpr)

    def program(key: Any, inputs: Any) -> Any:
        call = _CALL.get()
        paths = {label: call.run.paths.get(path, path) for label, path in call.path_of.items()}
        run = Run(settings, key, source=call.run.source_of(call.eqn), paths=paths)
        outputs = run.evaluate(known(), inputs)
        return outputs, _Undropped(tuple(run.undropped))

    program.__name__ = program.__qualname__ = name
    return functions.setdefault((name, settings), jax.jit(program))


@contextlib.contextmanager
def _called(call: _Call) -> Iterator[None]:
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if not is_weight(value):
        return value
    return dataclasses.replace(value, paths=tuple(names[path] for path in value.paths))
