"""What config.json of a Hugging Face folder says about a language model: all that changes its result, or an error."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlora.disk import read_json
from jlora.errors import ConfigError, DataError, listed, raise_all, shortened
from jlora.fields import choice, integer, number
from jlora.models._families import FAMILIES, NEUTRAL, NO_MATTER, Family
from jlora.models._rope import Rope
from jlora.models._rope_config import read_ropes

__all__ = ["DecoderConfig", "parse_config", "read_config"]

_ACTIVATIONS = {  # of transformers -> of `jax.nn`, as _decoder has them
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
_MOST_LAYERS = 10_000  # a window and a rope are noted for each
_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A language model: all that changes its result, and nothing else. Hashable, so that it may be static in jit.

    Attributes:
      family: the name that config.json has as model_type.
      vocab_size, hidden_size, intermediate_size: widths of the table, the residual stream and the MLP (of each expert).
      layers: how many there are.
      heads, kv_heads, head_dim: of the queries; of the keys and values, a divisor; the width of each.
      activation: "silu", "gelu", "gelu_tanh" or "relu".
      norm_eps: added to the mean square in each RMS norm.
      max_positions: the longest row that the model was made for.
      tied: the head is the table of the embedding.
      windows: for each layer how many tokens a token attends to, itself included; None for all before it.
      ropes: for each layer how positions turn queries and keys.
      qkv_bias, output_bias, mlp_bias: which linear layers have one.
      norms: where norms stand: "before" attention and MLP; "after" both; "around" them.
      norm_offset: added to the weights of the norms.
      query_norm: a norm over each "head" of queries and keys, over the "whole" of them, or None.
      query_scale: what queries are multiplied with.
      attention_softcap, logits_softcap: c in c tanh(x / c), of attention's logits and of the model's; None for no such.
      embedding_scaled: embeddings are multiplied with sqrt(hidden_size), rounded to their dtype.
      fused: one weight for queries, keys and values, and one for gate and up.
      experts, experts_per_token: how many MLPs a layer has, and how many of them a token goes through; 0: one.
      experts_normalized: the weights of a token's experts sum to one.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: str
    norm_eps: float
    max_positions: int
    tied: bool
    windows: tuple[int | None, ...]
    ropes: tuple[Rope, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    norms: str = "before"
    norm_offset: float = 0.0
    query_norm: str | None = None
    query_scale: float = 1.0
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    embedding_scaled: bool = False
    fused: bool = False
    experts: int = 0
    experts_per_token: int = 0
    experts_normalized: bool = False


def read_config(folder: str | Path) -> DecoderConfig:
    """The configuration of the language model in a Hugging Face folder, from its config.json.

    Both spellings are read: rope_parameters and layer_types of transformers 5, rope_theta, rope_scaling and
    sliding_window_pattern of before. A key that is missing is what transformers takes for it.

    Args:
      folder: with a config.json of a family in `jlora.models.FAMILIES`.

    Raises:
      DataError: there is no config.json, or it is no JSON object.
      ConfigError: an architecture that is not known, a key that is not known or has a value that is not supported: all
        such keys, with what is known.

    Example:
      >>> import json, pathlib, tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> _ = (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2}))
      >>> config = read_config(folder)
      >>> config.layers, config.head_dim, config.tied
      (2, 128, False)
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise DataError(f"{folder}: it has no config.json: wanted the folder of a Hugging Face model")
    return parse_config(read_json(file), str(file))


def parse_config(data: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """The configuration that `read_config` reads, of what config.json says.

    Args:
      data: the object in config.json.
      where: what errors begin with.

    Raises:
      ConfigError: as `read_config`.

    Example:
      >>> parse_config({"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": 512}).windows
      (512, 512)
    """
    family = _family(data, where)
    row = FAMILIES[family]
    data = _renamed(data, row, where)
    said = dict(row.defaults)
    for key in row.defaults:
        if key in data and (data[key] is not None or key in _NULL_SAYS):
            said[key] = data[key]

    problems = _refused_keys(data, row)
    fields: dict[str, Any] = {}
    for part in (_widths, _heads, _activation_and_norms, _layers, _biases, _softcaps, _experts):
        try:
            fields |= part(row, said)
        except ConfigError as error:
            problems.append(str(error))
    raise_all(dict.fromkeys(problems), ConfigError, where)  # the layers ask for the heads too
    return DecoderConfig(family=family, **fields, **row.fixed)


# null is a value of its own, not the default
_NULL_SAYS = ("num_key_value_heads", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping")


def _family(data: Mapping[str, Any], where: str) -> str:
    """The name of the family, by model_type and by the class."""
    known = ", ".join(f"{name} ({row.architecture})" for name, row in FAMILIES.items())
    classes = data.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ConfigError(f"{where}: architectures = {shortened(classes)}: wanted a list of names")
    name = data.get("model_type")
    if name is None and classes:
        name = next((family for family, row in FAMILIES.items() if row.architecture in classes), classes[0])
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(f"{where}: model_type = {shortened(name)} is not known: known are {known}")
    wanted = FAMILIES[name].architecture
    if classes and wanted not in classes:
        found = listed(classes)
        raise ConfigError(f"{where}: architectures = {found} of model_type {name!r} is not known: wanted {wanted}")
    return name


def _renamed(data: Mapping[str, Any], row: Family, where: str) -> dict[str, Any]:
    """With each key under the one name that it has here."""
    renamed = dict(data)
    for other, name in row.other_names.items():
        value = renamed.pop(other, None)
        if value is not None and renamed.setdefault(name, value) != value:
            found = f"{name} = {shortened(renamed[name])} and {other} = {shortened(value)}"
            raise ConfigError(f"{where}: {found}, which are two names of one number: wanted one of them")
    return renamed


def _refused_keys(data: Mapping[str, Any], row: Family) -> list[str]:
    """One problem for each key that might change the result in a way that is not known here."""
    problems = []
    neutral_values = {**NEUTRAL, **row.neutral}
    accounted = {*row.defaults, *row.ignored, *NO_MATTER}
    for key, value in data.items():
        if key in accounted or key.startswith("_") or value is None:
            continue
        if key == "quantization_config":
            problems.append(
                f"{key} = {shortened(value)}: packed weights are not supported: wanted the model before that"
            )
        elif key not in neutral_values:
            problems.append(
                f"{key} = {shortened(value)}: this key is not known for {row.architecture}. Take it out of the file if "
                "you are sure that the model computes the same without it"
            )
        elif value not in neutral_values[key]:
            wanted = " or ".join([*(repr(neutral) for neutral in neutral_values[key]), "null"])
            problems.append(f"{key} = {shortened(value)} is not supported for {row.architecture}: wanted {wanted}")
    return problems


Said = Mapping[str, Any]  # the keys of a family, with the defaults of those that config.json does not have


def _widths(row: Family, said: Said) -> dict[str, Any]:
    of_an_mlp = "moe_intermediate_size" if "num_experts" in said else "intermediate_size"
    return {
        "vocab_size": integer("vocab_size", said["vocab_size"], 1),
        "hidden_size": integer("hidden_size", said["hidden_size"], 1),
        "intermediate_size": integer(of_an_mlp, said[of_an_mlp], 1),
    }


def _heads(row: Family, said: Said) -> dict[str, Any]:
    heads, hidden = (integer(key, said[key], 1) for key in ("num_attention_heads", "hidden_size"))
    kv_heads = said["num_key_value_heads"]
    kv_heads = heads if kv_heads is None else integer("num_key_value_heads", kv_heads, 1)
    if heads % kv_heads:
        raise ConfigError(f"num_key_value_heads = {kv_heads}: wanted a divisor of num_attention_heads = {heads}")
    head_dim = said["head_dim"]
    if head_dim is None:
        head_dim, rest = divmod(hidden, heads)
        if rest:
            raise ConfigError(f"num_attention_heads = {heads}: wanted a divisor of hidden_size = {hidden}")
    head_dim = integer("head_dim", head_dim, 1)
    scalar = number("query_pre_attn_scalar", said.get("query_pre_attn_scalar", head_dim), 1e-9)
    return {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "query_scale": scalar**-0.5}


def _activation_and_norms(row: Family, said: Said) -> dict[str, Any]:
    key = "hidden_activation" if "hidden_activation" in said else "hidden_act"
    return {
        "activation": _ACTIVATIONS[choice(key, said[key], tuple(_ACTIVATIONS))],
        "norm_eps": number("rms_norm_eps", said["rms_norm_eps"], 0),
        "tied": _flag("tie_word_embeddings", said),
    }


def _layers(row: Family, said: Said) -> dict[str, Any]:
    """How many there are, and for each how positions change its attention."""
    layers = integer("num_hidden_layers", said["num_hidden_layers"], 1, _MOST_LAYERS)
    positions = integer("max_position_embeddings", said["max_position_embeddings"], 1)
    sliding = _sliding(row, said, layers)
    window = integer("sliding_window", said["sliding_window"], 1) if any(sliding) else None
    return {
        "layers": layers,
        "max_positions": positions,
        "windows": tuple(window if slides else None for slides in sliding),
        "ropes": read_ropes(said, _heads(row, said)["head_dim"], positions, sliding),
    }


def _biases(row: Family, said: Said) -> dict[str, Any]:
    fields = {}
    if "attention_bias" in said:
        fields["qkv_bias"] = fields["output_bias"] = _flag("attention_bias", said)
    if "mlp_bias" in said:
        fields["mlp_bias"] = _flag("mlp_bias", said)
    return fields


def _softcaps(row: Family, said: Said) -> dict[str, Any]:
    keys = {"attention_softcap": "attn_logit_softcapping", "logits_softcap": "final_logit_softcapping"}
    return {field: number(key, said[key], 1e-9) for field, key in keys.items() if said.get(key) is not None}


def _experts(row: Family, said: Said) -> dict[str, Any]:
    if "num_experts" not in said:
        return {}
    experts = integer("num_experts", said["num_experts"], 1)
    return {
        "experts": experts,
        "experts_per_token": integer("num_experts_per_tok", said["num_experts_per_tok"], 1, experts + 1),
        "experts_normalized": _flag("norm_topk_prob", said),
    }


def _flag(key: str, said: Said) -> bool:
    if not isinstance(said[key], bool):
        raise ConfigError(f"{key} = {shortened(said[key])}: wanted true or false")
    return bool(said[key])


def _sliding(row: Family, said: Said, layers: int) -> list[bool]:
    """For each layer, whether it attends within the window only."""
    on = not row.switch or _flag("use_sliding_window", said)
    on = on and row.window != "none" and said["sliding_window"] is not None
    if said.get("layer_types") is not None:
        return _sliding_as_listed(said["layer_types"], layers, on)
    if not on:
        return [False] * layers
    if row.window == "last":
        full = integer("max_window_layers", said["max_window_layers"], 0)
        return [layer >= full for layer in range(layers)]
    if row.window == "even":
        return [layer % 2 == 0 for layer in range(layers)]
    if row.window == "pattern":
        each = integer("sliding_window_pattern", said["sliding_window_pattern"], 1)
        return [(layer + 1) % each != 0 for layer in range(layers)]
    return [True] * layers


def _sliding_as_listed(kinds: Any, layers: int, on: bool) -> list[bool]:
    if not isinstance(kinds, list) or len(kinds) != layers:
        found = f"a list of {len(kinds)}" if isinstance(kinds, list) else shortened(kinds)
        raise ConfigError(f"layer_types: wanted a list of num_hidden_layers = {layers} names, found {found}")
    for kind in kinds:
        choice("layer_types", kind, (_SLIDING, _FULL))
    sliding = [kind == _SLIDING for kind in kinds]
    if any(sliding) and not on:
        raise ConfigError(f"layer_types has {_SLIDING!r}, and there is no sliding_window: wanted one, switched on")
    return sliding
