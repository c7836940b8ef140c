"""`python tests/xla_abort.py`: a program in pure JAX that XLA's CPU compiler aborts the process over, JAX 0.7 to 0.10.

The barrier is removed before layouts are chosen. Afterwards XLA makes of the transposed product that is the gradient
of `a` one product in a transposed layout, which for a batch of small products is none that its code generator knows:

    dot_op_emitter.cc: Check failed: shape.has_layout() && LayoutUtil::IsMonotonicWithDim0Major(shape.layout())

Where this prints a line, `jlora.contraction` no longer needs its care.
"""

import jax
import jax.numpy as jnp
from jax import lax


def loss(a: jax.Array, b: jax.Array, x: jax.Array) -> jax.Array:
    turned = lax.optimization_barrier(a.mT)  # (n, r, in)
    hidden = lax.dot_general(x, turned, (((2,), (2,)), ((0,), (0,))))  # (n, rows, r)
    return jnp.sin(lax.dot_general(hidden, b, (((2,), (1,)), ((0,), (0,))))).sum()


if __name__ == "__main__":
    a, b, x = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((3, 5, 2), (3, 2, 7), (3, 2, 5)))
    jax.jit(jax.grad(loss, (0, 1))).lower(a, b, x).compile()
    print(f"JAX {jax.__version__} compiles it")
