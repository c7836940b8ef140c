"""Faults below Python: a preloaded library counts the calls of libc that change files, and one meets its fault.

Writers run in children that are forked from one process, which has imported JAX and not started it.
"""

import ctypes
import errno
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from jlora.errors import JloraError

SOURCE = Path(__file__).with_suffix(".c")
KINDS = {  # what happens, and the number of the error or the signal, as in the library
    "killed before": (1, 0),
    "killed after": (2, 0),
    "half written": (3, 0),
    "ENOSPC": (4, errno.ENOSPC),
    "EIO": (4, errno.EIO),
    "EACCES": (4, errno.EACCES),
    "SIGTERM": (5, signal.SIGTERM),
    "SIGINT": (5, signal.SIGINT),
}
KILLED = ("killed before", "killed after", "half written")
WRITTEN, REFUSED, WRONG = 0, 3, 4


class Writers:
    """A process whose children run `writer(folder, generation)` of a module and meet a fault at a counted call."""

    def __init__(self, built: Path, module: str) -> None:
        if sys.platform != "linux" or not (compiler := shutil.which("cc")):
            pytest.skip("faults below Python want Linux and a C compiler (cc)")
        library = built / "faults.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-w", "-o", library, SOURCE, "-ldl"], check=True)
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from tests.faults_below import serve; serve({module!r})"],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "LD_PRELOAD": str(library)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, writer: str, folder: Path, generation: int, kind: str, call: int) -> tuple[bool, int]:
        """Whether the call was reached, and how the child ended: its exit status, or a signal's number below zero."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        print(writer, folder, generation, *KINDS[kind], call, sep="\t", file=stdin, flush=True)
        reached, status = stdout.readline().split()
        code = os.waitstatus_to_exitcode(int(status))
        assert code in (WRITTEN, REFUSED, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT), (writer, kind, call, code)
        assert code in (WRITTEN, REFUSED) or kind in ("SIGTERM", *KILLED), (writer, kind, call, code)
        assert not (int(reached) and kind in KILLED), "a call went on after the process was killed"
        return bool(int(reached)) or code < 0, code

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()


def serve(module: str) -> None:
    """What the process does: a child for each line."""
    __import__(module)
    library = ctypes.CDLL(None)
    library.faults_calls.restype = ctypes.c_long
    for line in sys.stdin:
        writer, folder, generation, what, which, call = line.rstrip("\n").split("\t")
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            library.faults_arm(os.fsencode(Path(folder).parent), ctypes.c_long(int(call)), int(what), int(which))
            status = _ended(getattr(sys.modules[module], writer), Path(folder), int(generation))
            os.write(send, b"1" if library.faults_calls() > int(call) else b"0")
            os._exit(status)
        os.close(send)
        status = os.waitpid(child, 0)[1]
        print((os.read(receive, 1) or b"0").decode(), status, flush=True)
        os.close(receive)


def _ended(write: Callable[[Path, int], None], folder: Path, generation: int) -> int:
    try:
        write(folder, generation)
    except (JloraError, KeyboardInterrupt):
        return REFUSED
    except BaseException:
        traceback.print_exc()
        return WRONG
    return WRITTEN
