"""LoRA-XS: factors from the singular values of each weight, and one small matrix between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import DataError, LoraConfig, TargetError
from jlora.variants import xs
from tests.reference import as64, assert_close, randomize, x64
from tests.variants.weights import CONFIG, apply, as_matrices, random_params

XS = CONFIG.replace(kind="xs", rank=1)
TOKENS = np.arange(4)


def best(matrices: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation of each matrix of this rank."""
    u, s, vh = np.linalg.svd(matrices, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]


@pytest.mark.parametrize("rank", [1, 3])
def test_the_factors_are_the_best_of_their_rank(rank, rng):
    params = random_params(rng)
    trained, frozen = xs.init(None, params, CONFIG.replace(kind="xs", rank=rank))
    for path, entry in frozen.items():
        matrices = as_matrices(path, params[path])
        a = as64(entry["A"]).reshape(len(matrices), -1, rank)
        b = as64(entry["B"]).reshape(len(matrices), rank, -1)
        assert_close(jnp.asarray(a @ b, "float32"), best(matrices, rank), factor=10)
        identity = np.broadcast_to(np.eye(rank), (len(matrices), rank, rank))
        assert_close(jnp.asarray(a.transpose(0, 2, 1) @ a, "float32"), identity, factor=10)
        assert not np.any(trained[path]["R"])


def test_a_large_weight_is_decomposed_by_a_sketch(rng):
    low = rng.standard_normal((601, 4)) @ rng.standard_normal((4, 700))
    weight = jnp.asarray(low + 1e-3 * rng.standard_normal(low.shape), jnp.bfloat16)
    _, frozen = xs.init(None, {"up": weight}, LoraConfig(rank=4, kind="xs", factorizations={"up": "io"}))
    a, b = (as64(frozen["up"][name]) for name in "AB")
    wanted = best(as64(weight)[None], 4)[0]
    assert np.linalg.norm(a @ b - wanted) < 1e-3 * np.linalg.norm(wanted)


def test_the_update_is_scaled_and_r_stands_in_the_middle(rng):
    params = random_params(rng)
    trained, frozen = xs.init(None, params, XS)
    trained = randomize(rng, trained)
    merged = jlora.merge_params(params, xs.adapters(trained, frozen, params, XS), XS)
    for path, weight in params.items():
        base = as_matrices(path, weight)
        a = as64(frozen[path]["A"]).reshape(len(base), -1, 1)
        b = as64(frozen[path]["B"]).reshape(len(base), 1, -1)
        r = as64(trained[path]["R"]).reshape(len(base), 1, 1)
        assert_close(jnp.asarray(as_matrices(path, merged[path]), "float32"), base + 5 * a @ r @ b)


def test_outputs_and_gradients_are_those_of_the_merged_model(rng):
    config = CONFIG.replace(kind="xs", rank=3)
    with x64():
        params = random_params(rng, "float64")
        trained, frozen = xs.init(None, params, config)
        trained = randomize(rng, trained)
        model = jlora.lora(apply, config, strict=True)

        def factored(trained):
            return jnp.sum(jnp.sin(model(params, xs.adapters(trained, frozen, params, config), TOKENS)))

        def merged(trained):
            adapters = xs.adapters(trained, frozen, params, config)
            return jnp.sum(jnp.sin(apply(jlora.merge_params(params, adapters, config), TOKENS)))

        (found, grads), (wanted, others) = (jax.jit(jax.value_and_grad(fn))(trained) for fn in (factored, merged))
        assert_close(found, np.asarray(wanted))
        for path in params:
            assert np.abs(others[path]["R"]).max() > 0
            assert_close(grads[path]["R"], as64(others[path]["R"]), factor=100)


def test_the_model_is_unchanged_at_the_start_and_learns_from_there(rng):
    params, config = random_params(rng), CONFIG.replace(kind="xs", rank=3)
    trained, frozen = xs.init(jax.random.key(1), params, config)
    model = jlora.lora(apply, config)

    def output(trained):
        return model(params, xs.adapters(trained, frozen, params, config), TOKENS)

    assert bool((output(trained) == apply(params, TOKENS)).all())
    grads = jax.grad(lambda trained: jnp.sum(output(trained) ** 2))(trained)
    assert all(np.any(entry["R"]) for entry in grads.values())


def test_what_is_refused(rng):
    params = {"up": np.ones((5, 7), np.float32)}
    config = LoraConfig(rank=2, kind="xs", factorizations={"up": "io"})
    with pytest.raises(TargetError, match="up: LoRA-XS begins at the singular values of the weight: wanted an array"):
        xs.init(None, {"up": jax.ShapeDtypeStruct((5, 7), "float32")}, config)
    with pytest.raises(DataError, match="up: holds a NaN or an infinity, and has no singular values"):
        xs.init(None, {"up": np.full((5, 7), np.nan, np.float32)}, config)
    trained, frozen = xs.init(None, params, config)
    with pytest.raises(TargetError, match=r"up \(5, 7\): found R \(3, 3\), wanted R \(2, 2\)"):
        xs.adapters({"up": {"R": np.zeros((3, 3))}}, frozen, params, config)
    with pytest.raises(TargetError, match="up: has an R, and nothing in frozen"):
        xs.adapters(trained, {}, params, config)
