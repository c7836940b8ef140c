"""The model card of an adapter: what was trained, on what, and how it does."""

import json
from collections.abc import Sequence
from typing import Any

from jlora.config import LoraConfig
from jlora.recipes._config import JobConfig
from jlora.recipes._language import LanguageModel
from jlora.recipes._results import Result


def model_card(job: JobConfig, language: LanguageModel, config: LoraConfig, results: Sequence[Result]) -> str:
    """A README.md with what is known, and nothing else.

    Args:
      job: what was run.
      language: the base.
      config: of the adapters.
      results: of the frozen base and of the adapters.
    """
    base = str(language.folder)
    head = ["---", f"base_model: {_quoted(base)}", "library_name: peft", "pipeline_tag: text-generation"]
    head += ["tags: [lora, jlora]", "---", ""]
    train, optimizer = job.train, job.optimizer
    clip = f", gradients clipped to a norm of {optimizer.clip_norm:g}" if optimizer.clip_norm else ""
    body = [
        "# A LoRA adapter",
        "",
        f"Of the model `{base}` ({language.config.family}), trained with jlora and written in PEFT's format.",
        "",
        "## What was trained",
        "",
        f"- adapted: {', '.join(f'`{pattern}`' for pattern in config.target_modules)}",
        f"- rank {config.rank}, alpha {config.alpha:g}, scaling {config.scaling}, dropout {config.dropout:g}",
        f"- trained parameters: {results[-1].parameters:,}",
        f"- base in {language.dtype or 'the dtype of its folder'}",
        "",
        "## On what, and how",
        "",
        f"- data: `{job.data.function}`, {_options(job.data.options)}",
        f"- {train.steps:,} steps of {train.batch_size:,} rows, in {train.accumulate:,} parts each, seed {train.seed}",
        f"- loss: `{train.loss}`",
        f"- {optimizer.name}, learning rate {optimizer.learning_rate:g}, {optimizer.schedule} schedule after "
        f"{optimizer.warmup_steps:,} steps of warm-up, weight decay {optimizer.weight_decay:g}{clip}",
        "",
        "## How it does on the evaluation data",
        "",
        *_table(results),
        "",
        "## How to load it",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({base!r})",
        'model = PeftModel.from_pretrained(base, "this folder")',
        "```",
    ]
    return "\n".join([*head, *body, ""])


def _quoted(text: str) -> str:
    """A string that YAML reads as it is."""
    return json.dumps(text)


def _options(options: Any) -> str:
    return ", ".join(f"{name} = `{value}`" for name, value in options.items()) or "with its defaults"


def _table(results: Sequence[Result]) -> list[str]:
    names = list(results[0].metrics)
    rows = [["", *(name.replace("_", " ") for name in names)], ["---"] * (len(names) + 1)]
    for result in results:
        values = [result.metrics.get(name) for name in names]
        rows.append([result.name, *("" if value is None else f"{value:.4g}" for value in values)])
    return [f"| {' | '.join(row)} |" for row in rows]
