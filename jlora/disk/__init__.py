"""Files: written whole or not at all, tensors in safetensors, checkpoints of one file or of many."""

from jlora.disk._atomic import file_written_whole, locked_folder, remove_leftovers, sync_folder, write_whole
from jlora.disk._beside import WEIGHTS, Beside, beside
from jlora.disk._checkpoint import Checkpoint
from jlora.disk._dry import check_can_hold, dry_run, is_dry_run
from jlora.disk._formats import NOT_GATHERED, START, format_of, format_of_file, found_instead, orbax_instead
from jlora.disk._lazy import LazyArray
from jlora.disk._open import open_to_read, read_bytes, reason
from jlora.disk._output import (
    FOLDERS,
    OWN,
    RECORD,
    RESIDUALS,
    check_as_if_written,
    check_room,
    check_target,
    put_in_place,
    write_folder,
)
from jlora.disk._pair import CONFIG, MOST_CONFIG, TENSORS, Pair
from jlora.disk._safetensors import (
    TensorEntry,
    TensorFile,
    bytes_of,
    bytes_of_all,
    can_store,
    header_bytes,
    tensor_bytes,
    write_tensors,
)
from jlora.disk._small import (
    dump_json,
    parse_json,
    parse_json_value,
    parse_toml,
    read_json,
    read_json_lines,
)
from jlora.disk._workplace import Workplace, bring_back, left_places, there_already, workplace
from jlora.disk._written import MOST_OF_A_SHARD, write_checkpoint

__all__ = [
    "CONFIG",
    "FOLDERS",
    "MOST_CONFIG",
    "MOST_OF_A_SHARD",
    "NOT_GATHERED",
    "OWN",
    "RECORD",
    "RESIDUALS",
    "START",
    "TENSORS",
    "WEIGHTS",
    "Beside",
    "Checkpoint",
    "LazyArray",
    "Pair",
    "TensorEntry",
    "TensorFile",
    "Workplace",
    "beside",
    "bring_back",
    "bytes_of",
    "bytes_of_all",
    "can_store",
    "check_as_if_written",
    "check_can_hold",
    "check_room",
    "check_target",
    "dry_run",
    "dump_json",
    "file_written_whole",
    "format_of",
    "format_of_file",
    "found_instead",
    "header_bytes",
    "is_dry_run",
    "left_places",
    "locked_folder",
    "open_to_read",
    "orbax_instead",
    "parse_json",
    "parse_json_value",
    "parse_toml",
    "put_in_place",
    "read_bytes",
    "read_json",
    "read_json_lines",
    "reason",
    "remove_leftovers",
    "sync_folder",
    "tensor_bytes",
    "there_already",
    "workplace",
    "write_checkpoint",
    "write_folder",
    "write_tensors",
    "write_whole",
]
