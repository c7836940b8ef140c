"""The command eval: how a language model of a folder does on a file of examples, with adapters and without."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jlora.cli._done import Done, add_output_options, plain_fields
from jlora.cli._language import (
    adapted_models,
    add_model_options,
    add_out_options,
    lines_written,
    read_adapters,
    read_language,
)
from jlora.errors import ConfigError

if TYPE_CHECKING:
    from jlora.recipes import LoadedModel

_DESCRIPTION = """\
Loss, perplexity and token accuracy of a language model over the tokens that count of a file of JSON lines (prompt and
completion, messages, or text), and of prompts with completions how many are answered exactly, greedily; of the model
alone, and with each of the adapters. In Python: jlora.recipes.load_language_model, read_language_test and evaluate.
"""
_EXAMPLES = """\
examples:
  jlora eval model --data test.jsonl
  jlora eval model --adapter runs/mine/adapter --data test.jsonl --exact-match 200 --out answers.jsonl

--out gets a line for each prompt that is answered, with prompt, completion, answer, match, tokens, stopped and adapter.
"""


def add_eval_command(commands: Any) -> None:
    """Adds eval to the parser's commands."""
    parser = commands.add_parser(
        "eval",
        help="how a language model does on a file, with adapters and without",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser, "with several each is tested")
    parser.add_argument("--data", required=True, metavar="FILE", help="a file of JSON lines")
    parser.add_argument("--length", type=int, help="cut examples to so many tokens (all that the model can have)")
    parser.add_argument("--template", action="store_true", help="texts of prompts are what a user says")
    parser.add_argument(
        "--exact-match", type=int, default=100, metavar="N", help="how many prompts are answered; 0 for none (100)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="of such an answer (what the longest completion needs)"
    )
    add_out_options(parser)
    add_output_options(
        parser,
        '"results", a list of adapter (null for the model alone), loss, perplexity, token_accuracy and exact_match',
    )
    parser.set_defaults(run=_run, command="eval")


def _run(arguments: argparse.Namespace) -> Done:
    from jlora.recipes import base_of, evaluate, is_match, read_language_test

    with lines_written(arguments.out, arguments.force) as write:
        language = read_language(arguments)
        test = read_language_test(
            arguments.data,
            language,
            length=arguments.length,
            template=arguments.template,
            exact_match=arguments.exact_match,
            max_new_tokens=arguments.max_new_tokens,
        )
        if arguments.out is not None and not test.questions:
            raise ConfigError(f"--out is for the answers: {arguments.data} has no prompts with completions to answer")
        found = read_adapters(arguments, language)
        base = base_of(language)
        results: list[Mapping[str, Any]] = []

        def tested(model: LoadedModel) -> None:
            metrics, answers = evaluate(model, test)
            results.append({"adapter": model.name, **metrics})
            for question, reply in zip(test.questions, answers, strict=True):
                own = {"completion": question.completion, "match": is_match(question, reply)}
                write(plain_fields(reply) | own)

        tested(base)
        for model in adapted_models(base, found, arguments.merged):
            tested(model)
    return Done(f"{test}\n{_table(results)}", {"results": results})


def _table(results: list[Mapping[str, Any]]) -> str:
    """A line for each model."""
    from jlora.recipes import shown_metric
    from jlora.tables import text_table

    names = [name for name in results[0] if name != "adapter"]
    rows = []
    for result in results:
        metrics = [shown_metric(name, result[name]) for name in names]
        rows.append((result["adapter"] or "base", *metrics))
    return text_table(("", *(name.replace("_", " ") for name in names)), rows, left=1)
