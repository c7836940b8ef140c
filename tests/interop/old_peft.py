"""Older versions of PEFT, each in a folder of its own and in a process of its own.

`python -m tests.interop.old_peft` installs all of them into a temporary folder and writes the table of the keys of
LoraConfig, `jlora/interop/peft/fields.json`: the version that brought each, and its default.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

VERSIONS = [f"0.{minor}.0" for minor in range(3, 22) if minor not in (16, 17)]  # these two want an older transformers
FIELDS = Path(__file__).parents[2] / "jlora" / "interop" / "peft" / "fields.json"
_READ_FIELDS = """
import dataclasses, json, peft
found = {}
for field in dataclasses.fields(peft.LoraConfig):
    made = None if field.default_factory is dataclasses.MISSING else field.default_factory()
    value = made if field.default is dataclasses.MISSING else field.default
    if not dataclasses.is_dataclass(value):  # which is not written
        found[field.name] = value
print(json.dumps(found))
"""


def install(version: str, folder: Path) -> Path | None:
    """The folder of a version of PEFT alone, None where pip cannot bring it."""
    target = folder / version
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
    done = subprocess.run([*command, f"peft=={version}"], capture_output=True, timeout=300)
    return target if done.returncode == 0 else None


def run(target: Path, program: str, *arguments: str) -> str:
    """What a program prints that imports PEFT from this folder."""
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(target), root]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise AssertionError(f"{target.name}: {done.stderr[-4000:]}")
    return done.stdout


def fields_of_installed() -> dict[str, Any]:
    """The keys of LoraConfig in the PEFT that is installed, and their defaults."""
    return dict(json.loads(run(Path(), _READ_FIELDS)))


def main() -> None:
    """Writes the table."""
    table: dict[str, tuple[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for version in VERSIONS:
            target = install(version, Path(folder))
            if target is None:
                raise SystemExit(f"peft {version} cannot be installed")
            for name, default in json.loads(run(target, _READ_FIELDS)).items():
                since, _ = table.get(name, (version, None))
                table[name] = since, default
    lines = (f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(table.items()))
    FIELDS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
