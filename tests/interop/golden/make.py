"""Writes the golden files with the PEFT at hand: PYTHONHASHSEED=0 python -m tests.interop.golden.make

Each case is a folder with what PEFT saved, and `expected.npz`: base/NAME, a small weight, and merged/NAME, what PEFT in
float64 makes of it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tests.interop.models import Case, Net, merged_by_peft, peft, quiet, randomized, state_of, torch, transformers

HERE = Path(__file__).parent


class Block(torch.nn.Module):
    """Linear layers, an embedding, a norm, and experts in two parameters."""

    def __init__(self, *, experts: bool = False) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(13, 5)
        self.up = torch.nn.Linear(5, 7)
        self.down = torch.nn.Linear(7, 5, bias=False)
        self.norm = torch.nn.LayerNorm(5)
        if experts:
            self.experts = Experts()


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.zeros(3, 14, 5))
        self.down_proj = torch.nn.Parameter(torch.zeros(3, 5, 7))


class Old(torch.nn.Module):
    """The Conv1D of GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = transformers.pytorch_utils.Conv1D(21, 7)
        self.c_proj = transformers.pytorch_utils.Conv1D(7, 7)


def moe() -> Any:
    return Block(experts=True)


PATTERNS: dict[str, Any] = {"rank_pattern": {"down": 3}, "alpha_pattern": {"^up": 1.5}, "use_rslora": True}
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
CASES = {
    "linear": Case(Block, {"target_modules": ["up", "down"], **PATTERNS}),
    "conv1d": Case(Old, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv": Case(Net, {"target_modules": ["conv1", "conv2", "conv3"], "rank_pattern": {"conv2": 1}}),
    "embedding": Case(Block, {"target_modules": ["embed"]}),
    "dora": Case(Net, {"target_modules": ["linear", "conv2", "embed"], "use_dora": True}),
    "lora_bias": Case(Block, {"target_modules": ["up"], "lora_bias": True, "bias": "all"}),
    "experts": Case(moe, {"target_modules": ["down"], "target_parameters": PARAMETERS}),
    "modules_to_save": Case(Block, {"target_modules": ["down"], "modules_to_save": ["up", "norm"]}),
    "bf16": Case(Block, {"target_modules": ["up"]}, dtype="bfloat16"),
}


def make(name: str, case: Case) -> None:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(sum(map(ord, name)))
    model = case.model()
    randomized(model)
    model = model.to(getattr(torch, case.dtype))
    base = state_of(model)
    fields = {"r": 2, "lora_alpha": 5, "init_lora_weights": False, **case.fields}
    with quiet():
        live = peft.get_peft_model(model, peft.LoraConfig(**fields), autocast_adapter_dtype=False).eval()
        randomized(live, trained=True)
        live.save_pretrained(str(folder))
    (folder / "README.md").unlink()
    merged = merged_by_peft(live)
    arrays = {f"base/{key}": base[key] for key in base if not np.array_equal(base[key], merged[key])}
    arrays |= {key.replace("base/", "merged/"): merged[key.removeprefix("base/")] for key in arrays}
    np.savez_compressed(folder / "expected.npz", **arrays)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{name}: {len(arrays) // 2} weights, {size:,} bytes")


def main() -> None:
    for name, case in CASES.items():
        make(name, case)
    versions = {"peft": peft.__version__, "torch": torch.__version__.partition("+")[0]}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
    print(versions)


if __name__ == "__main__":
    main()
