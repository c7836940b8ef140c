"""What a language model answers: prompts before, while and after it is trained, and exact matches."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from jlora.config import LoraConfig
from jlora.disk import read_json_lines, write_whole
from jlora.errors import DataError, shortened
from jlora.recipes._config import GenerateConfig
from jlora.recipes._evaluate import share_of_matches
from jlora.recipes._language import LanguageModel
from jlora.recipes._loaded import LoadedModel
from jlora.recipes._replies import Reply, Sampling, check_questions, replies
from jlora.text import Question
from jlora.transform import lora


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
        turns = [[{"role": "user", "content": text}] if asked.chat else text for text in asked.prompts]
        self._prompts = [Question(turn) for turn in turns]
        self._texts = asked.prompts
        self._questions = questions[: asked.exact_match]
        self._sampling = Sampling(max_new_tokens=asked.max_new_tokens)
        self._model = LoadedModel(language, lora(language.function(), config), params)
        # What cannot be asked is said before anything is written.
        check_questions(language, [*self._prompts, *self._questions], self._sampling)

    @property
    def has_prompts(self) -> bool:
        """Whether there is anything to show."""
        return bool(self._prompts)

    def exact_match(self, adapters: Any) -> dict[str, float]:
        """The share of the questions that are answered exactly, as a metric; nothing where there are none."""
        if not self._questions:
            return {}
        return {"exact_match": share_of_matches(self._questions, self._answers(self._questions, adapters))}

    def show(self, step: int, adapters: Any, log: "AnswersLog", console: Console) -> None:
        """Prints what is answered to the prompts at a step, and writes it."""
        console.out(f"answers at step {step}", highlight=False)
        for prompt, reply in zip(self._texts, self._answers(self._prompts, adapters), strict=True):
            console.out(f"  {shortened(prompt)} -> {shortened(reply.answer, 200)}", highlight=False)
            log.write({"step": step, "prompt": prompt, "answer": reply.answer})

    def _answers(self, questions: Sequence[Question], adapters: Any) -> list[Reply]:
        return list(replies(dataclasses.replace(self._model, adapters=adapters), questions, self._sampling))


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
