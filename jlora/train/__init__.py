"""Training as a library: a jitted step over adapters alone, batches, a loop, metrics and checkpoints."""

from jlora.train._checkpoint import Checkpoints
from jlora.train._data import Batches, Examples, count_examples
from jlora.train._log import Logger, MetricsLog
from jlora.train._loop import fit
from jlora.train._loss import ExpMean, Mean, Sum
from jlora.train._signals import Interrupted
from jlora.train._step import Loss, Metrics, Step, TrainState, init_state, make_train_step
from jlora.train._tensorboard import TensorBoardLog, has_tensorboard
from jlora.train._watch import DivergedError

__all__ = [
    "Batches",
    "Checkpoints",
    "DivergedError",
    "Examples",
    "ExpMean",
    "Interrupted",
    "Logger",
    "Loss",
    "Mean",
    "Metrics",
    "MetricsLog",
    "Step",
    "Sum",
    "TensorBoardLog",
    "TrainState",
    "count_examples",
    "fit",
    "has_tensorboard",
    "init_state",
    "make_train_step",
]
