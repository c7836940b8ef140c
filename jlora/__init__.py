"""Low-rank adaptation (LoRA) for any JAX model that is a function of a parameter pytree."""

from typing import TYPE_CHECKING

from jlora.faces import lazy_face

if TYPE_CHECKING:
    from jlora.adapter import (
        LoRALayer,
        init_lora_adapter,
        is_adapter,
        lora_delta,
        lora_linear,
        lora_singular_values,
        merge_lora_weight,
        tree_lora_delta,
        unmerge_lora_weight,
    )
    from jlora.config import LoraConfig
    from jlora.contraction import Factorization
    from jlora.cost import CostModel
    from jlora.errors import AdapterError, ConfigError, DataError, JloraError, JloraWarning, TargetError
    from jlora.starts import Started, start
    from jlora.storage import LoadReport, load_adapters, load_fitting_adapters, save_adapters
    from jlora.transform import Adapted, Explanation, adapt, explain, init_lora, lora, resolve_config
    from jlora.tree import (
        adapter_shardings,
        combine_params,
        count_params,
        lora_labels,
        lora_mask,
        merge_params,
        merge_params_with_residual,
        split_params,
        summary,
        unmerge_params,
    )

__version__ = "0.1.0"

__all__ = [
    "Adapted",
    "AdapterError",
    "ConfigError",
    "CostModel",
    "DataError",
    "Explanation",
    "Factorization",
    "JloraError",
    "JloraWarning",
    "LoRALayer",
    "LoadReport",
    "LoraConfig",
    "Started",
    "TargetError",
    "adapt",
    "adapter_shardings",
    "combine_params",
    "count_params",
    "explain",
    "init_lora",
    "init_lora_adapter",
    "is_adapter",
    "load_adapters",
    "load_fitting_adapters",
    "lora",
    "lora_delta",
    "lora_labels",
    "lora_linear",
    "lora_mask",
    "lora_singular_values",
    "merge_lora_weight",
    "merge_params",
    "merge_params_with_residual",
    "resolve_config",
    "save_adapters",
    "split_params",
    "start",
    "summary",
    "tree_lora_delta",
    "unmerge_lora_weight",
    "unmerge_params",
]

__getattr__, __dir__ = lazy_face(
    __name__,
    {
        "jlora.adapter": (
            "LoRALayer",
            "init_lora_adapter",
            "is_adapter",
            "lora_delta",
            "lora_linear",
            "lora_singular_values",
            "merge_lora_weight",
            "tree_lora_delta",
            "unmerge_lora_weight",
        ),
        "jlora.config": ("LoraConfig",),
        "jlora.contraction": ("Factorization",),
        "jlora.cost": ("CostModel",),
        "jlora.errors": ("AdapterError", "ConfigError", "DataError", "JloraError", "JloraWarning", "TargetError"),
        "jlora.starts": ("Started", "start"),
        "jlora.storage": ("LoadReport", "load_adapters", "load_fitting_adapters", "save_adapters"),
        "jlora.transform": ("Adapted", "Explanation", "adapt", "explain", "init_lora", "lora", "resolve_config"),
        "jlora.tree": (
            "adapter_shardings",
            "combine_params",
            "count_params",
            "lora_labels",
            "lora_mask",
            "merge_params",
            "merge_params_with_residual",
            "split_params",
            "summary",
            "unmerge_params",
        ),
    },
)
