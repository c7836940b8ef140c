"""One adapter: pure functions on `{'A': (*batch, *in, r), 'B': (*batch, r, *out)}`, and a layer that wraps them."""

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
from jlora.adapter._update import (
    PARTS,
    apply_update,
    boxed_update,
    check_update,
    is_reversible,
    is_update,
    part_axes,
    undo_update,
)

__all__ = [
    "PARTS",
    "Adapter",
    "LoRALayer",
    "apply_update",
    "boxed_update",
    "check_update",
    "count_lost",
    "draw_a",
    "init_lora_adapter",
    "is_adapter",
    "is_reversible",
    "is_update",
    "lora_delta",
    "lora_linear",
    "lora_singular_values",
    "merge_lora_weight",
    "part_axes",
    "range_problem",
    "tree_lora_delta",
    "undo_update",
    "unmerge_lora_weight",
]
