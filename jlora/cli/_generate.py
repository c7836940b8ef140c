"""The command generate: what a language model of a folder says, with adapters or without."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jlora.cli._done import REFUSED, Done, add_output_options, plain_fields
from jlora.cli._language import (
    adapted_models,
    add_model_options,
    add_out_options,
    lines_written,
    read_adapters,
    read_language,
)
from jlora.cli._print import say, show
from jlora.cli._signals import exit_code
from jlora.errors import ConfigError, DataError, shortened

if TYPE_CHECKING:
    from jlora.recipes import LanguageModel, LoadedModel, Question, Reply, Sampling

_DESCRIPTION = """\
Goes on from prompts with a language model in a folder of Hugging Face's layout (config.json, safetensors,
tokenizer.json), with adapters or without, and prints the tokens as they come.
In Python: jlora.recipes.load_language_model and replies.
"""
_EXAMPLES = """\
examples:
  jlora generate model --prompt "The capital of France is"
  jlora generate model --adapter runs/mine/adapter --template --prompt "What is LoRA?" --temperature 0.7 --top-p 0.9
  jlora generate model --adapter runs/mine/adapter --chat
  jlora generate model --file prompts.jsonl --out answers.jsonl

--file has a line of JSON for each prompt: {"prompt": "a text"}, or messages for the chat template, as
{"prompt": [{"role": "user", "content": "..."}]} or {"messages": [...]}. --out gets a line for each answer, with prompt,
answer, tokens, stopped, whether the model ended it, and adapter; it is there when all are, and without it --file prints
the same lines.

With several --adapter each answers all prompts, one after the other; jlora combine makes one of several. --chat ends
with the input (Ctrl-D) or with Ctrl-C.
"""


class _Unheard(Exception):  # noqa: N818
    """Nobody listens any more."""


def add_generate_command(commands: Any) -> None:
    """Adds generate to the parser's commands."""
    parser = commands.add_parser(
        "generate",
        help="what a language model says to prompts, with adapters or without",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser, "with several each answers in turn")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--prompt", action="append", metavar="TEXT", help="what to go on from; may be given several times"
    )
    what.add_argument("--file", metavar="PROMPTS", help="a file of JSON lines with prompts, answered many at once")
    what.add_argument("--chat", action="store_true", help="a conversation: each line of standard input is answered")
    parser.add_argument("--template", action="store_true", help="texts are what a user says, for the chat template")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system's message at its beginning")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="of an answer (256, or what the model has left)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (0)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest that have P together")
    parser.add_argument("--seed", type=int, default=0, help="of drawing (0)")
    add_out_options(parser)
    add_output_options(parser, '"answers", a list of prompt, answer, tokens, stopped and adapter')
    parser.set_defaults(run=_run, command="generate")


def _run(arguments: argparse.Namespace) -> Done:
    from jlora.recipes import Sampling, base_of, check_questions

    if arguments.system is not None and not arguments.chat:
        raise ConfigError("--system is the beginning of a conversation: give --chat")
    if arguments.chat and len(arguments.adapter) > 1:
        raise ConfigError("--chat is a conversation with one model: give one --adapter, or make one by jlora combine")
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    sampling = Sampling(**{name: getattr(arguments, name) for name in names})
    with lines_written(arguments.out, arguments.force) as write:
        language = read_language(arguments)
        questions = _questions(arguments, language)
        check_questions(language, questions, sampling, arguments.file or "")
        found = read_adapters(arguments, language)
        base = base_of(language)
        printer = _Printer(arguments, len(questions) > 1)
        done: list[Any] = []
        errors: list[str] = []
        with contextlib.suppress(_Unheard):
            for model in adapted_models(base, found, arguments.merged) if found else [base]:
                for reply in _answers(arguments, model, questions, sampling, printer, errors):
                    done.append(plain_fields(reply))
                    write(done[-1])
    text = "" if arguments.out is None else f"{len(done):,} answers: {arguments.out}"
    return Done(text, {"answers": done}, REFUSED if errors else 0, errors)


def _questions(arguments: argparse.Namespace, language: LanguageModel) -> list[Question]:
    """The prompts; of a conversation one as it may begin, so that what cannot be asked is told at once."""
    from jlora.recipes import Question
    from jlora.text import read_questions

    if arguments.file is not None:
        return read_questions(arguments.file, template=arguments.template)
    for option in ("prompt", "system"):
        _check_text(getattr(arguments, option) or "", f"--{option}")
    if arguments.chat:
        return [Question([*_beginning(arguments), {"role": "user", "content": "a"}])]
    texts = arguments.prompt
    return [Question([{"role": "user", "content": text}] if arguments.template else text) for text in texts]


def _check_text(text: str | Sequence[str], where: str) -> None:
    """Raises a DataError where a text was no UTF-8: Python keeps such bytes as halves of surrogate pairs."""
    try:
        "".join(text).encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: not UTF-8: {shortened(text)}") from None


def _beginning(arguments: argparse.Namespace) -> list[Mapping[str, Any]]:
    return [] if arguments.system is None else [{"role": "system", "content": arguments.system}]


def _answers(
    arguments: argparse.Namespace,
    model: LoadedModel,
    questions: Sequence[Question],
    sampling: Sampling,
    printer: _Printer,
    errors: list[str],
) -> Iterator[Reply]:
    """The answers of one model, printed.

    Raises:
      _Unheard: nobody listens, and nothing is written.
    """
    from jlora.recipes import replies

    if arguments.chat:
        yield from _talk(model, _beginning(arguments), sampling, printer, errors)
    elif printer.on_text is None:
        for reply in replies(model, questions, sampling):
            printer.line(reply)
            yield reply
    else:
        for number, question in enumerate(questions):
            printer.head(model, question)
            yield from replies(model, [question], sampling, first=number, on_text=printer.on_text)
            printer.end()


def _talk(
    model: LoadedModel, said: list[Mapping[str, Any]], sampling: Sampling, printer: _Printer, errors: list[str]
) -> Iterator[Reply]:
    """Answers to the lines of standard input, each with all that was said before; an empty line is passed over.

    It ends with the input, with Ctrl-C, or where the model has no room for more.
    """
    from jlora.recipes import Question, replies

    try:
        for turn, line in enumerate(_lines()):
            said.append({"role": "user", "content": line})
            for reply in replies(model, [Question(list(said))], sampling, first=turn, on_text=printer.on_text):
                said.append({"role": "assistant", "content": reply.answer})
                yield reply  # before its line ends, so that Ctrl-C after that loses nothing
                printer.end()
    except DataError as error:
        errors.append(f"the conversation ends: {error}")
    except KeyboardInterrupt as error:
        if exit_code(error) != 128 + signal.SIGINT:
            raise
        say("")


def _lines() -> Iterator[str]:
    """The lines of standard input that say something; on a terminal they are asked for."""
    if sys.stdin is None:
        raise DataError("standard input is closed")
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, lets input() edit
    while True:
        try:
            line = input("> ") if is_terminal else sys.stdin.readline()
        except EOFError:
            say("")
            return
        except UnicodeDecodeError as error:
            raise DataError(f"standard input: not UTF-8: {error}") from None
        if not line and not is_terminal:
            return
        _check_text(line, "standard input")
        if line.strip():
            yield line.strip()


class _Printer:
    """What is printed of answers: their tokens as they come, or lines of JSON for a file of prompts.

    Args:
      arguments: of the command.
      several: whether there are several prompts.
    """

    def __init__(self, arguments: argparse.Namespace, several: bool) -> None:
        is_silent = arguments.json or arguments.quiet
        self.on_text: Callable[[str], object] | None = None if is_silent or arguments.file is not None else self._text
        self._prints_lines = arguments.file is not None and arguments.out is None and not is_silent
        self._names_adapter = len(arguments.adapter) > 1
        self._names_prompt = several
        self._must_go_on = arguments.out is not None

    def head(self, model: LoadedModel, question: Question) -> None:
        """Tells whose answer to what follows, where there are several."""
        names = [model.name] if self._names_adapter and model.name else []
        prompt = question.prompt
        said = prompt if isinstance(prompt, str) else prompt[-1].get("content")
        names += [shortened(said)] if self._names_prompt else []
        if names:
            self._show(f"{': '.join(names)}\n")

    def end(self) -> None:
        """Ends the line of an answer."""
        if self.on_text is not None:
            self._show("\n")

    def line(self, reply: Reply) -> None:
        """An answer to a prompt of a file."""
        import json

        if self._prints_lines:
            self._show(f"{json.dumps(plain_fields(reply))}\n")

    def _text(self, text: str) -> None:
        self._show(_harmless(text) if sys.stdout.isatty() else text)

    def _show(self, text: str) -> None:
        if not show(text, end="") and not self._must_go_on:
            raise _Unheard


def _harmless(text: str) -> str:
    """A text without the characters that a terminal obeys, but for line ends and tabs."""
    return "".join(c if c in "\n\t" or not _is_control(c) else f"\\x{ord(c):02x}" for c in text)


def _is_control(character: str) -> bool:
    return ord(character) < 32 or 127 <= ord(character) < 160
