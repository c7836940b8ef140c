"""What a language model answers: prompts before, while and after it is trained, and exact matches."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from jlora.config import LoraConfig
from jlora.disk import read_json_lines, write_whole
from jlora.errors import DataError, shortened
from jlora.models import generate
from jlora.recipes._chunks import chunk_size
from jlora.recipes._config import GenerateConfig
from jlora.recipes._language import LanguageModel
from jlora.transform import lora

_ROWS = 32  # prompts that are answered at once

Prompt = str | Sequence[Mapping[str, Any]]


class Question(NamedTuple):
    """A prompt with the completion that is wanted.

    Attributes:
      prompt: a text, or messages for the chat template.
      completion: the text of it.
      variables: of the template, such as tools.
    """

    prompt: Prompt
    completion: str
    variables: Mapping[str, Any] = {}


def read_questions(path: str | Path, *, template: bool = False) -> list[Question]:
    """The prompts and completions of a file that `jlora.text.read_examples` reads; other lines are passed over.

    Args:
      path: the file.
      template: whether a prompt that is a string is what a user says.
    """
    questions = []
    for row in read_json_lines(path):
        prompt, completion = row.get("prompt"), row.get("completion")
        if isinstance(completion, list):
            completion = completion[0].get("content") if len(completion) == 1 else None
        if not isinstance(prompt, str | list) or not isinstance(completion, str):
            continue
        variables = {name: row[name] for name in ("tools", "documents") if row.get(name) is not None}
        variables |= row.get("chat_template_kwargs") or {}
        questions.append(Question(as_prompt(prompt, template), completion, variables))
    return questions


def as_prompt(prompt: Prompt, chat: bool) -> Prompt:
    """A prompt as it is, or as what a user says."""
    return [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt


class Answerer:
    """Answers prompts greedily, many at once: one compiled program for prompts of about the same lengths.

    Args:
      language: the model.
      fn: as `jlora.models.generate` takes it.
      max_new_tokens: of an answer.
    """

    def __init__(self, language: LanguageModel, fn: Callable[..., Any], max_new_tokens: int) -> None:
        self._language = language
        self._max_new_tokens = max_new_tokens
        self._fn = fn

    def answer(self, questions: Sequence[Question], params: Any, adapters: Any = None) -> list[str]:
        """The answers, in order; special tokens are left out.

        Raises:
          DataError: a prompt is empty, or too long for the model.
        """
        prompts = [self.tokens(question) for question in questions]
        answers = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        rows = chunk_size(len(order), _ROWS)
        for start in range(0, len(order), rows):
            some = order[start : start + rows]
            found = generate(
                self._fn,
                params,
                [prompts[i] for i in some],
                config=self._language.config,
                max_new_tokens=self._max_new_tokens,
                adapters=adapters,
                stop=self._language.tokenizer.stop,
            )
            for i, answer in zip(some, found, strict=True):
                answers[i] = self._language.tokenizer.decode(answer.tokens)
        return answers

    def tokens(self, question: Question) -> list[int]:
        """The tokens of a prompt, checked."""
        tokens = self._language.tokenizer.prompt(question.prompt, **question.variables)
        check_prompt(tokens, question.prompt, self._language, self._max_new_tokens)
        return tokens


def check_prompt(tokens: Sequence[int], prompt: Prompt, language: LanguageModel, max_new_tokens: int) -> None:
    """Raises a DataError where a prompt is empty, or leaves no room for an answer."""
    most = language.config.max_positions
    if not tokens:
        raise DataError(f"the prompt {shortened(prompt)} has no tokens")
    if len(tokens) + max_new_tokens > most:
        raise DataError(
            f"the prompt {shortened(prompt)} has {len(tokens):,} tokens, and with max_new_tokens = "
            f"{max_new_tokens:,} they are more than the {most:,} positions of the model"
        )


class Asked:
    """What a job asks its model: the prompts of [generate], and the questions of the evaluation file.

    Args:
      asked: the section [generate].
      language: the model.
      config: of the adapters.
      params: the base.
      questions: of the evaluation file.
    """

    def __init__(
        self,
        asked: GenerateConfig,
        language: LanguageModel,
        config: LoraConfig,
        params: Any,
        questions: Sequence[Question],
    ) -> None:
        self._prompts = [Question(as_prompt(prompt, asked.chat), "") for prompt in asked.prompts]
        self._texts = asked.prompts
        self._questions = questions[: asked.exact_match]
        self._params = params
        self._answerer = Answerer(language, lora(language.function(), config), asked.max_new_tokens)
        for question in (*self._prompts, *self._questions):  # what cannot be asked is said before anything is written
            self._answerer.tokens(question)

    @property
    def has_prompts(self) -> bool:
        """Whether there is anything to show."""
        return bool(self._prompts)

    def exact_match(self, adapters: Any) -> dict[str, float]:
        """The share of the questions that are answered exactly, as a metric; nothing where there are none."""
        if not self._questions:
            return {}
        answers = self._answerer.answer(self._questions, self._params, adapters)
        return {"exact_match": share_of_matches(self._questions, answers)}

    def show(self, step: int, adapters: Any, log: "AnswersLog", console: Console) -> None:
        """Prints what is answered to the prompts at a step, and writes it."""
        answers = self._answerer.answer(self._prompts, self._params, adapters)
        console.out(f"answers at step {step}", highlight=False)
        for prompt, answer in zip(self._texts, answers, strict=True):
            console.out(f"  {shortened(prompt)} -> {shortened(answer, 200)}", highlight=False)
            log.write({"step": step, "prompt": prompt, "answer": answer})


def share_of_matches(questions: Sequence[Question], answers: Sequence[str]) -> float:
    """The share of the answers that are the completions, but for spaces around them."""
    right = [question.completion.strip() == answer.strip() for question, answer in zip(questions, answers, strict=True)]
    return sum(right) / len(right)


class AnswersLog:
    """Answers as JSON lines, `{"step": 10, "prompt": "...", "answer": "..."}`.

    Args:
      path: the file; lines of steps after `step` are dropped, as a resumed run writes them again, all of them where it
        is None.
    """

    def __init__(self, path: Path, step: int | None) -> None:
        self._path = path
        rows = read_json_lines(path) if step is not None and path.exists() else []
        kept = [row for row in rows if isinstance(row.get("step"), int) and row["step"] <= step]
        write_whole(path, "".join(map(_line, kept)).encode())

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds a row.

        Raises:
          DataError: the system refuses, as for a full disk.
        """
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(row))
        except OSError as error:
            raise DataError(f"{self._path}: cannot be written: {error.strerror}") from None


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"
