"""Whole jobs: a model, its data, its loss, and the run that adapts one to the other."""

from jlora.recipes._answers import Question
from jlora.recipes._ask import Reply, Sampling, evaluate, read_prompts, replies
from jlora.recipes._config import (
    FullConfig,
    FunctionConfig,
    GenerateConfig,
    JobConfig,
    OptimizerConfig,
    OutputConfig,
    TrainConfig,
)
from jlora.recipes._folder import Trained, load_run
from jlora.recipes._job import run_job
from jlora.recipes._language import LanguageModel, read_language_model
from jlora.recipes._loaded import LoadedModel, load_language_model
from jlora.recipes._losses import cross_entropy, next_token
from jlora.recipes._plot import write_curve
from jlora.recipes._verify import verify_logits
from jlora.recipes._results import Result, shown_metric

__all__ = [
    "FullConfig",
    "FunctionConfig",
    "GenerateConfig",
    "JobConfig",
    "LanguageModel",
    "LoadedModel",
    "OptimizerConfig",
    "OutputConfig",
    "Question",
    "Reply",
    "Result",
    "Sampling",
    "TrainConfig",
    "Trained",
    "cross_entropy",
    "evaluate",
    "load_language_model",
    "load_run",
    "next_token",
    "read_language_model",
    "read_prompts",
    "replies",
    "run_job",
    "verify_logits",
    "shown_metric",
    "write_curve",
]
