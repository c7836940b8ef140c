"""Where the weights of Hugging Face models lie in the params trees of tunix: mappings for `jlora.interop.peft`.

The trees are those of `nnx.to_pure_dict(nnx.state(model, nnx.Param))`. Attention weights have an axis for the heads
there, and stacks hold what Hugging Face keeps apart (google-tunix 0.1.7, tunix/models).
"""

from jlora.interop.peft import Row

__all__ = ["gemma3", "qwen3"]


def qwen3(
    *, num_heads: int, num_kv_heads: int, head_dim: int, num_experts: int | None = None, prefix: str = "model"
) -> tuple[Row, ...]:
    """The mapping of Qwen3ForCausalLM and Qwen3MoeForCausalLM to the tree of `tunix.models.qwen3`.

    Args:
      num_heads: the number of query heads.
      num_kv_heads: the number of key and value heads.
      head_dim: the size of each head.
      num_experts: for adapters of one expert each, `mlp.experts.{e}.up_proj.weight`, which transformers 4 made. Those
        of transformers 5 are of all experts at once: `mlp.experts.down_proj` is mapped without this number, and
        `gate_up_proj`, which holds two weights of tunix's tree, is not.
      prefix: of the names, where another model holds this one.

    Returns:
      Rows for `read_peft` and `write_peft`.

    >>> import tempfile
    >>> import jax, jax.numpy as jnp
    >>> from jlora import LoraConfig
    >>> from jlora.interop.peft import read_peft, write_peft
    >>> rows = qwen3(num_heads=4, num_kv_heads=2, head_dim=3)
    >>> query = {"A": jnp.ones((7, 2)), "B": jnp.ones((2, 4, 3))}
    >>> adapters = {"layers": {"0": {"attn": {"q_proj": {"w": query}}}}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_peft(folder, adapters, LoraConfig(rank=2, factorizations={"**/q_proj/w": "ioo"}), rows)
    ...     in_peft, _ = read_peft(folder)
    ...     in_tunix, _ = read_peft(folder, rows)
    >>> jax.tree.map(jnp.shape, in_peft)
    {'model.layers.0.self_attn.q_proj.weight': {'A': (7, 2), 'B': (2, 12)}}
    >>> jax.tree.map(jnp.shape, in_tunix)
    {'layers': {'0': {'attn': {'q_proj': {'w': {'A': (7, 2), 'B': (2, 4, 3)}}}}}}
    """
    layer, place = f"{prefix}.layers.{{i}}", "layers/{i}"
    heads = {"q": num_heads, "k": num_kv_heads, "v": num_kv_heads}
    rows = [
        Row(f"{layer}.self_attn.{name}_proj.weight", f"{place}/attn/{name}_proj/w", (2, 0, 1), (count, head_dim, -1))
        for name, count in heads.items()
    ]
    rows.append(Row(f"{layer}.self_attn.o_proj.weight", f"{place}/attn/o_proj/w", (1, 2, 0), (-1, num_heads, head_dim)))
    rows += _mlp(layer, place)
    rows.append(Row(f"{layer}.mlp.gate.weight", f"{place}/mlp/router/kernel", (1, 0)))
    if num_experts is None:
        rows.append(Row(f"{layer}.mlp.experts.down_proj", f"{place}/mlp/down_proj", (0, 2, 1)))
    else:
        rows += [
            Row(
                f"{layer}.mlp.experts.{{e}}.{name}_proj.weight",
                f"{place}/mlp/{name}_proj",
                (1, 0),
                stack=(("{e}", num_experts),),
            )
            for name in ("gate", "up", "down")
        ]
    rows += [Row(f"{layer}.self_attn.{name}_norm.weight", f"{place}/attn/{name}_norm/w") for name in "qk"]
    rows += [
        Row(f"{layer}.{name}.weight", f"{place}/{name}/w") for name in ("input_layernorm", "post_attention_layernorm")
    ]
    return (
        *rows,
        Row(f"{prefix}.embed_tokens.weight", "embedder/input_embedding"),
        Row(f"{prefix}.norm.weight", "final_norm/w"),
        Row("lm_head.weight", "lm_head/w", (1, 0)),
    )


def gemma3(*, num_heads: int, num_kv_heads: int, head_dim: int, prefix: str = "model") -> tuple[Row, ...]:
    """The mapping of Gemma3ForCausalLM to the tree of `tunix.models.gemma3`, whose head is the embedding.

    Args:
      num_heads: the number of query heads.
      num_kv_heads: the number of key and value heads; where it is `num_heads`, the tree stacks q, k and v, else k and
        v, and where an adapter has not all of them, the others' updates are zero.
      head_dim: the size of each head.
      prefix: of the names: "model.language_model" in Gemma3ForConditionalGeneration.

    Returns:
      Rows for `read_peft` and `write_peft`.

    >>> for row in gemma3(num_heads=4, num_kv_heads=1, head_dim=256)[:3]:
    ...     print(row.name, "->", row.path, list(row.stack))
    model.layers.{i}.self_attn.q_proj.weight -> layers/{i}/attn/q_einsum/w []
    model.layers.{i}.self_attn.k_proj.weight -> layers/{i}/attn/kv_einsum/w [(0, 2)]
    model.layers.{i}.self_attn.v_proj.weight -> layers/{i}/attn/kv_einsum/w [(1, 2)]
    """
    layer, place = f"{prefix}.layers.{{i}}", "layers/{i}"
    stacks = ("qkv",) if num_heads == num_kv_heads else ("q", "kv")
    rows = []
    for stack in stacks:
        for index, name in enumerate(stack):
            source, path = f"{layer}.self_attn.{name}_proj.weight", f"{place}/attn/{stack}_einsum/w"
            split = (num_heads if name == "q" else num_kv_heads, head_dim, -1)
            rows.append(Row(source, path, (0, 2, 1), split, ((index, len(stack)),) if len(stack) > 1 else ()))
    rows.append(
        Row(f"{layer}.self_attn.o_proj.weight", f"{place}/attn/attn_vec_einsum/w", (1, 2, 0), (-1, num_heads, head_dim))
    )
    rows += _mlp(layer, place)
    norms = {
        "self_attn.q_norm": "attn/_query_norm",
        "self_attn.k_norm": "attn/_key_norm",
        "input_layernorm": "pre_attention_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "pre_ffw_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
    rows += [Row(f"{layer}.{name}.weight", f"{place}/{path}/scale") for name, path in norms.items()]
    return (
        *rows,
        Row(f"{prefix}.embed_tokens.weight", "embedder/input_embedding"),
        Row(f"{prefix}.norm.weight", "final_norm/scale"),
    )


def _mlp(layer: str, place: str) -> list[Row]:
    return [
        Row(f"{layer}.mlp.{name}_proj.weight", f"{place}/mlp/{name}_proj/kernel", (1, 0))
        for name in ("gate", "up", "down")
    ]
