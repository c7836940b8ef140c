"""Tests over several devices: a function of a test module, called in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path


def run_with_devices(module: str, function: str, folder: Path, devices: int = 8) -> None:
    """Calls `function(folder)` of a module where JAX has this many devices; its assertions hold or the test fails."""
    code = f"import {module} as m; from pathlib import Path; m.{function}(Path({str(folder)!r})); print('done')"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.endswith("done\n")
