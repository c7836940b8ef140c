"""Adapters over a params pytree: init, merge, unmerge, labels, splits, counts and the table of what is adapted."""

from typing import TYPE_CHECKING

from jlora.faces import lazy_face
from jlora.tree._bind import batch_dims_of, bind, given_split, in_structure
from jlora.tree._summary import Summary, left_out_html, left_out_text, summary
from jlora.tree._targets import (
    Known,
    LeftOut,
    Survey,
    Target,
    check_config,
    check_floating,
    check_patterns,
    find_targets,
    is_floating,
    is_targeted,
    survey,
)
from jlora.tree._views import combine_params, count_params, lora_labels, lora_mask, split_params

if TYPE_CHECKING:
    from jlora.tree._params import adapter_shapes, init_lora, merge_params, merge_params_with_residual, unmerge_params
    from jlora.tree._shardings import adapter_shardings

__all__ = [
    "Known",
    "LeftOut",
    "Summary",
    "Survey",
    "Target",
    "adapter_shapes",
    "adapter_shardings",
    "batch_dims_of",
    "bind",
    "check_config",
    "check_floating",
    "check_patterns",
    "combine_params",
    "count_params",
    "find_targets",
    "given_split",
    "in_structure",
    "init_lora",
    "is_floating",
    "is_targeted",
    "left_out_html",
    "left_out_text",
    "lora_labels",
    "lora_mask",
    "merge_params",
    "merge_params_with_residual",
    "split_params",
    "summary",
    "survey",
    "unmerge_params",
]

__getattr__, __dir__ = lazy_face(
    __name__,
    {
        "jlora.tree._params": (
            "adapter_shapes",
            "init_lora",
            "merge_params",
            "merge_params_with_residual",
            "unmerge_params",
        ),
        "jlora.tree._shardings": ("adapter_shardings",),
    },
)
