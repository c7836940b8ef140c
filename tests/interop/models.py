"""Tiny random models of transformers and torch, adapted by PEFT: what the tests of the files compare with."""

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
load_file = pytest.importorskip("safetensors.torch").load_file
torch.set_num_threads(1)  # of models so small, more threads wait for each other

LLAMA = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 22,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


class Net(torch.nn.Module):
    """A layer of each kind, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(13, 7)
        self.conv1 = torch.nn.Conv1d(7, 5, 2)
        self.conv2 = torch.nn.Conv2d(1, 3, (2, 3))
        self.conv3 = torch.nn.Conv3d(1, 5, (1, 2, 3), stride=(1, 2, 1))
        self.linear = torch.nn.Linear(6, 11)

    def forward(self, input_ids: Any) -> Any:
        x = self.conv1(self.embed(input_ids).transpose(1, 2))
        x = self.conv2(x[:, None])
        x = self.conv3(x[:, None])
        return self.linear(x.flatten(1)[:, :6])


def llama(**changes: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | changes))


def qwen3(**changes: Any) -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLAMA | changes))


def qwen3_moe(**changes: Any) -> Any:
    experts = {"moe_intermediate_size": 20, "num_experts": 3, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**LLAMA | experts | changes))


def mixtral() -> Any:
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 20}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**LLAMA | experts))


def gemma3(**changes: Any) -> Any:
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**LLAMA | changes))


def gpt2() -> Any:
    sizes = {"vocab_size": 37, "n_embd": 14, "n_inner": 22, "n_layer": 2, "n_head": 2, "n_positions": 16}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **tokens, tie_word_embeddings=False))


def bert() -> Any:
    sizes = {"vocab_size": 37, "hidden_size": 14, "intermediate_size": 22, "num_hidden_layers": 2}
    config = transformers.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=16, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def vit() -> Any:
    sizes = {"hidden_size": 14, "intermediate_size": 22, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and how PEFT adapts it; `dtype` of the model and of its adapters, `save` for `save_pretrained`."""

    model: Callable[..., Any]
    fields: dict[str, Any]
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    save: dict[str, Any] = dataclasses.field(default_factory=dict)
    resized: int | None = None


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CONVS = ["embed", "conv1", "conv2", "conv3", "linear"]
BIASED = {"attention_bias": True}
ATTENTION = ["q_proj", "v_proj"]
EMBEDDINGS = {"save_embedding_layers": True}

CASES = {
    "llama": Case(
        llama,
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 3, r"model\.layers\.1\.mlp\.(up|gate)_proj": 5},
            "alpha_pattern": {"k_proj": 7, "layers.0.self_attn.q_proj": 1.5},
            "use_rslora": True,
            "modules_to_save": ["lm_head"],
        },
    ),
    "llama regex": Case(llama, {"target_modules": r".*\.1\..*(q|down)_proj", "lora_dropout": 0.1}),
    "llama dora": Case(llama, {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "use_dora": True}, BIASED),
    "llama lora_bias": Case(
        llama, {"target_modules": ["q_proj", "k_proj"], "lora_bias": True, "rank_pattern": {"k_proj": 3}}, BIASED
    ),
    "llama bias all": Case(llama, {"target_modules": ATTENTION, "bias": "all"}, BIASED | {"mlp_bias": True}),
    "llama bias lora_only": Case(llama, {"target_modules": ATTENTION, "bias": "lora_only"}, BIASED),
    "llama bf16": Case(llama, {"target_modules": ATTENTION, "use_rslora": True}, dtype="bfloat16"),
    "llama fp16": Case(llama, {"target_modules": [*ATTENTION, "embed_tokens"]}, dtype="float16"),
    "llama embeddings": Case(llama, {"target_modules": ["embed_tokens", "lm_head"]}, save=EMBEDDINGS),
    "llama resized": Case(llama, {"target_modules": ATTENTION}, save=EMBEDDINGS, resized=41),
    "llama norms": Case(llama, {"target_modules": ATTENTION, "modules_to_save": ["input_layernorm", "embed_tokens"]}),
    "qwen3": Case(qwen3, {"target_modules": ["q_proj", "o_proj", "gate_proj"], "alpha_pattern": {"o_proj": 3}}),
    "qwen3 moe": Case(
        qwen3_moe,
        {
            "target_modules": ["q_proj"],
            "target_parameters": EXPERTS,
            "rank_pattern": {"experts.down_proj": 3},
            "alpha_pattern": {"experts.gate_up_proj": 7},
        },
    ),
    "qwen3 moe one": Case(qwen3_moe, {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}),
    "mixtral": Case(mixtral, {"target_modules": ["k_proj"], "target_parameters": EXPERTS}),
    "gpt2": Case(
        gpt2, {"target_modules": ["c_attn", "c_fc", "wte"], "fan_in_fan_out": True, "rank_pattern": {"c_fc": 3}}
    ),
    "gpt2 dora": Case(gpt2, {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "bert": Case(bert, {"target_modules": ["query", "value", "word_embeddings"], "task_type": "SEQ_CLS"}),
    "vit": Case(vit, {"target_modules": ["q_proj", "v_proj", "projection"], "modules_to_save": ["classifier"]}),
    "conv": Case(Net, {"target_modules": CONVS, "rank_pattern": {"conv2": 1}, "use_rslora": True}),
    "conv dora": Case(Net, {"target_modules": CONVS, "use_dora": True, "alpha_pattern": {"conv3": 3}}),
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what torch, transformers and PEFT warn of when they are used as they say they should be."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category)
        for message in (
            "Setting `save_embedding_layers` to `True`",
            "Could not identify embedding layer",
            "Model has `tie_word_embeddings",
            "fan_in_fan_out is set to",
            r"Adapter 'default': \d+ LoRA tensor\(s\) have invalid shape: .*lora_B.bias",
            "The following (rank|alpha)_pattern keys did not match any targeted module",  # of parameters they do
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


def base_of(case: Case, seed: int = 0) -> Any:
    """The model of a case with random numbers in it; the same for the same seed."""
    torch.manual_seed(seed)
    with quiet():
        model = case.model(**case.changes).eval()
        if case.resized:
            model.resize_token_embeddings(case.resized)
    randomized(model)
    return model.to(getattr(torch, case.dtype))


def adapted(case: Case) -> tuple[dict[str, np.ndarray], Any]:
    """The state dict of a case's base, and the model that PEFT made of it, whatever is trained random."""
    model = base_of(case)
    base = state_of(model)
    fields = {"r": 2, "lora_alpha": 5, "init_lora_weights": False, **case.fields}
    with quiet():
        live = peft.get_peft_model(model, peft.LoraConfig(**fields), autocast_adapter_dtype=False).eval()
        randomized(live, trained=True)
    return base, live


def randomized(model: Any, *, trained: bool = False) -> None:
    """Other numbers in a model, or in what of it is trained; magnitudes stay positive."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if trained and "magnitude" in name:
                value.mul_(1 + 0.3 * torch.rand_like(value))
            elif value.requires_grad or not trained:
                value.copy_(0.4 * torch.randn(value.shape))


def save(case: Case, live: Any, folder: Path) -> Path:
    """The folder that PEFT writes."""
    with quiet():
        live.save_pretrained(str(folder), **case.save)
    return folder


def merged_by_peft(live: Any) -> dict[str, np.ndarray]:
    """The state dict in float64 after PEFT merged its adapters in float64."""
    with quiet():
        return state_of(live.double().merge_and_unload())


def state_of(model: Any) -> dict[str, np.ndarray]:
    """The state dict in float64."""
    return {name: value.detach().double().numpy().copy() for name, value in model.state_dict().items()}


def inputs_of(model: Any) -> dict[str, Any]:
    """Something to call the model with."""
    rng = torch.Generator().manual_seed(1)
    if "pixel_values" in getattr(model, "main_input_name", ""):
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=rng)}
    return {"input_ids": torch.randint(3, 13, (2, 9), generator=rng)}


def logits_of(model: Any) -> np.ndarray:
    """What the model says to `inputs_of` it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad(), quiet():
        found = model(**inputs_of(base))
    return getattr(found, "logits", getattr(found, "last_hidden_state", found)).float().numpy()


def nested(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict taken apart at its dots."""
    tree: dict[str, Any] = {}
    for name, value in state.items():
        *modules, last = name.split(".")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[last] = value
    return tree
