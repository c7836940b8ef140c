"""Examples in memory, and read from files."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jlora.errors import DataError
from jlora.fields import choice, integer
from jlora.text._lines import WANTED, Problems, read_lines
from jlora.text._tokenizer import NoTemplateError, Tokenizer
from jlora.text._written import Encoded, Written, encode, write

_CHUNK_ROWS, _CHUNK_CHARACTERS = 512, 1 << 20


class Example(NamedTuple):
    """A text as tokens.

    Attributes:
      tokens: int32 (n,).
      counts: bool (n,): which of them are to be learned, each from those before it; never the first.
    """

    tokens: np.ndarray
    counts: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Examples(Sequence[Example]):
    """Many examples in three arrays, 5 bytes a token.

    Attributes:
      tokens: int32 (all tokens,).
      counts: bool (all tokens,).
      offsets: int64 (examples + 1,): example i is at offsets[i]:offsets[i + 1].

    >>> one, other = Example(np.array([5, 7]), np.ones(2, bool)), Example(np.array([3]), np.ones(1, bool))
    >>> examples = Examples.of([one, other])
    >>> len(examples), examples.lengths.tolist(), examples[0].tokens.tolist(), examples[0].counts.tolist()
    (2, [2, 1], [5, 7], [False, True])
    """

    tokens: np.ndarray
    counts: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "Examples":
        """Examples put together; the first token of each is not to be learned from anything."""
        every = list(examples)
        lengths = np.array([len(each.tokens) for each in every], np.int64)
        offsets = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
        tokens = np.concatenate([np.zeros(0, np.int32), *(np.asarray(each.tokens, np.int32) for each in every)])
        counts = np.concatenate([np.zeros(0, bool), *(np.asarray(each.counts, bool) for each in every)])
        counts[offsets[:-1][lengths > 0]] = False
        return cls(tokens, counts, offsets)

    @property
    def lengths(self) -> np.ndarray:
        """The tokens of each example, int64 (examples,)."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        index = range(len(self))[index]
        where = slice(self.offsets[index], self.offsets[index + 1])
        return Example(self.tokens[where], self.counts[where])

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


@dataclasses.dataclass(frozen=True)
class ReadReport:
    """What became of the lines of a file.

    Attributes:
      path: the file.
      lines: of examples.
      examples: that were kept.
      tokens, counted: of these; counted are those that are to be learned.
      longest: the tokens of the longest example, before it was cut or dropped.
      cut, dropped: examples that were longer than `length`.
      empty: examples left out as no token to be learned is in their first `length` tokens.
      joined: examples whose prompt ends where the tokenizer would not end a token: it would make other tokens of prompt
        and completion in one. They are put together of the tokens of both, as the model is given those of the prompt.
      length: what was asked for.
    """

    path: str
    lines: int
    examples: int
    tokens: int
    counted: int
    longest: int
    cut: int
    dropped: int
    empty: int
    joined: int
    length: int

    def __str__(self) -> str:
        kept = f"{self.path}: {self.examples:,} examples, {self.tokens:,} tokens, of which {self.counted:,} count"
        notes = [f"the longest has {self.longest:,}"]
        if self.cut:
            notes.append(f"{self.cut:,} cut to {self.length:,}")
        if self.dropped:
            notes.append(f"{self.dropped:,} longer than {self.length:,} left out")
        if self.empty:
            notes.append(f"{self.empty:,} left out that have nothing to learn in their first {self.length:,} tokens")
        if self.joined:
            notes.append(f"{self.joined:,} whose prompt ends within a token")
        return "; ".join([kept, *notes])


def read_examples(
    path: str | Path, tokenizer: Tokenizer, *, length: int, long: str = "cut", template: bool = False
) -> tuple[Examples, ReadReport]:
    """The examples in a file of JSON lines, as tokens, with those that are to be learned marked.

        {"prompt": "The capital of France is", "completion": " Paris."}
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
        {"text": "All of it is to be learned."}

    - Prompt and completion as strings are one plain text, begun as the tokenizer begins one (BOS, or nothing) and ended
      by EOS; the completion and EOS count. With `template=True` they are what a user says and the assistant answers.
      They may be lists of messages, too: what counts are the assistant's in the completion.
    - Messages are written by the folder's chat template, which writes BOS and EOS itself. What the assistant says
      counts: by the template's `{% generation %}` marks, or else what each answer adds to what the model is given
      before it, up to the token that ends it. `tools`, `documents` and `chat_template_kwargs` go to the template.
    - A text is begun and ended as above, and all of it counts.

    The tokens before what counts are those of `Tokenizer.prompt`; marks are taken as they are, as transformers takes
    them. Other keys of a line are not looked at.

    Args:
      path: the file, UTF-8.
      tokenizer: of `read_tokenizer`.
      length: the most tokens of an example.
      long: what is done with a longer one: "cut" keeps its first `length` tokens, "drop" leaves it out.
      template: whether prompts and completions that are strings go through the chat template.

    Returns:
      The examples, and a report of what was cut and left out, which prints as a line.

    Raises:
      DataError: the file cannot be read, is empty, or has lines that are no examples, which are all named; no example
        is left; the chat template is missing or refuses the messages.
      ConfigError: `length` or `long` is not possible.
    """
    length, long = integer("length", length, 2), choice("long", long, ("cut", "drop"))
    problems = Problems(path)
    counted: Counter[str] = Counter()
    parts = []
    for chunk in _chunks(path, tokenizer, template, problems):
        kept = []
        for number, found in chunk:
            if isinstance(found, DataError):
                problems.add(number, found)
                continue
            fate = _fate(found, length, long)
            counted[fate] += 1
            counted["longest"] = max(counted["longest"], len(found.tokens))
            if fate in ("whole", "cut"):
                counted["joined"] += found.is_joined
                kept.append(Example(found.tokens[:length], found.counts[:length]))
        counted["lines"] += len(chunk)
        parts.append(Examples.of(kept))
    problems.raise_all()
    examples = _merged(parts)
    names = ("lines", "longest", "cut", "dropped", "empty", "joined")
    report = ReadReport(
        path=str(path),
        examples=len(examples),
        tokens=len(examples.tokens),
        counted=int(examples.counts.sum()),
        length=length,
        **{name: counted[name] for name in names},
    )
    if not counted["lines"]:
        raise DataError(f"{path}: no examples in it: {WANTED}")
    if not len(examples):
        raise DataError(f"no example is left: {report}; a greater length, or shorter prompts")
    return examples, report


def _fate(found: Encoded, length: int, long: str) -> str:
    """What becomes of an example."""
    if len(found.tokens) > length and long == "drop":
        return "dropped"
    if not found.counts[1:length].any():
        return "empty"
    return "cut" if len(found.tokens) > length else "whole"


def _chunks(
    path: str | Path, tokenizer: Tokenizer, template: bool, problems: Problems
) -> Iterator[list[tuple[int, Encoded | DataError]]]:
    """The lines of a file with their tokens, or with what is wrong, some hundreds at a time."""
    numbers: list[int] = []
    texts: list[Written] = []
    characters = 0
    for number, row in read_lines(path, problems):
        try:
            texts.append(write(row, tokenizer, template))
        except NoTemplateError as error:
            raise DataError(f"{path}: line {number:,}: {error}") from None  # not of this line alone
        except DataError as error:
            problems.add(number, error)
            continue
        numbers.append(number)
        characters += len(texts[-1].text)
        if len(texts) == _CHUNK_ROWS or characters > _CHUNK_CHARACTERS:
            yield list(zip(numbers, encode(texts, tokenizer), strict=True))
            numbers, texts, characters = [], [], 0
    if texts:
        yield list(zip(numbers, encode(texts, tokenizer), strict=True))


def _merged(parts: Sequence[Examples]) -> Examples:
    """The examples of all parts, in order."""
    empty = Examples.of([])
    ends = np.cumsum([0, *(len(part.tokens) for part in parts)])
    offsets = [part.offsets[1:] + end for part, end in zip(parts, ends[:-1], strict=True)]
    return Examples(
        np.concatenate([empty.tokens, *(part.tokens for part in parts)]),
        np.concatenate([empty.counts, *(part.counts for part in parts)]),
        np.concatenate([empty.offsets, *offsets]),
    )
