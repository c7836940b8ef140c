"""MaxText and qwix in a process of their own: adapters that they make, and what they compute with them.

python real_maxtext.py PACKAGES FOLDER

Of MaxText only utils/lora_utils.py is run; what it imports of the rest, which it does not need for this, is a mock.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

PACKAGES = ("maxtext==0.2.5", "qwix==0.1.8")
ALPHA, RANK = 6.0, 2
_MOCKED = (
    *("maxtext", "maxtext.common", "maxtext.common.checkpointing", "maxtext.configs", "maxtext.configs.pyconfig"),
    *("maxtext.utils", "maxtext.utils.gcs_utils", "maxtext.utils.max_logging", "maxtext.utils.max_utils"),
    *("maxtext.utils.maxtext_utils", "maxtext.utils.globals"),
)


def install(folder: Path) -> bool:
    """Whether pip could bring both into a folder; MaxText says that it wants Python 3.12."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *PACKAGES]
    return subprocess.run([*command, "--ignore-requires-python"], capture_output=True, timeout=400).returncode == 0


def _lora_utils(packages: Path) -> Any:
    for name in _MOCKED:
        sys.modules[name] = mock.MagicMock(__path__=[], __spec__=None)
    spec = importlib.util.spec_from_file_location("lora_utils", packages / "maxtext" / "utils" / "lora_utils.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _save(folder: Path, tree: Any) -> None:
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)


def _own(packages: Path, folder: Path) -> None:
    """Adapters with the shapes that MaxText wants, scanned or not; of the others the base, and it with the adapters."""
    import jax
    import numpy as np

    lora_utils = _lora_utils(packages)
    rng = np.random.default_rng(3)
    devices = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    for name, layers in (("scanned", (3,)), ("unscanned", ())):
        shapes = {"query": (7, *layers, 4, 5), "key": (7, *layers, 2, 5), "value": (7, *layers, 2, 5)}
        attention = {module: {"kernel": rng.standard_normal(shape, np.float32)} for module, shape in shapes.items()}
        attention["out"] = {"kernel": rng.standard_normal((4, *layers, 5, 7), np.float32)}
        place = "layers" if layers else "layers_0"
        base = {"decoder": {place: {"self_attention": attention}}}

        def abstract(array: Any) -> Any:
            spec = jax.sharding.PartitionSpec(*[None] * array.ndim)
            sharding = jax.sharding.NamedSharding(devices, spec)
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

        more = (
            {"target_modules": [*config["target_modules"], "o_proj"]} if layers else {}
        )  # its engine applies no o_proj
        state, _ = lora_utils.get_lora_abstract_state(jax.tree.map(abstract, base), config | more)
        lora = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), state.params)
        _save(folder / name / "0" / "items", {"params": {"params": lora}})
        (folder / name / "adapter_config.json").write_text(json.dumps(config | more))
        _save(folder / f"{name}_base", {"params": {"params": base}})
        if not layers:
            merged = jax.tree.map(jax.numpy.asarray, base)
            lora_utils.apply_lora_on_base_params(merged, lora, ALPHA / RANK)
            _save(folder / f"{name}_merged", {"params": {"params": jax.tree.map(np.asarray, merged)}})


def _qwix(folder: Path) -> None:
    """The LoRA of a block that qwix adapted, its base, an input, and what it computes."""
    import jax
    import numpy as np
    import qwix
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.query = nnx.LinearGeneral(7, (4, 5), use_bias=False, rngs=rngs)
            self.out = nnx.LinearGeneral((4, 5), 7, axis=(-2, -1), use_bias=False, rngs=rngs)
            self.wi_0 = nnx.Linear(7, 11, use_bias=False, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.wi_0(self.out(self.query(x)))

    block, x = Block(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (3, 7))
    provider = qwix.LoraProvider(module_path=".*", rank=RANK, alpha=ALPHA)
    adapted = qwix.apply_lora_to_model(block, provider, x, rngs=nnx.Rngs(3))
    state = nnx.state(adapted, nnx.LoRAParam)
    nnx.update(adapted, jax.tree.map(lambda v: 0.5 * jax.random.normal(jax.random.key(v.size), v.shape), state))
    lora = nnx.to_pure_dict(nnx.state(adapted, nnx.LoRAParam))
    _save(folder / "qwix", jax.tree.map(lambda leaf: {"value": np.asarray(leaf)}, lora))
    _save(folder / "qwix_base", jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(block, nnx.Param))))
    np.savez(folder / "qwix.npz", x=x, y=adapted(x), plain=block(x))


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    _qwix(Path(sys.argv[2]))
    _own(Path(sys.argv[1]), Path(sys.argv[2]))
