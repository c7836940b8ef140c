"""Examples as one string each, with the characters that count, and these as tokens."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora.errors import DataError
from jlora.text._lines import Plain, parse_example
from jlora.text._template import ChatTemplate, Conversation, Span
from jlora.text._tokenizer import Tokenizer

_MOST_TURNS = 1000  # to write a conversation up to each of its turns takes the square of their number
_APART = 'give each answer a line of its own, {"prompt": [messages before it], "completion": [the answer]}'


class Written(NamedTuple):
    """An example as one string.

    Attributes:
      text: all of it.
      spans: begin and end of what counts, in characters.
      is_plain: it is begun with what the tokenizer puts before a text, and ended by EOS; a template does that itself.
      is_exact: what stands before each span is what the model is given at inference, so that its tokens are the same.
    """

    text: str
    spans: list[Span]
    is_plain: bool
    is_exact: bool


class Encoded(NamedTuple):
    """The tokens of an example, int32 (n,), which of them count, bool (n,), and whether pieces had to be joined."""

    tokens: np.ndarray
    counts: np.ndarray
    is_joined: bool


def write(row: Mapping[str, Any], tokenizer: Tokenizer, template: bool) -> Written:
    """What a line of a file says, as one string.

    Raises:
      DataError: what is wrong with it.
    """
    said = parse_example(row, template)
    if isinstance(said, Plain):
        return Written(said.text, [(said.begin, len(said.text))], True, True)
    conversation, begin = said
    messages = enumerate(conversation.messages)
    answers = [i for i, message in messages if i >= begin and message["role"] == "assistant"]
    if not answers:
        raise DataError("no message of the assistant, from which to learn")
    chat = tokenizer.template_for(conversation)
    if chat.marks:
        text, spans = chat.write_marked(conversation)
        _, before = chat.write_marked(conversation.first(begin)) if begin else ("", [])
        return Written(text, spans[len(before) :], False, False)
    return _write_by_difference(chat, conversation, answers)


def _write_by_difference(chat: ChatTemplate, conversation: Conversation, answers: Sequence[int]) -> Written:
    """A conversation by a template without marks: an answer is what it adds to what the model is given before it."""
    if len(answers) > _MOST_TURNS:
        raise DataError(
            f"{len(answers):,} messages of the assistant: at most {_MOST_TURNS:,}, or a template with marks"
        )
    text = chat.write(conversation)
    spans = []
    for answer in answers:
        given = chat.write(conversation.first(answer), generate=True)
        is_last = answer == len(conversation.messages) - 1
        upto = text if is_last else chat.write(conversation.first(answer + 1))
        if not (text.startswith(given) and text.startswith(upto) and len(given) <= len(upto)):
            raise DataError(
                f"the chat template writes message {answer + 1}, or what is before it, otherwise where more follows: "
                f"{_APART}"
            )
        spans.append((len(given), len(upto)))
    return Written(text, spans, False, True)


def encode(written: Sequence[Written], tokenizer: Tokenizer) -> Iterator[Encoded | DataError]:
    """The tokens of examples, or what is wrong with one."""
    given = [each.text[:begin] for each in written if each.is_exact for begin, _ in each.spans]
    given_tokens = iter(tokenizer.encode_all(given))
    wholes = tokenizer.encode_with_offsets([each.text for each in written])
    for each, (tokens, offsets) in zip(written, wholes, strict=True):
        if each.is_exact:
            before = [next(given_tokens) for _ in each.spans]
            try:
                found = _exact(each, tokens, offsets, before, tokenizer)
            except DataError as error:
                yield error
                continue
        else:
            found = Encoded(tokens, _overlapping(offsets, each.spans), False)
        yield _surrounded(found, tokenizer) if each.is_plain else found


def _exact(
    each: Written, tokens: np.ndarray, offsets: np.ndarray, given: Sequence[list[int]], tokenizer: Tokenizer
) -> Encoded:
    """The tokens of an example, in which each span begins where what the model is given before it ends."""
    starts = [len(before) for before in given]
    is_joined = any(tokens[: len(before)].tolist() != before for before in given)
    if is_joined:
        tokens, starts, ends = _joined(each, given, tokenizer)
    else:
        ends = [len(tokens) if end == len(each.text) else int((offsets[:, 0] < end).sum()) for _, end in each.spans]
    counts = np.zeros(len(tokens), bool)
    for start, end in zip(starts, ends, strict=True):
        if not each.is_plain:
            end = _end_of_turn(tokens, start, end, tokenizer.stop)
        counts[start:end] = True
    return Encoded(tokens, counts, is_joined)


def _joined(each: Written, given: Sequence[list[int]], tokenizer: Tokenizer) -> tuple[np.ndarray, list[int], list[int]]:
    """Tokens of pieces, put together: for a prompt that ends where the tokenizer would not end a token.

    At inference the model is given the tokens of the prompt alone, and must go on from there.
    """
    tokens: list[int] = []
    starts, ends, position = [], [], 0
    for (begin, end), before in zip(each.spans, given, strict=True):
        tokens += tokenizer.encode_after(each.text[position:begin]) if position else before
        if tokens != before:
            raise DataError(f"the prompt of an answer ends within a token, and answers before it too: {_APART}")
        starts.append(len(tokens))
        tokens += tokenizer.encode_after(each.text[begin:end])
        ends.append(len(tokens))
        position = end
    tokens += tokenizer.encode_after(each.text[position:]) if position < len(each.text) else []
    return np.array(tokens, np.int32), starts, ends


def _end_of_turn(tokens: np.ndarray, start: int, end: int, stop: Sequence[int]) -> int:
    """Where an answer ends: what a template writes after the token that ends it, nobody generates."""
    answer = tokens[start:end].tolist()
    last = max((i for i, token in enumerate(answer, 1) if token in stop), default=len(answer))
    return start + last


def _overlapping(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Which tokens have a character within a span, bool (n,)."""
    counts = np.zeros(len(offsets), bool)
    for begin, end in spans:
        counts |= (offsets[:, 1] > begin) & (offsets[:, 0] < end)
    return counts


def _surrounded(found: Encoded, tokenizer: Tokenizer) -> Encoded:
    """With what the tokenizer puts before a text, and with EOS, which counts; neither stands twice."""
    tokens, counts = found.tokens, found.counts
    begun = np.array(tokenizer.begun(tokens.tolist()), np.int32)
    counts = np.concatenate([np.zeros(len(begun) - len(tokens), bool), counts])
    tokens = begun
    if tokenizer.eos is not None and not (len(tokens) and tokens[-1] == tokenizer.eos):
        tokens, counts = np.append(tokens, np.int32(tokenizer.eos)), np.append(counts, True)
    return Encoded(tokens, counts, found.is_joined)
