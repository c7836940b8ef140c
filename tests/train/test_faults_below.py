"""What training writes as it goes: whatever call of libc fails, a checkpoint and the rows before it can be read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora.train import Checkpoints, MetricsLog
from tests.faults_below import KINDS, Writers

STRIDES = [pytest.param(31, id="some"), pytest.param(11, id="many", marks=pytest.mark.slow)]
SOME = ("killed after", "ENOSPC")
FAULTS = [pytest.param(kind, marks=() if kind in SOME else pytest.mark.slow) for kind in KINDS]


def state_of(generation: int) -> dict[str, Any]:
    return {"A": np.full((5, 2), generation, np.float32), "step": np.int32(generation)[None]}


def checkpoint(folder: Path, generation: int) -> None:
    Checkpoints(folder).save(generation, state_of(generation))


def metrics(folder: Path, generation: int) -> None:
    """A run that goes on behind the step before, and logs one more."""
    if not folder.exists():
        folder.mkdir()
    MetricsLog(folder / "metrics.jsonl", generation - 1).write({"step": generation, "loss": 0.5 / generation})


@pytest.fixture(scope="module")
def writers(tmp_path_factory):
    process = Writers(tmp_path_factory.mktemp("faults"), __name__)
    yield process
    process.close()


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("kind", FAULTS)
def test_checkpoints(writers, tmp_path, kind, stride):
    call, reached = 0, True
    while reached:
        folder = tmp_path / f"{call}" / "run"
        folder.parent.mkdir()
        checkpoint(folder, 1)
        reached, status = writers.run("checkpoint", folder, 2, kind, call)
        step = Checkpoints(folder).latest_step
        assert step in ((1, 2) if status else (2,))
        np.testing.assert_array_equal(Checkpoints(folder).restore(state_of(step))["A"], state_of(step)["A"])
        checkpoint(folder, 3)
        assert Checkpoints(folder).latest_step == 3
        assert {path.name for path in folder.iterdir()} == {f"{step}", "3"}
        call += stride
    assert call > stride


@pytest.mark.parametrize("kind", KINDS)
def test_metrics(writers, tmp_path, kind):
    call, reached = 0, True
    while reached:
        folder = tmp_path / f"{call}" / "run"
        folder.parent.mkdir()
        metrics(folder, 1)
        reached, status = writers.run("metrics", folder, 2, kind, call)
        steps = [row["step"] for row in MetricsLog.read_file(folder / "metrics.jsonl")]
        assert steps in ([[1], [1, 2]] if status else [[1, 2]])
        metrics(folder, 3)
        assert [row["step"] for row in MetricsLog.read_file(folder / "metrics.jsonl")] == [*steps, 3]
        assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]
        call += 1
    assert call > 5
