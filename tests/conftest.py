"""Settings of every test: the CPU, programs compiled once in a run, and property tests that are the same each time."""

import gc
import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import numpy as np
import pytest

# Half of the time of the tests was XLA's compiling, and programs that run a few times need not be fast.
FAST = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
if (0, 8) <= jax.__version_info__ < (0, 11):  # JAX 0.12 does not know the second
    os.environ.setdefault("XLA_FLAGS", FAST)

hypothesis.settings.register_profile("jlora", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("jlora")
gc.set_threshold(100_000, 50)  # the programs that JAX keeps are many objects to look through again and again


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
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(7)
