"""What the commands on files write: whatever call of libc fails, what was there or what was to come is whole."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jlora.checkpoints import combine, convert, extract, merge, read_adapters, resize, unmerge
from jlora.errors import JloraError
from jlora.paths import leaves_by_path
from tests.checkpoints.make import bits, peft_parts, random, write_checkpoint, write_peft
from tests.faults_below import KINDS, Writers

GENERATIONS = (1, 2, 3)
STRIDES = [pytest.param(23, id="some"), pytest.param(13, id="many", marks=pytest.mark.slow)]
SOME = ("killed after", "ENOSPC", "SIGINT")
FAULTS = [pytest.param(kind, marks=() if kind in SOME else pytest.mark.slow) for kind in KINDS]


def inputs_of(folder: Path) -> Path:
    return folder.parent.parent / "inputs"


def merged(folder: Path, generation: int) -> None:
    inputs = inputs_of(folder)
    base, adapter = inputs / f"base{generation}", inputs / "adapter1"
    merge(base, adapter, folder, keep_residual=True, force=folder.exists())


def unmerged(folder: Path, generation: int) -> None:
    inputs = inputs_of(folder)
    unmerge(inputs / f"merged{generation}", inputs / "adapter1", folder, force=folder.exists())


def extracted(folder: Path, generation: int) -> None:
    inputs = inputs_of(folder)
    extract(inputs / "base1", inputs / f"merged{generation}", folder, rank=2, form="peft", force=folder.exists())


def resized(folder: Path, generation: int) -> None:
    resize(inputs_of(folder) / f"adapter{generation}", folder, 2, force=folder.exists())


def combined(folder: Path, generation: int) -> None:
    adapter = inputs_of(folder) / "adapter1"
    combine([adapter, adapter], folder, [1.0, float(generation)], force=folder.exists())


def converted(folder: Path, generation: int) -> None:
    convert(inputs_of(folder) / f"adapter{generation}", folder, "own", force=folder.exists())


def converted_to_peft(folder: Path, generation: int) -> None:
    convert(inputs_of(folder) / f"own{generation}", folder, "peft", force=folder.exists())


def held(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint; of adapters what is read, for a PEFT folder may be between two of its renames."""
    if (folder / "config.json").exists():
        return bits(folder)
    tree, config, form = read_adapters(folder)
    arrays = {path: np.asarray(leaf).tobytes() for path, leaf in leaves_by_path(tree).items()}
    return arrays | {"config": repr(config).encode(), "form": form.encode()}


COMMANDS = (merged, unmerged, extracted, resized, combined, converted, converted_to_peft)


@pytest.fixture(scope="module")
def writers(tmp_path_factory):
    process = Writers(tmp_path_factory.mktemp("faults"), __name__)
    yield process
    process.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Three of everything that is read, no two alike."""
    folder, rng = tmp_path_factory.mktemp("read"), np.random.default_rng(0)
    for generation in GENERATIONS:
        names = ("a.q_proj.weight", "b.q_proj.weight", "b.norm.weight")
        tensors = {name: random(rng, (7,) if "norm" in name else (7, 5), std=0.1) for name in names}
        base = write_checkpoint(folder / f"base{generation}", tensors, 2)
        adapter = write_peft(folder / f"adapter{generation}", peft_parts(rng, tensors, "q_proj"))
        convert(adapter, folder / f"own{generation}", "own")
        merge(base, folder / "adapter1", folder / f"merged{generation}", keep_residual=True)
    return folder


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("write", COMMANDS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("there", [1, None], ids=["replaced", "new"])
def test_whole(writers, inputs, tmp_path, there: int | None, write: Callable[[Path, int], None], kind, stride):
    (tmp_path / "inputs").symlink_to(inputs)
    wanted, before = {}, bits(inputs)
    for generation in GENERATIONS:
        write(tmp_path / f"alone{generation}" / "out", generation)
        wanted[generation] = held(tmp_path / f"alone{generation}" / "out")
    assert len({tuple(files.values()) for files in wanted.values()}) == 3
    call, reached = 0, True
    while reached:
        out = tmp_path / f"{call}" / "out"
        out.parent.mkdir()
        if there:
            write(out, there)
        reached, status = writers.run(write.__name__, out, 2, kind, call)
        try:
            assert held(out) in ([wanted[2], wanted.get(there)] if status else [wanted[2]])
        except JloraError:
            assert status
            assert not there
            shutil.rmtree(out, ignore_errors=True)  # of what is not whole no command makes more
        write(out, 3)
        assert held(out) == wanted[3]
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        call += stride
    assert call > stride
    assert bits(inputs) == before
