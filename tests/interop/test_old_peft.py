"""What jlora writes, in older versions of PEFT: it loads, and the model computes the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.checkpoints import combine
from jlora.interop.peft import read_peft, write_peft
from tests.interop.files import Rng
from tests.interop.models import peft, quiet, randomized, torch
from tests.interop.old_peft import FIELDS, fields_of_installed, install, run
from tests.interop.test_derived import Net, factors, says

LOAD = """
import sys
import numpy as np
import peft
from tests.interop.test_derived import Net, says
for folder in sys.argv[1:]:
    live = peft.PeftModel.from_pretrained(Net(), folder).eval()
    np.save(f"{folder}/{peft.__version__}.npy", says(live))
"""
ROLES = {"m.layers.0.q.weight": "oi", "m.layers.1.v.weight": "oi", "embed.weight": "io", "head.weight": "oi"}
LINEAR = {path: roles for path, roles in ROLES.items() if roles == "oi"}
Made = tuple[dict[str, Any], jlora.LoraConfig]


def plain(rng: Rng, folder: Path, roles: dict[str, str] = ROLES, **fields: Any) -> Made:
    ranks = {"m.layers.1.v.weight": 3}
    config = jlora.LoraConfig(
        rank=2, alpha=5, factorizations=roles, rank_pattern=ranks, alpha_pattern={"head.weight": 1.5}, **fields
    )
    return {path: factors(rng, config.rank_of(path)) for path in roles}, config


def rslora(rng: Rng, folder: Path) -> Made:
    return plain(rng, folder, scaling="rslora")


def saved(rng: Rng, folder: Path) -> Made:
    entries, config = plain(rng, folder)
    norm = {
        f"m.layers.1.norm.{last}": {"value": jnp.asarray(rng.random(7), jnp.float32)} for last in ("weight", "bias")
    }
    return entries | norm, config


def dora(rng: Rng, folder: Path) -> Made:
    entries, config = plain(rng, folder, LINEAR)
    return {
        path: entry | {"magnitude": jnp.asarray(1 + rng.random(7), jnp.float32)} for path, entry in entries.items()
    }, config


def changed(rng: Rng, folder: Path) -> Made:
    """Two of the PEFT that is installed, combined."""
    for number, fields in enumerate(({"rank_pattern": {"0.q": 3}}, {"lora_alpha": 3})):
        with quiet():
            live = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules="all-linear", **fields))
            randomized(live, trained=True)
            live.save_pretrained(str(folder / str(number)))
    combine([folder / "0", folder / "1"], folder / "both", method="cat")
    return read_peft(folder / "both")


def parameters(rng: Rng, folder: Path) -> Made:
    roles = {"m.layers.0.q.weight": "oi", "m.layers.1.experts.w": "boi"}
    entries = {path: factors(rng, 2, (2,) * ("b" in letters)) for path, letters in roles.items()}
    return entries, jlora.LoraConfig(rank=2, alpha=3, factorizations=roles)


# What each is, and the first version that knows it. Before 0.19.1 square experts are transposed ones.
WRITTEN: dict[str, tuple[Callable[[Rng, Path], Made], int]] = {
    "plain": (plain, 6),
    "rslora": (rslora, 8),
    "saved": (saved, 6),
    "dora": (dora, 9),
    "changed": (changed, 6),
    "parameters": (parameters, 20),
}


def merged(entries: dict[str, Any], config: jlora.LoraConfig) -> np.ndarray:
    """What the model says into which jlora merges."""
    model = Net()
    params = {path: value.numpy() for path, value in model.state_dict().items()}
    found = jlora.merge_params(params, {path: entries.get(path) for path in params}, config)
    model.load_state_dict({path: torch.tensor(np.asarray(value)) for path, value in found.items()})
    return says(model)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.6.0", "0.8.0", "0.10.0", "0.13.0", "0.15.0", "0.18.0", "0.20.0"])
def test_older_versions_compute_the_same(version: str, tmp_path: Path, rng: Rng) -> None:
    target = install(version, tmp_path)
    if target is None:
        pytest.skip(f"pip cannot install peft {version}")
    wanted = {}
    for name, (make, since) in WRITTEN.items():
        if int(version.split(".")[1]) >= since:
            (tmp_path / f"made {name}").mkdir()
            entries, config = make(rng, tmp_path / f"made {name}")
            write_peft(tmp_path / name, entries, config)
            wanted[name] = merged(entries, config)
    run(target, LOAD, *(str(tmp_path / name) for name in wanted))
    for name, value in wanted.items():
        found = np.load(tmp_path / name / f"{version}.npy")
        assert np.abs(value - says(Net())).max() > 0.1
        np.testing.assert_allclose(found, value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=name)


def test_keys_that_are_written_are_those_that_are_needed(tmp_path: Path, rng: Rng) -> None:
    """None that the oldest version does not know but for what the adapters have need of."""
    oldest = {name for name, (since, _) in json.loads(FIELDS.read_text()).items() if since == "0.3.0"}
    needed = {
        "plain": {"rank_pattern", "alpha_pattern"},
        "rslora": {"rank_pattern", "alpha_pattern", "use_rslora"},
        "dora": {"rank_pattern", "alpha_pattern", "use_dora"},
        "changed": {"rank_pattern", "alpha_pattern", "auto_mapping"},
        "parameters": {"target_parameters", "peft_version"},
    }
    for name, more in needed.items():
        (tmp_path / f"made {name}").mkdir()
        write_peft(tmp_path / name, *WRITTEN[name][0](rng, tmp_path / f"made {name}"))
        data = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert data.keys() - oldest == more, name
        assert not any("^" in pattern for pattern in data.get("rank_pattern", {}))


def test_the_table_of_keys_is_that_of_the_installed_version() -> None:
    table = json.loads(FIELDS.read_text())
    found = fields_of_installed()
    assert len(found) > 30
    assert {name: table[name][1] for name in found if name in table} == {
        name: default for name, default in found.items() if name in table
    }
