"""The same uses of a weight wherever a program may have them."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jlora
from jlora.transform._primitives import name_of_primitive
from jlora.transform._registry import RULES
from jlora.transform._run import Registry
from tests.transform.test_decided import installed
from tests.transform.test_primitives import (
    FACTORED,
    MERGED,
    PROGRAMS,
    Program,
    arguments,
    assert_trees_close,
    config_of,
    derivatives,
    of_params,
    reference,
    x64,
)

Function = Callable[[Any, Any], Any]
P = PartitionSpec
NAMES = (
    "matmul",
    "einsum BTD,NDH->BTNH",
    "take",
    "tied table",
    "conv 1d",
    "experts by dot_general",
    "slice of in and out axes",
    "w ** 2",
)
FEW = ("matmul", "tied table", "w ** 2")


@dataclasses.dataclass(frozen=True)
class Place:
    """Makes of `fn(w, x)` a function that has it in some place; `stacked` where its weight has one more axis.

    `modes` are the derivatives that the function has; `merging` the programs that cannot be factored there; `names`
    the programs that are tried there.
    """

    wrap: Callable[[Function], Function]
    stacked: bool = False
    names: Sequence[str] = NAMES
    modes: str = "grad jvp"
    merging: tuple[str, ...] = ()

    def program(self, program: Program) -> Program:
        return dataclasses.replace(
            program,
            fn=self.wrap(program.fn),
            weight=(3, *program.weight) if self.stacked else program.weight,
            roles="b" + program.roles if self.stacked else program.roles,
            factored=program.factored and program.name not in self.merging,
        )


def nested_jit(fn: Function) -> Function:
    inner = jax.jit(fn)
    return jax.jit(lambda w, x: inner(w, x) + 2 * jax.jit(inner)(w, 3 * x))


def scanned(**options: Any) -> Callable[[Function], Function]:
    def wrap(fn: Function) -> Function:
        def step(c: Any, w: Any) -> Any:
            return c * 1.5, fn(w, c * jnp.sin(c))

        return lambda w, x: lax.scan(step, x, w, **options)

    return wrap


def scan_constant(fn: Function) -> Function:
    return lambda w, x: lax.scan(lambda c, s: (c * s, fn(w, c * s)), x, jnp.array([0.5, -1.0, 2.0], x.dtype))


def scan_carried(fn: Function) -> Function:
    def step(carry: Any, s: Any) -> Any:
        c, w = carry
        return (c * s, w), fn(w, c * s)

    def run(w: Any, x: Any) -> Any:
        (c, _), ys = lax.scan(step, (x, w), jnp.array([0.5, -1.0, 2.0], x.dtype))
        return c, ys

    return run


def scan_changing(fn: Function) -> Function:
    def run(w: Any, x: Any) -> Any:
        return lax.scan(lambda w, s: (w * s, fn(w, x)), w, jnp.array([0.5, -1.0, 2.0], x.dtype))

    return run


def scan_twice(fn: Function) -> Function:
    """Scanned over as a stack and used as a whole in each step."""
    return lambda w, x: lax.scan(lambda c, wi: (c, fn(wi, c) + fn(w[1], c)), x, w)[1]


def scan_scan(fn: Function) -> Function:
    """A scan over layers in a scan over steps."""
    return lambda w, x: lax.scan(lambda c, _: (c * 1.5, scanned()(fn)(w, c)), x, None, 2)


def fori(fn: Function) -> Function:
    return lambda w, x: lax.fori_loop(0, 3, lambda i, y: y + fn(w, x * (i + 1.0)), fn(w, x))


def while_(fn: Function) -> Function:
    def run(w: Any, x: Any) -> Any:
        def proceeds(state: Any) -> Any:
            step, y = state
            return (step < 3) & jnp.isfinite(jnp.sum(fn(w, x)) + jnp.sum(y))

        return lax.while_loop(proceeds, lambda state: (state[0] + 1, state[1] + fn(w, x * state[0])), (1.0, fn(w, x)))

    return run


def while_carried(fn: Function) -> Function:
    def run(w: Any, x: Any) -> Any:
        def body(state: Any) -> Any:
            step, w, y = state
            return step + 1, w, y + fn(w, x * step)

        return lax.while_loop(lambda state: state[0] < 3, body, (1.0, w, fn(w, x)))[2]

    return run


def cond(fn: Function) -> Function:
    def run(w: Any, x: Any) -> Any:
        branches = fn, lambda w, x: fn(w, 2 * x)
        return lax.cond(jnp.sum(x) > 0, *branches, w, x), lax.cond(jnp.sum(x) < 0, *branches, w, x)

    return run


def switch(fn: Function) -> Function:
    def run(w: Any, x: Any) -> Any:
        branches = [lambda x: fn(w, x), lambda x: jnp.zeros_like(fn(w, x)), lambda x: 3 * fn(w, -x)]
        return [lax.switch(jnp.sum(x > 9).astype(jnp.int32) + n, branches, x) for n in (0, 2)]

    return run


def checkpoint(**options: Any) -> Callable[[Function], Function]:
    return lambda fn: lambda w, x: jnp.sin(jax.checkpoint(lambda w, x: jnp.sin(fn(w, x)), **options)(w, x))


def custom_jvp(fn: Function) -> Function:
    """With three times the derivative, to see that it is the one that is used."""
    function = jax.custom_jvp(fn)

    @function.defjvp
    def derivative(primals: Any, tangents: Any) -> Any:
        y, dy = jax.jvp(fn, primals, tangents)
        return y, 3 * dy

    return lambda w, x: jnp.sin(function(w, x))


def custom_vjp(fn: Function) -> Function:
    function = jax.custom_vjp(fn)

    def forward(w: Any, x: Any) -> Any:
        return fn(w, x), (w, x)

    def backward(saved: Any, dy: Any) -> Any:
        return tuple(3 * g for g in jax.vjp(fn, *saved)[1](dy))

    function.defvjp(forward, backward)
    return lambda w, x: jnp.sin(function(w, x))


def over_x(fn: Function) -> Function:
    return lambda w, x: jax.vmap(fn, (None, 0))(w, jnp.stack([x, 2 * x, -x]))


def over_w(fn: Function) -> Function:
    return jax.vmap(fn, (0, None))


def shard_map_alone(fn: Function) -> Function:
    """On a mesh of one device."""
    mesh = Mesh(np.array(jax.devices()[:1]), "d")
    return jax.shard_map(fn, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))


def effect(fn: Function) -> Function:
    def run(w: Any, x: Any) -> Any:
        jax.debug.callback(lambda _: None, x)
        return fn(w, x)

    return run


PLACES = {
    "top": Place(lambda fn: fn),
    "jit": Place(jax.jit),
    "nested jit": Place(nested_jit, names=FEW),
    "scan": Place(scanned(), stacked=True),
    "scan, reversed and unrolled": Place(scanned(reverse=True, unroll=2), stacked=True, names=FEW),
    "scan, a stack used whole": Place(scan_twice, stacked=True, names=FEW),
    "scan in scan": Place(scan_scan, stacked=True, names=FEW),
    "scan, constant": Place(scan_constant),
    "scan, carried": Place(scan_carried, names=FEW),
    "scan, changing": Place(scan_changing, merging=FEW, names=FEW),
    "fori": Place(fori, names=FEW),
    "while": Place(while_, modes="jvp"),
    "while, carried": Place(while_carried, modes="jvp", names=FEW),
    "cond": Place(cond),
    "switch": Place(switch, names=FEW),
    "checkpoint": Place(checkpoint()),
    "checkpoint, policy": Place(checkpoint(policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False), names=FEW),
    "checkpoint in scan": Place(
        lambda fn: scanned()(checkpoint(policy=jax.checkpoint_policies.nothing_saveable)(fn)), stacked=True, names=FEW
    ),
    "custom_jvp": Place(custom_jvp),
    "custom_vjp": Place(custom_vjp, modes="grad"),
    "vmap over x": Place(over_x),
    "vmap over w": Place(over_w, stacked=True, merging=("conv 1d", "take", "tied table")),
    "shard_map of one": Place(shard_map_alone, names=FEW),
    "effect": Place(effect, names=FEW),
}


def in_places() -> Iterator[Any]:
    """Every program in every place; the short run has each of them somewhere, and one everywhere."""
    for number, place in enumerate(PLACES):
        for name in PLACES[place].names:
            is_short = name == "matmul" or number % 3 == NAMES.index(name) % 3
            yield pytest.param(place, name, marks=() if is_short else pytest.mark.slow)


@pytest.mark.parametrize(("place", "name"), list(in_places()))
def test_values_and_derivatives_are_those_of_the_dense_delta(rng, place, name):
    place = PLACES[place]
    program = place.program(PROGRAMS[name])
    fns = (
        reference(program.fn, program.roles),
        jlora.lora(of_params(program.fn), config_of(program), strict=program.factored, cost_model=FACTORED),
    )
    with x64():
        primals, tangents = arguments(program, rng), arguments(program, rng)
        run = jax.jit(lambda *args: [derivatives(fn, *args, place.modes) for fn in fns])
        wanted, found = run(primals, tangents)
    assert_trees_close(found, wanted, program.tolerance)


@pytest.mark.parametrize("place", PLACES)
def test_the_merged_form_in_every_place(rng, place):
    """Where merging is chosen, by its cost."""
    place = PLACES[place]
    program = place.program(PROGRAMS["matmul"])
    fns = reference(program.fn, program.roles), jlora.lora(of_params(program.fn), config_of(program), cost_model=MERGED)
    with x64():
        primals, tangents = arguments(program, rng), arguments(program, rng)
        run = jax.jit(lambda *args: [derivatives(fn, *args, place.modes) for fn in fns])
        wanted, found = run(primals, tangents)
    assert_trees_close(found, wanted, program.tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_what_has_a_custom_vjp_has_no_jvp(rng, name):
    program = PLACES["custom_vjp"].program(PROGRAMS[name])
    primals = arguments(program, rng, np.float32)
    for fn in (reference(program.fn, program.roles), jlora.lora(of_params(program.fn), config_of(program))):
        with pytest.raises(TypeError, match="custom_vjp"):
            jax.jvp(fn, primals, primals)


class Recording(Registry):
    """Rules that remember which were asked for, by name."""

    def __init__(self) -> None:
        super().__init__(RULES, {})
        object.__setattr__(self, "met", set())

    def rule_of(self, primitive: Primitive) -> Any:
        self.met.add(name_of_primitive(primitive))
        return super().rule_of(primitive)


def on_one_device(move: Callable[[Any], Any]) -> Function:
    """A product with a weight that is moved within shard_map."""
    return shard_map_alone(lambda w, x: (x @ move(w))[:, :11])


def resharded(w: Any, x: Any) -> Any:
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1])
    reshard = getattr(jax, "reshard", None) or jax.sharding.reshard  # public as jax.reshard since JAX 0.8
    return x @ reshard(w, NamedSharding(mesh, P(None, "d")))


MOVED = {
    "all_gather": on_one_device(lambda w: lax.all_gather(w, "d", axis=1, tiled=True)),
    "all_gather, a new axis": on_one_device(lambda w: lax.all_gather(w, "d", axis=1)[:, 0]),
    "all_to_all": on_one_device(lambda w: lax.all_to_all(w, "d", 1, 1, tiled=True)),
    "ppermute": on_one_device(lambda w: lax.ppermute(w, "d", [(0, 0)])),
    "reshard": resharded,
}


@pytest.mark.parametrize("name", MOVED)
def test_a_weight_that_is_moved_on_a_mesh_of_one_device(rng, name):
    program = dataclasses.replace(PROGRAMS["matmul"], fn=MOVED[name])
    primals = arguments(program, rng, np.float32)
    found = jlora.lora(of_params(program.fn), config_of(program), strict=True, cost_model=FACTORED)(*primals)
    wanted = reference(program.fn, program.roles)(*primals)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * float(jnp.abs(wanted).max()))


ELSEWHERE = {"mesh_cast"}  # auto_axes before JAX 0.8, in test_explicit.py


def test_every_rule_meets_a_weight(rng, monkeypatch):
    recording = Recording()
    monkeypatch.setattr("jlora.transform._lora.registry", lambda: recording)
    placed = [place.program(PROGRAMS["matmul"]) for place in PLACES.values()]
    moved = [dataclasses.replace(PROGRAMS["matmul"], fn=fn) for fn in MOVED.values()]
    for program in [*PROGRAMS.values(), *placed, *moved]:
        fn = jlora.lora(of_params(program.fn), config_of(program), cost_model=FACTORED)
        jax.eval_shape(fn, *arguments(program, rng, np.float32))
    assert set(RULES) & installed() - recording.met - ELSEWHERE == set()
