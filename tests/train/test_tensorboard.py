"""Metrics for TensorBoard, read from the event file as the format says, without the package that wrote it."""

import importlib.util
import math
import struct

import numpy as np
import pytest

from jlora import ConfigError
from jlora.train import MetricsLog, TensorBoardLog
from tests.train.runs import run

proto = pytest.importorskip("tensorboardX.proto.event_pb2")


def records(folder):
    """The events in all files of a folder, in the order of the files: length, its checksum, event, its checksum."""
    for file in sorted(folder.iterdir()):
        data, place = file.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = proto.Event()
            event.ParseFromString(data[place + 12 : place + 12 + length])
            yield event
            place += 12 + length + 4


def scalars(folder):
    """(step, name, value) of every number."""
    return [(event.step, value.tag, value.simple_value) for event in records(folder) for value in event.summary.value]


def test_a_row_is_a_number_for_each_name_and_what_is_not_finite_is_left_out(tmp_path):
    log = TensorBoardLog(tmp_path / "log")
    log.write({"step": 3, "loss": 0.5, "test_loss": math.nan})
    log.write({"step": 7, "loss": 0.25})
    assert scalars(tmp_path / "log") == [(3, "loss", 0.5), (7, "loss", 0.25)]


def test_a_run_that_goes_on_hides_what_it_writes_again_and_a_new_one_removes_it(tmp_path):
    TensorBoardLog(tmp_path).write({"step": 9, "loss": 1.0})
    TensorBoardLog(tmp_path, step=4).write({"step": 5, "loss": 2.0})
    starts = [event.step for event in records(tmp_path) if event.WhichOneof("what") == "session_log"]
    assert starts == [5]  # TensorBoard drops what stands at this step or later, and was written before
    assert sorted(scalars(tmp_path)) == [(5, "loss", 2.0), (9, "loss", 1.0)]
    TensorBoardLog(tmp_path).write({"step": 1, "loss": 3.0})
    assert scalars(tmp_path) == [(1, "loss", 3.0)]


def test_it_is_a_logger_of_fit_beside_another(tmp_path):
    logs = [MetricsLog(tmp_path / "metrics.jsonl"), TensorBoardLog(tmp_path / "log")]
    run(lambda step: {"x": np.full((3, 5), step, np.float32)}, 4, log=logs, log_every=2)
    rows = MetricsLog.read_file(tmp_path / "metrics.jsonl")
    wanted = [(row["step"], name, value) for row in rows for name, value in row.items() if name != "step"]
    found = scalars(tmp_path / "log")
    assert [one[:2] for one in found] == [one[:2] for one in wanted]
    assert [one[2] for one in found] == pytest.approx([one[2] for one in wanted], rel=1e-6)


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="tensorboardX is not installed: pip install tensorboardX"):
        TensorBoardLog(tmp_path)
