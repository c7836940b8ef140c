"""`python -m benchmarks.language`: a train step of a language model with LoRA, in jlora and in PEFT on torch.

The model has the shape of SmolLM2-135M (a Llama of 30 layers of width 576, 9 heads in 3 groups, 49,152 tokens, a tied
head) and random weights, which cost the same as trained ones; rank 8 at all linear layers, AdamW, one batch of tokens
again and again. Each form runs in a process of its own, which has a peak of memory and a start of its own; the steps
take turns, so that a busy machine slows all alike.

The columns: the median step over that of `floor`, the same model of jlora in which the norms alone are trained:
forward, and backward for activations. Tokens in a second. The peak of the process's memory, or of the GPU's. Seconds
until the first step is done, from a cold start: import, weights, trace, compile; `again` is a second start with what
the first has compiled (jlora: a compilation cache on the disk). The seconds of tracing and compiling alone.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.workers import Worker, serve

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
RANK = 8
FORMS = {
    "floor": "jlora's model, norms alone trained",
    "floor_remat": "the same, layers computed again in the backward pass",
    "jlora": "jlora.lora of the model",
    "jlora_remat": "the same, layers computed again in the backward pass",
    "peft": "PEFT on torch",
    "peft_remat": "the same with gradient checkpointing",
}
Run = Callable[[], None]


def start_jlora(form: str, sizes: argparse.Namespace) -> tuple[Run, dict[str, float]]:
    """The step, and the seconds of tracing and compiling it."""
    import jax
    import jax.numpy as jnp
    import optax

    import jlora
    from jlora.models import decoder, init_params, read_config
    from jlora.train import init_state, make_train_step

    model = read_config(sizes.folder)
    fn = decoder(model, remat="layer" if form.endswith("remat") else None)
    params = init_params(jax.random.key(0), model, jnp.dtype(sizes.dtype))
    tokens = jax.random.randint(jax.random.key(1), (sizes.batch, sizes.length + 1), 0, model.vocab_size)
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}

    def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    if form.startswith("floor"):
        layers = params["model"]["layers"]
        names = ("input_layernorm", "post_attention_layernorm")
        trained: Any = {name: layers[name] for name in names}

        def loss(norms: Any, params: Any, batch: Any, key: Any) -> jax.Array:
            model_params = {**params, "model": {**params["model"], "layers": {**params["model"]["layers"], **norms}}}
            return cross_entropy(fn(model_params, batch["tokens"]), batch["labels"])

    else:
        config = jlora.LoraConfig(rank=RANK, alpha=2 * RANK, target_modules=("model/layers/**",))
        adapted, trained, *_ = jlora.adapt(fn, config, params, batch["tokens"])

        def loss(adapters: Any, params: Any, batch: Any, key: Any) -> jax.Array:
            return cross_entropy(adapted(params, adapters, batch["tokens"]), batch["labels"])

    optimizer = optax.adamw(1e-4)
    step, state = make_train_step(loss, optimizer), init_state(trained, optimizer)
    began = time.perf_counter()
    program = step.lower(state, params, batch).compile()  # type: ignore[attr-defined]
    seconds = time.perf_counter() - began

    def run() -> None:
        nonlocal state
        state, metrics = program(state, params, batch)
        jax.block_until_ready((state, metrics))

    return run, {"compile": seconds}


def start_peft(form: str, sizes: argparse.Namespace) -> tuple[Run, dict[str, float]]:
    import peft
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = transformers.AutoConfig.from_pretrained(sizes.folder)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, sizes.dtype))
    if form.endswith("remat"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adapters = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, adapters).train()
    optimizer = torch.optim.AdamW([leaf for leaf in model.parameters() if leaf.requires_grad], 1e-4)
    tokens = torch.randint(0, config.vocab_size, (sizes.batch, sizes.length + 1), device=device)

    def run() -> None:
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()  # waits for a GPU

    return run, {}


def work(form: str, sizes: argparse.Namespace) -> None:
    """The process of one form: a line in is a step, a line out what it took."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    start = start_peft if form.startswith("peft") else start_jlora
    run, found = start(form, sizes)
    run()
    serve(run, found, torch=form.startswith("peft"))


def table(workers: dict[str, Worker], again: dict[str, float], sizes: argparse.Namespace) -> str:
    from jlora.tables import text_table

    floor = statistics.median(workers["floor"].steps) if "floor" in workers else None
    rows = []
    for form, worker in workers.items():
        seconds = statistics.median(worker.steps)
        compiled = worker.found.get("compile")
        rows.append(
            (
                form,
                "-" if floor is None else f"{seconds / floor:.2f}",
                f"{1e3 * seconds:,.0f} ms",
                f"{sizes.batch * sizes.length / seconds:,.0f}",
                f"{worker.found['peak']:,.0f}",
                f"{worker.found['start']:.1f}",
                f"{again[form]:.1f}" if form in again else "-",
                "-" if compiled is None else f"{compiled:.1f}",
            )
        )
    header = ("form", "step / floor", "step", "tokens/s", "peak MiB", "first step s", "again s", "compile s")
    return text_table(header, rows)


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.language",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--forms", default=",".join(FORMS), metavar="NAME,...", help=f"of {', '.join(FORMS)}")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the base")
    parser.add_argument("--repeats", type=int, default=10, help="rounds of steps (10)")
    parser.add_argument("--width", type=int, default=SHAPE["hidden_size"], help="of the model; heads stay 64 wide")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    sizes = parser.parse_args()
    if sizes.work:
        work(sizes.work, sizes)
        return
    forms = [form.strip() for form in sizes.forms.split(",")]
    if unknown := [form for form in forms if form not in FORMS]:
        parser.error(f"--forms: unknown {', '.join(unknown)}; known are {', '.join(FORMS)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        heads = sizes.width // 64
        shape = SHAPE | {"num_hidden_layers": sizes.layers, "hidden_size": sizes.width, "num_attention_heads": heads}
        shape |= {"num_key_value_heads": heads // 3, "intermediate_size": sizes.width * 8 // 3}
        (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
        words = ["--folder", temporary, "--batch", str(sizes.batch), "--length", str(sizes.length)]
        words += ["--dtype", sizes.dtype]
        workers = {form: Worker("benchmarks.language", form, words, folder / "cache" / form) for form in forms}
        for _ in range(sizes.repeats):
            for worker in workers.values():
                worker.step()
        for worker in workers.values():
            worker.end()
        again = {}
        for form in forms:
            second = Worker("benchmarks.language", form, words, folder / "cache" / form)
            again[form] = second.found["start"]
            second.end()
        print(table(workers, again, sizes))


if __name__ == "__main__":
    main()
