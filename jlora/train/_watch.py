"""A run that diverges stops at its first bad step, with nothing bad written."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.errors import JloraError, listed
from jlora.paths import leaves_by_path
from jlora.train._step import Metrics

_MOST = 100
_WATCHED = ("loss", "grad_norm")


class DivergedError(JloraError):
    """The loss, a gradient or what is trained is no longer finite; what was saved before is good.

    Attributes:
      step: the first step of which this is so.
      batch: the index of its batch, as `batches(index)` gives it.
    """

    def __init__(self, step: int, what: str) -> None:
        super().__init__(
            f"step {step}, on batch {step - 1}: {what}; nothing of it is saved. Look at this batch, lower the learning "
            "rate, or clip the gradients (clip_norm)"
        )
        self.step = step
        self.batch = step - 1


class Watch:
    """Keeps what steps gave until it is looked at, so that no step waits for the one before.

    Args:
      losses: whether losses and gradients that are not finite stop the run.
    """

    def __init__(self, losses: bool) -> None:
        self._losses = losses
        self._unseen: list[tuple[int, Metrics]] = []

    def note(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step; looks where many have come together."""
        if self._losses:
            self._unseen.append((step, {name: metrics[name] for name in _WATCHED if name in metrics}))
        if len(self._unseen) >= _MOST:
            self.check()

    def check(self) -> None:
        """Raises `DivergedError` for the first step that gave something that is not finite."""
        unseen, self._unseen = self._unseen, []
        for step, values in jax.device_get(unseen):
            for name, value in values.items():
                if not np.all(np.isfinite(value)):
                    raise DivergedError(step, f"the {name.replace('grad_norm', 'norm of the gradients')} is {value}")

    def check_trained(self, step: int, trained: Any) -> None:
        """Raises `DivergedError` where what is trained is not finite, before it is saved."""
        finite = jax.device_get(_finite(trained))
        bad = [path for path, good in leaves_by_path(finite).items() if not good]
        if bad:
            raise DivergedError(step, f"{listed(bad, 3)} is no longer finite, in {len(bad)} of {len(finite)} arrays")


@jax.jit
def _finite(tree: Any) -> dict[str, jax.Array]:
    return {path: jnp.all(jnp.isfinite(leaf)) for path, leaf in leaves_by_path(tree).items()}
