"""What the programs that serve adapters take of PEFT's files: names, features and limits, by their own source.

Facts of
- PEFT 0.21.2: `peft/peft_model.py` (`load_adapter`, `from_pretrained`: a tensor that is missing is warned of, one of
  another name passed over), `peft/utils/save_and_load.py`.
- vLLM 0.33.0: `vllm/lora/peft_helper.py` (features), `vllm/config/lora.py` (`MaxLoRARanks`), `vllm/lora/utils.py`
  (`parse_fine_tuned_lora_name`, `is_base_embedding_weights`), `vllm/lora/lora_model.py` (module names, vocabulary),
  `vllm/lora/model_manager.py` (`activate_adapter`: a module that the adapter has no weights for stays the base's, and
  no error says so; `_validate_moe_lora_format`), `vllm/lora/layers/logits_processor.py` (the head's vocabulary), and
  `embedding_modules`, `hf_to_vllm_mapper` and `is_3d_moe_weight` of the classes in `vllm/model_executor/models`.
- SGLang 0.5.23, below `python/sglang/srt`: `lora/lora.py` (`LoRAAdapter`: the scaling is lora_alpha / r whatever else
  the configuration says; how projections are joined), `lora/lora_config.py`, `lora/lora_manager.py`
  (`validate_new_adapter`), `lora/mem_pool.py` (`can_support`, tensors without a target), `lora/utils.py`
  (`get_normalized_target_modules`), `layers/utils` (`get_layer_id`).

A version of these that is not named here may have other limits.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jlora.errors import listed, shortened

__all__ = ["ENGINES", "Engine", "Handed", "Verdict", "verdict"]

_PREFIX = "base_model.model."
_LOW_RANK = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")


@dataclasses.dataclass(frozen=True)
class Handed:
    """What an engine is given.

    Attributes:
      shapes: name in PEFT's file -> shape.
      data: PEFT's configuration.
      architecture: the first of `architectures` in the base's config.json; "" where it is not known.
      vocabulary: how many tokens the base has; None where it is not known.
      elsewhere: name of a weight as the adapter has it -> its name in the base, where the two differ.
      files: names of the files in the adapter's folder.
    """

    shapes: Mapping[str, tuple[int, ...]]
    data: Mapping[str, Any]
    architecture: str = ""
    vocabulary: int | None = None
    elsewhere: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: Sequence[str] = ()

    def modules(self) -> dict[str, str]:
        """The module of each tensor of A or B, by the tensor's name, without PEFT's prefix."""
        found = {}
        for name in self.shapes:
            if suffix := next((suffix for suffix in _LOW_RANK if name.endswith(suffix)), None):
                found[name] = name.removeprefix(_PREFIX).removesuffix(suffix)
        return found


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether an engine loads an adapter as what it is.

    Attributes:
      engine, version: whose source was read.
      options: what the engine has to be started with.
      problems: why it refuses the adapter, or would answer as another model; none where it loads it.
    """

    engine: str
    version: str
    options: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def loads(self) -> bool:
        """Whether nothing stands against it."""
        return not self.problems


@dataclasses.dataclass(frozen=True)
class Engine:
    """A row of the table.

    Attributes:
      name, version: whose source was read.
      problems: what keeps it from loading an adapter.
      options: what it has to be started with.
    """

    name: str
    version: str
    problems: Callable[[Handed], Iterator[str]]
    options: Callable[[Handed], Iterator[str]]


def verdict(engine: Engine, handed: Handed) -> Verdict:
    """Whether an engine loads an adapter as what it is, and why not.

    >>> shapes = {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": (64, 12)}
    >>> shapes["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"] = (22, 64)
    >>> data = {"peft_type": "LORA", "r": 64, "lora_alpha": 64, "target_modules": ["up_proj"]}
    >>> verdict(ENGINES["vllm"], Handed(shapes, data)).options
    ('--max-lora-rank 64',)
    >>> verdict(ENGINES["vllm"], Handed(shapes, data | {"use_dora": True})).problems
    ('use_dora: DoRA is not supported',)
    """
    return Verdict(engine.name, engine.version, tuple(engine.options(handed)), tuple(engine.problems(handed)))


def _no_options(handed: Handed) -> Iterator[str]:
    yield from ()


# PEFT


def _peft_problems(handed: Handed) -> Iterator[str]:
    if "peft_type" not in handed.data:
        yield "adapter_config.json has no peft_type"
    if other := [name for name in handed.shapes if not name.startswith(_PREFIX)]:
        yield f"names without {_PREFIX}, which are passed over with a warning: {listed(other, 2)}"
    yield from _elsewhere(handed)


def _elsewhere(handed: Handed) -> Iterator[str]:
    if handed.elsewhere:
        name, wanted = next(iter(handed.elsewhere.items()))
        yield (
            f"{len(handed.elsewhere):,} weights have other names than in the base, and would be passed over: {name} is "
            f"{wanted} there"
        )


# vLLM

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_DEFAULT_RANK = 16
_VLLM_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_VLLM_REFUSED = {
    "use_dora": "DoRA is not supported",
    "lora_bias": "the bias of a B is not supported",
    "alora_invocation_tokens": "aLoRA is not supported",
    "layer_replication": "layer replication is not supported",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "use_qalora": "QALoRA is not supported",
}
_VLLM_SAVED = ("classifier", "score")
_VLLM_COPIES = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
_VLLM_MOST_VOCABULARY = 258_048
_BOTH = ("embed_tokens", "lm_head")
_VLLM_EMBEDDINGS = {  # class -> embedding_modules
    "LlamaForCausalLM": _BOTH,
    "Qwen3ForCausalLM": _BOTH,
    "Qwen3MoeForCausalLM": _BOTH,
    "Phi3ForCausalLM": _BOTH,
    "Olmo2ForCausalLM": ("embed_tokens",),
    "MistralForCausalLM": (),
    "Qwen2ForCausalLM": (),
    "Gemma2ForCausalLM": (),
    "Gemma3ForCausalLM": (),
}
_VLLM_LANGUAGE = ("model.language_model.", "language_model.model.", "lm_head", "language_model.lm_head")
_VLLM_VISION = {  # class -> how the names of its language model may begin
    "Qwen2VLForConditionalGeneration": (*_VLLM_LANGUAGE, "model.layers.", "model.embed_tokens"),
    "Gemma3ForConditionalGeneration": _VLLM_LANGUAGE,
    "LlavaForConditionalGeneration": _VLLM_LANGUAGE,
}
_VLLM_VISION_PARTS = ("visual", "vision_tower", "multi_modal_projector")
_VLLM_SINGLE_EXPERTS = ("Qwen3MoeForCausalLM",)  # of those known here whose is_3d_moe_weight is False


def _vllm_problems(handed: Handed) -> Iterator[str]:
    data = handed.data
    if missing := [key for key in ("r", "lora_alpha", "target_modules") if key not in data]:
        yield f"adapter_config.json has no {listed(missing)}"
    yield from (f"{key}: {why}" for key, why in _VLLM_REFUSED.items() if data.get(key))
    if data.get("bias", "none") != "none":
        yield f"bias = {shortened(data['bias'])}: biases are not supported"
    saved = data.get("modules_to_save")
    if other := [name for name in (saved if isinstance(saved, list) else ()) if name not in _VLLM_SAVED]:
        yield f"modules_to_save: {listed(other)}: none but {listed(_VLLM_SAVED)} are supported"
    init = data.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _VLLM_INITS:
        yield f"init_lora_weights = {shortened(init)}: an adapter whose base was changed is not supported"
    if (rank := _largest_rank(data)) > _VLLM_RANKS[-1]:
        yield f"rank {rank}: at most {_VLLM_RANKS[-1]} are supported; jlora resize makes one of a lower rank"
    if other := [name for name in handed.shapes if not _vllm_reads(name)]:
        yield f"names that are refused: {listed(other, 2)}"
    yield from _vllm_places(handed)


def _vllm_reads(name: str) -> bool:
    if name.endswith((*_LOW_RANK, *_VLLM_COPIES)):
        return True
    return any(name.endswith(f"{module}.{last}") for module in _VLLM_SAVED for last in ("weight", "bias"))


def _vllm_places(handed: Handed) -> Iterator[str]:
    """What of an adapter the model's class has no place for."""
    modules = handed.modules()
    if handed.architecture in _VLLM_VISION:
        begins = (*_VLLM_VISION[handed.architecture], *_VLLM_VISION_PARTS, *(f"model.{p}" for p in _VLLM_VISION_PARTS))
        if other := [name for name, module in modules.items() if not module.startswith(begins)]:
            wanted = _VLLM_LANGUAGE[0]
            yield f"names that are passed over without an error: {listed(other, 2)}; wanted {wanted} before them"
    else:
        yield from _elsewhere(handed)
    embeddings = _VLLM_EMBEDDINGS.get(handed.architecture)
    for name in _BOTH:
        adapted = [key for key, module in modules.items() if module.rpartition(".")[2] == name]
        if adapted and embeddings is not None and name not in embeddings:
            yield f"{name}: {handed.architecture} takes no adapter of it"
    tables = [handed.shapes[name][-1:] for name in modules if name.endswith(".lora_embedding_A")]
    rows = [size for size in tables if size != (handed.vocabulary,)]
    if handed.vocabulary is not None and rows:
        yield f"an embedding of {listed(rows[0])} rows: the base has {handed.vocabulary}"
    heads = [module for module in modules.values() if module.rpartition(".")[2] == "lm_head"]
    if heads and (handed.vocabulary or 0) > _VLLM_MOST_VOCABULARY:
        yield f"lm_head: a vocabulary of more than {_VLLM_MOST_VOCABULARY:,} is not supported"


def _vllm_options(handed: Handed) -> Iterator[str]:
    rank = _largest_rank(handed.data)
    if rank > _VLLM_DEFAULT_RANK and (allowed := [most for most in _VLLM_RANKS if most >= rank]):
        yield f"--max-lora-rank {allowed[0]}"
    if handed.architecture in _VLLM_SINGLE_EXPERTS and _has_stacked_experts(handed):
        yield "--enable-mixed-moe-lora-format, with is_3d_lora_weight = true in the LoRARequest"
    if any(part in name for name in handed.modules() for part in _VLLM_VISION_PARTS):
        yield "enable_tower_connector_lora"


# SGLang

_LAYER = re.compile(r"layers\.(\d+)\.")
_SGLANG_TARGETS = ("all", "all-linear")
# Of what is joined to one product: what a module cannot be without. A missing k_proj or up_proj is taken for zero.
_SGLANG_JOINED = {"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


def _sglang_problems(handed: Handed) -> Iterator[str]:
    data = handed.data
    if str(data.get("peft_type", "")).lower() != "lora":
        yield "adapter_config.json has no peft_type LORA"
    if missing := [key for key in ("r", "lora_alpha", "target_modules") if key not in data]:
        yield f"adapter_config.json has no {listed(missing)}"
    yield from _sglang_targets(data.get("target_modules"))
    if data.get("use_dora"):
        yield "use_dora: DoRA is not supported"
    if "added_tokens.json" in handed.files:
        yield "added_tokens.json: tokens beyond the base's vocabulary are not supported"
    yield from _sglang_scales(data)
    yield from _sglang_places(handed)


def _sglang_targets(targets: Any) -> Iterator[str]:
    if isinstance(targets, str) and targets not in _SGLANG_TARGETS:
        yield f"target_modules = {shortened(targets)}: wanted a list of names, or {listed(_SGLANG_TARGETS)}"
    if targets is None or targets == []:
        yield "target_modules names no modules"


def _sglang_scales(data: Mapping[str, Any]) -> Iterator[str]:
    """The scaling is lora_alpha / r of the whole file."""
    rank, alpha = data.get("r"), data.get("lora_alpha")
    if data.get("use_rslora") and isinstance(rank, int) and rank > 1 and isinstance(alpha, int | float):
        plain = f"{alpha * rank**0.5:g}"
        yield f"use_rslora is passed over: the scaling would be {alpha} / {rank}; say lora_alpha = {plain} without it"
    if any(value != rank for value in _patterns(data, "rank_pattern")):
        yield "rank_pattern is passed over: jlora resize gives all modules one rank"
    if any(value != alpha for value in _patterns(data, "alpha_pattern")):
        yield "alpha_pattern is passed over: every module would be scaled by lora_alpha / r"


def _sglang_places(handed: Handed) -> Iterator[str]:
    modules = handed.modules()
    if other := [name for name in handed.shapes if name not in modules]:
        yield f"tensors that are neither A nor B have no place: {listed(other, 2)}"
    if _has_stacked_experts(handed):
        yield "experts as parameters (target_parameters) have no place: wanted a tensor for each expert"
    names = set(modules.values())
    if other := [name for name in names if not _LAYER.search(f"{name}.") and name.rpartition(".")[2] not in _BOTH]:
        yield f"names without a number behind layers. are passed over: {listed(sorted(other), 2)}"
    for module, joined in _SGLANG_JOINED.items():
        own = sorted(name for name in names if name.rpartition(".")[2] == module)
        lacking = [name for name in own if f"{name.removesuffix(module)}{joined}" not in names]
        if lacking:
            yield f"{module} without {joined}, which are joined: {listed(lacking, 1)}"
    targets = handed.data.get("target_modules")
    if isinstance(targets, list):
        named = {str(target).rpartition(".")[2] for target in targets}
        for name in _BOTH:
            if name not in named and any(module.rpartition(".")[2] == name for module in names):
                yield f"{name} is passed over: target_modules does not name it"


def _sglang_options(handed: Handed) -> Iterator[str]:
    yield f"--max-lora-rank {_largest_rank(handed.data)}, where it is loaded after the start"


def _largest_rank(data: Mapping[str, Any]) -> int:
    ranks = (data.get("r"), *_patterns(data, "rank_pattern"))
    return max((rank for rank in ranks if isinstance(rank, int)), default=0)


def _patterns(data: Mapping[str, Any], key: str) -> list[Any]:
    """The values of patterns; none where they are no mapping, which is told of where the file is read."""
    found = data.get(key)
    return list(found.values()) if isinstance(found, Mapping) else []


def _has_stacked_experts(handed: Handed) -> bool:
    return any(module.endswith((".experts", ".experts.base_layer")) for module in handed.modules().values())


ENGINES = {
    "peft": Engine("PEFT", "0.21.2", _peft_problems, _no_options),
    "vllm": Engine("vLLM", "0.33.0", _vllm_problems, _vllm_options),
    "sglang": Engine("SGLang", "0.5.23", _sglang_problems, _sglang_options),
}
"""By the name that `jlora verify --engine` takes."""
