"""What a language model answers: prompts before, while and after it is trained, and exact matches."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from jlora.config import LoraConfig
from jlora.errors import shortened
from jlora.recipes._config import GenerateConfig
from jlora.recipes._evaluate import share_of_matches
from jlora.recipes._language import LanguageModel
from jlora.recipes._loaded import LoadedModel
from jlora.recipes._replies import Reply, Sampling, check_questions, replies
from jlora.text import Question
from jlora.train import MetricsLog
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


class AnswersLog(MetricsLog):
    """Answers as JSON lines, `{"step": 10, "prompt": "...", "answer": "..."}`; else as `MetricsLog`."""

    values = (int, str)
    called = "texts"
