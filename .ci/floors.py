"""Prints the floor of every dependency that pyproject.toml gives, as constraints for pip."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
wanted = [*project["dependencies"], *extras["train"], *extras["gguf"], *extras["lm"]]
wanted = [requirement for requirement in wanted if not requirement.startswith("jlora[")]
floors = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement).groups() for requirement in wanted)
print("\n".join(f"{name}=={version}" for name, version in floors.items()))
print(f"jaxlib=={floors['jax']}")
