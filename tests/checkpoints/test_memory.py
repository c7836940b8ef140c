"""Memory does not grow with the checkpoint."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jlora import LoraConfig, save_adapters
from jlora.disk import Checkpoint
from jlora.interop.peft import write_peft as write_peft_folder
from tests.checkpoints.make import random, write_peft

ROWS, WIDTH = 2048, 4096
TENSOR = 2 * ROWS * WIDTH  # 16 MiB in bfloat16

CHILD = """
import sys
from jlora.checkpoints import merge, unmerge

command, checkpoint, adapter, out, *keep = sys.argv[1:]
if command == "merge":
    merge(checkpoint, adapter, out, keep_residual=bool(keep))
else:
    assert unmerge(checkpoint, adapter, out).exact == bool(keep)
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


def sparse_checkpoint(folder: Path, count: int) -> Path:
    """Tensors of zeros of 16 MiB each, in a file of holes."""
    header = b",".join(
        b'"l%d.weight":{"dtype":"BF16","shape":[%d,%d],"data_offsets":[%d,%d]}'
        % (i, ROWS, WIDTH, i * TENSOR, (i + 1) * TENSOR)
        for i in range(count)
    )
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write((len(header) + 2).to_bytes(8, "little") + b"{" + header + b"}")
        file.truncate(file.tell() + count * TENSOR)
    return folder


def adapter(folder: Path, rng: np.random.Generator, count: int) -> Path:
    shapes = {"lora_A.weight": (3, WIDTH), "lora_B.weight": (ROWS, 3)}
    return write_peft(
        folder, {f"l{i}.{end}": random(rng, shape) for i in range(count) for end, shape in shapes.items()}
    )


def peak(*call: object) -> float:
    """The most memory that a process had to itself, in MB."""
    command = [sys.executable, "-c", CHILD, *map(str, call)]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    found = subprocess.run(command, cwd=Path(__file__).parents[2], env=env, stdout=subprocess.PIPE, check=True)
    return int(found.stdout) / 1e3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(
    "keep", [pytest.param((), id="no residual"), pytest.param(("keep",), id="residual", marks=pytest.mark.slow)]
)
def test_the_peak_is_the_same_for_six_times_the_size(tmp_path, rng, keep):
    peaks = {}
    for count in (3, 18):
        base, folder = sparse_checkpoint(tmp_path / f"base{count}", count), adapter(tmp_path / f"a{count}", rng, count)
        merged, back = tmp_path / "merged", tmp_path / "back"
        peaks[count] = [
            peak("merge", base, folder, merged, *keep),
            peak("unmerge", merged, folder, back, *keep),
        ]
        for place in (merged, back):
            assert sum(entry.stop - entry.start for entry in Checkpoint(place).entries.values()) == count * TENSOR
            shutil.rmtree(place)
    small, large = peaks.values()
    assert all(most - least < 30 for least, most in zip(small, large, strict=True)), peaks
    assert max(large) < 3 * TENSOR / 1e6 + 300, peaks


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.slow
@pytest.mark.parametrize("form", ["peft", "own"])
def test_the_peak_does_not_grow_with_the_adapters(tmp_path, rng, form):
    peaks = []
    for count in (4, 14):
        entry = {"A": np.zeros((WIDTH, 600), np.float32), "B": np.zeros((600, ROWS), np.float32)}  # 15 MB together
        entries = {f"l{i}.weight": entry for i in range(count)}
        config = LoraConfig(rank=600, factorizations={"**": "oi"})
        (save_adapters if form == "own" else write_peft_folder)(tmp_path / f"a{count}", entries, config)
        base = sparse_checkpoint(tmp_path / f"base{count}", count)
        peaks.append(peak("merge", base, tmp_path / f"a{count}", tmp_path / "merged"))
        shutil.rmtree(tmp_path / "merged")
    assert peaks[1] - peaks[0] < 30, peaks
