"""Modules that hold another one and stand in its place, and methods of a module as functions of its params."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
from flax.core import DenyList, Scope, freeze, lift
from flax.linen.transforms import lift_direct_transform

_BUT_PARAMS = DenyList("params")


class InPlace(nn.Module):
    """A module whose scope is that of the module it holds: parameter paths and PRNG keys are those of the held one.

    `nn.share_scope` alone does not do for a module that was given unbound: its own submodules keep the path and the
    keys of a child, and under a lifted transform it keeps a scope of its own.
    """

    held: ClassVar[str]

    @nn.nowrap
    def __post_init__(self) -> None:
        module = getattr(self, self.held)
        super().__post_init__()
        if _is_unbound(module) and self.scope is not None:
            self._hold(module)

    @nn.nowrap
    def _register_submodules(self, name: str, value: Any) -> None:
        if name != self.held or not _is_unbound(value):  # Flax would make a child of it
            super()._register_submodules(name, value)

    @nn.nowrap
    def _hold(self, module: nn.Module) -> None:
        object.__setattr__(self, self.held, in_scope(module, self.scope))

    def setup(self) -> None:
        module = getattr(self, self.held)
        if module.scope is not None and module.scope is not self.scope:
            nn.share_scope(self, module)


def in_scope(module: nn.Module, scope: Any) -> nn.Module:
    """A module that stands in this scope."""
    return module.clone(parent=scope, name=type(module).__name__)


def _is_unbound(module: Any) -> bool:
    return isinstance(module, nn.Module) and module.parent is None


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of a bound module that is called, as functions of the module's params.

    Attributes:
      rest: a pytree of all else that it reads: variables, PRNG keys, arguments.
    """

    rest: Any
    _call: Callable[..., Any]  # of the scopes of the module and of those that it refers to, its own the last
    _make_scopes: Callable[..., Sequence[Scope]]
    _changes: Callable[[Sequence[Scope]], Any]

    def init(self, complete: Callable[[Any, tuple[str, ...]], Any]) -> Any:
        """The output and every variable that changes where params are made.

        `complete` makes more of them, from those at hand and the names of the other collections.
        """
        variables, rngs, arguments = self.rest
        scopes = self._make_scopes(variables, rngs)
        output = self._call(scopes, *arguments)
        own = scopes[-1]._variables
        own["params"] = complete(own.get("params", {}), tuple(name for name in own if name != "params"))
        return output, self._changes(scopes)

    def apply(self, params: Any, rest: Any) -> Any:
        """The output and every variable that changes; params do not."""
        scopes, arguments = self._scopes(params, rest, _BUT_PARAMS)
        return self._call(scopes, *arguments), self._changes(scopes)

    def rehearse(self, params: Any, rest: Any, mutable: Any = _BUT_PARAMS, **flags: bool) -> Any:
        """The output; nothing changes, and the next call draws the same random numbers."""
        scopes, arguments = self._scopes(params, rest, mutable)
        for scope in scopes:
            scope.rng_counters = _copy(scope.rng_counters)
            scope.flags = freeze({**scope.flags, **flags})
        return self._call(scopes, *arguments)

    def _scopes(self, params: Any, rest: Any, mutable: Any) -> tuple[Sequence[Scope], Any]:
        variables, rngs, arguments = rest
        scopes = self._make_scopes(variables, rngs, mutable)
        scopes[-1]._variables["params"] = params
        return scopes, arguments


def lifted(module: nn.Module, name: str, args: Any, kwargs: Any, use: Callable[[Method], Any]) -> Any:
    """A method of a bound module, called by `use`, which returns what one of `Method`'s functions does.

    What changes is written to the scopes of the module and of those that it refers to.
    """

    def method(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return getattr(module, name)(*args, **kwargs)

    def transform(call: Callable[..., Any], scopes: Sequence[Scope], *arguments: Any) -> Any:
        def packed(make_scopes: Any, changes: Any, variables: Any, rngs: Any, *arguments: Any) -> Any:
            return use(Method((variables, rngs, arguments), call, make_scopes, changes))

        return lift.pack(packed, (True,), (True,), (True,))(scopes, *arguments)

    return lift_direct_transform(transform, (method,), module, args, kwargs)


def _copy(counters: Mapping[Any, Any]) -> dict[Any, Any]:
    """The counts of a scope and, nested, of its children."""
    return {key: _copy(count) if isinstance(count, Mapping) else count for key, count in counters.items()}
