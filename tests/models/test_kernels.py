"""Attention: each way of computing it beside NumPy, and when cuDNN is taken."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import ConfigError
from jlora.models import decoder, init_cache
from jlora.models._kernels import attend, cudnn_can
from tests.models.sizes import config_of, random_params, random_tokens
from tests.reference import as64, assert_close, random_array


def reference(q: Any, k: Any, v: Any, scale: float, seen: np.ndarray, softcap: float | None) -> np.ndarray:
    q, k, v = as64(q), as64(k), as64(v)
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(q.shape[:3]):
        head = n // (q.shape[2] // k.shape[2])
        logits = scale * k[b, :, head] @ q[b, t, n]
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        weights = np.where(seen[b, t], np.exp(logits - logits.max()), 0)
        out[b, t, n] = weights / weights.sum() @ v[b, :, head]
    return out


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_what_its_formula_says(
    masked: bool, window: int | None, softcap: float | None, rng: np.random.Generator
) -> None:
    q, k, v = (random_array(rng, (2, 7, heads, 5)) for heads in (6, 3, 3))
    ahead = np.arange(7)[:, None] - np.arange(7)
    seen = np.broadcast_to((ahead >= 0) & (ahead < (window or 7)), (2, 7, 7))
    if masked:
        seen = seen & (rng.random((2, 7, 7)) < 0.5) | np.eye(7, dtype=bool)
    given = jnp.asarray(seen)[:, None] if masked else None
    found = attend(q, k, v, scale=0.7, seen=given, window=None if masked else window, softcap=softcap)
    assert_close(found, reference(q, k, v, 0.7, seen, softcap))


def device(capability: Any) -> Any:
    return lambda: [types.SimpleNamespace(compute_capability=capability)]


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "length", "wanted"),
    [
        ("8.0", "bfloat16", 64, 6, True),
        ("8.9", "float16", 128, 8, True),
        ("8.0", "bfloat16", 64, 7, False),  # for gradients it wants an even length
        ("8.0", "float32", 64, 8, False),
        ("8.0", "bfloat16", 60, 8, False),
        ("8.0", "bfloat16", 256, 8, False),
        ("9.0", "bfloat16", 256, 8, True),
        ("10.0", "bfloat16", 128, 8, True),
        ("7.5", "float16", 64, 8, False),
        ("gfx942", "bfloat16", 64, 8, False),  # of AMD
    ],
)
def test_when_cudnn_is_taken(
    capability: str, dtype: str, width: int, length: int, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "devices", device(capability))
    assert cudnn_can(dtype, width, length) is wanted


def test_cudnn_is_not_taken_here() -> None:
    assert not cudnn_can("bfloat16", 64, 8)


def test_the_kernel_that_is_asked_for_is_taken(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = set()
    plain = jax.nn.dot_product_attention

    def recorded(*args: Any, implementation: str, **how: Any) -> jax.Array:
        taken.add((implementation, "mask" in how))
        return plain(*args, **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    config = config_of("window")
    params, tokens = random_params(rng, config), random_tokens(rng, (1, 6))

    def kernels(attention: str | None, **more: Any) -> set[tuple[str, bool]]:
        taken.clear()
        jax.eval_shape(lambda: decoder(config, attention=attention)(params, tokens, **more))
        return set(taken)

    assert kernels(None) == kernels("xla") == {("xla", False)}
    assert kernels("cudnn") == {("cudnn", False)}
    assert kernels("cudnn", segments=jnp.ones((1, 6), jnp.int32)) == {("cudnn", True)}
    assert kernels("cudnn", cache=init_cache(config, 1, 6)) == {("xla", True)}


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"attention = 'cuddn': wanted one of 'xla', 'cudnn' \(did you mean 'cudnn'"):
        decoder(config_of("plain"), attention="cuddn")
    with pytest.raises(ConfigError, match="the model's attention is softcapped"):
        decoder(config_of("capped"), attention="cudnn")
