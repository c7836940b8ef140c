"""Files written whole or not at all, and files that are read whatever they are."""

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from jlora import DataError
from jlora.disk import dump_json, file_written_whole, read_bytes, read_json, remove_leftovers, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_name_at_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with file_written_whole(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
        assert len(names(tmp_path)) == 2
        file.seek(0)
        assert file.read() == b"new"
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [KeyError("a"), KeyboardInterrupt(), SystemExit(1)])
def test_an_error_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write() -> None:
        with file_written_whole(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_full_disk(tmp_path, monkeypatch, name):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, name, full)
    with pytest.raises(DataError, match="file: cannot be written: No space left on device"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "no" / "file", tmp_path / "folder", tmp_path / ("x" * 300)):
        with pytest.raises(DataError, match="cannot be written"):
            write_whole(path, b"new")
    with pytest.raises(DataError, match=r"a\\x00b'?: cannot be written: .*embedded null"):
        write_whole(tmp_path / "a\0b", b"new")
    assert names(tmp_path) == ["folder"]


def test_the_mode_of_the_file(tmp_path):
    path, before = tmp_path / "file", os.umask(0o027)
    try:
        write_whole(path, b"")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        for mode in (0o600, 0o664, 0o400):
            path.chmod(mode)
            with file_written_whole(path) as file:
                assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == mode
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(before)


def test_a_link_is_replaced(tmp_path):
    (tmp_path / "outside").write_bytes(b"keep")
    for target in ("outside", "nowhere"):
        (tmp_path / "link").symlink_to(target)
        write_whole(tmp_path / "link", b"new")
        assert not (tmp_path / "link").is_symlink()
        assert (tmp_path / "link").read_bytes() == b"new"
        (tmp_path / "link").unlink()
    assert (tmp_path / "outside").read_bytes() == b"keep"


def test_long_names(tmp_path):
    for name in ("x" * 255, "é" * 127):
        write_whole(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"
        (tmp_path / name).unlink()


def test_leftovers(tmp_path):
    for name in (
        ".file.0123456789abcdef.jlora",
        ".file.0123456789abcdeg.jlora",
        ".other.0123456789abcdef.jlora",
        "file",
    ):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path / "file")
    assert names(tmp_path) == [".file.0123456789abcdeg.jlora", ".other.0123456789abcdef.jlora", "file"]
    remove_leftovers(tmp_path / "no" / "file")


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        for read in (read_json, lambda path: read_bytes(path, 10)):
            with pytest.raises(DataError, match="cannot be read: no regular file"):
                read(path)
    with pytest.raises(DataError, match="nothing: cannot be read: No such file or directory"):
        read_json(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"a\\0b: cannot be read: .*embedded null"):
        read_json("a\0b")


def test_a_file_that_is_too_large(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10)
    assert read_bytes(path, 10) == b"x" * 10
    with pytest.raises(DataError, match="file: larger than 9 bytes"):
        read_bytes(path, 9)
    os.truncate(path, 2**40)
    with pytest.raises(DataError, match="larger than 104,857,600 bytes"):
        read_json(path)


def test_json(tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(dump_json({"b": [1, None], "a": "é"}))
    assert path.read_text(encoding="utf-8") == '{\n  "a": "é",\n  "b": [\n    1,\n    null\n  ]\n}\n'
    assert read_json(path) == {"a": "é", "b": [1, None]}
    assert list(read_json(path)) == ["a", "b"]
    path.write_bytes(dump_json({"b": 1, "a": 2}, sort_keys=False))
    assert list(read_json(path)) == ["b", "a"]
    path.write_text('{"a": 1, "a": 2}')
    with pytest.raises(DataError, match=r"file.json: not valid JSON: key 'a' stands twice"):
        read_json(path)
    for data in (float("nan"), {1, 2}, "\ud800", 10**5000):
        with pytest.raises(DataError, match="cannot be written as JSON"):
            dump_json({"a": data})
