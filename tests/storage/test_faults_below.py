"""Adapters and configurations that are replaced: whatever call of libc fails, one whole generation can be read."""

from pathlib import Path

import numpy as np
import pytest

from jlora import LoraConfig
from jlora.errors import JloraError
from jlora.interop.peft import is_peft_folder, read_peft, write_peft
from jlora.storage import load_adapters, save_adapters
from tests.faults_below import KINDS, Writers

STRIDES = [pytest.param(7, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def writers(tmp_path_factory):
    process = Writers(tmp_path_factory.mktemp("faults"), __name__)
    yield process
    process.close()


def entries(generation: int) -> dict:
    return {"up.weight": {"A": np.full((5, 2), generation, np.float32), "B": np.full((2, 3), generation, np.float32)}}


def config_of(generation: int) -> LoraConfig:
    return LoraConfig(rank=2, alpha=generation, factorizations={"**": "oi"})


def own(folder: Path, generation: int) -> None:
    save_adapters(folder, entries(generation), config_of(generation))


def peft(folder: Path, generation: int) -> None:
    write_peft(folder, entries(generation), config_of(generation))


def toml(folder: Path, generation: int) -> None:
    if not folder.exists():
        folder.mkdir()
    config_of(generation).write(folder / "lora.toml")


def generation_of(folder: Path) -> int:
    """The generation of the configuration and of every number."""
    if (folder / "lora.toml").exists():
        return int(LoraConfig.read(folder / "lora.toml").alpha)
    adapters, config = read_peft(folder) if is_peft_folder(folder) else load_adapters(folder)
    for array in adapters["up.weight"].values():
        assert set(np.asarray(array).ravel().tolist()) == {config.alpha}
    return int(config.alpha)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", [own, peft, toml], ids=lambda write: write.__name__)
def test_replaced(writers, tmp_path, write, kind, stride):
    call, reached, least = 0, True, 4 if write is toml else 15
    while reached:
        folder = tmp_path / f"{call}" / "a"
        folder.parent.mkdir()
        write(folder, 1)
        names = sorted(path.name for path in folder.iterdir())
        reached, status = writers.run(write.__name__, folder, 2, kind, call)
        assert generation_of(folder) in ((1, 2) if status else (2,))
        write(folder, 3)
        assert generation_of(folder) == 3
        assert sorted(path.name for path in folder.iterdir()) == names
        call += stride
    assert call >= least


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", [own, peft, toml], ids=lambda write: write.__name__)
def test_written_where_nothing_is(writers, tmp_path, write, kind, stride):
    write(tmp_path / "alone", 1)
    names = sorted(path.name for path in (tmp_path / "alone").iterdir())
    call, reached = 0, True
    while reached:
        folder = tmp_path / f"{call}" / "a"
        (folder if write is toml else folder.parent).mkdir(parents=True)
        reached, status = writers.run(write.__name__, folder, 2, kind, call)
        try:
            assert generation_of(folder) == 2
        except JloraError:
            assert status
        write(folder, 3)
        assert generation_of(folder) == 3
        assert sorted(path.name for path in folder.iterdir()) == names
        call += stride
    assert call > stride
