"""What holds for every decoder: packed rows, remat, a program that does not grow, adapters factored everywhere."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import ConfigError
from jlora.models import decoder, init_params, param_shapes
from jlora.paths import leaves_by_path
from tests.models.sizes import KINDS, config_of, random_params, random_tokens
from tests.reference import assert_close, randomize


@pytest.mark.parametrize("kind", KINDS)
def test_packed_examples_have_the_logits_that_they_have_alone(kind: str, rng: np.random.Generator) -> None:
    config = config_of(kind)
    params = random_params(rng, config)
    tokens = random_tokens(rng, (1, 19))
    lengths = (7, 3, 6)  # and three of padding
    segments = jnp.asarray(np.repeat([1, 2, 3, 0], [*lengths, 3])[None], jnp.int32)
    positions = jnp.asarray(np.concatenate([np.arange(n) for n in (*lengths, 3)])[None], jnp.int32)
    fn = decoder(config)

    packed = fn(params, tokens, positions=positions, segments=segments)
    assert np.isfinite(packed).all()
    start = 0
    for length in lengths:
        alone = np.asarray(fn(params, tokens[:, start : start + length]))
        assert_close(packed[:, start : start + length], alone, factor=0.05)  # 1e-6
        start += length


def test_logits_of_one_position(rng: np.random.Generator) -> None:
    config = config_of("plain")
    params, tokens = random_params(rng, config), random_tokens(rng, (3, 7))
    at = jnp.array([6, 0, 2])
    wanted = np.asarray(decoder(config)(params, tokens))[np.arange(3), at]
    assert_close(decoder(config)(params, tokens, logits_at=at), wanted)


@pytest.mark.parametrize("remat", ["layer", jax.checkpoint_policies.dots_with_no_batch_dims_saveable])
def test_remat_changes_no_gradient(remat: str, rng: np.random.Generator) -> None:
    config = config_of("alternating")
    params, tokens = random_params(rng, config), random_tokens(rng, (2, 7))
    lora = jlora.LoraConfig(rank=2, target_modules=("model/layers/**",))
    _, adapters, lora, _ = jlora.adapt(decoder(config), lora, params, tokens)
    adapters = randomize(rng, adapters, std=0.2)

    def gradients(fn: Any) -> Any:
        adapted = jlora.lora(fn, lora, strict=True)
        return jax.jit(jax.grad(lambda params, adapters: jnp.sum(jnp.sin(adapted(params, adapters, tokens))), (0, 1)))

    plain, again = gradients(decoder(config)), gradients(decoder(config, remat=remat))
    assert "remat" not in str(jax.make_jaxpr(plain)(params, adapters))
    assert "remat" in str(jax.make_jaxpr(again)(params, adapters))
    wanted = leaves_by_path(plain(params, adapters))
    found = leaves_by_path(again(params, adapters))
    assert len(found) == len(wanted) > 20
    for path, gradient in found.items():
        assert_close(gradient, np.asarray(wanted[path]), factor=5)


def test_a_remat_that_is_not_known() -> None:
    with pytest.raises(ConfigError, match="remat = 'layers': wanted None, 'layer' or a policy"):
        decoder(config_of("plain"), remat="layers")


def equations(program: Any) -> int:
    """How many a program has, those within its scans and calls too."""
    count = 0
    for equation in getattr(program, "jaxpr", program).eqns:
        count += 1
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    count += equations(inner)
    return count


@pytest.mark.parametrize("kind", KINDS)
def test_the_program_does_not_grow_with_the_layers(kind: str) -> None:
    tokens = jax.ShapeDtypeStruct((2, 7), jnp.int32)

    def count(layers: int) -> int:
        config = config_of(kind, num_hidden_layers=layers)
        lora = jlora.LoraConfig(rank=2, target_modules=("model/layers/**",))
        fn, adapters, _, _ = jlora.adapt(decoder(config), lora, param_shapes(config), tokens)

        def loss(adapters, params, tokens):  # type: ignore[no-untyped-def]
            return jnp.sum(fn(params, adapters, tokens))

        return equations(jax.make_jaxpr(jax.grad(loss))(adapters, param_shapes(config), tokens))

    assert 100 < count(30) == count(60)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_random_params_fit_the_shapes(kind: str, dtype: str) -> None:
    config = config_of(kind)
    params = leaves_by_path(init_params(jax.random.key(0), config, dtype))
    wanted = leaves_by_path(param_shapes(config, dtype))
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in params.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in wanted.items()
    }
    assert all(np.std(leaf.astype("float32")) > 0 for path, leaf in params.items() if "norm" not in path)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_factored(kind: str, rng: np.random.Generator) -> None:
    config = config_of(kind)
    params, tokens = random_params(rng, config), random_tokens(rng, (2, 7))
    lora = jlora.LoraConfig(rank=2, target_modules=("**",), exclude_modules=("**/*norm",))
    fn, adapters, resolved, _ = jlora.adapt(decoder(config), lora, params, tokens, strict=True)
    matrices = {path for path, leaf in leaves_by_path(params).items() if "norm" not in path}
    adapted = {path.rpartition("/")[0] for path in leaves_by_path(adapters)}
    assert adapted == matrices

    adapters = randomize(rng, adapters, std=0.2)
    merged = jlora.merge_params(params, adapters, resolved)
    wanted = np.asarray(decoder(config)(merged, tokens))
    assert_close(fn(params, adapters, tokens), wanted, factor=5)
    jax.make_jaxpr(jlora.lora(decoder(config), resolved, strict=True))(params, adapters, tokens)
