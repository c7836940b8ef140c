"""diffusers in a process of its own: small models, LoRA files for them, and what it says with them.

python real_diffusers.py make FOLDER
python real_diffusers.py says FOLDER FILE OUT.npy
python real_diffusers.py make_models FOLDER
python real_diffusers.py merges FOLDER FILE OUT.safetensors
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

# diffusers, and of what it wants what torch, PEFT and transformers do not bring.
PACKAGES = ("diffusers==0.42.1", "requests", "urllib3", "charset-normalizer", "certifi", "importlib_metadata", "pillow")


def install(folder: Path) -> bool:
    """Whether pip could bring diffusers into a folder."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *PACKAGES]
    return subprocess.run(command, capture_output=True, timeout=400).returncode == 0


def _says(model: object, out: Path) -> None:
    import numpy as np
    import torch

    torch.manual_seed(1)
    x, times, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 12)
    with torch.no_grad():
        np.save(out, model.eval()(x, times, text).sample.numpy())  # type: ignore[attr-defined]


def _unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def _text_encoder() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
    return CLIPTextModel(CLIPTextConfig(vocab_size=17, max_position_embeddings=7, **sizes))


def _transformer() -> Any:
    from diffusers import FluxTransformer2DModel

    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    others = {"in_channels": 4, "joint_attention_dim": 12, "pooled_projection_dim": 8, "axes_dims_rope": (4, 4, 8)}
    return FluxTransformer2DModel(**sizes, **others)


def _save(model: Any, folder: Path) -> None:
    import torch

    with torch.no_grad():
        for value in model.parameters():
            value.copy_(0.2 * torch.randn(value.shape))
    model.save_pretrained(folder)


def _make_models(folder: Path) -> None:
    import torch

    torch.manual_seed(0)
    for name, make in (("unet", _unet), ("text_encoder", _text_encoder), ("transformer", _transformer)):
        _save(make(), folder / name)


def _merges(folder: Path, file: Path, out: Path) -> None:
    """The weights of all three models with a file that diffusers' pipelines loaded, without those of the adapters."""
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel
    from diffusers.loaders import FluxLoraLoaderMixin, StableDiffusionLoraLoaderMixin
    from peft.tuners.tuners_utils import BaseTunerLayer
    from safetensors import safe_open
    from safetensors.torch import save_file
    from transformers import CLIPTextModel

    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet"),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder"),
        "transformer": FluxTransformer2DModel.from_pretrained(folder / "transformer"),
    }
    with safe_open(file, "pt") as opened:
        is_flux = any(key.startswith("transformer.") for key in opened.keys())  # noqa: SIM118
    base: Any = FluxLoraLoaderMixin if is_flux else StableDiffusionLoraLoaderMixin
    pipeline: Any = type("Pipeline", (base,), {"components": parts, "hf_device_map": None, **parts})()
    pipeline.load_lora_weights(str(file))
    tensors = {}
    for component, model in parts.items():
        for name, module in model.named_modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()
                tensors[f"{component}.{name}.weight"] = module.get_base_layer().weight.detach().contiguous()
                if module.get_base_layer().bias is not None:
                    tensors[f"{component}.{name}.bias"] = module.get_base_layer().bias.detach().contiguous()
    save_file(tensors, out)


def _make(folder: Path) -> None:
    import peft
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
    from safetensors.torch import save_file

    torch.manual_seed(0)
    unet = _unet()
    _save(unet, folder / "unet")
    _says(unet, folder / "plain.npy")
    tensors, count = {}, 0
    for name, module in unet.named_modules():
        is_known = isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and ("attentions" in name or ".conv" in name)
        if is_known and "samplers" not in name:
            count += 1
            rank, shape, flat = 2 + count % 3, module.weight.shape, "lora_unet_" + name.replace(".", "_")
            tensors[f"{flat}.lora_down.weight"] = torch.randn(rank, *shape[1:])
            tensors[f"{flat}.lora_up.weight"] = 0.3 * torch.randn(shape[0], rank, *(1 for _ in shape[2:]))
            # One for all: of several alphas this version applies those of to_q, to_k and to_v to none.
            tensors[f"{flat}.alpha"] = torch.tensor(3.0)
    save_file(tensors, folder / "kohya.safetensors")
    state, alphas = Loader.lora_state_dict(str(folder / "kohya.safetensors"), unet_config=unet.config)
    Loader.load_lora_into_unet(state, network_alphas=alphas, unet=unet)
    _says(unet, folder / "kohya.npy")
    fresh = UNet2DConditionModel.from_pretrained(folder / "unet")
    fields = {"rank_pattern": {"to_v": 4}, "alpha_pattern": {"conv1": 9}, "use_rslora": True}
    fresh.add_adapter(peft.LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "to_v", "conv1"], **fields))
    with torch.no_grad():
        for name, value in fresh.named_parameters():
            if "lora_" in name:
                value.copy_(0.4 * torch.randn(value.shape))
    _says(fresh, folder / "diffusers.npy")
    Loader.save_lora_weights(
        folder,
        unet_lora_layers=peft.get_peft_model_state_dict(fresh),
        unet_lora_adapter_metadata=fresh.peft_config["default"].to_dict(),
        weight_name="diffusers.safetensors",
    )


def _says_merged(folder: Path, file: Path, out: Path) -> None:
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    unet.load_state_dict(load_file(file))
    _says(unet, out)


if __name__ == "__main__":
    {"make": _make, "says": _says_merged, "make_models": _make_models, "merges": _merges}[sys.argv[1]](
        *map(Path, sys.argv[2:])
    )
