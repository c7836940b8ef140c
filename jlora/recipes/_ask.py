"""What `jlora generate` and `jlora eval` do."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jlora.disk import read_json_lines
from jlora.errors import ConfigError, DataError, raise_all, shortened
from jlora.fields import integer
from jlora.models import generate
from jlora.recipes._answers import Answerer, Question, as_prompt, check_prompt, read_questions, share_of_matches
from jlora.recipes._chunks import chunk_size
from jlora.recipes._evaluator import evaluator
from jlora.recipes._loaded import LoadedModel
from jlora.recipes._losses import next_token
from jlora.text import pack, read_examples

_ROWS, _STEP = 32, 64


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a model said.

    Attributes:
      prompt: a text, or messages.
      answer: the text of what was said.
      tokens: how many tokens that is.
      stopped: whether the model ended it, and not the most that was allowed.
    """

    prompt: Any
    answer: str
    tokens: int
    stopped: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
      max_new_tokens: of an answer.
      temperature: 0 takes the most likely token each time; else tokens are drawn from softmax(logits / temperature).
      top_k, top_p: of which they are drawn, as of `jlora.models.generate`.
      seed: of drawing.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ConfigError("top_k and top_p are for drawing tokens: give a temperature above 0")
        integer("seed", self.seed, 0, 2**32)


def read_prompts(path: str | Path, *, chat: bool = False) -> list[Question]:
    """The prompts of a file of JSON lines, each with `prompt` (a text or messages) or `messages`.

    A `messages` that ends with what the assistant says is asked up to there.

    Raises:
      DataError: a line without one, or a file without lines.
    """
    questions, problems = [], []
    for number, row in enumerate(read_json_lines(path), 1):
        prompt = row.get("prompt", row.get("messages"))
        if "prompt" not in row and isinstance(prompt, list):
            prompt = list(prompt)
            while prompt and isinstance(prompt[-1], Mapping) and prompt[-1].get("role") == "assistant":
                prompt.pop()
        if not isinstance(prompt, str | list) or not prompt:
            problems.append(f"row {number:,}: wanted a prompt or messages, found {shortened(row, 60)}")
            continue
        questions.append(Question(as_prompt(prompt, chat), ""))
    raise_all(problems, DataError, str(path))
    if not questions:
        raise DataError(f"{path}: no prompts in it")
    return questions


def replies(
    loaded: LoadedModel,
    questions: Sequence[Question],
    sampling: Sampling,
    *,
    on_text: Callable[[str], object] | None = None,
) -> Iterator[Reply]:
    """Answers to prompts, in order; all prompts are checked before the first is answered.

    Args:
      loaded: the model.
      questions: the prompts.
      sampling: how tokens are chosen.
      on_text: called with each piece of an answer as it comes; prompts are then answered one after the other, and else
        many at once.

    Raises:
      ConfigError, DataError: settings or prompts that are not possible.
    """
    language = loaded.language
    prompts = [language.tokenizer.prompt(question.prompt, **question.variables) for question in questions]
    for tokens, question in zip(prompts, questions, strict=True):
        check_prompt(tokens, question.prompt, language, sampling.max_new_tokens)
    return _replies(loaded, questions, prompts, sampling, on_text)


def _replies(
    loaded: LoadedModel,
    questions: Sequence[Question],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    on_text: Callable[[str], object] | None,
) -> Iterator[Reply]:
    language = loaded.language
    rows = 1 if on_text is not None else chunk_size(len(prompts), _ROWS)
    for number, start in enumerate(range(0, len(prompts), rows)):
        some = slice(start, start + rows)
        streamed = None if on_text is None else _Stream(loaded, on_text)
        key = jax.random.fold_in(jax.random.key(sampling.seed), number)
        found = generate(
            loaded.fn,
            loaded.params,
            prompts[some],
            config=language.config,
            max_new_tokens=sampling.max_new_tokens,
            adapters=loaded.adapters,
            stop=language.tokenizer.stop,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            key=key,
            on_token=streamed,
        )
        if streamed is not None:
            streamed.end()
        for question, answer in zip(questions[some], found, strict=True):
            text = language.tokenizer.decode(answer.tokens)
            yield Reply(question.prompt, text, len(answer.tokens), answer.stopped)


class _Stream:
    """The text of one answer, piece by piece: never half of a character."""

    def __init__(self, loaded: LoadedModel, on_text: Callable[[str], object]) -> None:
        self._decode = loaded.language.tokenizer.decode
        self._on_text = on_text
        self._tokens: list[int] = []
        self._said = ""

    def __call__(self, step: int, tokens: np.ndarray) -> None:
        if tokens[0] >= 0:
            self._tokens.append(int(tokens[0]))
            text = self._decode(self._tokens)
            if not text.endswith("\ufffd"):  # a character whose other bytes are still to come
                self._say(text)

    def end(self) -> None:
        """Says what is left, be it half of a character."""
        self._say(self._decode(self._tokens))

    def _say(self, text: str) -> None:
        if text.startswith(self._said) and len(text) > len(self._said):
            self._on_text(text[len(self._said) :])
            self._said = text


def evaluate(
    loaded: LoadedModel,
    path: str | Path,
    *,
    length: int | None = None,
    template: bool = False,
    exact_match: int = 100,
    max_new_tokens: int = 64,
) -> tuple[dict[str, float], str]:
    """Loss, perplexity, token accuracy and exact match of a model on a file of JSON lines.

    Args:
      loaded: the model.
      path: the file, as `jlora.text.read_examples` reads it.
      length: the most tokens of an example, the rest is cut; by default as many as the model has positions.
      template: whether prompts and completions that are strings go through the chat template.
      exact_match: how many of the prompts that have completions are answered, greedily; 0 for none.
      max_new_tokens: of such an answer.

    Returns:
      The metrics by name, and a line on what was read.

    Raises:
      ConfigError, DataError: as of `jlora.text.read_examples`.
    """
    language = loaded.language
    most = language.config.max_positions
    integer("exact_match", exact_match, 0)
    examples, read = read_examples(
        path, language.tokenizer, length=min(length or most, most), long="cut", template=template
    )
    row_length = min(-(-int(examples.lengths.max()) // _STEP) * _STEP, most)
    rows, _ = pack(examples, row_length, pad=language.tokenizer.pad)

    def forward(adapters: Any, params: Any, inputs: Any, state: Any, key: Any) -> tuple[Any, Any]:
        both = (params,) if adapters is None else (params, adapters)
        return loaded.fn(*both, inputs["tokens"], positions=inputs["positions"], segments=inputs["segments"]), None

    metrics = evaluator(forward, next_token, rows, loaded.params)(loaded.adapters)
    questions = read_questions(path, template=template)[:exact_match]
    if questions:
        answers = Answerer(language, loaded.fn, max_new_tokens).answer(questions, loaded.params, loaded.adapters)
        metrics["exact_match"] = share_of_matches(questions, answers)
    return metrics, str(read)
