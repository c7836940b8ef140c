"""mlx-lm in a process of its own: what it computes with an adapter, and adapters that it makes.

python real_mlx.py logits BASE ADAPTER|- OUT.npy
python real_mlx.py make BASE ADAPTER KIND KEY...
python real_mlx.py base CONFIG BASE
"""

import json
import subprocess
import sys
from pathlib import Path

PACKAGES = ("mlx==0.32.4", "mlx-cpu==0.32.4", "mlx-lm==0.32.2")
TOKENS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]]


def install(folder: Path) -> bool:
    """Whether pip could bring mlx-lm into a folder."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *PACKAGES]
    return subprocess.run(command, capture_output=True, timeout=400).returncode == 0


def _logits(base: str, adapter: str, out: str) -> None:
    import mlx.core as mx
    import numpy as np
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(base))
    if adapter != "-":
        model = load_adapters(model, adapter)
    model.eval()
    np.save(out, np.array(model(mx.array(TOKENS)).astype(mx.float32)))


def _make(base: str, adapter: str, kind: str, *keys: str) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    mx.random.seed(7)
    model, _ = load_model(Path(base))
    model.freeze()
    parameters = {"rank": 3, "scale": 2.5, "dropout": 0.0, "keys": list(keys)}
    linear_to_lora_layers(model, 1, parameters, use_dora=kind == "dora")
    trained = tree_map(lambda array: array + 0.1 * mx.random.normal(array.shape), model.trainable_parameters())
    Path(adapter).mkdir()
    mx.save_safetensors(f"{adapter}/adapters.safetensors", dict(tree_flatten(trained)))
    config = {"fine_tune_type": kind, "num_layers": 1, "lora_parameters": parameters, "model": base}
    Path(adapter, "adapter_config.json").write_text(json.dumps(config))


def _base(config: str, base: str) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.utils import _get_classes

    mx.random.seed(3)
    data = json.loads(config)
    kind, arguments = _get_classes(data)
    model = kind(arguments.from_dict(data))
    model.update(tree_map(lambda array: 0.3 * mx.random.normal(array.shape), model.parameters()))
    Path(base).mkdir()
    Path(base, "config.json").write_text(config)
    mx.save_safetensors(f"{base}/model.safetensors", dict(tree_flatten(model.parameters())), {"format": "mlx"})


if __name__ == "__main__":
    {"logits": _logits, "make": _make, "base": _base}[sys.argv[1]](*sys.argv[2:])
