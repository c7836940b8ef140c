"""One adapter: pure functions on `{'A': (*batch, *in, r), 'B': (*batch, r, *out)}`, and a layer that wraps them."""

from typing import TYPE_CHECKING

from jlora.adapter._entry import PARTS, Adapter, Entry, boxed_entry, is_adapter, is_entry, matrices_of, part_axes
from jlora.faces import lazy_face

if TYPE_CHECKING:
    from jlora.adapter._applied import base_weight, gain_of, init_magnitude, merged_weight, unmerged_weight
    from jlora.adapter._functions import (
        adapter_dtype,
        draw_a,
        init_lora_adapter,
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
    "adapter_dtype",
    "base_weight",
    "boxed_entry",
    "count_lost",
    "draw_a",
    "gain_of",
    "init_lora_adapter",
    "init_magnitude",
    "is_adapter",
    "is_entry",
    "lora_delta",
    "lora_linear",
    "lora_singular_values",
    "matrices_of",
    "merge_lora_weight",
    "merged_weight",
    "part_axes",
    "part_sharding",
    "range_problem",
    "tree_lora_delta",
    "unmerge_lora_weight",
    "unmerged_weight",
]

__getattr__, __dir__ = lazy_face(
    __name__,
    {
        "jlora.adapter._applied": ("base_weight", "gain_of", "init_magnitude", "merged_weight", "unmerged_weight"),
        "jlora.adapter._functions": (
            "adapter_dtype",
            "draw_a",
            "init_lora_adapter",
            "lora_delta",
            "lora_linear",
            "lora_singular_values",
            "merge_lora_weight",
            "tree_lora_delta",
            "unmerge_lora_weight",
        ),
        "jlora.adapter._layer": ("LoRALayer",),
        "jlora.adapter._range": ("count_lost", "range_problem"),
        "jlora.adapter._sharding": ("part_sharding",),
    },
)
