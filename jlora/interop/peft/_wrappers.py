"""Names of tensors that training wrapped, as PEFT would have written them.

torch.compile, FSDP and activation checkpointing put a name of theirs before that of the module within, DDP and
DeepSpeed put `module.` before all; a state dict that was not saved by PEFT has the adapter's name in each key, and one
of an older trainer lacks `base_model.model.`.
"""

import re
from collections.abc import Iterable

PREFIX = "base_model.model."
_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_OUTER = re.compile(rf"^(?:module\.)+(?={re.escape(PREFIX)})")
_ADAPTER = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save)\.(?!(?:weight|bias)$)\w+(?=$|\.weight$|\.bias$)"
)
_COPIES = (".modules_to_save.", ".original_module.")
_UNPREFIXED = re.compile(r"\.lora_(?:[AB]\.weight|embedding_[AB])$")


def without_wrappers(keys: Iterable[str]) -> dict[str, str]:
    """Each tensor's name in a file -> the name that PEFT would have given it.

    A saved module that is an embedding too PEFT writes with copies, which it does not read; they are left out.
    """
    every = list(keys)
    there = set(every)
    copies = {key for key in every if any(name in key and key.replace(name, ".") in there for name in _COPIES)}
    plain = {key: _plain(key) for key in every if key not in copies}
    if any(name.startswith(PREFIX) for name in plain.values()):
        return plain
    if any(_UNPREFIXED.search(name) for name in plain.values()):
        return {key: PREFIX + name for key, name in plain.items()}
    return plain


def _plain(key: str) -> str:
    name = _OUTER.sub("", _WRAPPER.sub("", key))
    name = _ADAPTER.sub(r".\1", name)
    name = name.replace(".modules_to_save.", ".")
    return name.removesuffix(".weight") if name.endswith(".lora_magnitude_vector.weight") else name
