"""Arguments, exit codes and messages of the command `jlora`."""

import argparse
import shlex
import sys
from collections.abc import Sequence

from jlora.cli._files import add_file_commands
from jlora.cli._signals import exit_code, say, stopped_by_signals
from jlora.errors import ConfigError, JloraError, plain

_TRAIN = """\
Adapts a model with LoRA, as a TOML or JSON file says, and compares with the frozen base, and where the file asks for it
with full fine-tuning.

The file has the sections
  [model]      function = "module:function" that returns the model; other keys are its arguments. It is one of
                 (module, params), (module, params, collections): a Linen module; collections as {"batch_stats": ...}
                 (function, params): any function(params, inputs)
                 (function, params, state): a function(params, state, inputs) that returns (outputs, state)
                 model: an nnx.Module
  [data]       function = "module:function" that returns (train, test), each a mapping of arrays with "inputs"
  [lora]       rank, alpha, dropout, target_modules, exclude_modules, seed, scaling, init, init_std, rank_pattern,
               alpha_pattern, dtype, factorizations, extras
  [optimizer]  name (adamw, adam, lion, sgd), learning_rate, weight_decay, schedule (constant, cosine, linear),
               warmup_steps, clip_norm (0 for none)
  [train]      steps, batch_size, accumulate, seed, loss = "module:function", log_every, eval_every, checkpoint_every
  [full]       enabled (false), learning_rate: the full fine-tuning to compare with
  [output]     folder
Only the two functions have to be given. Where a model has parameters of these names it is called with train, training,
is_training (true in training), deterministic, use_running_average (false in training), and a function with key (the
step's, None outside of training) or rngs ({"dropout": key}).
"""

_TRAIN_END = """\
examples:
  jlora train configs/digits.toml
  jlora train configs/digits.toml lora.rank=2 train.steps=200 output.folder=runs/rank2
  jlora train configs/digits.toml --resume
  jlora train configs/digits.toml train.steps=800 --extend

The output folder holds adapters/, which the other commands and jlora.load_adapters read, model_state/ where the model
changed arrays of its own (batch statistics), checkpoints/ (Orbax) to resume from, config.toml, metrics.jsonl, curve.png
and results.json; jlora.recipes.load_run reads the trained model from it.

--extend goes on with a run, finished or not, although train.steps is more than before, or optimizer.learning_rate,
optimizer.schedule or optimizer.warmup_steps are others. A schedule is a function of the step and of all steps: from the
step at hand the rate is the one that the new values give there, so that a cosine that had come to its end begins higher
again. Everything else has to stay as it was.

Ctrl-C, SIGTERM and SIGHUP save after the step at hand, and say how to go on; a second one stops at once. Those that are
ignored, as under nohup, stay so. Exit codes: 0 done, 2 something in the call or its files is wrong, 130 interrupted by
Ctrl-C, 143 by SIGTERM, 129 by SIGHUP.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments and returns its exit code."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if unknown := [word for word in rest if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest and not hasattr(arguments, "overrides"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest  # argparse leaves those that stand behind an option
    try:
        with stopped_by_signals():
            return arguments.run(arguments)
    except JloraError as error:
        say(f"jlora: {error}")
    except OSError as error:
        say(f"jlora: {plain(str(error))}")
    except ModuleNotFoundError as error:
        if error.name not in ("orbax", "sklearn", "matplotlib"):
            raise
        say(f"jlora: {error.name} is not installed: pip install 'jlora[train]'")
    except KeyboardInterrupt as error:
        say("\njlora: interrupted; the same command goes on where it can, or starts anew")
        return exit_code(error)
    return 2


def _parser() -> argparse.ArgumentParser:
    from jlora import __version__

    parser = argparse.ArgumentParser(prog="jlora", description="Low-rank adaptation (LoRA) for JAX.")
    parser.add_argument("--version", action="version", version=f"jlora {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    train = commands.add_parser(
        "train",
        help="adapt a model with LoRA, as a file says",
        description=_TRAIN,
        epilog=_TRAIN_END,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("config", metavar="CONFIG", help="the .toml or .json file of the job")
    train.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="a value of the file, changed for this run",
    )
    again = train.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the output folder")
    train.add_argument("--extend", action="store_true", help="go on with more steps, or another rate or schedule")
    again.add_argument("--force", action="store_true", help="replace the run that the output folder holds")
    train.set_defaults(run=_train)
    add_file_commands(commands)
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from jlora.recipes import JobConfig, run_job
    from jlora.train import Interrupted

    sys.path.insert(0, "")  # a user's own module:function, from the folder of the call
    if arguments.extend and arguments.force:
        raise ConfigError("--extend goes on with the run that --force replaces: give one of them")
    job = JobConfig.read(arguments.config, arguments.overrides)
    try:
        run_job(job, resume=arguments.resume, extend=arguments.extend, force=arguments.force)
    except Interrupted as error:
        again = shlex.join(["jlora", "train", arguments.config, *arguments.overrides, "--resume"])
        say(f"\njlora: {error}; go on with: {again}")
        return exit_code(error)
    except KeyboardInterrupt as error:
        say("\njlora: interrupted before the run began; give the same command again")
        return exit_code(error)
    return 0
