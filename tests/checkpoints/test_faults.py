"""Outputs of the commands on files: whatever fails, what was there is there, or what was to come."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from jlora import DataError, LoraConfig
from jlora.checkpoints import combine, convert, extract, merge, read_adapters, resize, unmerge
from jlora.disk import _rename
from jlora.disk import _workplace as workplace
from tests.checkpoints.make import bits, write_checkpoint, write_llama
from tests.faults import KINDS, SOME_KINDS, at_every_call, calls_of, failed


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def made(tmp_path, rng):
    """A base and an adapter."""
    return write_llama(tmp_path, rng, layers=1)[1:]


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("kind", SOME_KINDS)
def test_a_merge_in_place_of_another(tmp_path, made, monkeypatch, kind, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(workplace, "exchange", lambda one, other: False)
    merge(*made, tmp_path / "wanted", weights=[2])
    merge(*made, tmp_path / "out", weights=[3])
    old, new, base = bits(tmp_path / "out"), bits(tmp_path / "wanted"), bits(made[0])

    def again() -> None:
        merge(*made, tmp_path / "out", weights=[2], force=True)

    total = calls_of(again)
    for calls in (*range(0, total - 16, 25), *range(total - 16, total)):
        merge(*made, tmp_path / "out", weights=[3], force=True)
        failed(kind, calls, again)
        missing = not can_exchange and not (tmp_path / "out").exists()
        if missing:  # between the two renames the old one lies beside its place, and the next run brings it back
            workplace.bring_back(tmp_path / "out")
        assert bits(tmp_path / "out") in (old, new)
        again()
        assert bits(tmp_path / "out") == new
        assert bits(made[0]) == base
        assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_a_merge_where_nothing_is(tmp_path, made, kind):
    merge(*made, tmp_path / "wanted")
    for calls in at_every_call(kind, lambda calls: merge(*made, tmp_path / "out"), least=20):
        if (tmp_path / "out").exists():
            assert bits(tmp_path / "out") == bits(tmp_path / "wanted")
            shutil.rmtree(tmp_path / "out")
        merge(*made, tmp_path / f"out{calls}")
        assert bits(tmp_path / f"out{calls}") == bits(tmp_path / "wanted")


def test_an_output_that_appears_meanwhile(tmp_path, made):
    merge(*made, tmp_path / "wanted")

    def appear(*_: Any) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "model.safetensors").write_text("words")

    with pytest.raises(DataError, match=r"out: is there already; give another folder, or --force"):
        merge(*made, tmp_path / "out", on_progress=appear)
    assert (tmp_path / "out" / "model.safetensors").read_text() == "words"
    assert merge(*made, tmp_path / "out", force=True).resumed == 2
    assert bits(tmp_path / "out") == bits(tmp_path / "wanted")
    assert not list(tmp_path.glob(".out*"))


def test_what_carries_no_mark_is_left_alone(tmp_path, made):
    for name in (".out.partial", ".out.old", ".out.0123456789abcdef.jlora"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("words")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "jlora_workplace").write_text("out")
    (tmp_path / ".out.fedcba9876543210.jlora").symlink_to(tmp_path / "elsewhere")
    merge(*made, tmp_path / "out", force=True)
    for name in (".out.partial", ".out.old", ".out.0123456789abcdef.jlora"):
        assert (tmp_path / name / "precious").read_text() == "words"
    assert [file.name for file in (tmp_path / "elsewhere").iterdir()] == ["jlora_workplace"]
    assert not (tmp_path / "out").is_symlink()


def test_the_mode_of_what_is_replaced(tmp_path, made):
    merge(*made, tmp_path / "out")
    (tmp_path / "out").chmod(0o700)
    for file in (tmp_path / "out").iterdir():
        file.chmod(0o600)
    merge(*made, tmp_path / "out", weights=[2], force=True)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o600}


def test_an_exchange(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").touch()
    (tmp_path / "b").mkdir()
    if not _rename.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system has no exchange")
    assert (tmp_path / "b" / "x").exists()
    assert not (tmp_path / "a" / "x").exists()
    with pytest.raises(FileNotFoundError):
        _rename.exchange(tmp_path / "a", tmp_path / "c")


COMMANDS = {
    "convert": lambda base, adapter, out: convert(adapter, out, "peft", force=True),
    "convert to own": lambda base, adapter, out: convert(adapter, out, "own", force=True),
    "resize": lambda base, adapter, out: resize(adapter, out, 2, force=True),
    "combine": lambda base, adapter, out: combine([adapter, adapter], out, [1.0, 2.0], force=True),
    "extract": lambda base, adapter, out: extract(base, base.parent / "tuned", out, rank=2, form="peft", force=True),
}


def adapters_of(folder: Path) -> Any:
    tree, config, form = read_adapters(folder)
    return str(tree), config.replace(extras={}), form


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["killed after", "half written", "ENOSPC", "interrupted"])
def test_adapters_in_place_of_others(tmp_path, made, rng, kind, command):
    merge(*made, tmp_path / "tuned")
    run, out = COMMANDS[command], tmp_path / "out"
    run(*made, tmp_path / "wanted")
    convert(made[1], out, "peft")
    old, new = adapters_of(out), adapters_of(tmp_path / "wanted")
    total = calls_of(lambda: run(*made, out))
    for calls in range(total % 2, total, 2):
        convert(made[1], out, "peft", force=True)
        failed(kind, calls, lambda: run(*made, out))
        assert adapters_of(out) in (old, new)
    run(*made, out)
    assert adapters_of(out) == new
    assert len(list(out.iterdir())) == 2


@pytest.mark.parametrize("ending", ["toml", "json"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_in_place_of_another(tmp_path, kind, ending):
    path = tmp_path / f"lora.{ending}"
    for _ in at_every_call(kind, lambda calls: LoraConfig(rank=2).write(path), least=4):
        if path.exists():
            assert LoraConfig.read(path) in (LoraConfig(rank=2), LoraConfig(rank=3))
        LoraConfig(rank=3).write(path)
        assert LoraConfig.read(path) == LoraConfig(rank=3)
        assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_an_unmerge_in_place_of_another(tmp_path, made, rng):
    merge(*made, tmp_path / "merged", keep_residual=True)
    write_checkpoint(tmp_path / "out", {"w": rng.standard_normal((3, 5))})
    before, total = bits(tmp_path / "out"), 10
    for calls in range(0, total, 3):
        failed("killed after", calls, lambda: unmerge(tmp_path / "merged", made[1], tmp_path / "out", force=True))
        assert bits(tmp_path / "out") == before
    unmerge(tmp_path / "merged", made[1], tmp_path / "out", force=True)
    assert bits(tmp_path / "out") == bits(made[0])
