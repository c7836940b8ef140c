"""Optimizers that treat the parts of an adapter differently."""

from collections.abc import Collection
from typing import Any

import jax
import optax
from jax import lax

from jlora.adapter import PARTS
from jlora.config import LoraConfig
from jlora.fields import number, refusal
from jlora.optim._grams import divided_by_gram
from jlora.tree import lora_labels

_DAMPING = 1e-8  # of A^T A, as in PEFT


def lora_plus(optimizer: optax.GradientTransformation, ratio: float) -> optax.GradientTransformationExtraArgs:
    """The optimizer with a rate for B that is `ratio` times that for A.

    Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354, which gives 16 for a
    rate of A that is a little lower than one for both. A magnitude, an offset and a value have the rate of B, as what
    is not A has in PEFT. The weight decay of a part is multiplied like its rate.

    Args:
      optimizer: any, at the rate of A; its updates are multiplied.
      ratio: at least 0.

    >>> import jax.numpy as jnp
    >>> optimizer = lora_plus(optax.sgd(0.1), ratio=16)
    >>> adapters = {'up': {'A': jnp.ones((2, 1)), 'B': jnp.zeros((1, 3))}, 'down': None}
    >>> updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, adapters), optimizer.init(adapters), adapters)
    >>> float(updates['up']['A'][0, 0]), float(updates['up']['B'][0, 0])
    (-0.10000000149011612, -1.600000023841858)
    """
    ratio = number("ratio", ratio, 0.0, wanted="a finite number of at least 0")

    def scale(updates: Any, params: Any = None) -> Any:
        labels = lora_labels(updates, by="part")
        return jax.tree.map(lambda update, part: update if part in ("A", "frozen") else ratio * update, updates, labels)

    return optax.with_extra_args_support(optax.chain(optimizer, optax.stateless(scale)))


def lora_fa(
    optimizer: optax.GradientTransformation, config: LoraConfig | None = None
) -> optax.GradientTransformationExtraArgs:
    """The optimizer for everything but A, which stays as it began.

    Zhang et al. 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", arXiv
    2308.03303. The optimizer has no state for A, and decays none of it. The loss takes its adapters through
    `freeze_parts(adapters, "A")`: then no gradient of A is computed either, nor kept what it is computed of.

    Args:
      optimizer: any.
      config: given, B's gradient becomes (A^T A)^-1 dB / scaling^2, the step in B that comes closest to one in the
        weight itself, as in PEFT's `create_lorafa_optimizer`. It says how the axes of A and B split, and the scaling.

    >>> import jax.numpy as jnp
    >>> optimizer = lora_fa(optax.adamw(1e-3))
    >>> adapters = {'up': {'A': jnp.ones((2, 1)), 'B': jnp.zeros((1, 3))}, 'down': None}
    >>> updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, adapters), optimizer.init(adapters), adapters)
    >>> float(updates['up']['A'].sum())
    0.0
    """

    def labels(tree: Any) -> Any:
        return jax.tree.map(lambda part: part if part in ("A", "frozen") else "rest", lora_labels(tree, by="part"))

    still = {name: optax.set_to_zero() for name in ("A", "frozen")}
    parts = optax.partition({**still, "rest": optimizer}, labels)
    if config is None:
        return parts

    def precondition(updates: Any, params: Any = None) -> Any:
        return divided_by_gram(updates, params, config, _DAMPING, {"B"}, by_scaling=True)

    return optax.with_extra_args_support(optax.chain(optax.stateless(precondition), parts))


def freeze_parts(adapters: Any, parts: str | Collection[str]) -> Any:
    """The adapters with the parts of these names as constants: their gradients are zero, and nothing is kept for them.

    Args:
      adapters: as `jlora.init_lora` gives them.
      parts: a name, such as "A", or several.

    Raises:
      ConfigError: a name that no part has.

    >>> import jax.numpy as jnp
    >>> adapters = {'A': jnp.ones((2, 1)), 'B': jnp.ones((1, 3))}
    >>> grads = jax.grad(lambda entry: (freeze_parts(entry, "A")['A'] @ entry['B']).sum())(adapters)
    >>> float(grads['A'].sum()), float(grads['B'].sum())
    (0.0, 6.0)
    """
    names = {parts} if isinstance(parts, str) else set(parts)
    if unknown := sorted(names - set(PARTS)):
        raise refusal("parts", unknown, f"of {', '.join(PARTS)}")
    labels = lora_labels(adapters, by="part")
    return jax.tree.map(lambda part, name: lax.stop_gradient(part) if name in names else part, adapters, labels)
