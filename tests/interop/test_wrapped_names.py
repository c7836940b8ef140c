"""Adapters whose names training wrapped, or that PEFT did not save: read as PEFT would have named them, and said so."""

import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

import jlora
from jlora import cli
from jlora.disk import write_tensors
from jlora.interop.peft import read_peft
from jlora.interop.peft._wrappers import without_wrappers
from tests.interop.files import PREFIX, embedding_pair, pair, write_folder

UP, EMBED, HEAD = "model.layers.0.mlp.up_proj", "model.embed_tokens", "lm_head"
RENAMED = {
    "torch.compile": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "torch.compile around all": lambda key: f"_orig_mod.{key}",
    "a compiled layer": lambda key: key.replace("layers.0.", "layers.0._orig_mod."),
    "DDP": lambda key: f"module.{key}",
    "DeepSpeed around torch.compile": lambda key: f"module._orig_mod.{key}",
    "FSDP": lambda key: key.replace("mlp.", "_fsdp_wrapped_module.mlp."),
    "checkpoints": lambda key: key.replace("mlp.", "mlp._checkpoint_wrapped_module."),
    "the name of the adapter": lambda key: (
        key.replace(".weight", ".default.weight")
        .replace("embedding_A", "embedding_A.default")
        .replace("embedding_B", "embedding_B.default")
    ),
    "another name": lambda key: key.replace("lora_A.", "lora_A.mine.").replace("lora_B.", "lora_B.mine."),
    "no prefix": lambda key: key.removeprefix(PREFIX),
}


def rewritten(folder: Path, renamed, tensors) -> None:
    with (folder / "adapter_model.safetensors").open("wb") as file:
        write_tensors(file, {renamed(PREFIX + key): array for key, array in tensors.items()}, {"format": "pt"})


@pytest.mark.parametrize("name", RENAMED)
def test_they_are_the_adapters_under_the_names_of_peft(name, tmp_path, rng):
    tensors = pair(rng, UP, 3, 5)
    if name != "the name of the adapter":
        tensors |= embedding_pair(rng, EMBED, 7, 3)
    folder = write_folder(tmp_path / "a", tensors)
    wanted, config = read_peft(folder)
    rewritten(folder, RENAMED[name], tensors)
    with pytest.warns(jlora.JloraWarning, match=r"\d names are not PEFT's: '.*' is read as 'base_model.model."):
        found, found_config = read_peft(folder)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert found_config.replace(extras={}) == config.replace(extras={})


def test_names_of_a_state_dict():
    keys = {
        f"{PREFIX}{EMBED}.lora_embedding_A.default": f"{PREFIX}{EMBED}.lora_embedding_A",
        f"{PREFIX}{UP}.lora_magnitude_vector.default.weight": f"{PREFIX}{UP}.lora_magnitude_vector",
        f"{PREFIX}{UP}.lora_B.default.bias": f"{PREFIX}{UP}.lora_B.bias",
        f"{PREFIX}{HEAD}.modules_to_save.default.weight": f"{PREFIX}{HEAD}.weight",
        f"{PREFIX}{HEAD}.modules_to_save.bias": f"{PREFIX}{HEAD}.bias",
    }
    assert without_wrappers(keys) == keys


def test_names_that_are_peft_s_stay():
    for key in (
        f"{PREFIX}{UP}.lora_A.weight",
        f"{PREFIX}{UP}.lora_B.bias",
        f"{PREFIX}{UP}.lora_magnitude_vector",
        f"{PREFIX}{EMBED}.lora_embedding_B",
        f"{PREFIX}my_module.module.weight",
        f"{PREFIX}module.weight",
    ):
        assert without_wrappers([key]) == {key: key}


def test_two_names_that_become_one_are_refused(tmp_path, rng):
    tensors = pair(rng, "q", 3, 5) | {"q.lora_A.other.weight": np.ones((2, 5), "float32")}
    with pytest.raises(jlora.DataError, match=r"are both the A of q.weight"):
        read_peft(write_folder(tmp_path / "a", tensors))


def test_a_command_says_so_in_a_line(tmp_path, rng, capsys):
    tensors = pair(rng, UP, 3, 5)
    folder = write_folder(tmp_path / "a", tensors)
    rewritten(folder, RENAMED["DDP"], tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["inspect", str(folder)]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(f"jlora: warning: {folder}: 2 names are not PEFT's: 'module.base_model")
    assert captured.err.count("\n") == 1
    assert UP.replace(".", "/") in captured.out
