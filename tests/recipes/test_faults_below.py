"""A whole run that meets a fault of libc: an error of jlora's or a signal ends it, and it goes on to the same bits."""

import io
import itertools
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from jlora import DataError
from jlora.recipes import JobConfig, run_job
from tests.faults_below import KINDS, Writers

STRIDE = 97  # of about 500 calls; each kind begins at another one


def model():
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    module = nn.Dense(3)
    return module, module.init(jax.random.key(0), jnp.zeros((1, 5)))["params"]


def data():
    import numpy as np

    inputs = np.random.default_rng(0).standard_normal((60, 5)).astype(np.float32)
    examples = {"inputs": inputs, "labels": inputs[:, :3].argmax(-1).astype(np.int32)}
    return tuple({name: array[part] for name, array in examples.items()} for part in (slice(40), slice(40, None)))


def run(folder: Path, generation: int = 0, resume: bool = False) -> None:
    job = JobConfig.from_dict(
        {
            "model": {"function": f"{__name__}:model"},
            "data": {"function": f"{__name__}:data"},
            "lora": {"rank": 2},
            "train": {"steps": 4, "batch_size": 8, "log_every": 1, "eval_every": 2, "checkpoint_every": 2},
            "full": {"enabled": False},
            "output": {"folder": str(folder)},
        }
    )
    run_job(job, resume=resume, force=not resume, console=Console(file=io.StringIO()))


def read(folder: Path) -> tuple[bytes, ...]:
    names = ("metrics.jsonl", "adapters/adapter_config.json", "adapters/adapter_model.safetensors")
    return tuple((folder / name).read_bytes() for name in names)


def go_on(folder: Path, begun: bool, older: bool) -> None:
    try:
        run(folder, resume=begun)
    except DataError as error:
        if not (older and "delete them to begin anew" in str(error)):
            raise
        run(folder)  # the checkpoints of the older run were half removed


@pytest.fixture(scope="module")
def writers(tmp_path_factory):
    process = Writers(tmp_path_factory.mktemp("faults"), __name__)
    yield process
    process.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder)
    return folder, read(folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the checkpoint of step")  # of the older run, which was half removed
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("older", [pytest.param(False, id="first"), pytest.param(True, id="over an older run")])
def test_it_goes_on(writers, whole, tmp_path, older, kind):
    written, contents = whole
    start = list(KINDS).index(kind) * STRIDE // len(KINDS)
    for call in itertools.count(start, STRIDE):
        folder = tmp_path / f"{call}" / "run"
        folder.parent.mkdir()
        if older:
            shutil.copytree(written, folder)
        reached, status = writers.run("run", folder, 0, kind, call)
        begun = (folder / "config.toml").exists()
        assert begun or not older
        if status:
            go_on(folder, begun, older)
        assert read(folder) == contents
        assert {path.name for path in folder.iterdir()} == {path.name for path in written.iterdir()}
        if not reached:
            break
    assert call > start + STRIDE
