"""Adapters of Hugging Face PEFT, read and written: `adapter_config.json` and `adapter_model.safetensors`."""

from jlora.interop.peft._config import Scales, base_model_of, check_peft_config, kept_of, kind_of_experts
from jlora.interop.peft._derive import of_model, scales_in_peft, with_kinds_of, without_defaults
from jlora.interop.peft._keys import Named, names_embedding
from jlora.interop.peft._manifest import differences, manifest_of
from jlora.interop.peft._mapping import FLAT, NESTED, Mapping, Row, paths_of_name, read_rows
from jlora.interop.peft._read import from_tensors, is_peft_folder, read_named, read_peft, read_peft_arrays
from jlora.interop.peft._targeted import Targeted
from jlora.interop.peft._vera import is_vera_folder, read_vera, read_vera_arrays, vera_weights, write_vera
from jlora.interop.peft._write import ModelEntry, model_entries, peft_tensors, to_tensors, write_peft

__all__ = [
    "FLAT",
    "NESTED",
    "Mapping",
    "ModelEntry",
    "Named",
    "Row",
    "Scales",
    "Targeted",
    "base_model_of",
    "check_peft_config",
    "differences",
    "from_tensors",
    "is_peft_folder",
    "is_vera_folder",
    "kept_of",
    "kind_of_experts",
    "manifest_of",
    "model_entries",
    "names_embedding",
    "of_model",
    "paths_of_name",
    "peft_tensors",
    "read_named",
    "read_peft",
    "read_peft_arrays",
    "read_rows",
    "read_vera",
    "read_vera_arrays",
    "scales_in_peft",
    "to_tensors",
    "vera_weights",
    "with_kinds_of",
    "without_defaults",
    "write_peft",
    "write_vera",
]
