"""The modes of JAX, each with a program for every rule: what runs without adapters runs with them."""

import contextlib
import dataclasses
import functools
import gc
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jlora
from jlora.transform._registry import RULES
from tests.transform.test_places import ELSEWHERE, MOVED, PLACES, Recording, installed
from tests.transform.test_primitives import (
    FACTORED,
    MERGED,
    PROGRAMS,
    Program,
    arguments,
    assert_trees_close,
    config_of,
    of_params,
    reference,
    x64,
)

FORMS = {"factored": FACTORED, "merged": MERGED}
FEW = ["matmul", "w times a scale of out axes", "take", "w ** 2", "@nested jit", "@scan", "@cond", "@checkpoint"]
every_form = pytest.mark.parametrize("form", FORMS)
Mode = Callable[[], contextlib.AbstractContextManager[Any]]


@functools.cache
def programs() -> dict[str, tuple[Program, str]]:
    """As few programs as meet every rule, and the derivatives that each has."""
    tried = {name: (program, "grad jvp") for name, program in PROGRAMS.items()}
    tried |= {f"@{name}": (place.program(PROGRAMS["matmul"]), place.modes) for name, place in PLACES.items()}
    tried |= {name: (dataclasses.replace(PROGRAMS["matmul"], fn=fn), "grad jvp") for name, fn in MOVED.items()}
    chosen, met = {}, set()
    for name, (program, modes) in tried.items():
        recording = Recording()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("jlora.transform._lora.registry", lambda recording=recording: recording)
            jax.eval_shape(adapted(program, "factored"), *shapes(program))
        if name in FEW or recording.met & set(RULES) - met:
            met |= recording.met
            chosen[name] = program, modes
    assert set(RULES) & installed() - ELSEWHERE <= met
    return chosen


def adapted(program: Program, form: str, **options: Any) -> Callable[..., Any]:
    return jlora.lora(of_params(program.fn), config_of(program, **options), cost_model=FORMS[form])


def shapes(program: Program) -> Any:
    arrays = arguments(program, np.random.default_rng(0), np.float32)
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), arrays)


def differentiated(fn: Callable[..., Any], modes: str) -> Callable[..., Any]:
    """The value, and a derivative along or by every argument."""

    def total(*primals: Any) -> Any:
        value = fn(*primals)
        return sum(jnp.sum(y) for y in jax.tree.leaves(value) if jnp.issubdtype(y.dtype, jnp.floating)), value

    def run(*primals: Any) -> Any:
        if "grad" not in modes:
            return jax.jvp(fn, primals, primals)
        (_, value), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*primals)
        return value, gradients

    return run


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """No promotion of dtypes or ranks, and types that are checked."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"), jax.enable_checks(True):
        yield


@contextlib.contextmanager
def checking_leaks() -> Iterator[None]:
    """In little time: what other tests left in JAX's caches is not looked through."""
    gc.freeze()
    with jax.checking_leaks():
        yield


TRACING: dict[str, Mode] = {
    "checking_leaks": checking_leaks,
    "strict": strict,
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "no promotion of ranks": lambda: jax.numpy_rank_promotion("raise"),
    "x64": x64,
    "enable_checks": lambda: jax.enable_checks(True),
}
TOGETHER = ("strict promotion", "no promotion of ranks", "enable_checks")


@pytest.mark.parametrize("mode", [mode for mode in TRACING if mode not in TOGETHER])
def test_what_is_traced(mode):
    for name, (program, modes) in programs().items():
        traced = traces_alike(mode, name, program, modes)
        if mode == "strict" and not traced:  # a base that one of them refuses is traced in the others
            for part in TOGETHER:
                traces_alike(part, name, program, modes)


def traces_alike(mode: str, name: str, program: Program, modes: str) -> bool:
    """Whether the base can be traced in a mode; the types of its outputs are then those with adapters."""
    args = shapes(program)
    with TRACING[mode]():
        wanted = unless_it_fails(jax.eval_shape, differentiated(reference(program.fn, program.roles), modes), *args)
        if wanted is None:
            return False
        for form in FORMS:
            try:
                found = jax.eval_shape(differentiated(adapted(program, form), modes), *args)
            except Exception as error:
                raise AssertionError(f"{mode}: {name}, {form}") from error
            assert types(found) == types(wanted), f"{mode}: {name}, {form}"
    return True


def unless_it_fails(fn: Callable[..., Any], *args: Any) -> Any:
    """What fn returns, None where it raises."""
    try:
        return fn(*args)
    except Exception:
        return None


def types(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


RUNNING: dict[str, tuple[Mode, Callable[..., Any]]] = {
    "disable_jit": (jax.disable_jit, lambda fn: fn),
    "debug_nans": (lambda: jax.debug_nans(True), jax.jit),
    "debug_infs": (lambda: jax.debug_infs(True), jax.jit),
}


@functools.cache
def computed(name: str) -> tuple[Any, Any]:
    """The arguments of a program, and its value and derivatives with the merged weights."""
    program, modes = programs()[name]
    args = arguments(program, np.random.default_rng(7), np.float32)
    return args, jax.jit(differentiated(reference(program.fn, program.roles), modes))(*args)


@every_form
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("mode", ["disable_jit", "debug_nans", pytest.param("debug_infs", marks=pytest.mark.slow)])
def test_what_is_run(mode, form, name):
    program, modes = programs()[name]
    around, prepared = RUNNING[mode]
    args, wanted = computed(name)
    with around():
        found = prepared(differentiated(adapted(program, form), modes))(*args)
    assert_trees_close(found, wanted, 1e-4)


@pytest.mark.parametrize("name", [name for name in FEW if name != "w ** 2"])
def test_no_key_of_dropout_is_used_twice(rng, name):
    program, _ = programs()[name]
    fn = adapted(program, "factored", dropout=0.5)
    with jax.debug_key_reuse(True), jax.checking_leaks():
        jax.jit(lambda key, *args: fn(*args, dropout_key=key))(jax.random.key(0), *arguments(program, rng, np.float32))


def test_programs_with_a_symbolic_batch_are_exported(rng):
    (batch,) = export.symbolic_shape("batch")
    exported = []
    for name, (program, _) in programs().items():
        params, adapters, x = arguments(program, rng, np.float32)
        symbolic = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
        if unless_it_fails(export.export(jax.jit(of_params(program.fn))), params, symbolic) is None:
            continue
        program_of_batch = export.export(jax.jit(adapted(program, "merged")))(params, adapters, symbolic)
        if name in FEW:
            found = program_of_batch.call(params, adapters, x)
            assert_trees_close(found, reference(program.fn, program.roles)(params, adapters, x), 1e-4)
        uses = jlora.explain(of_params(program.fn), config_of(program), params, symbolic, cost_model=MERGED)
        assert re.search("w .*(factored|merged)", str(uses)), name
        exported.append(name)
    assert len(exported) > 15


def test_a_product_of_unknown_size_is_factored(rng):
    program = PROGRAMS["matmul"]
    params, _, x = shapes(program)
    (batch,) = export.symbolic_shape("batch")
    symbolic = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    (use,) = jlora.explain(of_params(program.fn), config_of(program), params, symbolic, cost_model=MERGED).uses
    assert use.factored
    assert np.isnan(use.base_flops)


@every_form
def test_compiled_ahead_of_time(rng, form):
    program = PROGRAMS["matmul"]
    args = arguments(program, rng, np.float32)
    ahead = jax.jit(differentiated(adapted(program, form), "grad")).lower(*shapes(program)).compile()
    assert_trees_close(ahead(*args), differentiated(reference(program.fn, program.roles), "grad")(*args), 1e-4)
