"""How a language model does on a file of examples."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jlora.fields import integer
from jlora.recipes._evaluator import evaluator
from jlora.recipes._language import LanguageModel
from jlora.recipes._loaded import LoadedModel
from jlora.recipes._losses import next_token
from jlora.recipes._replies import Reply, Sampling, check_questions, replies
from jlora.text import Question, ReadReport, pack, read_examples, read_questions

_STEP = 64  # lengths of rows are multiples of it
_SPACES = 8  # tokens that an answer may have beside the completion, as blanks at its end are no fault


@dataclasses.dataclass(frozen=True)
class LanguageTest:
    """A file of examples, to test a language model on.

    Attributes:
      rows: of tokens, as `jlora.text.pack` makes them.
      questions: those that are answered, to count the answers that are exactly right.
      sampling: how.
      report: on what was read.
      completed: how many examples of the file have a completion.
    """

    rows: Mapping[str, Any]
    questions: Sequence[Question]
    sampling: Sampling
    report: ReadReport
    completed: int

    def __str__(self) -> str:
        asked = len(self.questions)
        more = f"; exact match on {'the first ' if asked < self.completed else ''}{asked:,} of {self.completed:,}"
        return f"{self.report}{more if asked else ''}"


def read_language_test(
    path: str | Path,
    language: LanguageModel,
    *,
    length: int | None = None,
    template: bool = False,
    exact_match: int = 100,
    max_new_tokens: int | None = None,
) -> LanguageTest:
    """The examples of a file of JSON lines.

    Args:
      path: the file, as `jlora.text.read_examples` reads it.
      language: the model that is tested.
      length: the most tokens of an example, the rest is cut; by default as many as the model has positions.
      template: whether prompts and completions that are strings go through the chat template.
      exact_match: how many of the prompts that have completions are answered, greedily; 0 for none.
      max_new_tokens: of such an answer; by default enough for the longest completion.

    Raises:
      ConfigError, DataError: as of `jlora.text.read_examples`; prompts that leave no room for an answer.
    """
    integer("exact_match", exact_match, 0)
    most, tokenizer = language.config.max_positions, language.tokenizer
    at_most = most if length is None else min(integer("length", length, 2), most)
    examples, report = read_examples(path, tokenizer, length=at_most, long="cut", template=template)
    row_length = min(-(-int(examples.lengths.max()) // _STEP) * _STEP, most)
    rows, _ = pack(examples, row_length, pad=tokenizer.pad)
    completed = read_questions(path, template=template, completed=True)
    questions = completed[:exact_match]
    if max_new_tokens is None and questions:
        wanted = tokenizer.encode_all([question.completion or "" for question in questions])
        max_new_tokens = max(map(len, wanted)) + _SPACES
    sampling = Sampling(max_new_tokens=max_new_tokens)
    check_questions(language, questions, sampling, str(path))
    return LanguageTest(rows, questions, sampling, report, len(completed))


def evaluate(loaded: LoadedModel, test: LanguageTest) -> tuple[dict[str, float], list[Reply]]:
    """Loss, perplexity and token accuracy of a model over the tokens that count, and its exact matches.

    Returns:
      The metrics by name, `exact_match` where prompts have completions; and the answers to these prompts.
    """

    def forward(adapters: Any, params: Any, inputs: Any, state: Any, key: Any) -> tuple[Any, None]:
        model = dataclasses.replace(loaded, params=params, adapters=adapters)
        return model(inputs["tokens"], positions=inputs["positions"], segments=inputs["segments"]), None

    metrics = evaluator(forward, next_token, test.rows, loaded.params)(loaded.adapters)
    answers = list(replies(loaded, test.questions, test.sampling))
    if answers:
        metrics["exact_match"] = share_of_matches(test.questions, answers)
    return metrics, answers


def share_of_matches(questions: Sequence[Question], answers: Sequence[Reply]) -> float:
    """The share of the answers that are exactly right."""
    right = [is_match(question, answer) for question, answer in zip(questions, answers, strict=True)]
    return sum(right) / len(right)


def is_match(question: Question, reply: Reply) -> bool:
    """Whether an answer is the completion, but for spaces around it, and ended there by the model itself."""
    return reply.stopped and question.completion is not None and question.completion.strip() == reply.answer.strip()
