"""Random programs over adapted weights, against the same program on weights with the dense update added, in float64."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, assume, example, given, settings
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jlora import CostModel, LoraConfig, lora
from tests.reference import as64, random_adapter, random_array, reference_delta

ALPHA, RANK = 3.0, 2
Step = Callable[[Any, Any], Any]
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # JAX 0.8 moved it


def axes_of(roles: str) -> list[list[int]]:
    return [[axis for axis, found in enumerate(roles) if found == role] for role in "bio"]


def delta_of(adapter: Any, roles: str, alpha: float = ALPHA) -> np.ndarray:
    """The dense update in the order of the weight's axes."""
    order = [axis for axes in axes_of(roles) for axis in axes]
    return reference_delta(adapter, alpha, roles.count("b")).transpose(np.argsort(order))


def grads_of(dense: Any, adapter: Any, roles: str, alpha: float = ALPHA) -> dict[str, np.ndarray]:
    """The gradients of A and B, from that of the dense weight."""
    a, b = as64(adapter["A"]), as64(adapter["B"])
    batch, ins, outs = axes_of(roles)
    sizes = [[dense.shape[axis] for axis in axes] for axes in (batch, ins, outs)]
    g = as64(dense).transpose([*batch, *ins, *outs]).reshape(*sizes[0], math.prod(sizes[1]), math.prod(sizes[2]))
    flat_a, flat_b = a.reshape(*g.shape[:-1], -1), b.reshape(*sizes[0], -1, g.shape[-1])
    scale = alpha / a.shape[-1]
    grad_a, grad_b = scale * g @ flat_b.swapaxes(-1, -2), scale * flat_a.swapaxes(-1, -2) @ g
    return {"A": grad_a.reshape(a.shape), "B": grad_b.reshape(b.shape)}


def fit(x: Any, shape: tuple[int, ...]) -> Any:
    """The elements of x, repeated or cut, in this shape: a program goes on with whatever came out."""
    size = math.prod(shape)
    flat = x.reshape(-1)
    return jnp.concatenate([flat] * -(-size // flat.size))[:size].reshape(shape)


@dataclasses.dataclass(frozen=True)
class Use:
    """A weight that is moved about, then used; `over` says what takes its first axis apart."""

    name: str
    moves: tuple[Callable[[Any], Any], ...]
    over: str
    apply: Step

    def __call__(self, params: Any, x: Any) -> Any:
        weight = params[self.name]
        for move in self.moves:
            weight = move(weight)
        return jnp.tanh(OVER[self.over](self.apply, weight, x))


def over_scan(apply: Step, weight: Any, x: Any) -> Any:
    def body(carry: Any, element: Any) -> Any:
        y = apply(element, carry)
        return jnp.tanh(carry + fit(y, carry.shape)), y

    carry, ys = lax.scan(body, x, weight)
    return ys.sum(0) + fit(carry, ys.shape[1:])


def over_index(apply: Step, weight: Any, x: Any) -> Any:
    def body(step: Any, carry: Any) -> Any:
        return jnp.tanh(fit(apply(lax.dynamic_index_in_dim(weight, step, keepdims=False), carry), x.shape))

    return lax.fori_loop(0, weight.shape[0], body, x)


OVER = {
    "nothing": lambda apply, weight, x: apply(weight, x),
    "loop": lambda apply, weight, x: sum(apply(weight[n], x + n) for n in range(weight.shape[0])),
    "map": lambda apply, weight, x: lax.map(lambda element: apply(element, x), weight).sum(0),
    "vmap": lambda apply, weight, x: jax.vmap(lambda element: apply(element, x))(weight).sum(0),
    "scan": over_scan,
    "index": over_index,
}


def contracted(weight: Any, x: Any, letters: str, xs: str, y: str, weight_first: bool) -> Any:
    sizes = dict(zip(letters, weight.shape, strict=True)) | {"z": 2}
    x = fit(x, tuple(sizes[c] for c in xs))
    return (
        jnp.einsum(f"{letters},{xs}->{y}", weight, x) if weight_first else jnp.einsum(f"{xs},{letters}->{y}", x, weight)
    )


def convolved(weight: Any, x: Any, spec: str, groups: int) -> Any:
    channels = weight.shape[spec.index("I")] * groups
    x = fit(x, (2, *(4,) * (weight.ndim - 2), channels))
    window = spec.replace("O", "").replace("I", "")
    numbers = (f"N{window}C", spec, f"N{window}C")
    if weight.shape[spec.index("O")] % groups:
        return x.sum() * weight
    return lax.conv_general_dilated(
        x, weight, (1,) * len(window), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


def added(weight: Any, x: Any) -> Any:
    return x + fit(weight, x.shape)


def looked_up(weight: Any, x: Any, ids: Any) -> Any:
    return fit(x, (2,)).sum() * weight[jnp.asarray(ids) % weight.shape[0]]


def twofold(weight: Any, axis: int, join: Callable[..., Any]) -> Any:
    """The weight joined with another form of itself."""
    return join([weight, 0.5 * jnp.flip(weight)], axis)


def channels(weight: Any, axis: int) -> Any:
    scale = jnp.cos(jnp.arange(weight.shape[axis], dtype=weight.dtype))
    return weight * jnp.expand_dims(scale, [other for other in range(weight.ndim) if other != axis])


def shifted(weight: Any) -> Any:
    return jnp.sin(jnp.arange(weight.size, dtype=weight.dtype)).reshape(weight.shape) - weight


def chosen(weight: Any) -> Any:
    return lax.select_n(jnp.int32(1), weight, 2 + weight, jnp.ones_like(weight))


@st.composite
def moves(draw: Any, shape: tuple[int, ...]) -> Any:
    """A move of a weight of this shape."""
    ndim = len(shape)
    axis = draw(st.integers(0, ndim - 1))
    joined = (*shape[: max(axis - 1, 0)], math.prod(shape[max(axis - 1, 0) : axis + 1]), *shape[axis + 1 :])
    half = [n for n in (2, 3, 5) if shape[axis] % n == 0 and shape[axis] > n]
    parts = (*shape[:axis], half[0], shape[axis] // half[0], *shape[axis + 1 :]) if half else (*shape, 1)
    index = draw(st.integers(0, shape[axis] - 1))
    choices: list[Callable[[Any], Any]] = [
        functools.partial(jnp.transpose, axes=tuple(draw(st.permutations(range(ndim))))),
        functools.partial(jnp.reshape, shape=joined),
        functools.partial(jnp.reshape, shape=parts),
        functools.partial(jnp.expand_dims, axis=axis),
        functools.partial(jnp.flip, axis=axis),
        functools.partial(jnp.multiply, 0.7),
        functools.partial(jnp.multiply, jnp.float32(0.7)),
        jnp.negative,
        functools.partial(lax.slice_in_dim, start_index=index, limit_index=shape[axis], stride=2, axis=axis),
        functools.partial(jnp.take, indices=np.array([index, 0, index]), axis=axis),
        functools.partial(jnp.broadcast_to, shape=(2, *shape)),
        functools.partial(jnp.repeat, repeats=2, axis=axis),
        functools.partial(jnp.tile, reps=[2 if other == axis else 1 for other in range(ndim)]),
        functools.partial(jnp.roll, shift=1, axis=axis),
        functools.partial(jnp.pad, pad_width=[(int(other == axis), 0) for other in range(ndim)]),
        functools.partial(jnp.add, 0.3),
        functools.partial(twofold, axis=axis, join=jnp.concatenate),
        functools.partial(twofold, axis=axis, join=jnp.stack),
        functools.partial(twofold, axis=axis, join=lambda parts, _: parts[0] + parts[1]),
        functools.partial(channels, axis=axis),
        functools.partial(checkpoint_name, name="weight"),
        shifted,
        chosen,
        jnp.sin,
    ]
    if ndim > 1:
        choices.append(functools.partial(lax.index_in_dim, index=index, axis=axis, keepdims=False))
    return draw(st.sampled_from(choices))


@st.composite
def contractions(draw: Any, ndim: int) -> Any:
    letters = "abcdefgh"[:ndim]
    of_x = [c for c in letters if draw(st.booleans())] + ["z"] * draw(st.integers(0, 1))
    out = [c for c in letters if c not in of_x or draw(st.integers(0, 3)) == 0] + ["z"] * ("z" in of_x)
    xs, y = ("".join(draw(st.permutations(part))) for part in (of_x, out))
    return functools.partial(contracted, letters=letters, xs=xs, y=y, weight_first=draw(st.booleans()))


@st.composite
def uses(draw: Any, shapes: dict[str, tuple[int, ...]]) -> Use:
    name = draw(st.sampled_from(sorted(shapes)))
    shape, done = shapes[name], []
    for _ in range(draw(st.integers(0, 3))):
        move = draw(moves(shape))
        with enable_x64(True):
            found = jax.eval_shape(move, jax.ShapeDtypeStruct(shape, "float64"))
        if 0 < len(found.shape) < 6 and found.size < 400:
            shape, done = found.shape, [*done, move]
    over = draw(st.sampled_from(["nothing", "nothing", *OVER])) if len(shape) > 1 else "nothing"
    ndim = len(shape) - (over != "nothing")
    choices = [contractions(ndim)] * 4 + [st.just(added)]
    choices += [
        st.lists(st.integers(0, 4), min_size=1, max_size=3).map(lambda ids: functools.partial(looked_up, ids=ids))
    ]
    if ndim in (3, 4):
        spec = st.permutations("OIHW"[:ndim]).map("".join)
        choices += [st.builds(functools.partial, st.just(convolved), spec=spec, groups=st.integers(1, 2))] * 2
    return Use(name, tuple(done), over, draw(st.one_of(choices)))


def with_jvp(step: Step) -> Step:
    function = jax.custom_jvp(step)
    function.defjvp(lambda primals, tangents: jax.jvp(step, primals, tangents))
    return function


def with_vjp(step: Step) -> Step:
    function = jax.custom_vjp(step)
    function.defvjp(lambda *args: jax.vjp(step, *args), lambda pull, g: pull(g))
    return function


def twice(step: Step) -> Step:
    return lambda p, x: lax.fori_loop(0, 2, lambda n, y: fit(step(p, y), x.shape), x)


def until(step: Step) -> Step:
    """A while loop, which has no reverse derivative: outside of the gradient."""

    def function(p: Any, x: Any) -> Any:
        p, x = lax.stop_gradient((p, x))
        return lax.while_loop(
            lambda c: (c[0] < 2) & (step(p, c[1]).sum() < 1e9),
            lambda c: (c[0] + 1, fit(step(p, c[1]), x.shape)),
            (0, x),
        )[1]

    return function


WRAPPERS: dict[str, Callable[[Step], Step]] = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "cond": lambda step: lambda p, x: lax.cond(x.sum() > 0, step, lambda p, x: step(p, -0.3 * x), p, x),
    "vmap": lambda step: lambda p, x: jax.vmap(step, (None, 0))(p, jnp.stack([x, -0.3 * x])).sum(0),
    "fori": twice,
    "while": until,
    "grad": lambda step: lambda p, x: x - jax.grad(lambda x: step(p, x).sum())(x),
    "jvp": lambda step: lambda p, x: jax.jvp(lambda x: step(p, x), [x], [jnp.cos(x)])[1],
    "custom_jvp": with_jvp,
    "custom_vjp": with_vjp,
}


@dataclasses.dataclass(frozen=True)
class Program:
    steps: tuple[tuple[Use, tuple[str, ...]], ...]

    def __call__(self, params: Any, x: Any) -> Any:
        for use, wrappers in self.steps:
            step: Step = use
            for name in wrappers:
                step = WRAPPERS[name](step)
            x = step(params, x)
        return x


@st.composite
def programs(draw: Any) -> tuple[dict[str, tuple[tuple[int, ...], str]], Program]:
    """Weights with their roles, and a program that uses them."""
    weights = {}
    for name in "uvw"[: draw(st.integers(1, 3))]:
        roles = draw(st.permutations("io" + draw(st.text("bio", max_size=2))).map("".join))
        weights[name] = tuple(draw(st.sampled_from([2, 3, 5])) for _ in roles), roles
    use = uses({name: shape for name, (shape, _) in weights.items()})
    wrappers = st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=2).map(tuple)
    return weights, Program(tuple(draw(st.lists(st.tuples(use, wrappers), min_size=1, max_size=3))))


def one_step(*wrappers: str, move: Any = jnp.transpose) -> Any:
    """A program of one product."""
    apply = functools.partial(contracted, letters="ab", xs="b", y="a", weight_first=False)
    return {"u": ((5, 3), "oi")}, Program(((Use("u", (move,), "nothing", apply), wrappers),))


random = given(programs(), st.sampled_from([0.0, 12.0, math.inf]), st.integers(0, 2**32 - 1))
generated = [Phase.explicit, Phase.generate]


@pytest.mark.filterwarnings("ignore:the adapters of .* reach nothing")
@settings(max_examples=20, phases=generated)
@example(one_step("custom_vjp", move=functools.partial(jnp.multiply, jnp.float32(0.7))), 12.0, 1)
@example(one_step("while", "vmap"), 12.0, 1)
@random
def test_a_random_program_is_the_program_of_the_merged_weights(drawn, merge_from, seed):
    check(*drawn, merge_from, seed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the adapters of .* reach nothing")
@settings(max_examples=40, phases=generated)
@random
def test_more_random_programs_are_those_of_the_merged_weights(drawn, merge_from, seed):
    check(*drawn, merge_from, seed)


def check(weights: dict[str, Any], program: Program, merge_from: float, seed: int) -> None:
    assume(
        not any("custom_vjp" in names and "jvp" in names for _, names in program.steps)
    )  # JAX has no such derivative
    rng = np.random.default_rng(seed)
    config = LoraConfig(rank=RANK, alpha=ALPHA, factorizations={name: roles for name, (_, roles) in weights.items()})
    with enable_x64(True):
        params = {name: random_array(rng, shape, "float64") for name, (shape, _) in weights.items()}
        adapters = {}
        for name, (shape, roles) in weights.items():
            batch, ins, outs = ([shape[axis] for axis in axes] for axes in axes_of(roles))
            adapters[name] = random_adapter(rng, (*batch, *ins, RANK), (*batch, RANK, *outs), "float64")
        merged = {
            name: jnp.asarray(as64(params[name]) + delta_of(adapters[name], roles))
            for name, (_, roles) in weights.items()
        }
        x = random_array(rng, (7,), "float64")
        adapted = lora(program, config, cost_model=CostModel(merge_from, merge_from))

        def losses(params, adapters, merged, x):
            def loss(function, *args):
                y = function(*args)
                return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

            found = jax.value_and_grad(lambda *a: loss(adapted, *a), (0, 1, 2), has_aux=True)(params, adapters, x)
            wanted = jax.value_and_grad(lambda *a: loss(program, *a), (0, 1), has_aux=True)(merged, x)
            return found, wanted

        found, wanted = jax.jit(losses)(params, adapters, merged, x)
        ((_, y), (d_params, d_adapters, dx)), ((_, y_wanted), (dense, dx_wanted)) = found, wanted
        np.testing.assert_allclose(y, y_wanted, rtol=0, atol=1e-9)
        np.testing.assert_allclose(dx, dx_wanted, rtol=0, atol=1e-8 * max(1.0, float(jnp.abs(dx_wanted).max())))
        scale = max(float(np.max(np.abs(as64(g)))) for g in dense.values())
        for name, (_, roles) in weights.items():
            np.testing.assert_allclose(d_params[name], dense[name], rtol=0, atol=1e-9 * max(scale, 1))
            for part, grad in grads_of(dense[name], adapters[name], roles).items():
                assert d_adapters[name][part].shape == grad.shape
                np.testing.assert_allclose(d_adapters[name][part], grad, rtol=0, atol=1e-8 * max(scale, 1))
