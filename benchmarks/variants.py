"""`python -m benchmarks.variants`: train steps of VeRA and LoRA-XS over those of plain LoRA, of the same rank.

The workloads are those of `python -m benchmarks`. Steps take turns in an order of each round's own, so that what else
the machine does hits all alike; the table has the medians of the rounds' ratios, FLOPs and temporaries as XLA counts
them, and what is trained.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax

import jlora
from benchmarks.forms import by_jlora
from benchmarks.measure import Runner, costs, shuffled
from benchmarks.problem import Case, Problem
from benchmarks.products import PLAIN
from benchmarks.workloads import WORKLOADS
from jlora import variants
from jlora.tables import text_table
from jlora.transform import resolve_config

COLUMNS = ("workload", "rank", "variant", "step", "FLOPs", "temporaries", "trained")


def by_variant(kind: str, case: Case) -> Problem:
    """The smaller tree of a variant in front of the transform."""
    fn = partial(case.workload.apply, PLAIN)
    config = resolve_config(fn, case.config.replace(kind=kind), case.params, case.inputs)
    model = jlora.lora(fn, config)
    trained, frozen = variants.init(None, case.params, config)

    def loss(trained: Any, given: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        params, frozen = given
        adapters = variants.adapters(trained, frozen, params, config)
        return case.workload.loss(model(params, adapters, inputs), labels)

    return Problem(trained, (case.params, frozen), jax.value_and_grad(loss))


def rows_of(name: str, rank: int, rounds: int) -> list[tuple[str, ...]]:
    """The rows of one workload at one rank."""
    case = Case.make(WORKLOADS[name], rank)
    problems = {"lora": by_jlora(PLAIN, case)} | {kind: by_variant(kind, case) for kind in variants.KINDS}
    runners = {kind: Runner(problem, case) for kind, problem in problems.items()}
    for runner in runners.values():
        runner.compile()
        runner.run()
    seconds: dict[str, list[float]] = {kind: [] for kind in runners}
    for _, kind in shuffled(runners, rounds):
        seconds[kind].append(runners[kind].run())
    flops_of_lora, memory_of_lora = costs(runners["lora"].program)
    rows = []
    for kind, runner in runners.items():
        ratios = [own / plain for own, plain in zip(seconds[kind], seconds["lora"], strict=True)]
        flops, memory = costs(runner.program)
        shares = [
            f"{own / plain:.3f}" if own and plain else "-"
            for own, plain in ((flops, flops_of_lora), (memory, memory_of_lora))
        ]
        trained = jlora.count_params(problems[kind].trained)
        rows.append((name, str(rank), kind, f"{statistics.median(ratios):.3f}", *shares, f"{trained:,}"))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.variants", description=__doc__)
    parser.add_argument("workloads", nargs="*", default=["A", "llama"], help="of python -m benchmarks")
    parser.add_argument("--rank", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    rows: list[tuple[str, ...]] = []
    for name in options.workloads:
        for rank in options.rank:
            print(f"{name}, rank {rank}", file=sys.stderr)
            rows += rows_of(name, rank, options.rounds)
    print(text_table(COLUMNS, rows, left=3))


if __name__ == "__main__":
    main()
