"""Whole jobs: a model, its data, its loss, and the run that adapts one to the other."""

from jlora.recipes._config import FullConfig, FunctionConfig, JobConfig, OptimizerConfig, OutputConfig, TrainConfig
from jlora.recipes._folder import Result, Trained, load_run
from jlora.recipes._job import run_job
from jlora.recipes._losses import cross_entropy
from jlora.recipes._plot import write_curve
from jlora.recipes._verify import verify_logits

__all__ = [
    "FullConfig",
    "FunctionConfig",
    "JobConfig",
    "OptimizerConfig",
    "OutputConfig",
    "Result",
    "TrainConfig",
    "Trained",
    "cross_entropy",
    "load_run",
    "run_job",
    "verify_logits",
    "write_curve",
]
