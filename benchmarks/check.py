"""Before anything is timed: every form computes the same loss and the same gradients, or the run ends."""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import products
from benchmarks.forms import FORMS, MERGED
from benchmarks.problem import Case, Problem
from jlora.paths import path_string

TOLERANCE = 1e-3


class CheckError(Exception):
    """A form computes something else than the others, or the check could not tell."""


class Reference:
    """The loss and the gradients of the merged form, at full precision, which a GPU does not give by itself."""

    def __init__(self, name: str, case: Case) -> None:
        self.name, self.case = name, case
        self.loss, adapters = evaluated(FORMS["merged"].build(case), case)
        self.grads = {"adapters": adapters, "activations": self.activation_grads()}
        base = jax.jit(lambda params: case.loss(products.PLAIN, params, case.inputs, case.labels))(case.params)
        if not abs(base - self.loss) > 10 * TOLERANCE * abs(self.loss):
            raise CheckError(
                f"{name}: the loss is {base:.6g} without adapters and {self.loss:.6g} with them: too close"
            )

    def activation_grads(self) -> jax.Array:
        case, workload = self.case, self.case.workload
        bound = products.bind(case.params, case.adapters)

        def loss(rows: jax.Array, bound: Any) -> jax.Array:
            return workload.loss(workload.body(MERGED, bound, rows), case.labels)

        with jax.default_matmul_precision("highest"):
            return jax.jit(jax.grad(loss))(workload.enter(MERGED, bound, case.inputs), bound)

    def check(self, form: str, problem: Problem) -> None:
        """Raises a CheckError that names what differs most."""
        loss, grads = evaluated(problem, self.case)
        wanted = self.grads[problem.compared]
        if jax.tree.structure(grads) != jax.tree.structure(wanted):
            raise CheckError(f"{form} on {self.name}: gradients of another structure: {jax.tree.structure(grads)}")
        differences = jax.tree.map(difference, grads, wanted)
        by_path = {path_string(path): float(d) for path, d in jax.tree_util.tree_leaves_with_path(differences)}
        by_path = {f"gradient of {path or problem.compared}": d for path, d in by_path.items()}
        by_path["loss"] = float(difference(loss, self.loss))
        wrong = {what: d for what, d in by_path.items() if not d <= TOLERANCE}  # a NaN is wrong too
        if wrong:
            what = max(wrong, key=lambda key: wrong[key])
            raise CheckError(
                f"{form} on {self.name} computes something else than the merged form: {len(wrong)} of {len(by_path)} "
                f"values differ, most the {what}, by {wrong[what]:.2g} of its size (at most {TOLERANCE} is allowed)"
            )


def evaluated(problem: Problem, case: Case) -> tuple[jax.Array, Any]:
    with jax.default_matmul_precision("highest"):
        loss, grads = jax.jit(problem.value_and_grad)(problem.trained, problem.frozen, case.inputs, case.labels)
        return loss, problem.adapters(grads)


def difference(found: jax.Array, wanted: jax.Array) -> jax.Array:
    """The norm of the difference over the norm of what is wanted."""
    return jnp.linalg.norm((found - wanted).ravel()) / jnp.linalg.norm(wanted.ravel())
