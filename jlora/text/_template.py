"""Chat templates: Jinja programs of a stranger, run in a sandbox, with the language that transformers gives them.

The language (transformers, utils/chat_template_utils.py): blocks leave no line of their own, loops have break and
continue; `raise_exception`, `strftime_now`, a `tojson` that escapes nothing, and `{% generation %}` around what the
assistant says.
"""

import dataclasses
import datetime
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jlora.errors import DataError, shortened
from jlora.text._imports import imported

Message = Mapping[str, Any]
Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages, and what else a template is told beside them.

    Attributes:
      messages: each with a `role`, and nearly always a `content`.
      variables: `tools`, `documents`, and others that the template knows, such as `enable_thinking`.
    """

    messages: Sequence[Message]
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def first(self, count: int) -> "Conversation":
        """The same with its first messages only."""
        return Conversation(self.messages[:count], self.variables)


class ChatTemplate:
    """The program that writes a conversation as one string.

    Attributes:
      path: the file that it is from.
      marks: whether it marks what the assistant says by `{% generation %}`.
    """

    def __init__(self, source: str, path: Path, variables: Mapping[str, str], now: datetime.datetime | None) -> None:
        self.path = path
        self._variables = dict(variables)
        sandbox = imported("jlora.text._sandbox")
        self._opens, self._closes, self._refusal = sandbox.OPENS, sandbox.CLOSES, sandbox.RefusalError
        self._marks = re.compile(f"([{self._opens}{self._closes}])")
        self._sandbox = sandbox.Sandbox(now)
        try:
            self._template = self._sandbox.compile(source)
        except Exception as error:
            raise DataError(f"{path}: not a chat template: {_said(error)}") from None
        self.marks = self._sandbox.has_marks(source)

    def write(self, conversation: Conversation, *, generate: bool = False) -> str:
        """The conversation as one string, with `generate` up to where the assistant begins to speak."""
        return self._marks.sub("", self._render(conversation, generate))

    def write_marked(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The conversation as one string, and where in it stands what the assistant says, by the template's marks."""
        pieces = self._marks.split(self._render(conversation, False))
        text, spans, begin = "", [], None
        for piece in pieces:
            if piece == self._opens:
                begin = len(text)
            elif piece == self._closes and begin is not None:
                spans.append((begin, len(text)))
                begin = None
            elif piece != self._closes:
                text += piece
        return text, spans

    def _render(self, conversation: Conversation, generate: bool) -> str:
        # A key whose value is null is one that is not there: transformers 5 drops it, or templates write "None".
        messages = [{k: v for k, v in message.items() if v is not None} for message in conversation.messages]
        told = {"tools": None, "documents": None} | self._variables | dict(conversation.variables)
        told |= {"messages": messages, "add_generation_prompt": generate}
        try:
            return self._sandbox.render(self._template, told)
        except self._refusal as refusal:
            raise DataError(f"the chat template refuses: {shortened(str(refusal), 300)}") from None
        except Exception as error:
            raise DataError(f"the chat template {self.path} failed: {_said(error)}") from None


def _said(error: Exception) -> str:
    """What a template, or Jinja, says of a failure."""
    line = getattr(error, "lineno", None)
    where = f"line {line}: " if line else ""
    return f"{where}{type(error).__name__}: {shortened(str(error), 300)}"
