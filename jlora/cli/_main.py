"""Arguments, exit codes and messages of the command `jlora`."""

import argparse
import contextlib
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

from jlora.cli._done import EXIT_CODES, REFUSED, Done, StoppedError, add_output_options, json_object, plain_fields
from jlora.cli._eval import add_eval_command
from jlora.cli._files import add_file_commands
from jlora.cli._generate import add_generate_command
from jlora.cli._import import add_import_command
from jlora.cli._inspect import add_inspect_and_diff
from jlora.cli._print import plain_output, say, show
from jlora.cli._signals import exit_code, stopped_by_signals, warnings_in_a_line
from jlora.cli._verify import add_verify_command
from jlora.errors import ConfigError, DataError, JloraError, plain

_TRAIN = """\
Adapts a model with LoRA, as a TOML or JSON file says, and compares with the frozen base, and where the file asks for it
with full fine-tuning.

The file has the sections
  [model]      function = "module:function" that returns the model; other keys are its arguments. It is one of
                 (module, params), (module, params, collections): a Linen module; collections as {"batch_stats": ...}
                 (function, params): any function(params, inputs)
                 (function, params, state): a function(params, state, inputs) that returns (outputs, state)
                 model: an nnx.Module
               or folder = "a language model": a folder of Hugging Face's layout, with dtype and remat ("layer")
  [data]       function = "module:function" that returns (train, test), each a mapping of arrays with "inputs"
               or train and eval = "files of JSON lines" (prompt and completion, messages, or text) for a language
               model, with length (512), packed (true), long ("cut", "drop"), template (false), seed
  [lora]       kind (lora, dora, vera, xs), rank, alpha, dropout, target_modules, exclude_modules, seed, scaling, init,
               init_std, rank_pattern, alpha_pattern, dtype, factorizations, extras
  [optimizer]  name (adamw, adam, lion, sgd), learning_rate, weight_decay, schedule (constant, cosine, linear),
               warmup_steps, clip_norm (0 for none), b_ratio (1; LoRA+), freeze_a (false; LoRA-FA),
               preconditioner (none, riemannian)
  [train]      steps, batch_size, accumulate, seed, loss = "module:function", log_every, eval_every, checkpoint_every
  [full]       enabled (false), learning_rate: the full fine-tuning to compare with
  [generate]   of a language model: prompts, answered before, while and after it is trained; chat (false), whether they
               are what a user says; max_new_tokens (64); exact_match (0), how many prompts of the evaluation file are
               answered before and after, to count the answers that are exactly right
  [output]     folder
Only [model] and [data] have to be given. Of a language model every linear layer is adapted by default; embeddings and
head are where target_modules names them, as in ["model/layers/**/*_proj", "model/embed_tokens", "lm_head"]. Where a
model has parameters of these names it is called with train, training, is_training (true in training), deterministic,
use_running_average (false in training), and a function with key (the step's, None outside of training) or rngs
({"dropout": key}).
"""

_TRAIN_END = """\
examples:
  jlora train configs/digits.toml
  jlora train configs/cron.toml
  jlora train configs/digits.toml lora.rank=2 train.steps=200 output.folder=runs/rank2
  jlora train configs/digits.toml --resume
  jlora train configs/digits.toml train.steps=800 --extend

The output folder holds adapters/, which the other commands and jlora.load_adapters read, model_state/ where the model
changed arrays of its own (batch statistics), checkpoints/ (Orbax) to resume from, config.toml, metrics.jsonl, curve.png
and results.json; jlora.recipes.load_run reads the trained model from it. That of a language model has adapter/ too, the
same in PEFT's format with a model card, and answers.jsonl, what it said to the prompts.

--extend goes on with a run, finished or not, although train.steps is more than before, or optimizer.learning_rate,
optimizer.schedule or optimizer.warmup_steps are others. A schedule is a function of the step and of all steps: from the
step at hand the rate is the one that the new values give there, so that a cosine that had come to its end begins higher
again. Everything else has to stay as it was.

Ctrl-C, SIGTERM and SIGHUP save after the step at hand, and say how to go on; a second one stops at once. Those that are
ignored, as under nohup, stay so.
"""

_INTERRUPTED = "interrupted; the same command goes on where it can, or starts anew"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments and returns its exit code."""
    with plain_output():
        return _run(sys.argv[1:] if argv is None else argv)


def _run(words: Sequence[str]) -> int:
    parser = _parser("--json" in words)
    arguments, rest = parser.parse_known_args(words)
    if unknown := [word for word in rest if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest and not hasattr(arguments, "overrides"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest  # argparse leaves those that stand behind an option
    try:
        with stopped_by_signals(), warnings_in_a_line():
            done = arguments.run(arguments)
            _show(arguments, done)
            return done.code
    except JloraError as error:
        return _refused(arguments, str(error))
    except OSError as error:
        return _refused(arguments, plain(str(error)))
    except ModuleNotFoundError as error:
        if error.name not in ("orbax", "sklearn", "matplotlib"):
            return _unforeseen(arguments, error)
        return _refused(arguments, f"{error.name} is not installed: pip install 'jlora[train]'")
    except StoppedError as error:
        say("")
        return _refused(arguments, str(error), error.code)
    except KeyboardInterrupt as error:
        say("")
        return _refused(arguments, _INTERRUPTED, exit_code(error))
    except Exception as error:
        return _unforeseen(arguments, error)


def _show(arguments: argparse.Namespace, done: Done) -> None:
    for error in done.errors:
        say(f"jlora: {error}")
    if arguments.json:
        show(json_object(arguments.command, done.code, done.fields))
    elif done.text and not arguments.quiet:
        show(done.text)


def _refused(arguments: argparse.Namespace, message: str, code: int = REFUSED) -> int:
    """Says on standard error what is wrong, and in the object of --json as well."""
    say(f"jlora: {message}")
    if arguments.json:
        with contextlib.suppress(DataError):  # which cannot be written either
            show(json_object(arguments.command, code, {"error": message}))
    return code


def _unforeseen(arguments: argparse.Namespace, error: Exception) -> int:
    """Shows the traceback of an error in a user's own code, or in jlora; Python's exit code is that of differences."""
    sys.excepthook(type(error), error, error.__traceback__)
    return _refused(arguments, plain(f"stopped by {type(error).__name__}: {error}"))


def _parser(is_json: bool) -> argparse.ArgumentParser:
    from jlora import __version__

    class Parser(argparse.ArgumentParser):
        """A parser whose errors are an object too where --json is among the words."""

        def error(self, message: str) -> NoReturn:
            if is_json:
                command = self.prog.partition(" ")[2] or None
                with contextlib.suppress(DataError):
                    show(json_object(command, REFUSED, {"error": message}))
            super().error(message)

        def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
            try:
                show("", end="")  # --help, which is printed by now
            except DataError as error:
                status, message = REFUSED, f"jlora: {error}\n"
            super().exit(status, message)

    parser = Parser(prog="jlora", description="Low-rank adaptation (LoRA) for JAX.", epilog=EXIT_CODES)
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
    add_output_options(train, '"out" and "results", for each way of adapting the fields of jlora.recipes.Result')
    train.set_defaults(run=_train, command="train")
    add_file_commands(commands)
    add_inspect_and_diff(commands)
    add_generate_command(commands)
    add_eval_command(commands)
    add_import_command(commands)
    add_verify_command(commands)
    return parser


def _train(arguments: argparse.Namespace) -> Done:
    from rich.console import Console

    from jlora.recipes import JobConfig, run_job
    from jlora.train import Interrupted

    sys.path.insert(0, "")  # a user's own module:function, from the folder of the call
    if arguments.extend and arguments.force:
        raise ConfigError("--extend goes on with the run that --force replaces: give one of them")
    job = JobConfig.read(arguments.config, arguments.overrides)
    console = Console(quiet=arguments.quiet or arguments.json)
    try:
        results = run_job(job, resume=arguments.resume, extend=arguments.extend, force=arguments.force, console=console)
    except Interrupted as error:
        again = shlex.join(["jlora", "train", arguments.config, *arguments.overrides, "--resume"])
        raise StoppedError(f"{error}; go on with: {again}", exit_code(error)) from None
    except KeyboardInterrupt as error:
        message = "interrupted before the run began; give the same command again"
        raise StoppedError(message, exit_code(error)) from None
    return Done("", {"out": job.output.folder, "results": plain_fields(results)})
