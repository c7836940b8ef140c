"""Answers: the same with a cache as without one, the same in any batch, from the distribution that was asked for."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.adapter import is_adapter
from jlora.errors import ConfigError, DataError
from jlora.models import decoder, filtered, generate
from tests.models.folders import run_program
from tests.models.sizes import KINDS, config_of, random_params

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3], [12, 30, 31], [20, 21, 22, 23, 24]]


def model_of(kind: str = "plain", **changes: Any) -> tuple[Any, Callable[..., Any], Any]:
    config = config_of(kind, **changes)
    return config, decoder(config), random_params(np.random.default_rng(1), config)


def greedy(fn: Callable[..., Any], params: Any, prompt: list[int], count: int) -> list[int]:
    """The most likely tokens, each from the whole row anew."""
    run = jax.jit(fn)
    row = np.zeros((1, 24), np.int32)
    row[0, : len(prompt)] = prompt
    for place in range(len(prompt), len(prompt) + count):
        row[0, place] = int(np.argmax(run(params, row)[0, place - 1]))
    return [int(token) for token in row[0, len(prompt) : len(prompt) + count]]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_as_without_a_cache(kind: str) -> None:
    config, fn, params = model_of(kind)
    answers = generate(fn, params, PROMPTS, config=config, max_new_tokens=9)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.tokens.tolist() == greedy(fn, params, prompt, 9)
        assert answer.tokens.dtype == np.int32
        assert not answer.stopped


def test_adapters_and_merged_params_answer_alike() -> None:
    config, fn, params = model_of()
    lora_config = jlora.LoraConfig(rank=2, alpha=6, target_modules=("model/layers/**/*_proj", "lm_head"))
    adapted, adapters, lora_config, _ = jlora.adapt(fn, lora_config, params, jnp.zeros((1, 3), jnp.int32))
    rng = np.random.default_rng(4)
    adapters = jax.tree.map(
        lambda entry: entry | {"B": jnp.asarray(rng.standard_normal(entry["B"].shape), jnp.float32)},
        adapters,
        is_leaf=is_adapter,
    )
    options: dict[str, Any] = {"config": config, "max_new_tokens": 9}
    unmerged = generate(adapted, params, PROMPTS, adapters=adapters, **options)
    as_one = generate(lambda both, *args, **more: adapted(*both, *args, **more), (params, adapters), PROMPTS, **options)
    assert [a.tokens.tolist() for a in as_one] == [a.tokens.tolist() for a in unmerged]
    merged = generate(fn, jlora.merge_params(params, adapters, lora_config), PROMPTS, **options)
    base = generate(fn, params, PROMPTS, **options)
    assert [a.tokens.tolist() for a in unmerged] == [a.tokens.tolist() for a in merged]
    assert [a.tokens.tolist() for a in unmerged] != [a.tokens.tolist() for a in base]


def test_two_programs_for_a_bucket() -> None:
    config, fn, params = model_of(max_position_embeddings=100)
    traced: list[tuple[int, ...]] = []

    def counted(params: Any, tokens: jax.Array, **options: Any) -> Any:
        traced.append((*tokens.shape, options["cache"].slots))
        return fn(params, tokens, **options)

    def run(length: int, new: int, **options: Any) -> None:
        generate(counted, params, [[4] * length, [5]], config=config, max_new_tokens=new, **options)

    for length, new in ((3, 4), (9, 20), (20, 12), (1, 31)):
        run(length, new)
    assert traced == [(2, 32, 32), (2, 1, 32)]
    run(20, 13)
    assert traced[2:] == [(2, 32, 64), (2, 1, 64)]
    run(33, 67)  # the model has no more positions
    assert traced[4:] == [(2, 64, 100), (2, 1, 100)]
    drawn = {"key": jax.random.key(0), "top_k": 5}
    for seed, (temperature, top_p) in enumerate(((0.5, 0.9), (1.5, 0.4))):
        run(3, 4, **drawn | {"key": jax.random.key(seed)}, temperature=temperature, top_p=top_p)
    assert len(traced) == 8


def test_answers_end_with_a_stop_token() -> None:
    config, fn, params = model_of()
    whole = [answer.tokens.tolist() for answer in generate(fn, params, PROMPTS, config=config, max_new_tokens=9)]
    stop = [whole[0][4], whole[1][2]]
    seen: list[tuple[int, list[int]]] = []
    answers = generate(
        fn,
        params,
        PROMPTS,
        config=config,
        max_new_tokens=9,
        stop=stop,
        on_token=lambda step, ids: seen.append((step, ids.tolist())),
    )
    for answer, plain in zip(answers, whole, strict=True):
        ends = [place for place, token in enumerate(plain) if token in stop]
        assert answer.tokens.tolist() == plain[: ends[0] if ends else 9]
        assert answer.stopped == bool(ends)
    assert [step for step, _ in seen] == list(range(len(seen)))
    for row, answer in enumerate(answers):
        assert [ids[row] for _, ids in seen if ids[row] >= 0] == answer.tokens.tolist()

    every = generate(fn, params, PROMPTS[:1], config=config, max_new_tokens=9, stop=[whole[0][0]])
    assert every[0].tokens.shape == (0,)
    assert every[0].stopped


def test_drawn_answers_depend_on_the_key_and_the_row_alone() -> None:
    config, fn, params = model_of()
    options: dict[str, Any] = {"config": config, "temperature": 0.9, "top_k": 20, "top_p": 0.95}
    run = lambda prompts, new, seed: [  # noqa: E731
        answer.tokens.tolist()
        for answer in generate(fn, params, prompts, max_new_tokens=new, key=jax.random.key(seed), **options)
    ]
    four = run(PROMPTS, 9, 0)
    assert four == run(PROMPTS, 9, 0)
    assert four != run(PROMPTS, 9, 1)
    assert four[:2] == run(PROMPTS[:2], 9, 0)  # in another batch
    assert [row[:5] for row in four] == run(PROMPTS, 5, 0)
    assert [row[:9] for row in run(PROMPTS, 40, 0)] == four  # in another bucket
    same = run([PROMPTS[0]] * 3, 9, 0)
    assert same[0] != same[1]


def test_params_that_are_spread_over_devices() -> None:
    program = """
        import jax
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        import numpy as np
        from jlora.models import decoder, generate
        from tests.models.sizes import config_of, random_params

        config = config_of("plain", vocab_size=38)
        params, fn = random_params(np.random.default_rng(1), config), decoder(config)
        mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))

        def spread(path, array):
            name = jax.tree_util.keystr(path)
            axes = (None, "model") if "proj" in name else ("model",) if "embed" in name or "lm_head" in name else ()
            return jax.device_put(array, NamedSharding(mesh, P(*axes)))

        options = {"config": config, "max_new_tokens": 9, "temperature": 0.7, "key": jax.random.key(3)}
        prompts = [[5, 6, 7], [8]]
        one = generate(fn, params, prompts, **options)
        two = generate(fn, jax.tree_util.tree_map_with_path(spread, params), prompts, **options)
        print([answer.tokens.tolist() for answer in one] == [answer.tokens.tolist() for answer in two])
    """
    assert run_program(program, flags="--xla_force_host_platform_device_count=2") == "True\n"


def test_drawn_tokens_have_the_distribution() -> None:
    config, fn, params = model_of(vocab_size=11)
    prompt, count = [3, 4, 5], 3000
    key, settings = jax.random.key(2), {"temperature": 3.0, "top_k": 7, "top_p": 0.9}
    answers = generate(fn, params, [prompt] * count, config=config, max_new_tokens=1, key=key, **settings)
    found = np.bincount([int(answer.tokens[0]) for answer in answers], minlength=11) / count
    logits = filtered(fn(params, jnp.asarray([prompt]))[0, -1], **settings)
    wanted = np.asarray(jax.nn.softmax(logits))
    assert 2 <= np.sum(wanted > 0) < 8
    assert np.all((found > 0) <= (wanted > 0))
    np.testing.assert_allclose(found, wanted, atol=4 * np.sqrt(0.25 / count))


def reference(logits: np.ndarray[Any, Any], temperature: float, top_k: int | None, top_p: float | None) -> Any:
    """The probabilities, token by token in float64."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    kept = order if top_k is None else order[:top_k]
    shares = np.exp(scaled[kept] - scaled.max())
    shares /= shares.sum()
    if top_p is not None:
        total, number = 0.0, 0
        while number == 0 or (number < len(kept) and total < top_p):
            total += shares[number]
            number += 1
        kept, shares = kept[:number], shares[:number] / shares[:number].sum()
    found = np.zeros(len(logits))
    found[kept] = shares
    return found


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [None, 1, 5, 100])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.3, 0.95, 1.0])
def test_filters(temperature: float, top_k: int | None, top_p: float | None) -> None:
    logits = 3 * np.random.default_rng(5).standard_normal((4, 41)).astype(np.float32)
    found = jax.nn.softmax(filtered(jnp.asarray(logits), temperature, top_k, top_p))
    wanted = np.stack([reference(row, temperature, top_k, top_p) for row in logits])
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-7)


def test_tokens_as_likely_as_the_last_are_kept() -> None:
    logits = jnp.asarray([0.0, 2.0, 1.0, 1.0, 0.0])
    assert jnp.isfinite(filtered(logits, top_k=2)).tolist() == [False, True, True, True, False]


def test_refused_settings_and_prompts() -> None:
    config, fn, params = model_of()

    def run(prompts: Any = ((3, 4),), **options: Any) -> None:
        generate(fn, params, prompts, config=config, **{"max_new_tokens": 5} | options)

    assert generate(fn, params, [], config=config, max_new_tokens=3) == []
    for options, match in (
        ({"max_new_tokens": 0}, "max_new_tokens = 0: wanted a whole number of at least 1"),
        ({"temperature": -1.0}, r"temperature = -1\.0: wanted"),
        ({"temperature": 1.0}, r"temperature = 1\.0 draws tokens: give a key"),
        ({"top_k": 0}, "top_k = 0: wanted a whole number of at least 1"),
        ({"top_p": 0.0}, r"top_p = 0\.0: wanted 0 < top_p <= 1"),
        ({"top_p": 1.5}, r"top_p = 1\.5: wanted 0 < top_p <= 1"),
    ):
        with pytest.raises(ConfigError, match=match):
            run(**options)
    with pytest.raises(DataError) as caught:
        run([[3] * 60, [], [37], [4, -1], [5] * 64, [6]])
    message = str(caught.value)
    for part in (
        "prompt 0: 60 tokens and 5 new ones, and the model has 64 positions: wanted max_new_tokens <= 4",
        "prompt 1: has no tokens",
        "prompt 2: token 37, and the model has 37",
        "prompt 3: token -1",
        "prompt 4: 64 tokens and 5 new ones, and the model has 64 positions: wanted a shorter prompt",
    ):
        assert part in message
    assert "prompt 5" not in message
    run([[3] * 59])  # the last position
