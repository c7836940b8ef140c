"""Files: written whole or not at all, tensors in safetensors, checkpoints of one file or of many."""

from jlora.disk._atomic import file_written_whole, write_whole
from jlora.disk._checkpoint import Checkpoint
from jlora.disk._json import dump_json, read_json
from jlora.disk._safetensors import TensorEntry, TensorFile, tensor_bytes, write_tensors

__all__ = [
    "Checkpoint",
    "TensorEntry",
    "TensorFile",
    "dump_json",
    "file_written_whole",
    "read_json",
    "tensor_bytes",
    "write_tensors",
    "write_whole",
]
