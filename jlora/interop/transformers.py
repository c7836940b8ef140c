"""Names of Hugging Face models in memory, and in their checkpoints, where transformers 5 renames on the way.

Adapters carry the names that modules have in memory, checkpoints those that they were published with. The rows are what
models saved by transformers 5.23 show; experts that are one array in memory and many tensors on the disk are another
matter, and are taken apart where adapters are merged.
"""

from jlora.interop.peft import Row

_ATTENTION = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
_MLP = {"fc1": "intermediate.dense", "fc2": "output.dense"}

RENAMED: tuple[Row, ...] = (
    # ViT, DeiT, BEiT
    *(
        Row(
            f"{{m*}}.layers.{{i}}.attention.{memory}.{{e}}",
            f"{{m*}}.encoder.layer.{{i}}.attention.attention.{disk}.{{e}}",
        )
        for memory, disk in _ATTENTION.items()
    ),
    Row("{m*}.layers.{i}.attention.o_proj.{e}", "{m*}.encoder.layer.{i}.attention.output.dense.{e}"),
    *(
        Row(f"{{m*}}.layers.{{i}}.mlp.{memory}.{{e}}", f"{{m*}}.encoder.layer.{{i}}.{disk}.{{e}}")
        for memory, disk in _MLP.items()
    ),
    Row("{m*}.layers.{i}.{rest*}", "{m*}.encoder.layer.{i}.{rest*}"),
    # DINOv2
    *(
        Row(f"{{m*}}.attention.{memory}.{{e}}", f"{{m*}}.attention.attention.{disk}.{{e}}")
        for memory, disk in _ATTENTION.items()
    ),
    Row("{m*}.attention.o_proj.{e}", "{m*}.attention.output.dense.{e}"),
    # Swin
    *(
        Row(f"{{m*}}.attention.{memory}.{{e}}", f"{{m*}}.attention.self.{disk}.{{e}}")
        for memory, disk in _ATTENTION.items()
    ),
    *(Row(f"{{m*}}.mlp.{memory}.{{e}}", f"{{m*}}.{disk}.{{e}}") for memory, disk in _MLP.items()),
    # Mixtral
    Row("{m*}.mlp.gate.{e}", "{m*}.block_sparse_moe.gate.{e}"),
    Row("{m*}.mlp.experts.{e}", "{m*}.block_sparse_moe.experts.{e}"),
)
"""Rows of a name in memory and the name on the disk; one that leads to no tensor says nothing."""
