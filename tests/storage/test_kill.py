"""A save that is cut off at any moment leaves one whole generation of adapters."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora import LoraConfig
from jlora.storage import load_adapters, save_adapters

FILES = ["adapter_config.json", "adapter_model.safetensors"]

# Children are forked from a process that has imported JAX and not yet started it: a kill every few milliseconds.
CHILDREN = """
import os, signal, sys, time
from pathlib import Path
from tests.storage.test_kill import save

for line in sys.stdin:
    folder, generation, seconds = line.split()
    child = os.fork()
    if child == 0:
        for number in range(int(generation), 10**9):
            save(Path(folder), number, 30_000)
    time.sleep(float(seconds))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("killed", flush=True)
"""


def save(folder: Path, generation: int, width: int = 3) -> None:
    parts = {"A": np.full((width, 2), generation, np.float32), "B": np.full((2, 5), generation, np.float16)}
    save_adapters(folder, {"w": parts, "v": [parts]}, LoraConfig(rank=2, alpha=generation), metadata={"at": generation})


def generation_of(folder: Path) -> int:
    """The generation that a folder holds; configuration and every number are of it."""
    adapters, config = load_adapters(folder)
    for array in (*adapters["w"].values(), *adapters["v"][0].values()):
        assert set(np.asarray(array, np.float32).ravel().tolist()) == {config.alpha}
    return int(config.alpha)


def test_killed_at_random_moments(tmp_path, rng):
    folder = tmp_path / "adapters"
    save(folder, 1)
    reached, left = [1], 0
    with subprocess.Popen(
        [sys.executable, "-c", CHILDREN],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as children:
        assert children.stdin is not None
        assert children.stdout is not None
        for seconds in rng.uniform(0.002, 0.05, 50):
            children.stdin.write(f"{folder} {reached[-1] + 1} {seconds}\n")
            children.stdin.flush()
            assert children.stdout.readline() == "killed\n"
            left += len(list(folder.iterdir())) > len(FILES)
            reached.append(generation_of(folder))
            assert reached[-1] >= reached[-2]
        children.stdin.close()
    assert left, "no kill fell into a save"
    assert reached[-1] > 10
    save(folder, 1000)
    assert generation_of(folder) == 1000
    assert sorted(file.name for file in folder.iterdir()) == FILES


class Crash(BaseException):
    """The end of the process, so to speak: nothing after it has an effect."""


class Crashing:
    """Lets a number of calls to the system through, and none after them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, calls: int, late: bool) -> None:
        self.left, self.late = calls, late
        for name in ("open", "replace", "unlink", "fsync", "chmod", "mkdir", "write"):
            monkeypatch.setattr(os, name, self._wrapped(getattr(os, name)))

    def _wrapped(self, call: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left < 0 and not (self.late and self.left == -1):
                raise Crash
            result = call(*args, **kwargs)
            if self.left < 0:
                raise Crash
            return result

        return wrapped


def crash_after(calls: int, folder: Path, generation: int, late: bool = False) -> bool:
    """Whether a save was cut off by that many calls to the system."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        Crashing(monkeypatch, calls, late)
        try:
            save(folder, generation)
        except Crash:
            return True
    return False


@pytest.mark.parametrize("late", [False, True], ids=["before the call", "after the call"])
def test_two_saves_cut_off_at_every_call(tmp_path, late):
    calls, cut = 0, True
    while cut:
        second, cut_again = 0, True
        while cut_again:
            folder = tmp_path / f"{calls}-{second}"
            save(folder, 1)
            cut = crash_after(calls, folder, 2, late)
            first = generation_of(folder)
            assert first in ((1, 2) if cut else (2,))
            cut_again = crash_after(second, folder, 3, late)
            assert generation_of(folder) in ((first, 3) if cut_again else (3,))
            save(folder, 4)
            assert generation_of(folder) == 4
            assert sorted(file.name for file in folder.iterdir()) == FILES
            second += 1
        calls += 1
    assert calls > 10


def test_the_first_save_cut_off_at_every_call(tmp_path):
    calls, cut = 0, True
    while cut:
        folder = tmp_path / f"{calls}" / "new"
        cut = crash_after(calls, folder, 1)
        if cut and not (folder / FILES[1]).exists():
            with pytest.raises(ValueError, match=r"no such folder|holds no adapters"):
                load_adapters(folder)
        else:
            assert generation_of(folder) == 1
        save(folder, 2)
        assert generation_of(folder) == 2
        assert sorted(file.name for file in folder.iterdir()) == FILES
        calls += 1
    assert calls > 10


def test_a_reader_beside_a_writer(tmp_path):
    code = CHILDREN.replace("30_000", "30")
    save(tmp_path, 1)
    with subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2], stdin=subprocess.PIPE) as child:
        assert child.stdin is not None
        child.stdin.write(f"{tmp_path} 2 2.0\n".encode())
        child.stdin.close()
        reached = [1]
        while child.poll() is None:
            reached.append(generation_of(tmp_path))
            assert reached[-1] >= reached[-2]
    assert reached[-1] > 10
