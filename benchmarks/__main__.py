"""What a train step over adapters costs: `python -m benchmarks`.

Every form is a whole jitted step, forward, backward and Adam, of the same model with the same weights, adapters and
loss; before it is timed, its loss and its gradients are checked against the merged form.

How to read the table. The first columns are the step's median time over the floor's, one column a workload. The floor
is the step without adapters: forward, and backward for activations only, which no way of training adapters can leave
out. It is the faster of `floor` and `floor_plain`. It goes back to the model's first activations, which adapters do
not need, so that a ratio can fall a little under 1. For A and B there follow the FLOPs over the floor's, the megabytes
of temporaries, and the time to trace and compile over that of `hand_flat`, from cold. The last row says what 1.00 is.
`-` is what a form cannot do, or what was not measured; why is said below the table and in the JSON.

FLOPs and megabytes are XLA's own counts and the same in every run; times are not. Rounds are interleaved, so that a
busy machine slows all forms alike, but close the browser. The JSON holds every sample.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from benchmarks import report
from benchmarks.check import CheckError
from benchmarks.forms import FLOORS, FORMS
from benchmarks.measure import Cells, measure
from benchmarks.workloads import WORKLOADS


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = [name for name, workload in WORKLOADS.items() if not workload.asked]
    parser.add_argument("--workloads", default=",".join(common), metavar="A,B,...", help=f"default: {','.join(common)}")
    parser.add_argument("--forms", default=",".join(FORMS), metavar="NAME,...", help="default: all; floors always")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="rounds of timing; default: 20")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("results.json"), metavar="PATH")
    parser.add_argument("--list", action="store_true", help="name the workloads and forms, and end")
    args = parser.parse_args(argv)
    args.workloads = names(parser, "workloads", args.workloads, list(WORKLOADS))
    args.forms = names(parser, "forms", args.forms, list(FORMS))
    args.forms = [form for form in FORMS if form in (*FLOORS, *args.forms)]
    if args.repeats < 1:
        parser.error(f"--repeats: found {args.repeats}, wanted at least 1")
    if not args.json.parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.parent}")
    return args


def names(parser: argparse.ArgumentParser, what: str, text: str, known: list[str]) -> list[str]:
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        parser.error(f"--{what}: unknown {', '.join(unknown) or 'empty list'}; known are {', '.join(known)}")
    return list(dict.fromkeys(wanted))


class Progress:
    """What is going on, on stderr: one line that is written over, or in a log a line for each change."""

    def __init__(self) -> None:
        self.last = ""
        self.over = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        """A text that ends in a newline stays."""
        if text == self.last:
            return
        self.last = text
        line = f"\r\x1b[K{text}" if self.over else f"{text.strip()}\n"
        print(line, end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.over:
            self("")


def listing() -> str:
    width = max(map(len, (*WORKLOADS, *FORMS)))
    both = (("workloads", WORKLOADS), ("forms", FORMS))
    lines = ([title, *(f"  {name:{width}}  {item.about}" for name, item in items.items())] for title, items in both)
    return "\n".join(line for part in lines for line in part)


def finish(results: dict[str, Cells], args: argparse.Namespace, complete: bool) -> None:
    print(report.table(results))
    for reason, where in report.missing(results).items():
        print(f"- {', '.join(where)}: {reason}")
    report.write(args.json, report.as_data(results, args.repeats, complete))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.list:
        print(listing())
        return 0
    jax.config.update("jax_enable_compilation_cache", False)  # a cache on disk would make compiling look free
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started without it
    results: dict[str, Cells] = {}
    progress = Progress()
    try:
        for name in args.workloads:
            measure(name, args.forms, args.repeats, results.setdefault(name, {}), progress)
        status, problem = 0, ""
    except KeyboardInterrupt:
        status, problem = 130, "interrupted: this is what was measured so far"
    except CheckError as error:
        status, problem = 1, f"error: {error}"
    progress.clear()
    finish(results, args, complete=status == 0)
    if problem:
        print(problem, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
