"""`python -m benchmarks.startup`: the CPU seconds (user and system) of `jlora` where there is next to nothing to do.

The checkpoint has two weights in float32, 0.01 MB. Each run is a process of its own; runs take turns, so that a busy
machine slows all alike. `--against` runs the same with another checkout of jlora in turns with this one. As in an
installed package, modules are compiled before: their bytecode is kept, also where the environment says not to.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from jlora import LoraConfig
from jlora.disk import file_written_whole, write_tensors
from jlora.interop.peft import write_peft
from jlora.tables import text_table

ROOT = Path(__file__).parent.parent
JLORA = "import sys; from jlora.cli import main; sys.exit(main())"
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
COMMANDS = {
    "--help": 0,
    "merge base adapter --out out": 0,
    "extract base tuned --rank 2 --out out": 0,
    "resize adapter --rank 2 --out out": 0,
    "combine adapter adapter --out out": 0,
    "convert adapter --to own --out out": 0,
    "inspect adapter": 0,
    "diff base tuned": 1,
}


def make_files(folder: Path) -> None:
    """Writes two checkpoints and an adapter."""
    random = np.random.default_rng(0)
    for name in ("base", "tuned"):
        (folder / name).mkdir()
        weights = {key: random.standard_normal((37, 41), np.float32) for key in (UP, DOWN)}
        with file_written_whole(folder / name / "model.safetensors") as file:
            write_tensors(file, weights, {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps({}), encoding="utf-8")
    parts = {"A": random.standard_normal((41, 3), np.float32), "B": random.standard_normal((3, 37), np.float32)}
    write_peft(folder / "adapter", {UP: parts, DOWN: parts}, LoraConfig(rank=3, factorizations={"**": "oi"}))


def measured(code: str, words: list[str], root: Path, folder: Path, status: int) -> float:
    """CPU seconds of a program with these words in its command line, run in the folder."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd=folder, env=environment, stdout=subprocess.DEVNULL
    ) as process:
        _, found, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(found)
    if process.returncode != status:
        raise SystemExit(f"{words}: ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="runs of each (7)")
    parser.add_argument("--against", type=Path, help="the folder of another checkout")
    arguments = parser.parse_args()
    roots = {"jlora": ROOT} | ({} if arguments.against is None else {"the other": arguments.against.resolve()})
    runs: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_files(folder)
        for _ in range(1 + arguments.repeats):  # the first, which compiles, is left out
            for command, status in COMMANDS.items():
                for name, root in roots.items():
                    seconds = measured(JLORA, command.split(), root, folder, status)
                    runs.setdefault((command, name), []).append(seconds)
            for name, code in (("import numpy", "import numpy"), ("import jax", "import jax")):
                runs.setdefault((name, "jlora"), []).append(measured(code, [], ROOT, folder, 0))
    rows = []
    for what in dict.fromkeys(what for what, _ in runs):
        medians = [f"{statistics.median(runs[what, name][1:]):.2f}" if (what, name) in runs else "-" for name in roots]
        rows.append((what, *medians))
    print(text_table(("CPU seconds", *roots), rows))


if __name__ == "__main__":
    main()
