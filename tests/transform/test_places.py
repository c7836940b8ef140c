"""The same uses of a weight wherever a program may have them, and the transform inside other transforms of JAX."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import jlora
from jlora.transform._rules import RULES
from tests.transform.test_primitives import (
    FACTORED,
    MERGED,
    PROGRAMS,
    Program,
    arguments,
    assert_trees_close,
    compiled,
    config_of,
    dense,
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


@pytest.mark.parametrize(("place", "name"), [(place, name) for place in PLACES for name in PLACES[place].names])
def test_values_and_derivatives_are_those_of_the_dense_delta(rng, place, name):
    place = PLACES[place]
    program = place.program(PROGRAMS[name])
    fns = (
        reference(program.fn, program.roles),
        jlora.lora(of_params(program.fn), config_of(program), strict=program.factored, cost_model=FACTORED),
    )
    with x64():
        primals, tangents = arguments(program, rng), arguments(program, rng)
        run = compiled(lambda *args: [derivatives(fn, *args, place.modes) for fn in fns])
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
        run = compiled(lambda *args: [derivatives(fn, *args, place.modes) for fn in fns])
        wanted, found = run(primals, tangents)
    assert_trees_close(found, wanted, program.tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_what_has_a_custom_vjp_has_no_jvp(rng, name):
    program = PLACES["custom_vjp"].program(PROGRAMS[name])
    primals = arguments(program, rng, np.float32)
    for fn in (reference(program.fn, program.roles), jlora.lora(of_params(program.fn), config_of(program))):
        with pytest.raises(TypeError, match="custom_vjp"):
            jax.jvp(fn, primals, primals)


class Recording(dict):
    """Rules that remember which were asked for."""

    def __init__(self, rules: Any) -> None:
        super().__init__(rules)
        self.met: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.met.add(name)
        return super().get(name, default)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def test_every_rule_meets_a_weight(rng, monkeypatch):
    recording = Recording(RULES)
    monkeypatch.setattr("jlora.transform._lora.RULES", recording)
    placed = [place.program(PROGRAMS["matmul"]) for place in PLACES.values()]
    for program in [*PROGRAMS.values(), *placed]:
        fn = jlora.lora(of_params(program.fn), config_of(program), cost_model=FACTORED)
        jax.eval_shape(fn, *arguments(program, rng, np.float32))
    assert set(RULES) - recording.met == set()


# Second derivatives, and transforms around the transform


@jax.custom_jvp
def softplus(x: Any) -> Any:
    return jnp.logaddexp(x, 0)


softplus.defjvps(lambda dx, y, x: dx * jax.nn.sigmoid(x))


def loss(params: Any, x: Any) -> Any:
    """A product, an activation, and the same weight again, transposed and scanned over."""
    h = softplus(x @ params["w"])
    h, _ = lax.scan(
        lambda h, s: (jnp.tanh(h @ params["w"].T @ params["w"]) * s, None), h, jnp.array([0.5, 2.0], x.dtype)
    )
    return jnp.sum(h**2)


TINY = Program("loss", lambda w, x: loss({"w": w}, x), (3, 5), (7, 3))
FORMS = {"factored": FACTORED, "merged": MERGED}


def tiny(rng: np.random.Generator, form: str = "factored") -> Any:
    fn = jlora.lora(loss, config_of(TINY), cost_model=FORMS[form])
    return fn, reference(TINY.fn, TINY.roles), arguments(TINY, rng)


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives(rng, form):
    *fns, primals = tiny(rng, form)

    def second(fn: Any, primals: Any) -> Any:
        def slope(*args: Any) -> Any:
            return sum(jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(jax.grad(fn, (0, 1, 2))(*args)))

        return jax.hessian(fn, 1)(*primals), jax.grad(slope, (0, 1, 2))(*primals), jax.hessian(fn, 2)(*primals)

    with x64():
        found, wanted = compiled(lambda primals: [second(fn, primals) for fn in fns])(primals)
    assert_trees_close(found, wanted, 1e-10)


def descended(fn: Any, params: Any, adapters: Any, x: Any) -> Any:
    """Training in a scan."""

    def step(adapters: Any, s: Any) -> Any:
        value, grads = jax.value_and_grad(fn, 1)(params, adapters, x * s)
        return jax.tree.map(lambda a, g: a - 0.01 * g, adapters, grads), value

    return lax.scan(step, adapters, jnp.array([1.0, 0.5, 2.0], x.dtype))


def stacked(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.stack([a, 2 * a, -a]), tree)


AROUND = {
    "jit": lambda fn, p, a, x: jax.jit(fn)(p, a, x),
    "grad": lambda fn, p, a, x: jax.grad(fn, (0, 1, 2))(p, a, x),
    "value_and_grad": lambda fn, p, a, x: jax.value_and_grad(fn, 1)(p, a, x),
    "jvp": lambda fn, p, a, x: jax.jvp(lambda a: fn(p, a, x), (a,), (a,)),
    "linearize": lambda fn, p, a, x: jax.linearize(lambda a: fn(p, a, x), a)[1](a),
    "jacfwd": lambda fn, p, a, x: jax.jacfwd(fn, 1)(p, a, x),
    "vmap over x": lambda fn, p, a, x: jax.vmap(fn, (None, None, 0))(p, a, x),
    "vmap over adapters": lambda fn, p, a, x: jax.vmap(fn, (None, 0, None))(p, stacked(a), x),
    "vmap of grad over all": lambda fn, p, a, x: jax.vmap(jax.grad(fn, (0, 1)))(*map(stacked, (p, a, x))),
    "grad of vmap": lambda fn, p, a, x: jax.grad(lambda a: jnp.sum(jax.vmap(fn, (None, 0, None))(p, a, x)))(stacked(a)),
    "scan": descended,
    "checkpoint": lambda fn, p, a, x: jax.grad(jax.checkpoint(fn), (1, 2))(p, a, x),
    "all of them": lambda fn, p, a, x: jax.jit(
        jax.vmap(lambda a, x: descended(jax.checkpoint(jax.jit(fn)), p, a, x), (0, None))
    )(stacked(a), x),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("around", AROUND)
def test_other_transforms_around_it(rng, around, form):
    *fns, primals = tiny(rng, form)
    with x64():
        found, wanted = compiled(lambda *args: [AROUND[around](fn, *args) for fn in fns])(*primals)
    assert_trees_close(found, wanted, 1e-10)


def test_it_runs_outside_of_jit(rng):
    fn, wanted, primals = tiny(rng)
    with x64():
        found = jax.value_and_grad(fn, 1)(*primals)
        assert_trees_close(found, compiled(jax.value_and_grad(wanted, 1))(*primals), 1e-10)


def test_donated_adapters_are_used_up_and_the_base_is_not(rng):
    fn, wanted, primals = tiny(rng)
    step = jax.jit(lambda p, a, x: jax.tree.map(jnp.subtract, a, jax.grad(fn, 1)(p, a, x)), donate_argnums=1)
    with x64():
        params, adapters, x = jax.tree.map(jnp.array, primals)
        after = step(params, adapters, x)
        grads = compiled(jax.grad(wanted, 1))(*primals)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(adapters))
    assert not params["w"].is_deleted()
    assert_trees_close(after, jax.tree.map(lambda a, g: a - g, primals[1], jax.tree.map(np.asarray, grads)), 1e-10)


def test_two_weights_and_a_bias_of_which_one_is_adapted(rng):
    def fn(params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["w"] + params["bias"]) @ params["other"]

    program = PROGRAMS["matmul"]
    with x64():
        params, adapters, x = arguments(program, rng)
        params |= {"bias": rng.standard_normal(11), "other": rng.standard_normal((11, 3))}
        model = jlora.lora(fn, config_of(program), strict=True)
        tree = {"w": adapters["w"], "bias": None, "other": None}

        def wanted(params: Any, adapters: Any, x: Any) -> Any:
            return fn(params | {"w": params["w"] + dense(adapters["w"], "io")}, x)

        primals = params, tree, x
        found, dense_found = compiled(lambda *args: [derivatives(fn, args, args) for fn in (model, wanted)])(*primals)
    assert_trees_close(found, dense_found, 1e-10)


# Over eight devices


@functools.lru_cache
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("d", "m"))


def sharded(fn: Function, w: Any, x: Any, y: Any, **options: Any) -> Function:
    return lambda *args: jax.shard_map(fn, mesh=mesh(), in_specs=(w, x), out_specs=y, **options)(*args)


def summed(fn: Function) -> Function:
    return lambda w, x: lax.psum(fn(w, x), "m")


def vocabulary(w: Any, x: Any) -> Any:
    """A lookup in a table of 16 rows of which each device has eight."""
    ids = np.array([3, 0, 12, 15, 7, 8, 5, 5]) - 8 * lax.axis_index("m")
    rows = w.at[jnp.where(ids < 0, 99, ids)].get(mode="fill", fill_value=0)
    return lax.psum(rows, "m") * x


def matmul(w: Any, x: Any) -> Any:
    return x @ w


SHARDED = {
    "rows": Program("", sharded(matmul, P(), P("d"), P("d")), (5, 11), (8, 5)),
    "rows over all": Program("", sharded(matmul, P(), P(("d", "m")), P(("d", "m"))), (5, 11), (8, 5)),
    "rows, unchecked": Program("", sharded(matmul, P(), P("d"), P("d"), check_vma=False), (5, 11), (8, 5)),
    "rows, jit inside": Program("", sharded(jax.jit(matmul), P(), P("d"), P("d")), (5, 11), (8, 5)),
    "rows, one axis": Program("", jax.jit(sharded(matmul, P(), P("d"), P("d"), axis_names={"d"})), (5, 11), (8, 5)),
    "rows, merged": Program("", sharded(lambda w, x: x @ w**2, P(), P("d"), P("d")), (5, 11), (8, 5), factored=False),
    "rows, conv": Program("", sharded(PROGRAMS["conv 1d"].fn, P(), P("d"), P("d")), (3, 5, 11), (8, 13, 5), "iio"),
    "rows, tied": Program(
        "", sharded(lambda w, x: jnp.tanh(w[np.arange(2)] * x) @ w.T, P(), P("d"), P("d")), (13, 5), (8, 5)
    ),
    "rows, scan": Program(
        "", sharded(lambda w, x: scan_constant(matmul)(w, x)[1], P(), P("d"), P(None, "d")), (5, 11), (8, 5)
    ),
    "rows, checkpoint": Program("", sharded(checkpoint()(matmul), P(), P("d"), P("d")), (5, 11), (8, 5)),
    "mean of rows": Program(
        "", sharded(lambda w, x: lax.pmean(jnp.sin(x @ w), "d"), P(), P("d"), P()), (5, 11), (8, 5)
    ),
    "out axes": Program("", sharded(matmul, P(None, "m"), P("d"), P("d", "m")), (5, 14), (8, 5)),
    "in axes": Program("", sharded(summed(matmul), P("m"), P("d", "m"), P("d")), (10, 11), (8, 10)),
    "in axes of w.T": Program(
        "", sharded(summed(lambda w, x: x @ w.T), P(None, "m"), P("d", "m"), P("d")), (11, 10), (8, 10), "oi"
    ),
    "in axes, unchecked": Program(
        "", sharded(summed(matmul), P("m"), P("d", "m"), P("d"), check_vma=False), (10, 11), (8, 10)
    ),
    "in and out axes": Program(
        "", sharded(lambda w, x: lax.psum(x @ w, "d"), P("d", "m"), P(None, "d"), P(None, "m")), (20, 14), (3, 20)
    ),
    "in axes, merged": Program(
        "", sharded(summed(lambda w, x: x @ w**2), P("m"), P("d", "m"), P("d")), (10, 11), (8, 10), factored=False
    ),
    "heads": Program(
        "",
        sharded(PROGRAMS["einsum BTD,NDH->BTNH"].fn, P("m"), P("d"), P("d", None, "m")),
        (6, 5, 11),
        (4, 7, 5),
        "oio",
    ),
    "experts": Program(
        "", sharded(PROGRAMS["experts by dot_general"].fn, P("m"), P("m"), P("m")), (6, 5, 11), (6, 7, 5), "bio"
    ),
    "vocabulary": Program("", sharded(vocabulary, P("m"), P(), P()), (16, 5), (8, 5)),
    "layers": Program(
        "",
        sharded(lambda w, x: scanned()(matmul)(w, x)[1], P(None, None, "m"), P("d"), P(None, "d", "m")),
        (3, 5, 14),
        (8, 5),
        "bio",
    ),
}


def dropped_rows() -> list[list[int]]:
    """How many different updates there are of rows that are the same, by the devices that have them, with dropout."""
    params = {"w": jnp.zeros((30, 14))}
    adapters = {"w": {"A": jnp.arange(60.0).reshape(30, 2), "B": jnp.ones((2, 14))}}
    config = jlora.LoraConfig(rank=2, target_modules="w", dropout=0.5)
    counts = []
    for axes in (("d", "m"), "d"):
        model = jax.jit(jlora.lora(of_params(sharded(matmul, P(), P(axes), P(axes))), config))
        ys = [np.asarray(model(params, adapters, jnp.ones((8, 30)), dropout_key=jax.random.key(n))) for n in (3, 3, 4)]
        assert np.array_equal(ys[0], ys[1])
        counts.append([len({row.tobytes() for row in y}) for y in (ys[0], np.concatenate(ys))])
    return counts


def check_sharded() -> dict[str, str]:
    """What went wrong in each case; run in a process with eight devices."""
    problems = {}
    for name, program in SHARDED.items():
        rng = np.random.default_rng(20260)
        config = config_of(program)
        fns = (
            reference(program.fn, program.roles),
            jlora.lora(of_params(program.fn), config, strict=program.factored, cost_model=FACTORED),
            jlora.lora(of_params(program.fn), config, cost_model=MERGED),
        )
        try:
            with x64():
                primals, tangents = arguments(program, rng), arguments(program, rng)
                run = compiled(lambda *args, fns=fns: [derivatives(fn, *args) for fn in fns])
                wanted, *found = run(primals, tangents)
            for form in found:
                assert_trees_close(form, wanted, program.tolerance)
            problems[name] = ""
        except Exception:
            problems[name] = traceback.format_exc()
    return problems


def report_sharded() -> None:
    print(json.dumps({"problems": check_sharded(), "dropped": dropped_rows()}))


@pytest.fixture(scope="module")
def eight_devices() -> Any:
    """What a process with eight devices reports."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    code = "from tests.transform.test_places import report_sharded; report_sharded()"
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", SHARDED)
def test_shard_map_over_eight_devices(eight_devices, case):
    assert not eight_devices["problems"][case], eight_devices["problems"][case]


def test_dropout_differs_from_device_to_device(eight_devices):
    assert eight_devices["dropped"] == [[8, 16], [8, 16]]
