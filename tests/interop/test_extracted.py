"""What is extracted from a fine-tuned checkpoint, in PEFT: the model of transformers says what the tuned one does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora.cli import main
from jlora.disk import Checkpoint
from tests.checkpoints.make import write_checkpoint
from tests.interop.models import (
    LLAMA,
    Case,
    base_of,
    bert,
    gemma3,
    gpt2,
    llama,
    load_file,
    logits_of,
    mixtral,
    peft,
    quiet,
    torch,
    transformers,
    vit,
)

SMALL = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = LLAMA | {"hidden_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
IMAGE = SMALL | {"image_size": 8, "patch_size": 4}


def gpt_oss() -> Any:
    # Square experts, on which nothing but the model says which axis is which.
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 12, "hidden_size": 12}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**TEXT | experts))


def gemma3_images() -> Any:
    config = transformers.Gemma3Config(
        text_config=TEXT | {"model_type": "gemma3_text"},
        vision_config=IMAGE | {"model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        image_token_index=5,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def dinov2() -> Any:
    return transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**IMAGE, num_labels=3))


def qwen2_vl() -> Any:
    vision = {"depth": 1, "embed_dim": 8, "hidden_size": 12, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    text = TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]}}
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    )


def llava() -> Any:
    config = transformers.LlavaConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=IMAGE | {"model_type": "clip_vision_model"},
        image_token_index=5,
    )
    return transformers.LlavaForConditionalGeneration(config)


def t5() -> Any:
    sizes = {"vocab_size": 37, "d_model": 12, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def whisper() -> Any:
    sizes = {"vocab_size": 37, "d_model": 12, "num_mel_bins": 5, "max_source_positions": 8, "max_target_positions": 16}
    heads = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**sizes, **heads, **tokens, encoder_ffn_dim=20, decoder_ffn_dim=20)
    )


def resnet() -> Any:
    sizes = {"embedding_size": 5, "hidden_sizes": [7, 11], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))


def mobilenet() -> Any:
    sizes = {"num_labels": 3, "depth_multiplier": 0.3, "min_depth": 3, "tf_padding": False}
    return transformers.MobileNetV1ForImageClassification(transformers.MobileNetV1Config(**sizes))


def regnet() -> Any:
    """Of its convolutions one of three has groups of several channels."""
    sizes = {"embedding_size": 6, "hidden_sizes": [8, 12], "depths": [1, 2], "groups_width": 4, "num_labels": 3}
    return transformers.RegNetForImageClassification(transformers.RegNetConfig(**sizes))


def squeezebert() -> Any:
    sizes = SMALL | {"vocab_size": 37, "embedding_size": 12, "max_position_embeddings": 16, "num_labels": 3}
    return transformers.SqueezeBertForSequenceClassification(transformers.SqueezeBertConfig(**sizes))


def bart() -> Any:
    sizes = {"vocab_size": 37, "d_model": 12, "max_position_embeddings": 16, "pad_token_id": 0, "eos_token_id": 2}
    parts = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(**sizes, **parts, encoder_ffn_dim=20, decoder_ffn_dim=20)
    )


def albert() -> Any:
    """Its layers are one, before which a Linear is called an embedding."""
    sizes = SMALL | {"vocab_size": 37, "embedding_size": 6, "max_position_embeddings": 16, "num_labels": 3}
    return transformers.AlbertForSequenceClassification(transformers.AlbertConfig(**sizes))


def mamba() -> Any:
    sizes = {"vocab_size": 37, "hidden_size": 12, "state_size": 4, "num_hidden_layers": 2, "conv_kernel": 3}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))


# The model, and PEFT's task.
FAMILIES: dict[str, tuple[Callable[[], Any], str | None]] = {
    "llama": (lambda: llama(tie_word_embeddings=False), "CAUSAL_LM"),
    "llama tied": (lambda: llama(tie_word_embeddings=True), "CAUSAL_LM"),
    "gpt2": (gpt2, "CAUSAL_LM"),
    "gpt_oss": (gpt_oss, "CAUSAL_LM"),
    "gemma3 text": (gemma3, "CAUSAL_LM"),
    "gemma3": (gemma3_images, None),
    "dinov2": (dinov2, None),
    "qwen2_vl": (qwen2_vl, None),
    "llava": (llava, None),
    "mixtral": (mixtral, "CAUSAL_LM"),
    "bert": (bert, None),  # whose head is adapted, which PEFT would save as a whole
    "t5": (t5, "SEQ_2_SEQ_LM"),
    "whisper": (whisper, None),
    "vit": (vit, None),
    "resnet": (resnet, None),
    "mobilenet": (mobilenet, None),  # whose convolutions are grouped
    "regnet": (regnet, None),
    "squeezebert": (squeezebert, None),
    "bart": (bart, "SEQ_2_SEQ_LM"),
    "albert": (albert, None),
    "mamba": (mamba, "CAUSAL_LM"),  # of which PEFT refuses some modules
}


def logits(model: Any) -> np.ndarray:
    rng = torch.Generator().manual_seed(1)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    tokens = torch.randint(6, 13, (2, 9), generator=rng)
    given: dict[str, Any] = {"input_ids": tokens}
    if base.main_input_name == "pixel_values":
        given = {"pixel_values": torch.randn(2, 3, 8, 8, generator=rng)}
    elif base.main_input_name == "input_features":
        given = {"input_features": torch.randn(2, 5, 16, generator=rng), "decoder_input_ids": tokens}
    elif base.config.is_encoder_decoder:
        given["decoder_input_ids"] = tokens
    elif base.config.model_type in ("gemma3", "llava"):
        tokens[:, :4] = 5  # the image's
        given["pixel_values"] = torch.randn(2, 3, 8, 8, generator=rng)
    with torch.no_grad(), quiet():
        return model(**given).logits.numpy()


def tuned(model: Any) -> None:
    """Other numbers in what PEFT can change: its convolutions are none for Whisper, which asks for their strides."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            is_matrix = value.ndim > 1 and name.endswith((".weight", "_proj", "projection_weight"))
            if value.requires_grad and is_matrix and ".conv" not in name:
                value.add_(0.2 * torch.randn(value.shape))


def check_in_peft(
    base: Any,
    tune: Callable[[Any], None],
    rank: int,
    says: Callable[[Any], np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """PEFT loads what is extracted of a tuned model on the model, and it says what the tuned one does."""
    with quiet():
        base.save_pretrained(str(tmp_path / "base"))
        before = says(base)
        tune(base)
        wanted = says(base)
        base.save_pretrained(str(tmp_path / "tuned"))
    command = ["extract", str(tmp_path / "base"), str(tmp_path / "tuned"), "--out", str(tmp_path / "adapter")]
    assert main([*command, "--format", "peft", "--rank", str(rank)]) == 0, capsys.readouterr().err
    with quiet():
        model = type(base).from_pretrained(str(tmp_path / "base")).eval()
        live = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
    assert np.abs(wanted - before).max() > 1e-3 * max(1, np.abs(before).max())
    np.testing.assert_allclose(says(live), wanted, rtol=0, atol=1e-4 * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_extracted_is_the_tuned_model_in_peft(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, task = FAMILIES[family]
    check_in_peft(base_of(Case(make, {})), tuned, 512, logits, tmp_path, capsys)
    data = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (data["base_model_name_or_path"], data["task_type"]) == (str(tmp_path / "base"), task)


def fully_tuned(model: Any) -> None:
    """Other numbers in all that a full fine-tune changes: biases, norms, tokens, the statistics of a BatchNorm."""
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.2 * torch.randn(value.shape))
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand(buffer.shape))
            elif name.endswith("num_batches_tracked"):
                buffer.fill_(2**24 + 1)


@pytest.mark.parametrize(
    ("make", "ends"),
    [
        (bert, ("query.weight", "LayerNorm.bias")),  # of the tasks in which PEFT asks for the head as a whole
        (bert, ("query.weight", "classifier.bias")),
        (vit, ("q_proj.weight", "layernorm_before.weight")),  # and not the bias beside it
        (lambda: base_of(Case(llama, {})).model, ("q_proj.weight", "norm.weight")),  # one name that ends another
    ],
)
def test_a_part_of_a_model_that_changed_is_the_tuned_one_in_peft(
    make: Callable[[], Any], ends: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def tune(base: Any) -> None:
        with torch.no_grad():
            for name, value in base.named_parameters():
                if name.endswith(ends):
                    value.add_(0.3 * torch.randn(value.shape))

    check_in_peft(base_of(Case(make, {})), tune, 64, logits_of, tmp_path, capsys)


@pytest.mark.parametrize(
    "ends", [("norm.weight",), (".bias",), ("norm.weight", ".bias")], ids=["norms", "biases", "both"]
)
def test_what_has_no_adapter_at_all_is_the_tuned_model_in_peft(
    ends: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def tune(base: Any) -> None:
        with torch.no_grad():
            for name, value in base.named_parameters():
                if name.endswith(ends):
                    value.add_(0.3 * torch.randn(value.shape))

    make = Case(lambda: llama(attention_bias=True, tie_word_embeddings=False), {})
    check_in_peft(base_of(make), tune, 64, logits_of, tmp_path, capsys)
    told = capsys.readouterr().out
    assert "carried whole: model/layers/0/" in told
    assert "error left" not in told
    folders = [str(tmp_path / name) for name in ("base", "adapter", "merged", "tuned", "own")]
    assert main(["merge", *folders[:2], "--out", folders[2]]) == 0
    assert main(["diff", *folders[2:4]]) == 0
    assert main(["extract", folders[0], folders[3], "--out", folders[4]]) == 0
    assert main(["diff", folders[1], folders[4]]) == 0
    assert main(["extract", folders[0], folders[3], "--out", str(tmp_path / "x"), "--adapters-only"]) == 2
    assert "what did has no adapter: model/layers/0/" in capsys.readouterr().err


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_fine_tune_is_the_tuned_model_in_peft(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_in_peft(base_of(Case(FAMILIES[family][0], {})), fully_tuned, 512, logits, tmp_path, capsys)


WRITTEN = [*((family, "peft") for family in FAMILIES), ("llama", "own"), ("vit", "own"), ("resnet", "own")]


@pytest.mark.parametrize(("family", "form"), WRITTEN)
def test_merging_finds_the_tensors_of_what_was_extracted(
    family: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_of(Case(FAMILIES[family][0], {}))
    with quiet():
        base.save_pretrained(str(tmp_path / "base"))
        fully_tuned(base)
        base.save_pretrained(str(tmp_path / "tuned"))
    folders = [str(tmp_path / name) for name in ("base", "tuned", "adapter", "merged")]
    options = ["--format", form, "--rank", "512"]
    assert main(["extract", *folders[:2], "--out", folders[2], *options]) == 0, capsys.readouterr().err
    assert main(["merge", folders[0], folders[2], "--out", folders[3]]) == 0, capsys.readouterr().err
    merged, wanted = Checkpoint(folders[3]), Checkpoint(folders[1])
    assert merged.entries.keys() == wanted.entries.keys()
    for name in wanted.entries:
        np.testing.assert_allclose(merged.read(name), wanted.read(name), rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_grew_is_carried_whole(
    tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_of(Case(llama, {}, {"tie_word_embeddings": tied}))
    with quiet():
        base.save_pretrained(str(tmp_path / "base"))
        base.resize_token_embeddings(41)
        fully_tuned(base)
        base.save_pretrained(str(tmp_path / "tuned"))
    command = ["extract", str(tmp_path / "base"), str(tmp_path / "tuned"), "--out", str(tmp_path / "adapter")]
    assert main([*command, "--format", "peft"]) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    carried = next(line for line in told.splitlines() if line.startswith("7 carried whole: "))
    for name in ("lm_head/weight", "model/embed_tokens/weight", "model/layers/0/input_layernorm/weight"):
        assert name in carried
    assert "not in the adapters" not in told
    with quiet():
        model = type(base).from_pretrained(str(tmp_path / "base")).eval()
        model.resize_token_embeddings(41)
        live = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
    tokens = torch.tensor([[5, 40, 37, 39, 2, 38]])
    with torch.no_grad():
        wanted, found = base(tokens).logits.numpy(), live(tokens).logits.numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    is_tied = live.get_output_embeddings().weight is live.get_input_embeddings().weight
    assert is_tied == tied
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"]
    assert {"lm_head", "model.embed_tokens"}.isdisjoint(saved) == tied


def test_what_is_not_carried_is_told_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without whole tensors the adapters alone are in the file, and PEFT loads it all the same."""
    base = base_of(Case(llama, {}, {"tie_word_embeddings": False, "attention_bias": True}))
    with quiet():
        base.save_pretrained(str(tmp_path / "base"))
        base.resize_token_embeddings(41)
        fully_tuned(base)
        base.save_pretrained(str(tmp_path / "tuned"))
    folders = [str(tmp_path / name) for name in ("base", "tuned", "adapter")]
    options = ["--format", "peft", "--adapters-only", "--exclude", "**/up_proj", "--exclude", "**/norm"]
    command = ["extract", *folders[:2], "--out", folders[2], *options]
    assert main(command) == 2
    message = "lm_head/weight: shape (37, 16) in base, (41, 16) in tuned"
    assert message in capsys.readouterr().err
    assert main([*command, "--exclude", "lm_head", "--exclude", "**/embed_tokens"]) == 0
    told = capsys.readouterr().out
    assert "carried whole" not in told
    for reason, path in (
        ("of another shape", "lm_head/weight"),
        ("no weight of known axes", "model/layers/0/input_layernorm/weight"),
        ("not targeted", "model/layers/0/mlp/up_proj/weight"),
    ):
        assert path in told.partition(f"not in the adapters ({reason}): ")[2].splitlines()[0]
    with quiet():
        peft.PeftModel.from_pretrained(type(base).from_pretrained(folders[0]), folders[2])
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert names
    assert all(".lora_" in name for name in names)


def test_tensors_that_transformers_converts_are_left_out_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One tensor on the disk is three in memory; under its own name PEFT would find nothing."""
    rng = np.random.default_rng(0)
    layer = "nomic_bert.encoder.layers.0"
    shapes = {f"{layer}.attn.Wqkv.weight": (21, 7), f"{layer}.mlp.fc2.weight": (7, 11), f"{layer}.norm1.weight": (7,)}
    config = {"model_type": "nomic_bert", "architectures": ["NomicBertForMaskedLM"]}
    for name in ("base", "tuned"):
        tensors = {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}
        write_checkpoint(tmp_path / name, tensors, 1, **config)
    folders = [str(tmp_path / name) for name in ("base", "tuned", "adapter")]
    assert main(["extract", *folders[:2], "--out", folders[2], "--format", "peft"]) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    reason = "other numbers in memory, in a way that is not known here"
    assert f"1 changed, but not adapted, and so not in the adapters ({reason}): " in told
    assert "Wqkv/weight" in told.partition(reason)[2]
    assert not any("qkv" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
