"""A PEFT folder that is replaced: whatever fails, and whenever it is read, it holds the old adapter or the new one."""

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from jlora import DataError, LoraConfig
from jlora.disk import TensorFile
from jlora.interop.peft import is_peft_folder, read_peft, write_peft
from jlora.storage import load_adapters, save_adapters
from tests.faults import KINDS, SOME_KINDS, at_every_call, failed

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
NAME = "up.weight"


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def entry(generation: int) -> dict[str, np.ndarray]:
    return {"A": np.full((5, 2), generation, np.float32), "B": np.full((2, 3), generation, np.float32)}


def write(folder: Path, generation: int) -> None:
    write_peft(folder, {NAME: entry(generation)}, LoraConfig(rank=2, alpha=generation, factorizations={"**": "oi"}))


def save(folder: Path, generation: int) -> None:
    save_adapters(folder, {NAME: entry(generation)}, LoraConfig(rank=2, alpha=generation))


def generation_of(folder: Path) -> int:
    """The generation of the configuration and of every number."""
    adapters, config = read_peft(folder) if is_peft_folder(folder) else load_adapters(folder)
    for array in adapters[NAME].values():
        assert set(np.asarray(array).ravel().tolist()) == {config.alpha}
    return int(config.alpha)


def check_plain(folder: Path) -> None:
    """What a reader of the two names alone finds is of one generation, or has no configuration."""
    if (folder / CONFIG).exists():
        alpha = json.loads((folder / CONFIG).read_text())["lora_alpha"]
        with TensorFile(folder / TENSORS) as file:
            assert {float(file.read(name).ravel()[0]) for name in file.entries} == {alpha}


def neighbours(folder: Path) -> None:
    """What else may lie in the folder of an adapter."""
    (folder / "checkpoint-1").mkdir(parents=True)
    (folder / "checkpoint-1" / "optimizer.pt").write_bytes(b"state")
    (folder / "README.md").write_text("words")
    (folder / "link").symlink_to("README.md")


def check_neighbours(folder: Path, *more: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(["README.md", "checkpoint-1", "link", *more])
    assert (folder / "checkpoint-1" / "optimizer.pt").read_bytes() == b"state"
    assert (folder / "link").is_symlink()


@pytest.mark.parametrize("kind", KINDS)
def test_replaced(tmp_path, kind):
    def folder(calls: int) -> Path:
        return tmp_path / str(calls)

    def replaced(calls: int) -> None:
        write(folder(calls), 2)

    neighbours(folder(0))
    write(folder(0), 1)
    for calls in at_every_call(kind, replaced, least=15):
        at = folder(calls)
        check_plain(at)
        first = generation_of(at)
        assert first in (1, 2)
        for second in range(20) if calls % 9 == 0 else ():
            cut = failed(kind, second, lambda at=at: write(at, 3))
            assert generation_of(at) in ((first, 3) if cut else (3,))
        write(at, 4)
        assert generation_of(at) == 4
        check_neighbours(at, CONFIG, TENSORS)
        neighbours(folder(calls + 1))
        write(folder(calls + 1), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_written_where_there_was_none(tmp_path, kind):
    for calls in at_every_call(kind, lambda calls: write(tmp_path / f"{calls}" / "new", 1)):
        folder = tmp_path / f"{calls}" / "new"
        if is_peft_folder(folder):
            assert generation_of(folder) == 1
        else:
            assert not (folder / CONFIG).exists()
            with pytest.raises(DataError, match=r"no such folder|holds no adapters|found the format"):
                load_adapters(folder)
        write(folder, 2)
        assert generation_of(folder) == 2
        assert sorted(path.name for path in folder.iterdir()) == [CONFIG, TENSORS]


@pytest.mark.parametrize("kind", SOME_KINDS)
@pytest.mark.parametrize("writers", [(save, write), (write, save)], ids=["own by PEFT", "PEFT by own"])
def test_one_format_by_the_other(tmp_path, kind, writers):
    first, second = writers
    first(tmp_path / "0", 1)
    for calls in at_every_call(kind, lambda calls: second(tmp_path / f"{calls}", 2), least=10):
        folder = tmp_path / f"{calls}"
        assert generation_of(folder) in (1, 2)
        write(folder, 3)
        assert generation_of(folder) == 3
        assert sorted(path.name for path in folder.iterdir()) == [CONFIG, TENSORS]
        first(tmp_path / f"{calls + 1}", 1)


def test_a_reader_beside_a_writer(tmp_path):
    write(tmp_path, 1)
    done = threading.Event()

    def writer() -> None:
        for generation in range(2, 150):
            write(tmp_path, generation)
        done.set()

    thread = threading.Thread(target=writer)
    thread.start()
    reached = [1]
    while not done.is_set():
        reached.append(generation_of(tmp_path))
        assert reached[-1] >= reached[-2]
    thread.join()
    assert len(set(reached)) > 10
    assert generation_of(tmp_path) == 149


def test_a_folder_above_which_nothing_can_be_written(tmp_path):
    (tmp_path / "closed").mkdir()
    write(tmp_path / "closed" / "a", 1)
    inode = (tmp_path / "closed" / "a").stat().st_ino
    (tmp_path / "closed").chmod(0o500)
    write(tmp_path / "closed" / "a", 2)
    (tmp_path / "closed").chmod(0o700)
    assert generation_of(tmp_path / "closed" / "a") == 2
    assert (tmp_path / "closed" / "a").stat().st_ino == inode


def test_what_is_hidden_is_not_followed(tmp_path):
    """Links under the names that a replacement uses are replaced themselves."""
    folder, outside = tmp_path / "a", tmp_path / "outside"
    write(folder, 1)
    outside.write_text("keep")
    for name in (f".{CONFIG}.jlora-old", f".{CONFIG}.jlora-new", f".{TENSORS}.jlora-new"):
        (folder / name).symlink_to(outside)
    assert generation_of(folder) == 1
    write(folder, 2)
    assert outside.read_text() == "keep"
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, TENSORS]
