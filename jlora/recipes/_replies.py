"""What a language model says to prompts: many at once, or one as its tokens come."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.errors import ConfigError, DataError, raise_all, shortened
from jlora.fields import integer, number
from jlora.models import DecoderConfig, generate
from jlora.recipes._chunks import chunk_size
from jlora.recipes._language import LanguageModel
from jlora.recipes._loaded import LoadedModel
from jlora.text import Question

_MOST_NEW_TOKENS = 256  # where nobody says how many
_ROWS, _WINDOW = 32, 256  # prompts that are answered at once, and of which those of like lengths are taken together
_CACHE_NUMBERS = 1 << 28  # keys and values of prompts that are answered at once


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a model said.

    Attributes:
      prompt: a text, or messages.
      answer: the text of what was said; special tokens are left out.
      tokens: how many tokens that is.
      stopped: whether the model ended it, and not the most that was allowed.
      adapter: the folder of the adapter that it was said with; None for none.
    """

    prompt: Any
    answer: str
    tokens: int
    stopped: bool
    adapter: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are made.

    Attributes:
      max_new_tokens: of an answer; None for 256, or fewer where the model has no positions for more.
      temperature: 0 takes the most likely token each time; else tokens are drawn from softmax(logits / temperature).
      top_k, top_p: of which they are drawn, as of `jlora.models.generate`.
      seed: of drawing. What is drawn for a prompt depends on the seed and its number among the prompts.

    Raises:
      ConfigError: a value that is not possible.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            integer("max_new_tokens", self.max_new_tokens, 1)
        number("temperature", self.temperature, 0.0, wanted="a number of at least 0")
        integer("seed", self.seed, 0, 2**32)
        if self.top_k is not None:
            integer("top_k", self.top_k, 1)
        if self.top_p is not None and not 0 < number("top_p", self.top_p) <= 1:
            raise ConfigError(f"top_p = {self.top_p}: wanted 0 < top_p <= 1")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ConfigError("top_k and top_p are for drawing tokens: give a temperature above 0")


class _Asked(NamedTuple):
    """A prompt as tokens, and how many an answer may have."""

    tokens: list[int]
    room: int


def check_questions(
    language: LanguageModel, questions: Sequence[Question], sampling: Sampling, where: str = ""
) -> None:
    """Raises a DataError with all prompts, out of `where`, that have no tokens or leave no room for an answer."""
    _asked(language, questions, sampling, where)


def replies(
    loaded: LoadedModel,
    questions: Sequence[Question],
    sampling: Sampling,
    *,
    first: int = 0,
    on_text: Callable[[str], object] | None = None,
) -> Iterator[Reply]:
    """Answers to prompts, in order; all prompts are checked before the first is answered.

    Args:
      loaded: the model.
      questions: the prompts.
      sampling: how tokens are chosen.
      first: the number of the first prompt, by which tokens are drawn.
      on_text: called with each piece of an answer as it comes; prompts are then answered one after the other, and else
        many at once.

    Raises:
      DataError: prompts that have no tokens, or leave no room for an answer.
    """
    asked = _asked(loaded.language, questions, sampling)
    return _replies(loaded, questions, asked, sampling, first, on_text)


def _replies(
    loaded: LoadedModel,
    questions: Sequence[Question],
    asked: Sequence[_Asked],
    sampling: Sampling,
    first: int,
    on_text: Callable[[str], object] | None,
) -> Iterator[Reply]:
    decode = loaded.language.tokenizer.decode
    window = 1 if on_text is not None else _WINDOW
    for start in range(0, len(asked), window):
        numbers = range(start, min(start + window, len(asked)))
        found: dict[int, Reply] = {}
        for rows in _batches(asked, numbers, loaded.language.config):
            stream = None if on_text is None else _Stream(decode, on_text)
            keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(sampling.seed), row))(jnp.array(rows) + first)
            answers = generate(
                loaded.fn,
                loaded.params,
                [asked[row].tokens for row in rows],
                config=loaded.language.config,
                max_new_tokens=asked[rows[0]].room,
                adapters=loaded.adapters,
                stop=loaded.language.tokenizer.stop,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                key=keys,
                on_token=stream,
            )
            if stream is not None:
                stream.end()
            for row, answer in zip(rows, answers, strict=True):
                text = decode(answer.tokens)
                found[row] = Reply(questions[row].prompt, text, len(answer.tokens), answer.stopped, loaded.name)
        yield from (found[row] for row in numbers)


def _batches(asked: Sequence[_Asked], numbers: Sequence[int], config: DecoderConfig) -> Iterator[list[int]]:
    """The numbers of prompts that are answered at once: of like lengths, with as much room for an answer."""
    order = sorted(numbers, key=lambda row: (asked[row].room, len(asked[row].tokens)))
    for room in sorted({asked[row].room for row in numbers}):
        some = [row for row in order if asked[row].room == room]
        slots = 2 * (len(asked[some[-1]].tokens) + room)
        numbers_of_row = 2 * config.layers * config.kv_heads * config.head_dim * slots
        size = chunk_size(len(some), min(_ROWS, _CACHE_NUMBERS // numbers_of_row))
        yield from (some[start : start + size] for start in range(0, len(some), size))


def _asked(language: LanguageModel, questions: Sequence[Question], sampling: Sampling, where: str = "") -> list[_Asked]:
    """The prompts as tokens, checked."""
    most, wanted = language.config.max_positions, sampling.max_new_tokens
    asked, problems = [], []
    for question in questions:
        line = f"line {question.line:,}: " if question.line else ""
        try:
            tokens = language.tokenizer.prompt(question.prompt, **question.variables)
        except DataError as error:
            problems.append(f"{line}{error}")
            continue
        left = most - len(tokens)
        told = f"{line}the prompt {shortened(question.prompt)} has"
        if not tokens:
            problems.append(f"{told} no tokens: say something, or make it a user's turn of the chat template")
        elif left < (wanted or 1):
            problems.append(f"{told} {len(tokens):,} tokens, and the model {most:,} positions: {_way_out(left)}")
        asked.append(_Asked(tokens, min(left, _MOST_NEW_TOKENS) if wanted is None else wanted))
    raise_all(problems, DataError, where)
    return asked


def _way_out(left: int) -> str:
    return f"wanted max_new_tokens <= {left:,}" if left > 0 else "wanted a shorter prompt"


class _Stream:
    """The text of one answer, piece by piece: never half of a character."""

    def __init__(self, decode: Callable[[Sequence[int]], str], on_text: Callable[[str], object]) -> None:
        self._decode = decode
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
