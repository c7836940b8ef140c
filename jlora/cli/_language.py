"""The commands generate and eval: a language model of a folder, asked and tested, with adapters or without."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from jlora.cli._done import Done, add_output_options, plain_fields
from jlora.cli._print import show
from jlora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from jlora.recipes import LoadedModel, Question, Reply, Sampling

_DTYPES = ("float32", "bfloat16", "float16")
_GENERATE = """\
Goes on from prompts with a language model in a folder of Hugging Face's layout (config.json, safetensors,
tokenizer.json), with adapters or without, and prints the tokens as they come.
In Python: jlora.recipes.load_language_model and replies.
"""
_GENERATE_END = """\
examples:
  jlora generate model --prompt "The capital of France is"
  jlora generate model --adapter runs/mine/adapter --template --prompt "What is LoRA?" --temperature 0.7 --top-p 0.9
  jlora generate model --adapter runs/mine/adapter --chat
  jlora generate model --file prompts.jsonl --out answers.jsonl

--file has a line of JSON for each prompt: {"prompt": "a text"}, or messages for the chat template, as
{"prompt": [{"role": "user", "content": "..."}]} or {"messages": [...]}. --out gets a line for each answer, with prompt,
answer, tokens and stopped, whether the model ended it.
"""
_EVAL = """\
Loss, perplexity and token accuracy of a language model on a file of JSON lines (prompt and completion, messages, or
text), and of prompts with completions how many are answered exactly; with adapters also those of the model without
them. In Python: jlora.recipes.load_language_model and evaluate.
"""


def add_language_commands(commands: Any) -> None:
    """Adds generate and eval to the parser's commands."""
    generate = commands.add_parser(
        "generate",
        help="what a language model says to prompts, with adapters or without",
        description=_GENERATE,
        epilog=_GENERATE_END,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _model(generate)
    what = generate.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--prompt", action="append", metavar="TEXT", help="what to go on from; may be given several times"
    )
    what.add_argument("--file", metavar="PROMPTS", help="a file of JSON lines with prompts, answered many at once")
    what.add_argument("--chat", action="store_true", help="a conversation: each line of standard input is answered")
    generate.add_argument("--template", action="store_true", help="prompts are what a user says, for the chat template")
    generate.add_argument("--system", metavar="TEXT", help="with --chat: the system's message at its beginning")
    generate.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of an answer (256)")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (0)")
    generate.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    generate.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest that have P together")
    generate.add_argument("--seed", type=int, default=0, help="of drawing (0)")
    generate.add_argument("--out", "-o", metavar="FILE", help="write the answers as JSON lines")
    generate.add_argument("--force", action="store_true", help="replace the file where it is there")
    add_output_options(generate, '"answers", a list of prompt, answer, tokens and stopped')
    generate.set_defaults(run=_run_generate, command="generate")

    evaluate = commands.add_parser(
        "eval",
        help="how a language model does on a file, with adapters and without",
        description=_EVAL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _model(evaluate)
    evaluate.add_argument("--data", required=True, metavar="FILE", help="a file of JSON lines")
    evaluate.add_argument("--length", type=int, help="cut examples to so many tokens (all that the model can have)")
    evaluate.add_argument("--template", action="store_true", help="texts of prompts are what a user says")
    evaluate.add_argument(
        "--exact-match", type=int, default=100, metavar="N", help="how many prompts are answered; 0 for none (100)"
    )
    evaluate.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="of such an answer (64)")
    add_output_options(evaluate, '"results", by "base" and "adapted", each with loss, perplexity, token_accuracy, ...')
    evaluate.set_defaults(run=_run_eval, command="eval")


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="the folder of the model")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="ADAPTER",
        help="a folder of adapters, PEFT's or jlora's own; the updates of several are added",
    )
    parser.add_argument("--merged", action="store_true", help="add the adapters to the weights first")
    parser.add_argument("--dtype", choices=_DTYPES, help="of the weights; by default as they are in the folder")


def _run_generate(arguments: argparse.Namespace) -> Done:
    from jlora.recipes import Question, Sampling, load_language_model, read_prompts, replies

    if arguments.system is not None and not arguments.chat:
        raise ConfigError("--system is the beginning of a conversation: give --chat")
    if arguments.merged and not arguments.adapter:
        raise ConfigError("--merged adds adapters to the weights: give --adapter")
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    sampling = Sampling(**{name: getattr(arguments, name) for name in names})
    questions: list[Question] = []
    if arguments.file is not None:
        questions = read_prompts(arguments.file, chat=arguments.template)
    elif arguments.prompt:
        turns = [[{"role": "user", "content": text}] if arguments.template else text for text in arguments.prompt]
        questions = [Question(turn, "") for turn in turns]
    _check_out(arguments.out, arguments.force)
    loaded = load_language_model(arguments.folder, arguments.adapter, merged=arguments.merged, dtype=arguments.dtype)
    is_quiet = arguments.json or arguments.quiet
    on_text = None if is_quiet or arguments.file is not None else _stream
    if arguments.chat:
        found = _talk(loaded, sampling, arguments.system, on_text)
    else:
        found = replies(loaded, questions, sampling, on_text=on_text)
    done = []
    with _opened(arguments.out) as out:
        for reply in found:
            done.append(plain_fields(reply))
            if out is not None:
                out.write(json.dumps(done[-1]) + "\n")
                out.flush()
            if on_text is not None:
                show("")
            elif not is_quiet and out is None:
                show(json.dumps(done[-1]))
    return Done("" if out is None else f"{len(done):,} answers: {arguments.out}", {"answers": done})


def _talk(
    loaded: LoadedModel, sampling: Sampling, system: str | None, on_text: Callable[[str], object] | None
) -> Iterator[Reply]:
    """Answers to the lines of standard input, each with all that was said before; an empty line is passed over."""
    from jlora.recipes import Question, replies

    said: list[Mapping[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            continue
        said.append({"role": "user", "content": line.strip()})
        for reply in replies(loaded, [Question(list(said), "")], sampling, on_text=on_text):
            said.append({"role": "assistant", "content": reply.answer})
            yield reply


def _stream(text: str) -> None:
    show(text, end="")


def _check_out(path: str | None, force: bool) -> None:
    if path is not None and Path(path).exists() and not (force and Path(path).is_file()):
        raise DataError(f"{path}: is there already; --force replaces a file")


@contextlib.contextmanager
def _opened(path: str | None) -> Iterator[TextIO | None]:
    """The file for answers: each is in it as soon as it is there."""
    if path is None:
        yield None
        return
    try:
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from None
    with file:
        yield file


def _run_eval(arguments: argparse.Namespace) -> Done:
    from jlora.recipes import evaluate, load_language_model

    if arguments.merged and not arguments.adapter:
        raise ConfigError("--merged adds adapters to the weights: give --adapter")

    def tested(loaded: LoadedModel) -> tuple[dict[str, float], str]:
        return evaluate(
            loaded,
            arguments.data,
            length=arguments.length,
            template=arguments.template,
            exact_match=arguments.exact_match,
            max_new_tokens=arguments.max_new_tokens,
        )

    loaded = load_language_model(arguments.folder, arguments.adapter, merged=arguments.merged, dtype=arguments.dtype)
    found, read = tested(loaded)
    results = {"base": found}
    if arguments.adapter:
        base = load_language_model(arguments.folder, dtype=arguments.dtype) if arguments.merged else loaded.base()
        results = {"base": tested(base)[0], "adapted": found}
    return Done(f"{read}\n{_table(results)}", {"results": results})


def _table(results: Mapping[str, Mapping[str, float]]) -> str:
    from jlora.recipes import shown_metric
    from jlora.tables import text_table

    names = list(next(iter(results.values())))
    rows = [(name, *(shown_metric(metric, found[metric]) for metric in names)) for name, found in results.items()]
    return text_table(("", *(name.replace("_", " ") for name in names)), rows, left=1)
