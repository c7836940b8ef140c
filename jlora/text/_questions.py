"""Prompts that are asked of a model, out of files of JSON lines."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jlora.errors import DataError, shortened
from jlora.text._lines import Problems, messages_of, read_lines, variables_of
from jlora.text._template import Message

_WANTED = 'wanted {"prompt": a text or messages} or {"messages": [...]}'


class Question(NamedTuple):
    """A prompt, and what is wanted for an answer where that is known.

    Attributes:
      prompt: a text, or messages for the chat template.
      completion: the text that is wanted; None where nothing is known of it.
      variables: of the template, such as tools.
      line: of the file that it is from; 0 where it is from none.
    """

    prompt: str | Sequence[Message]
    completion: str | None = None
    variables: Mapping[str, Any] = {}
    line: int = 0


def read_questions(path: str | Path, *, template: bool = False, completed: bool = False) -> list[Question]:
    """The prompts in a file of JSON lines.

        {"prompt": "The capital of France is"}
        {"prompt": "The capital of France is", "completion": " Paris."}
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}

    Messages are asked up to what the assistant says at their end. `tools`, `documents` and `chat_template_kwargs` go to
    the chat template; other keys are not looked at.

    Args:
      path: the file, UTF-8.
      template: whether a prompt that is a string is what a user says, for the chat template.
      completed: whether lines without a prompt and a completion are passed over: a file for `read_examples` may have
        others. A completion of several messages is none.

    Raises:
      DataError: the file cannot be read or has no prompts; lines that have none, which are all named.
    """
    problems = Problems(path)
    questions, lines = [], 0
    for number, row in read_lines(path, problems):
        lines += 1
        if completed and "prompt" not in row:
            continue
        try:
            question = _question(row, template, number)
        except DataError as error:
            problems.add(number, error)
            continue
        if question.completion is not None or not completed:
            questions.append(question)
    problems.raise_all()
    if not lines:
        raise DataError(f"{path}: no prompts in it: {_WANTED}")
    return questions


def _question(row: Mapping[str, Any], template: bool, line: int) -> Question:
    """What a line asks.

    Raises:
      DataError: nothing, or something of the wrong kind.
    """
    given = [key for key in ("prompt", "messages") if key in row]
    if len(given) != 1:
        raise DataError(f"{_WANTED}, found the keys {shortened(sorted(row))}")
    prompt = row[given[0]]
    if isinstance(prompt, str) and given == ["prompt"]:
        said: str | Sequence[Message] = [{"role": "user", "content": prompt}] if template else prompt
    elif isinstance(prompt, list) or given == ["messages"]:
        said = messages_of(given[0], prompt)
    else:
        raise DataError(f"prompt: wanted a text or messages, found {shortened(prompt, 60)}")
    if given == ["messages"]:
        said = _up_to_the_answer(said)
    return Question(said, _completion(row), variables_of(row), line)


def _up_to_the_answer(messages: Sequence[Any]) -> Sequence[Message]:
    """Messages without what the assistant says at their end."""
    last = max((i for i, message in enumerate(messages, 1) if message["role"] != "assistant"), default=0)
    if not last:
        raise DataError("messages: none that the assistant could answer")
    return messages[:last]


def _completion(row: Mapping[str, Any]) -> str | None:
    """The text that is wanted, where a line has one."""
    completion = row.get("completion")
    if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], Mapping):
        completion = completion[0].get("content")
    return completion if isinstance(completion, str) else None
