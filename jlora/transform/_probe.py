"""A weight that only shows how a program uses its axes, from which its factorization follows."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora.transform._lazy import dense
from jlora.transform._weight import Factor, Parts, Shape, Weight


@dataclasses.dataclass(frozen=True, eq=False)
class Trace(Factor):
    """A factor of a probe: which axes of the weights in params it comes from. Its numbers are of no account.

    `origin` are these axes, each with the path of its weight; `looked_up` says that an index chose among them.
    """

    origin: tuple[tuple[str, int], ...] = ()
    looked_up: bool = False

    def after_lookup(self) -> "Trace":
        return dataclasses.replace(self, looked_up=True)


class Probe(Weight):
    """A weight with one factor of rank 1 for each axis. It fits every product, and is merged for nothing."""

    factors: tuple[Trace, ...]

    @property
    def looked_up(self) -> bool:
        return any(factor.looked_up for factor in self.factors)

    def merged(self) -> Any:
        return dense(self.value)

    def order(self, roles: str) -> tuple[int, int]:
        return 0, 1

    def product(self, update: Any, x: jax.Array) -> jax.Array:
        return jnp.zeros((), x.dtype)

    def differs(self, parts: Sequence[Factor], names: Sequence[str]) -> bool:
        return False

    def together(self, groups: Sequence[Sequence[int]]) -> Weight:
        """The factors that have an axis of the same group become one."""
        factors = list(self.factors)
        for group in groups:
            having = [factor for factor in factors if set(group) & set(factor.axes)]
            if len(having) > 1:
                axes = sorted({axis for factor in having for axis in factor.axes})
                origin = sorted(start for factor in having for start in factor.origin)
                joined = _trace(self.shape, axes, origin, having)
                factors = [*(factor for factor in factors if factor not in having), joined]
        return dataclasses.replace(self, factors=tuple(factors))

    def joined(self, weights: Sequence[Weight], shape: Shape, rule: Callable[..., Parts]) -> Parts:
        """The factors of all weights: those that have an axis in common become one.

        An axis in params that is met twice, as in w + w.T, counts where it is first met.
        """
        first: dict[tuple[str, int], Factor] = {}
        groups: list[tuple[set[int], list[Any]]] = []
        for weight in weights:
            factors: Any = weight.factors
            for factor in factors:
                for start in factor.origin:
                    first.setdefault(start, factor)
                axes, members = set(weight.own(factor)), [factor]
                for group in [group for group in groups if group[0] & axes]:
                    groups.remove(group)
                    axes, members = axes | group[0], [*group[1], *members]
                groups.append((axes, members))
        shared = set(range(len(shape))).difference(*(axes for axes, _ in groups))
        traces = []
        for axes, members in groups:
            origin = [start for factor in members for start in factor.origin if first[start] is factor]
            traces.append(_trace(shape, sorted(axes | shared), origin, members))
        return traces

    def reading(self, path: str, primitive: str, roles: str) -> tuple[str, str]:
        """The primitive and the roles of the axes that the weight at `path` has in params.

        An axis that was sliced or scanned away is a batch axis. So is one of which a single element was looked up,
        unless what is left lacks an in axis, as a row of a table does.
        """
        rows = {axis for factor in self.factors if factor.looked_up for axis in factor.axes}
        if not roles or any(roles[axis] != "b" for axis in rows):
            roles = "".join("i" if axis in rows else "o" for axis in range(len(self.shape)))
        gone = "b" if {"i", "o"} <= set(roles) else "i"
        found: dict[int, str] = {}
        for factor in self.factors:
            used = {roles[axis] for axis in factor.axes}
            role = next((role for role in "iob" if role in used), gone if factor.looked_up else "b")
            found.update({axis: role for of_path, axis in factor.origin if of_path == path})
        return "gather" if self.looked_up else primitive, "".join(found[axis] for axis in sorted(found))


def probe(path: str, value: Any) -> Probe:
    """The probe of a weight in params."""
    factors = [_trace(value.shape, [axis], [(path, axis)]) for axis in range(len(value.shape))]
    return Probe((path,), value, tuple(factors))


def _trace(
    shape: Shape, axes: Sequence[int], origin: Sequence[tuple[str, int]], members: Sequence[Trace] = ()
) -> Trace:
    """A factor in place of these, with these axes of a weight of this shape."""
    array = jnp.zeros([*(shape[axis] for axis in axes), 1])
    return Trace(array, tuple(axes), None, tuple(origin), any(factor.looked_up for factor in members))


jax.tree_util.register_dataclass(Trace, ["array"], ["axes", "product_dtype", "origin", "looked_up"])
jax.tree_util.register_dataclass(Probe, ["value", "factors", "gains"], ["paths", "of_data"])
