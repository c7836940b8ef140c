"""Tests over several devices: a function of a test module, called in a process of its own."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax


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


def run_in_two_processes(module: str, function: str, folder: Path) -> None:
    """Calls `function(folder, number)` of a module in two processes of one program, in step with each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = f"from tests.storage.devices import joined; from {module} import {function}; joined({function})"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(number), str(port)],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        found = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(found)
    assert all("done" in text for text in found)


def joined(function: Callable[[Path, int], None]) -> None:
    """Runs a function in a process that has joined the other one."""
    folder, number, port = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, int(number))
    assert jax.process_count() == 2
    function(Path(folder), int(number))
    print("done")
