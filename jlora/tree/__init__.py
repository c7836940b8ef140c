"""Adapters over a params pytree: init, merge, unmerge, labels, splits, counts and the table of what is adapted."""

from jlora.tree._params import init_lora, merge_params, settle_params, unmerge_params
from jlora.tree._summary import Summary, summary
from jlora.tree._targets import (
    Target,
    adapted_targets,
    check_config,
    check_floating,
    check_patterns,
    find_targets,
    is_floating,
    is_targeted,
)
from jlora.tree._views import combine_params, count_params, lora_labels, lora_mask, split_params

__all__ = [
    "Summary",
    "Target",
    "adapted_targets",
    "check_config",
    "check_floating",
    "check_patterns",
    "combine_params",
    "count_params",
    "find_targets",
    "init_lora",
    "is_floating",
    "is_targeted",
    "lora_labels",
    "lora_mask",
    "merge_params",
    "settle_params",
    "split_params",
    "summary",
    "unmerge_params",
]
