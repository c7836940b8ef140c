"""Compiles and times the forms of one workload, interleaved, so that what else the machine does hits all alike."""

import gc
import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from benchmarks.check import CheckError, Reference
from benchmarks.forms import FORMS
from benchmarks.problem import Case, Problem, Unsupported
from benchmarks.workloads import WORKLOADS

COMPILES = 3
Say = Callable[[str], None]


@dataclass
class Cell:
    """One form on one workload; `missing` is the sentence that says why there is nothing."""

    seconds: list[float] = field(default_factory=list)
    compile_seconds: list[float] = field(default_factory=list)
    flops: float | None = None
    temp_bytes: int | None = None
    missing: str | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def compile_median(self) -> float | None:
        return statistics.median(self.compile_seconds) if self.compile_seconds else None


Cells = dict[str, Cell]


class Runner:
    """One form's step, its state and its compiled program."""

    def __init__(self, problem: Problem, case: Case) -> None:
        self.problem, self.data = problem, (problem.frozen, case.inputs, case.labels)
        self.state = problem.state()
        self.program: Any = None

    def compile(self) -> float:
        """Seconds to trace and compile from cold: a fresh jit, and nothing left in JAX's caches."""
        jax.clear_caches()
        gc.collect()
        start = time.perf_counter()
        step = jax.jit(lambda *args: self.problem.step(*args), donate_argnums=0)
        self.program = step.lower(self.state, *self.data).compile()
        return time.perf_counter() - start

    def run(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self.state, other = self.program(self.state, *self.data)
        jax.block_until_ready((self.state, other))
        return time.perf_counter() - start


def measure(name: str, forms: Sequence[str], repeats: int, cells: Cells, say: Say) -> None:
    """Fills `cells` as it goes, so that an interrupted run still has what was measured."""
    say(f"{name}: checking {len(forms)} forms against the merged one")
    runners = checked(name, forms, cells, say)
    compiles = min(COMPILES, repeats)
    for number, form in shuffled(runners, compiles):
        say(f"{name}: compiling, round {number + 1} of {compiles}")
        cells[form].compile_seconds.append(runners[form].compile())
    for form, runner in runners.items():
        cells[form].flops, cells[form].temp_bytes = costs(runner.program)
        runner.run()
    for number, form in shuffled(runners, repeats):
        say(f"{name}: timing, round {number + 1} of {repeats}")
        cells[form].seconds.append(runners[form].run())


def checked(name: str, forms: Sequence[str], cells: Cells, say: Say) -> dict[str, Runner]:
    """The forms that can do this workload, each checked before any is timed."""
    case = Case.make(WORKLOADS[name])
    timed, reference = case.timed(), Reference(name, case)
    runners = {}
    for form in forms:
        cell = cells[form] = Cell()
        package = FORMS[form].package
        if package and importlib.util.find_spec(package) is None:
            cell.missing = f"{package} is not installed."
            continue
        try:
            problem = FORMS[form].build(case)
            reference.check(form, problem)
        except Unsupported as reason:
            cell.missing = str(reason)
        except CheckError:
            raise
        except Exception as error:
            if not package:
                raise
            # Another library that fails here is a finding, not the end of an hour's run; it is said aloud.
            cell.missing = f"It raised {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
            say(f"{name}: {form} fails: {cell.missing}\n")
        else:
            runners[form] = Runner(problem if timed is case else FORMS[form].build(timed), timed)
    return runners


def shuffled(runners: Sequence[str] | dict[str, Any], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, form), each form once a round, in an order of the round's own that is the same in every run."""
    for number in range(rounds):
        order = list(runners)
        random.Random(number).shuffle(order)
        for form in order:
            yield number, form


def costs(program: Any) -> tuple[float | None, int | None]:
    """FLOPs and bytes of temporaries as XLA counts them, where the backend does. A scan's body is counted once."""
    analysis, memory = program.cost_analysis() or {}, program.memory_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return analysis.get("flops"), getattr(memory, "temp_size_in_bytes", None)
