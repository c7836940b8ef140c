"""The evaluation of a traced program in which some values are adapted weights."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import source_info_util
from jax.extend.core import JaxprEqn, Literal, Primitive, Var

from jlora.cost import CostModel
from jlora.errors import AdapterError
from jlora.paths import path_number
from jlora.transform._jax import jaxpr_and_consts, varying_axes
from jlora.transform._lazy import Lazy, bind, densified, is_packed
from jlora.transform._primitives import name_of_primitive, primitive_of_jax
from jlora.transform._weight import Plain, Weight, bare, base_of, is_marked, is_weight, of_params
from jlora.transform._whole import UNKNOWN, WHOLE

_PROGRAMS = frozenset(["cond", "custom_jvp_call", "custom_vjp_call", "jit", "remat2", "scan", "shard_map", "while"])

Rule = Callable[["Run", JaxprEqn, Sequence[Any]], Sequence[Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Registry:
    """Which rule a primitive has that meets a weight; a constant, hashed by its identity.

    Attributes:
      of_jax: of JAX's primitives, by name.
      registered: of any others, and in place of JAX's.
    """

    of_jax: Mapping[str, Rule]
    registered: Mapping[Primitive, Rule]

    def rule_of(self, primitive: Primitive) -> Rule | None:
        """The rule of a primitive; None if the weight is merged for it."""
        if primitive in self.registered:
            return self.registered[primitive]
        return self.of_jax.get(primitive.name) if primitive_of_jax(primitive.name) is primitive else None

    def enters(self, primitive: Primitive) -> bool:
        """Whether the rule of a primitive evaluates a program that it holds."""
        return name_of_primitive(primitive) in _PROGRAMS and primitive not in self.registered


@dataclasses.dataclass(frozen=True)
class Settings:
    """What holds for a whole evaluation.

    Attributes:
      rules: the registry.
      cost: chooses between factored and merged.
      strict: whether a weight that has to be merged is an error.
      dropout: the share of the input of each adapter that is dropped, where there is a key.
    """

    rules: Registry
    cost: CostModel
    strict: bool = False
    dropout: float = 0.0


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a weight.

    Attributes:
      path: of the weight in params.
      shape: of the weight as it stands there.
      primitive: that uses it.
      source: the line of the user's code that called it.
      roles: one letter for each axis of the weight as it is used here; none where it is used as a whole. Of a `Probe`
        they are those of the weight in params.
      factored: whether the product is computed from the factors.
      why: the reason of the choice.
      times: how often the scans around it repeat it.
      base_flops: of the base's product, in all its repetitions.
      adapter_flops: of the update, in all its repetitions.
    """

    path: str
    shape: tuple[int, ...]
    primitive: str
    source: str
    roles: str
    factored: bool
    why: str
    times: int
    base_flops: float
    adapter_flops: float

    @property
    def place(self) -> str:
        """The file and the line of the source."""
        return _place(self.source)


@dataclasses.dataclass(frozen=True)
class Unpacked:
    """Where a lazy base becomes a dense array that the program keeps.

    Attributes:
      path: of the lazy base in params.
      shape: as it stands there.
      primitive: that the program applies to it.
      source: the line of the user's code that called it.
      why: the reason.
    """

    path: str
    shape: tuple[int, ...]
    primitive: str
    source: str
    why: str

    @property
    def place(self) -> str:
        """The file and the line of the source."""
        return _place(self.source)


def _place(source: str) -> str:
    """`model.py:12` of the source `/some/where/model.py:12:8 (Model.__call__)`."""
    place, _, _ = source.partition(" (")
    file, *numbers = place.rsplit(":", 2) if place.count(":") > 1 else place.rsplit(":", 1)
    return ":".join([Path(file).name, *numbers[:1]])


@dataclasses.dataclass(frozen=True)
class Run:
    """The evaluation of one program, or of one within another.

    Attributes:
      settings: of the whole.
      key: PRNG key of the dropout; None for none.
      times: how often the program at hand is repeated.
      source: the line that called the program at hand, for equations that do not know theirs.
      uses: where the uses are written to; None for nowhere.
      unpacked: where it is written down which lazy bases become dense; None for nowhere.
      draws: one entry for each key that was taken.
      undropped: the paths of the weights that are merged although there is a key.
      paths: of the weights in params, by the labels that weights have instead in a program that is compiled once for
        many of them.
      keeps_rows: whether what is looked up in a weight is one, and not a value.
    """

    settings: Settings
    key: jax.Array | None = None
    times: int = 1
    source: str = ""
    uses: list[Use] | None = None
    unpacked: list[Unpacked] | None = None
    draws: list[None] = dataclasses.field(default_factory=list)
    undropped: dict[str, None] = dataclasses.field(default_factory=dict)
    paths: Mapping[str, str] = dataclasses.field(default_factory=dict)
    keeps_rows: bool = False

    def evaluate(self, jaxpr: Any, inputs: Sequence[Any]) -> list[Any]:
        """The outputs of a jaxpr, closed or open, for inputs of which some are weights."""
        program, consts = jaxpr_and_consts(jaxpr)
        values: dict[Var, Any] = dict(zip(program.constvars, consts, strict=True))
        values.update(zip(program.invars, inputs, strict=True))
        last = _last_uses(program)

        def read(atom: Any) -> Any:
            return Plain(atom.val) if isinstance(atom, Literal) else values[atom]

        for number, eqn in enumerate(program.eqns):
            values.update(zip(eqn.outvars, self.apply(eqn, [read(atom) for atom in eqn.invars]), strict=True))
            for var in last.get(number, ()):
                del values[var]
        return [read(atom) for atom in program.outvars]

    def apply(self, eqn: JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any]:
        """The outputs of one equation; they follow from params alone if its inputs do."""
        uses = len(self.uses or ())
        outputs = self._outputs(eqn, inputs)
        if not eqn.effects and all(map(of_params, inputs)):
            outputs = [value if is_marked(value) else Plain(value) for value in outputs]
        if len(self.uses or ()) == uses and not self.settings.rules.enters(eqn.primitive):
            self._note_kept(eqn, inputs, outputs)
        return outputs

    def _note_kept(self, eqn: JaxprEqn, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Notes the lazy bases among the inputs of which the outputs, no activations, are dense arrays."""
        if self.unpacked is None:
            return
        dense = [base_of(value) for value in outputs if is_marked(value) and not is_packed(base_of(value))]
        for value in inputs:
            if is_packed(base_of(value)) and sum(array.size for array in dense) >= base_of(value).size:
                self.note_unpacked(eqn, value, "it makes a dense array of it")

    def note_unpacked(self, eqn: JaxprEqn | None, value: Any, why: str) -> None:
        """Notes that a value becomes dense for an equation, or as an output of the whole program, if it is lazy."""
        base = base_of(value)
        if self.unpacked is None or not is_packed(base):
            return
        path = self.path_of(value) if is_weight(value) else base.path
        if path:  # a merged weight has none: that is a use of its own
            name = name_of_primitive(eqn.primitive) if eqn else "return"
            self.unpacked.append(Unpacked(path, tuple(base.shape), name, self.source_of(eqn) if eqn else "", why))

    def _outputs(self, eqn: JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any]:
        stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
        with source_info_util.user_context(eqn.source_info.traceback, name_stack=stack), eqn.ctx.manager:
            rules = self.settings.rules
            if not any(map(is_weight, inputs)):
                values = list(map(bare, inputs))
                if not any(map(is_packed, values)) or not rules.enters(eqn.primitive):
                    return bind(eqn, values)
            rule = rules.rule_of(eqn.primitive)
            if rule is not None:
                return rule(self, eqn, inputs)
            return bind(eqn, self.merge_all(eqn, inputs, WHOLE.get(name_of_primitive(eqn.primitive), UNKNOWN)))

    def merge_all(self, eqn: JaxprEqn | None, inputs: Sequence[Any], why: str) -> list[Any]:
        """The inputs of an equation, or the outputs of the whole program, as arrays: every weight is merged."""
        merged = {id(value): self.merge(eqn, value, why) for value in inputs if is_weight(value)}
        return [merged.get(id(value), bare(value)) for value in inputs]

    def merge_outputs(self, eqn: JaxprEqn | None, outputs: Sequence[Any], why: str) -> list[Any]:
        """What leaves a program as arrays: every weight is merged, and every lazy base dense."""
        for value in outputs:
            if isinstance(value, Plain):
                self.note_unpacked(eqn, value, why)
        return list(densified(self.merge_all(eqn, outputs, why)))

    def merge(self, eqn: JaxprEqn | None, weight: Weight, why: str) -> Any:
        """The merged weight, for an equation that takes it as a whole; of a lazy base it is a lazy base again."""
        if self.settings.strict:
            place = (
                f"{name_of_primitive(eqn.primitive)} at {self.source_of(eqn)}" if eqn else "the output of the function"
            )
            raise AdapterError(
                f"{self.path_of(weight)}: {place} cannot be factored: {why}; leave the weight out with "
                "exclude_modules, or allow merging with strict=False"
            )
        if self.key is not None:
            why += "; no dropout"
            self.undropped.update(dict.fromkeys(weight.paths))
        flops = 2.0 * weight.rank * weight.value.size
        self.record(eqn, weight, roles="", factored=False, why=why, adapter_flops=flops)
        if is_packed(weight.value):
            return Lazy(weight, weight.shape, weight.value.dtype, front=0)
        return weight.merged()

    def path_of(self, weight: Weight) -> str:
        """The paths in params of what a weight is made of, as one word, for messages."""
        return " with ".join(self.paths.get(path, path) for path in weight.paths)

    def source_of(self, eqn: JaxprEqn) -> str:
        """The line of the user's code that an equation comes from."""
        found = source_info_util.summarize(eqn.source_info)
        return self.source if found in ("", "unknown") else found

    def record(
        self,
        eqn: JaxprEqn | None,
        weight: Weight,
        *,
        roles: str,
        factored: bool,
        why: str,
        base_flops: float = 0.0,
        adapter_flops: float = 0.0,
    ) -> None:
        """Notes a use, with the roles of the weight's axes as they stand at this equation.

        What several weights in params are a part of is a use of each, and its cost is shared out among them.
        """
        if self.uses is None:
            return
        name = name_of_primitive(eqn.primitive) if eqn else "return"
        share = self.times / len(weight.paths)
        for path in weight.paths:
            primitive, of_path = weight.reading(path, name, roles)
            self.uses.append(
                Use(
                    path,
                    weight.shape,
                    primitive,
                    self.source_of(eqn) if eqn else "",
                    of_path,
                    factored,
                    why,
                    self.times,
                    base_flops * share,
                    adapter_flops * share,
                )
            )

    def inner(self, eqn: JaxprEqn, key: jax.Array | None, times: int = 1) -> "Run":
        """The run of a program that this equation holds, with a key of its own."""
        return dataclasses.replace(self, key=key, times=self.times * times, source=self.source_of(eqn), draws=[])

    def next_key(self) -> jax.Array | None:
        """A key for the next draw or inner program; None without dropout."""
        if self.key is None:
            return None
        self.draws.append(None)
        return jax.random.fold_in(self.key, len(self.draws))

    def with_dropout(self, x: jax.Array, path: str) -> jax.Array:
        """The input of the adapter at `path`, with dropout."""
        key = self.next_key()
        if key is None:
            return x
        key = jax.random.fold_in(key, path_number(path))
        axes = varying_axes(x)
        if axes:
            key = jax.random.fold_in(key, jax.lax.axis_index(axes))
        share = 1 - self.settings.dropout
        keep = jax.random.bernoulli(key, share, x.shape)
        return jnp.where(keep, x / jnp.asarray(share, x.dtype), jnp.zeros((), x.dtype))


def _last_uses(program: Any) -> dict[int, list[Var]]:
    """The variables that no equation after the numbered one reads."""
    at: dict[Var, int] = {}
    for number, eqn in enumerate(program.eqns):
        at.update({atom: number for atom in (*eqn.invars, *eqn.outvars) if not isinstance(atom, Literal)})
    for atom in program.outvars:
        at.pop(atom, None) if not isinstance(atom, Literal) else None
    last: dict[int, list[Var]] = {}
    for var, number in at.items():
        last.setdefault(number, []).append(var)
    return last
