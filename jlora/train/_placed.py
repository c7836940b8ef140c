"""A jitted step whose new state lies on devices as the old one did."""

from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax.sharding import NamedSharding


class PlacedStep:
    """`step(state, frozen, batch) -> (state, metrics)`, jitted; the state is donated.

    Left alone XLA chooses where what a step returns lies, and the second step is another program if it chose other than
    the first was given. Here a leaf that was split over a mesh is split so again. There is one jitted function for each
    set of shardings, and one for states that no mesh splits or that are traced.
    """

    def __init__(self, step: Callable[[Any, Any, Any], tuple[Any, Any]]) -> None:
        self._step = step
        self._jitted: dict[Hashable, Any] = {}

    def __call__(self, state: Any, frozen: Any, batch: Any) -> tuple[Any, Any]:
        return self._for(state)(state, frozen, batch)

    def lower(self, state: Any, frozen: Any, batch: Any) -> jax.stages.Lowered:
        """The lowered program, as `jax.jit(...).lower` gives it; shapes with shardings are enough."""
        return self._for(state).lower(state, frozen, batch)

    def _for(self, state: Any) -> Any:
        leaves, structure = jax.tree.flatten(state)
        shardings = tuple(_sharding_on_a_mesh(leaf) for leaf in leaves)
        if not any(shardings):
            return self._jit(None, None)
        return self._jit((structure, shardings), (jax.tree.unflatten(structure, shardings), None))

    def _jit(self, key: Hashable, out_shardings: Any) -> Any:
        if key not in self._jitted:
            self._jitted[key] = jax.jit(self._step, donate_argnums=0, out_shardings=out_shardings)
        return self._jitted[key]


def _sharding_on_a_mesh(leaf: Any) -> NamedSharding | None:
    """Where an array lies that is spread over a mesh; None if it lies on one device, or is traced."""
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None
