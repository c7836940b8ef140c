"""One adapter: pure functions on `{'A': (*batch, *in, r), 'B': (*batch, r, *out)}`, and a layer that wraps them."""

from jlora.adapter._entry import PARTS, Entry, boxed_entry, is_entry, matrices_of, part_axes
from jlora.adapter._functions import (
    Adapter,
    draw_a,
    init_lora_adapter,
    is_adapter,
    lora_delta,
    lora_linear,
    lora_singular_values,
    merge_lora_weight,
    tree_lora_delta,
    unmerge_lora_weight,
)
from jlora.adapter._layer import LoRALayer
from jlora.adapter._range import count_lost, range_problem
from jlora.adapter._sharding import part_sharding

__all__ = [
    "PARTS",
    "Adapter",
    "Entry",
    "LoRALayer",
    "boxed_entry",
    "count_lost",
    "draw_a",
    "init_lora_adapter",
    "is_adapter",
    "is_entry",
    "lora_delta",
    "lora_linear",
    "lora_singular_values",
    "matrices_of",
    "merge_lora_weight",
    "part_axes",
    "part_sharding",
    "range_problem",
    "tree_lora_delta",
    "unmerge_lora_weight",
]
