"""Forms that are measured in a process each, which has a peak of memory and a start of its own, and take turns."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

_ROOT = Path(__file__).parent.parent


def serve(run: Callable[[], object], found: dict[str, float], *, torch: bool) -> None:
    """The process of a form, which is ready: a line in is a step, a line out what it took.

    Args:
      run: does a step, and returns when it is done.
      found: what is said first.
      torch: whether its memory is torch's, and not JAX's.
    """
    print(json.dumps(found), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        run()
        print(json.dumps({"step": time.perf_counter() - began, "peak": _peak(torch)}), flush=True)


def _peak(of_torch: bool) -> float:
    """The most memory at once: of the GPU where there is one, else of the process, in MiB."""
    if of_torch:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 2**20
    else:
        import jax

        if stats := jax.devices()[0].memory_stats():
            return stats["peak_bytes_in_use"] / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class Worker:
    """A form in a process of its own.

    Args:
      module: that is run with `--work FORM` and the words, and calls `serve`.
      cache: where it keeps what is compiled.

    Attributes:
      found: what it says of itself; `start` are the seconds until it is ready.
      steps: the seconds of its steps.
    """

    def __init__(self, module: str, form: str, words: list[str], cache: Path) -> None:
        environment = {"PYTHONPATH": str(_ROOT), **os.environ}
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        began = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--work", form, *words],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.found = self._read(form)
        self.found["start"] = time.perf_counter() - began
        self.steps: list[float] = []

    def _read(self, form: str = "") -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{form}: ended with {self.process.wait()}")
        return json.loads(line)

    def step(self) -> None:
        """One step, measured."""
        assert self.process.stdin is not None
        print("step", file=self.process.stdin, flush=True)
        told = self._read()
        self.steps.append(told["step"])
        self.found["peak"] = told["peak"]

    def end(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
