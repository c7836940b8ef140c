"""Texts to numbers and back, as the folder of a model says."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlora.errors import DataError
from jlora.text._imports import told_as
from jlora.text._template import ChatTemplate, Conversation, Message

_ANCHORS, _PROBE = ("\n", "a", "0", "."), "jlora"


class NoTemplateError(DataError):
    """Messages, and a folder without a chat template."""


class Tokenizer:
    """The tokenizer of a model's folder, with its chat template: `read_tokenizer` reads one.

    Attributes:
      folder: where it was read.
      vocabulary_size: the highest number of a token and one more; a model's embedding has at least so many rows.
      bos, eos: the tokens that begin and end a text, by the folder's word; None where it names none.
      pad: a token to fill rows with; its number is of no meaning, as padding never counts.
      stop: the tokens that end an answer, in order: the end of a text, those of generation_config.json, and what the
        chat template writes after what the assistant says.
      template: the chat template; None where the folder has none.
    """

    def __init__(
        self,
        folder: Path,
        backend: Any,
        special: Mapping[str, str],
        ends: Iterable[int],
        template: ChatTemplate | None,
        tool_template: ChatTemplate | None,
    ) -> None:
        self.folder = folder
        self.template = template
        self._backend = backend
        self._failure = f"{folder / 'tokenizer.json'}: it makes no tokens of a text"
        self._tool_template = tool_template
        self._numbers = backend.get_vocab(with_added_tokens=True)
        self._special = {number for number, token in backend.get_added_tokens_decoder().items() if token.special}
        self.vocabulary_size = max(self._numbers.values(), default=-1) + 1
        self.bos = self._number(special.get("bos_token"))
        self.eos = self._number(special.get("eos_token"))
        pad = self._number(special.get("pad_token"))
        self._before = self._before_a_text()
        self._anchors = [(anchor, self.encode(anchor)) for anchor in _ANCHORS]
        self.stop = tuple(sorted({*ends, *([] if self.eos is None else [self.eos]), *self._ends_of_a_turn()}))
        self.pad = next((number for number in (pad, self.eos, *self.stop) if number is not None), 0)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The tokens of a text; with `special`, also those that the tokenizer puts around one, such as BOS.

        What stands in the text for a special token, such as `<|im_end|>`, becomes that token.
        """
        return self.encode_all([text], special)[0]

    def encode_all(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """The tokens of many texts, on all cores."""
        with told_as(self._failure):
            found = self._backend.encode_batch_fast(list(texts), add_special_tokens=special)
        return [each.ids for each in found]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each text its tokens, int32 (n,), and where each begins and ends in it, in characters, int64 (n, 2)."""
        with told_as(self._failure):
            found = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [
            (np.array(each.ids, np.int32), np.array(each.offsets, np.int64).reshape(len(each.ids), 2)) for each in found
        ]

    def encode_after(self, text: str) -> list[int]:
        """The tokens of a text that goes on after another: without the space that some put at a text's beginning."""
        for anchor, before in self._anchors:
            tokens = self.encode(anchor + text)
            if tokens[: len(before)] == before:  # or the text begins with what the anchor melts into
                return tokens[len(before) :]
        return self.encode(text)

    def decode(self, tokens: Iterable[int], special: bool = False) -> str:
        """The text of tokens; special ones are left out unless `special`."""
        return self._backend.decode([int(token) for token in tokens], skip_special_tokens=not special)

    def chat(self, messages: Sequence[Message], generate: bool = False, **variables: Any) -> str:
        """Messages as one string, by the chat template.

        Args:
          messages: each with a `role` and a `content`.
          generate: whether to go on to where the assistant begins to speak.
          **variables: `tools`, `documents`, and others that the template knows.

        Raises:
          DataError: there is no template, or it refuses the messages.
        """
        conversation = Conversation(messages, variables)
        return self.template_for(conversation).write(conversation, generate=generate)

    def prompt(self, prompt: str | Sequence[Message], **variables: Any) -> list[int]:
        """The tokens that a model is given to go on from: the same as it was given in training.

        A string is a plain text, begun as the tokenizer begins one; messages go through the chat template, up to where
        the assistant begins to speak.
        """
        if isinstance(prompt, str):
            return self.begun(self.encode(prompt))
        return self.encode(self.chat(prompt, True, **variables))

    def begun(self, tokens: list[int]) -> list[int]:
        """Tokens after what the tokenizer puts before a text (BOS, or nothing), unless it stands there already."""
        return tokens if tokens[: len(self._before)] == self._before else self._before + tokens

    def template_for(self, conversation: Conversation) -> ChatTemplate:
        """The chat template for a conversation; some folders have another for those with tools."""
        template = self.template
        if self._tool_template is not None and conversation.variables.get("tools"):
            template = self._tool_template
        if template is None:
            raise NoTemplateError(
                f"{self.folder} has no chat template (chat_template.jinja, or chat_template of tokenizer_config.json), "
                "which messages need: write prompts and completions as strings, or add the template"
            )
        return template

    def _number(self, token: str | None) -> int | None:
        return None if token is None else self._numbers.get(token)

    def _before_a_text(self) -> list[int]:
        plain, whole = self.encode("a"), self.encode("a", special=True)
        starts = range(len(whole) - len(plain) + 1)
        start = next((start for start in starts if whole[start : start + len(plain)] == plain), 0)
        return whole[:start]

    def _ends_of_a_turn(self) -> list[int]:
        """The first special token that the template writes after what the assistant says."""
        if self.template is None:
            return []
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
        try:
            written = self.chat(turns)
        except DataError:  # a template for other messages: nothing is known of its ends
            return []
        after = written.rpartition(_PROBE)[2]
        return [token for token in self.encode(after) if token in self._special][:1]
