"""Settings of every test: the CPU, programs compiled once in a run, and property tests that are the same each time."""

import collections
import gc
import os
import signal
import tempfile
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import numpy as np
import pytest

# Half of the time of the tests was compiling, and programs that run a few times need not be fast.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):  # JAX 0.12 does not know it
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # of no use in a program that nobody looks at

for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):  # which a job in the background ignores
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

hypothesis.settings.register_profile("jlora", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("jlora")
gc.set_threshold(100_000, 50)  # the programs that JAX keeps are many objects to look through again and again


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every", type=int, default=1, metavar="N", help="of the cases of each test the first and every N-th after it"
    )


@pytest.hookimpl(trylast=True)  # after those that are slow are out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --every: a version of JAX that is not the newest for this Python meets every test, not every case."""
    every, seen, left_out = config.getoption("every"), collections.Counter[str](), []
    chosen = []
    for item in items:
        test = item.nodeid.partition("[")[0]
        (left_out if seen[test] % every else chosen).append(item)
        seen[test] += 1
    config.hook.pytest_deselected(items=left_out)
    items[:] = chosen


def pytest_configure(config: pytest.Config) -> None:
    """Gives the process, and those that its tests start, a compilation cache for as long as it lives.

    Each worker of pytest-xdist has its own: JAX does not lock the files.
    """
    hands_out_the_tests = bool(config.getoption("numprocesses", None)) and not hasattr(config, "workerinput")
    if hands_out_the_tests or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = tempfile.TemporaryDirectory(prefix="jlora-tests-")
    config.add_cleanup(folder.cleanup)
    settings = {
        "jax_compilation_cache_dir": folder.name,
        "jax_persistent_cache_min_compile_time_secs": 0.2,  # what is faster to compile than to read is not kept
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture(autouse=True, scope="module")
def _left_behind() -> Iterator[None]:
    """What a file of tests leaves in JAX's caches is not looked through by the collections of garbage after it."""
    yield
    gc.freeze()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(7)
