"""Lazy bases: weights that are kept packed, as integers with scales are, and become dense where they are used."""

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import jax

__all__ = ["LazyBase", "is_lazy"]


class LazyBase(Protocol):
    """What a leaf of params has to be to stand for a weight that is made dense only where it is used.

    Its class is a pytree node, registered with JAX, of the arrays that hold the numbers. It may also say `batch_dims`:
    how many leading axes of the weight are the leading axes of each of these arrays too. A scan, a slice or an index
    along one of them takes its part of the arrays, and nothing is made dense for it; the class is then rebuilt of
    arrays with fewer or shorter leading axes, so its shape has to follow from them. Without it there are none. It may
    also say `sharding`, that of the weight: its adapter is placed by it, as by that of an array.

    Attributes:
      shape: of the weight.
      dtype: of the weight.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def dense(self) -> "jax.Array":
        """The weight itself, of this shape and dtype."""
        ...


def is_lazy(node: Any) -> bool:
    """Whether a node of a pytree is a lazy base."""
    return callable(getattr(type(node), "dense", None)) and hasattr(node, "shape") and hasattr(node, "dtype")
