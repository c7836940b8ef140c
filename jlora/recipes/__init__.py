"""Whole jobs: a model, its data, its loss, and the run that adapts one to the other; language models that answer."""

from typing import TYPE_CHECKING

from jlora.faces import lazy_face
from jlora.text import Question

if TYPE_CHECKING:
    from jlora.recipes._config import (
        FullConfig,
        FunctionConfig,
        GenerateConfig,
        JobConfig,
        OptimizerConfig,
        OutputConfig,
        TrainConfig,
    )
    from jlora.recipes._evaluate import LanguageTest, evaluate, is_match, read_language_test
    from jlora.recipes._folder import Trained, load_run
    from jlora.recipes._job import run_job
    from jlora.recipes._language import LanguageModel, read_language_model
    from jlora.recipes._loaded import FolderAdapters, LoadedModel, base_of, load_language_model, read_adapter_folder
    from jlora.recipes._losses import cross_entropy, next_token
    from jlora.recipes._plot import write_curve
    from jlora.recipes._replies import Reply, Sampling, check_questions, replies
    from jlora.recipes._results import Result, shown_metric
    from jlora.recipes._verify import verify_logits

__all__ = [
    "FolderAdapters",
    "FullConfig",
    "FunctionConfig",
    "GenerateConfig",
    "JobConfig",
    "LanguageModel",
    "LanguageTest",
    "LoadedModel",
    "OptimizerConfig",
    "OutputConfig",
    "Question",
    "Reply",
    "Result",
    "Sampling",
    "TrainConfig",
    "Trained",
    "base_of",
    "check_questions",
    "cross_entropy",
    "evaluate",
    "is_match",
    "load_language_model",
    "load_run",
    "next_token",
    "read_adapter_folder",
    "read_language_model",
    "read_language_test",
    "replies",
    "run_job",
    "shown_metric",
    "verify_logits",
    "write_curve",
]

# To answer a prompt takes no matplotlib, Orbax, Flax or optax, which take longer to import than that.
__getattr__, __dir__ = lazy_face(
    __name__,
    {
        "jlora.recipes._config": (
            "FullConfig",
            "FunctionConfig",
            "GenerateConfig",
            "JobConfig",
            "OptimizerConfig",
            "OutputConfig",
            "TrainConfig",
        ),
        "jlora.recipes._evaluate": ("LanguageTest", "evaluate", "is_match", "read_language_test"),
        "jlora.recipes._folder": ("Trained", "load_run"),
        "jlora.recipes._job": ("run_job",),
        "jlora.recipes._language": ("LanguageModel", "read_language_model"),
        "jlora.recipes._loaded": (
            "FolderAdapters",
            "LoadedModel",
            "base_of",
            "load_language_model",
            "read_adapter_folder",
        ),
        "jlora.recipes._losses": ("cross_entropy", "next_token"),
        "jlora.recipes._plot": ("write_curve",),
        "jlora.recipes._replies": ("Reply", "Sampling", "check_questions", "replies"),
        "jlora.recipes._results": ("Result", "shown_metric"),
        "jlora.recipes._verify": ("verify_logits",),
    },
)
