"""XLA compiles small products with adapters: in processes of their own, since a failure ends the process."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if jax.__version_info__ < (0, 12):
    FAST += " --xla_cpu_use_fusion_emitters=false"


def python(*arguments: str, flags: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    top = Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, *arguments], cwd=top, env=environment, text=True, capture_output=True, check=False
    )


@pytest.mark.parametrize(("cases", "flags"), [(80, FAST), pytest.param(70, "", marks=pytest.mark.slow)])
def test_every_small_product_is_compiled(cases, flags):
    run = python("-m", "tests.compiles", "--cases", str(cases), "--seed", str(cases), flags=flags)
    last = run.stdout.strip().rpartition("\n")[2]
    assert last.endswith("all compiled"), f"{last}\n{run.stderr[-2000:]}"


def test_which_versions_of_jax_abort():
    """`jlora.contraction` takes care; once no supported version aborts it need not."""
    run = python("tests/xla_abort.py")
    if jax.__version_info__ < (0, 12):
        assert run.returncode < 0, run.stdout
        assert "IsMonotonicWithDim0Major" in run.stderr or "Check failure" in run.stderr
    else:
        assert run.returncode == 0, run.stderr[-2000:]
