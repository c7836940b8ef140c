"""Adapters of stacked experts by PEFT: what it writes, and what it makes of the weights when it merges.

`python -m tests.interop.experts_of_peft FOLDER` in an environment with any PEFT since 0.17.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora.disk import write_tensors

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

SHAPES = {"oblong": (3, 7, 5), "square": (3, 5, 5)}


class Experts(torch.nn.Module):
    """Experts in one parameter; `is_transposed` is what transformers says of GPT-OSS and its like."""

    def __init__(self, shape: tuple[int, ...], is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        generator = torch.Generator().manual_seed(11)
        self.down_proj = torch.nn.Parameter(torch.randn(shape, generator=generator))

    def forward(self, x: Any) -> Any:
        return x


class Model(torch.nn.Module):
    """Experts in a layer."""

    def __init__(self, shape: tuple[int, ...], is_transposed: bool) -> None:
        super().__init__()
        self.mlp = torch.nn.Module()
        self.mlp.experts = Experts(shape, is_transposed)

    def forward(self, x: Any) -> Any:
        return self.mlp.experts(x)


def write(folder: Path) -> None:
    """For each shape and model a base, an adapter, and what PEFT makes of the base."""
    for name, shape in SHAPES.items():
        for is_transposed in (False, True):
            own = folder / f"{name} {'transposed' if is_transposed else 'plain'}"
            own.mkdir(parents=True)
            config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=["experts.down_proj"])
            live = peft.get_peft_model(Model(shape, is_transposed), config)
            generator = torch.Generator().manual_seed(5)
            with torch.no_grad():
                for key, value in live.named_parameters():
                    if "lora_" in key:
                        value.copy_(torch.randn(value.shape, generator=generator))
            live.save_pretrained(str(own / "adapter"))
            np.save(own / "merged.npy", live.merge_and_unload().mlp.experts.down_proj.detach().numpy())
            base = Model(shape, is_transposed).mlp.experts.down_proj.detach().numpy()
            (own / "base").mkdir()
            with (own / "base" / "model.safetensors").open("wb") as file:
                write_tensors(file, {"mlp.experts.down_proj": base}, {"format": "pt"})


if __name__ == "__main__":
    write(Path(sys.argv[1]))
