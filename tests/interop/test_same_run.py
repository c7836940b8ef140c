"""A run of jlora is that of PEFT: from the same adapters, on the same batches, the same loss at every step."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.models import decoder, read_adapter, read_config, read_params
from jlora.train import Mean, init_state, make_train_step
from tests.interop.models import peft, quiet, torch, transformers

STEPS, ROWS, LENGTH, VOCABULARY, RATE, DECAY, CLIP = 50, 4, 11, 53, 5e-3, 0.1, 0.3
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SIZES, head_dim=6, tie_word_embeddings=True)
    ),
}
ADAPTATIONS: dict[str, dict[str, Any]] = {"plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
OPTIONS: dict[str, dict[str, Any]] = {"": {}, "accumulated": {"accumulate": 2}, "clipped": {"clip_norm": CLIP}}
RUNS = [
    ("llama", "plain", ""),
    ("llama", "rslora", "accumulated"),
    ("llama", "dora", "clipped"),
    ("qwen3", "plain", "clipped"),
    ("qwen3", "dora", "accumulated"),
]


@pytest.mark.parametrize(("family", "adaptation", "option"), RUNS)
def test_losses_at_every_step_and_adapters_at_the_end(
    family: str, adaptation: str, option: str, tmp_path: Path
) -> None:
    batches = _batches()
    losses_of_peft = _run_of_peft(family, adaptation, option, batches, tmp_path)
    losses, adapters, config = _run_of_jlora(option, batches, tmp_path)

    np.testing.assert_allclose(losses, losses_of_peft, rtol=1e-4)
    assert np.mean(losses[-5:]) < 0.97 * np.mean(losses[:5])  # it learned
    wanted, wanted_config = read_adapter(tmp_path / "end", read_config(tmp_path / "base"))
    assert config == wanted_config
    found_leaves, wanted_leaves = jax.tree.leaves(adapters), jax.tree.leaves(wanted)
    assert len(found_leaves) == len(wanted_leaves) >= 2 * 7
    for found, expected in zip(found_leaves, wanted_leaves, strict=True):
        assert np.linalg.norm(found - expected) <= 1e-3 * np.linalg.norm(expected)


def _batches() -> list[dict[str, np.ndarray]]:
    """Rows that follow a rule, so that there is something to learn; in some rows hardly any tokens count."""
    rng = np.random.default_rng(3)
    batches = []
    for _ in range(STEPS):
        first = rng.integers(0, VOCABULARY, (ROWS, 1))
        tokens = (first + 7 * np.arange(LENGTH + 1)) % VOCABULARY
        counts = rng.random((ROWS, LENGTH)) < rng.random((ROWS, 1))
        counts[:, 0] = True
        batches.append({"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "counts": counts.astype(np.float32)})
    return batches


def _run_of_peft(family: str, adaptation: str, option: str, batches: list[Any], folder: Path) -> list[float]:
    """The losses; the base and the adapters at the start and at the end are left in the folder."""
    torch.manual_seed(0)
    base = MODELS[family]()
    base.save_pretrained(folder / "base")
    chosen = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM", **ADAPTATIONS[adaptation]
    )
    with quiet():
        model = peft.get_peft_model(base, chosen)
    model.save_pretrained(folder / "start")
    trained = [leaf for leaf in model.parameters() if leaf.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE, weight_decay=DECAY)
    parts = OPTIONS[option].get("accumulate", 1)
    losses = []
    for batch in batches:
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        optimizer.zero_grad()
        total = 0.0
        for part in range(parts):
            rows = {name: tensor[part::parts] for name, tensor in tensors.items()}
            logits = model(input_ids=rows["tokens"]).logits
            each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows["labels"], reduction="none")
            loss = (each * rows["counts"]).sum() / tensors["counts"].sum()  # of all tokens of the step that count
            loss.backward()
            total += loss.item()
        if option == "clipped":
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        losses.append(total)
    model.save_pretrained(folder / "end")
    return losses


def _run_of_jlora(option: str, batches: list[Any], folder: Path) -> tuple[list[float], Any, jlora.LoraConfig]:
    model = read_config(folder / "base")
    params = read_params(folder / "base")
    adapters, config = read_adapter(folder / "start", model)
    adapted = jlora.lora(decoder(model), config, strict=True)

    def loss(adapters: Any, params: Any, batch: Any, key: jax.Array) -> Mean:
        logits = adapted(params, adapters, batch["tokens"])
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return Mean((each * batch["counts"]).sum(), batch["counts"].sum())

    optimizer = optax.adamw(RATE, weight_decay=DECAY)
    step = make_train_step(loss, optimizer, **OPTIONS[option])
    state = init_state(adapters, optimizer)
    losses = []
    for batch in batches:
        state, metrics = step(state, params, jax.tree.map(jnp.asarray, batch))
        losses.append(float(metrics["loss"]))
    return losses, state.trained, config
