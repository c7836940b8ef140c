"""The Riemannian preconditioner of A and B."""

from typing import Any

import optax

from jlora.config import LoraConfig
from jlora.fields import number
from jlora.optim._grams import divided_by_gram


def riemannian(
    optimizer: optax.GradientTransformation, config: LoraConfig, *, damping: float = 1e-2
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, given dA (B B^T + damping I)^-1 and (A^T A + damping I)^-1 dB as the gradients of A and B.

    Zhang and Pilanci 2024, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models", arXiv 2402.02347: the
    gradients in the metric of the products A B, so that a step does not depend on how the scale of a product is shared
    between its factors. The matrices are of the size of the rank, one for each batch element. Other parts get their
    gradients as they are.

    Args:
      optimizer: any; its update is called with the adapters, `update(grads, state, adapters)`.
      config: of the adapters: how many of their axes are batch axes.
      damping: what is added to the diagonals, at least 0; B is zero at the start, so that 0 gives no finite step there.

    >>> import jax.numpy as jnp
    >>> adapters = {'up': {'A': 2 * jnp.ones((1, 1)), 'B': jnp.ones((1, 3))}}
    >>> optimizer = riemannian(optax.sgd(1.0), LoraConfig(rank=1), damping=0.0)
    >>> grads = {'up': {'A': jnp.ones((1, 1)), 'B': jnp.ones((1, 3))}}
    >>> updates, _ = optimizer.update(grads, optimizer.init(adapters), adapters)
    >>> updates['up']['A'].round(3).tolist(), updates['up']['B'].tolist()
    ([[-0.3330000042915344]], [[-0.25, -0.25, -0.25]])
    """
    damping = number("damping", damping, 0.0, wanted="a finite number of at least 0")

    def precondition(updates: Any, params: Any = None) -> Any:
        return divided_by_gram(updates, params, config, damping, {"A", "B"})

    return optax.with_extra_args_support(optax.chain(optax.stateless(precondition), optimizer))
