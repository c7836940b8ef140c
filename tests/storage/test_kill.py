"""A save that is cut off at any moment leaves one whole generation of adapters."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jlora import LoraConfig
from jlora.storage import load_adapters, save_adapters
from tests.faults import KINDS, SOME_KINDS, at_every_call, failed

FILES = ["adapter_config.json", "adapter_model.safetensors"]

# Children are forked from a process that has imported JAX and not yet started it; each kills itself at a counted call.
CHILDREN = """
import os, sys
from pathlib import Path
from tests.faults import failed
from tests.storage.test_kill import save

for line in sys.stdin:
    folder, generation, calls = line.split()
    child = os.fork()
    if child == 0:
        failed("SIGKILL", int(calls), lambda: save(Path(folder), int(generation), 30_000))
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""

# Saves without an end, from a number on.
SAVES = """
import sys
from pathlib import Path
from tests.storage.test_kill import save

for generation in range(2, 10**9):
    save(Path(sys.argv[1]), generation, 30)
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


def test_killed_at_every_call(tmp_path):
    folder = tmp_path / "adapters"
    save(folder, 1)
    reached, left, status = [1], 0, 9
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
        while status:
            children.stdin.write(f"{folder} {reached[-1] + 1} {len(reached) - 1}\n")
            children.stdin.flush()
            status = int(children.stdout.readline())
            assert status in (0, 9)
            left += len(list(folder.iterdir())) > len(FILES)
            reached.append(generation_of(folder))
            assert reached[-1] >= reached[-2]
        children.stdin.close()
    assert left > 5
    assert len(reached) > 12
    assert reached[-1] == reached[-2] + 1
    assert sorted(file.name for file in folder.iterdir()) == FILES


@pytest.fixture
def _no_waiting(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize("kind", SOME_KINDS)
def test_two_saves_cut_off_at_every_call(tmp_path, kind):
    save(tmp_path / "0-0", 1)
    for calls in at_every_call(kind, lambda calls: save(tmp_path / f"{calls}-0", 2), least=10):
        folder = tmp_path / f"{calls}-0"
        first = generation_of(folder)
        assert first in (1, 2)
        for second in (1, 5, 9, 11, 13) if calls % 3 == 0 else ():
            again = tmp_path / f"{calls}-{second}"
            shutil.copytree(folder, again)
            cut = failed(kind, second, lambda at=again: save(at, 3))
            assert generation_of(again) in ((first, 3) if cut else (3,))
            save(again, 4)
            assert generation_of(again) == 4
            assert sorted(file.name for file in again.iterdir()) == FILES
        save(folder, 4)
        assert generation_of(folder) == 4
        assert sorted(file.name for file in folder.iterdir()) == FILES
        save(tmp_path / f"{calls + 1}-0", 1)


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_save_cut_off_at_every_call(tmp_path, kind):
    for calls in at_every_call(kind, lambda calls: save(tmp_path / f"{calls}" / "new", 1), least=10):
        folder = tmp_path / f"{calls}" / "new"
        if (folder / FILES[1]).exists():
            assert generation_of(folder) == 1
        else:
            with pytest.raises(ValueError, match=r"no such folder|holds no adapters"):
                load_adapters(folder)
        save(folder, 2)
        assert generation_of(folder) == 2
        assert sorted(file.name for file in folder.iterdir()) == FILES


def test_a_reader_beside_a_writer(tmp_path):
    save(tmp_path, 1)
    with subprocess.Popen([sys.executable, "-c", SAVES, tmp_path], cwd=Path(__file__).parents[2]) as child:
        reached = [1]
        while reached[-1] < 12:
            reached.append(generation_of(tmp_path))
            assert reached[-1] >= reached[-2]
            assert child.poll() is None
        child.kill()
